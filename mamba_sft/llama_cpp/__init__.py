"""llama.cpp, as the xllamacpp wheel carries it: quantizing rows, loading GGUF files, talking to one.

Read `installed` (is the gguf extra here), `library` (all that talks to native code), `reading` (what a file
says of its model and tokenizer), then `worker` (a process of its own that runs one file) and `process` (the
side of it that asks). llama.cpp ends the whole process on files it takes exception to, and what goes wrong in
native code must not take a conversation with it.
"""
