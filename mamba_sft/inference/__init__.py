"""A model that computes answers: one at a time, in a batch, in a conversation; and a loss on given rows.

Read `sampling` (how the next token is chosen), `generation` (prompts to answers, state carried) with
`next_token` (the step of one, recorded on a GPU), `state_rows` (states of a batch, taken apart and put
together), `prefixes` (beginnings that prompts share, read once) and `answer_text` (ids to text, stop
strings), `scoring` (loss on held-out rows) and `evaluating` (dropout off meanwhile); `request`, `prompt_rows`
and `model_places` (what is asked for, and of which model),
`chat_model` (a model with all that talking needs, from such a place), `gguf_model` (the same of a GGUF file),
`sessions` (conversations with one model, or with tuned and base) with `unread` (what of one is still to be
read), `repetition` (answers that go round in a circle) and `saved_chats` (a conversation in a file),
`answering` (what the verbs `generate` and `chat` do), `answer` and `answer_file` (where answers go, as they
come) and `unfinished` (gone on with later, by the same model: `fingerprints`).
"""
