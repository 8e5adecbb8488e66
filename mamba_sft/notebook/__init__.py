"""What `from mamba_sft import ...` gives, and how it shows in a notebook: Jupyter, Colab, Kaggle, VS Code.

Read `verbs` (the functions: each does what the command of its name does), `cell` (are we in a notebook,
our messages in its output, outputs that change), `arguments` (those of a wrong kind) and `letting_go` (no
verb leaves a model in memory). Then `markup` (escaped HTML that reads in
light and dark, and the same as text) and `views` (what each result shows); `token_rows` (rows and their
mask), `answers` (answers and samples beside each other), `scored` (an evaluation), `plots` (the loss),
`pages` (a report in a frame); `live` (a run, while it trains) and `stages` (one bar for the rest);
`chatting` (the widget, or a loop without one).
Besides `cli` the only room that prints or asks, and that only in a notebook or for `chat`.
"""
