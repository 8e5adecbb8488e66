"""GGUF files for llama.cpp.

Read `export` (the two exports: a model, an adapter), `files` (planned, written, checked, named), `types` (the
quantizations) with `names` (as people write them), `tensors` and `metadata` (what a file holds), `writing`,
`lora`, `importance`, `timing`; then the check: `verifying` and `probe` (a process of its own). All that talks
to native code is in the room `llama_cpp`.
"""
