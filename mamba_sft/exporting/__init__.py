"""A run as files that other programs load: GGUF, Ollama, a checkpoint for the hub.

Read `export_run` (the entry), `request` (what is asked for and answered), `full_model` (the model that goes
out), `texts` and `logits` (what files are measured on and against); then `gguf/`, `hub/` or `ollama/`, each
by itself. `hub` works without the gguf extra.
"""
