"""The command line. The only room that exits, and with `notebook` the only one that prints or asks.

Read `app` (the verbs, errors and exit codes) and `console` (where output goes, what verbs share), then any
verb, one file each: `train` `data` `plan` `merge` `export` `chat` `generate` `doctor` `bench` `recipes`
`report` `evaluate` (called `eval`).

    plan       plan_plot    the course of a run, drawn    plan_many     what is said of many GPUs
    data       preview      the rows and counts
    train      progress     the bars                      launched      what one of many processes tells
               unsaved      where else an adapter may go
    generate   answers      counted, printed in order
    chat       terminal     the loop                      typed_lines   editing, Tab, earlier lines
               columns      answers side by side          chat_commands what begins with `/`
    bench      bench_train  bench_generate                measured      what the two share
               length_plot  figures over lengths
    any        help         what `-h` prints              completing    what a shell offers after a Tab
               printable    text of others, harmless      lines         what must not wrap
               hub_reach    is there a network            output_files  results, written whole

Verbs import what they need when they run, so that `--help` never loads torch.
"""
