"""GGUF files for llama.cpp.

Read `export` (the two exports: a model, an adapter), `files` (planned, written, checked, named), `types` (the
quantizations) with `names` (as people write them), `tensors` and `metadata` (what a file holds), `writing`,
`lora`, `importance`, `timing`; then the check: `verifying`, `probe` (a process of its own) and `llama_cpp`
(all that talks to native code).
`installed` says whether the gguf extra is here.
"""
