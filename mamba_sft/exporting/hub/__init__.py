"""What is published on the Hugging Face hub: a checkpoint with its model card, and GGUF files with theirs.

Read `export` (the flow), `checkpoint` (files), `card` (facts for `card.md.jinja`), `push` (what is sent and
what is there) and `hub_errors` (what the hub refuses, in a sentence).
"""
