"""What Ollama needs beside a GGUF file: `modelfile`, and `go_template`, the chat template in Go's syntax."""
