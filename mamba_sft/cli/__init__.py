"""The command line. The only room that prints, asks or exits.

Read `app` (the verbs, errors and exit codes) and `console` (where output goes, what verbs share), then any
verb, one file each: `train` `data` `plan` `merge` `export` `chat` `generate` `doctor` `bench` `recipes`
`report` `evaluate` (called `eval`).
`plan_plot` draws the course of a run, `help` is what `-h` prints, `completing` what the shell offers after
a Tab. `printable` is how text of others is shown, `progress` draws the bars, `answers` counts answers and
prints them in order, `preview` the rows and counts of `data`, `plan_many` what `plan` says of many GPUs,
`lines` what must not wrap, `terminal` is the loop behind `chat`, with `typed_lines` (editing, Tab, earlier
lines), `chat_commands` and `columns` (side by side), `unsaved` asks where else an adapter may go, `launched`
is what one of many processes tells the one that started it.
Verbs import what they need when they run, so that `--help` never loads torch.
"""
