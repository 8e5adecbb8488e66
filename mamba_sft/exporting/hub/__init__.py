"""A checkpoint for the hub, or a directory: weights, model card, upload.

Read `export` (the flow), `checkpoint` (files as `transformers` loads them), `card` (what the model card
says), `push` (the upload).
"""
