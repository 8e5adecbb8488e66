"""The base model: its files, its weights with our mixer, its tokenizer and template, its adapter.

Read `checkpoint` (find a base and read what is in it), `tensor_headers` (what a file says it holds),
`tensor_files` (safetensors, a few rows at a time) and `checksums`; `shape` (sizes without weights),
`quantization` (what is stored in 4 or 8 bits) and `loading` (weights into memory); `chat_template`,
`special_tokens` and `literal_text` (what makes a base able to chat; `chatml.jinja` is the template),
`template_rendering` and `template_process` (templates of others, in bounds), `portable` (what other tools
read of all that); `adapter` (where LoRA goes, and the proof that it learns), `adapter_config` (what other
people's say of themselves), `adapter_card` (how others load ours), `trained_rows` (rows of the vocabulary
beside it), `base_facts` (its base), `base_view` (the base under an adapter as a model of its own) and
`shards` (tensors in parts); `full_weights` (training without an adapter, and the checkpoint it leaves);
`warming_up` (what the first call would do) and `compiling` (the step of one token, compiled).
"""
