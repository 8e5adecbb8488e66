"""The command line: one file a verb. The only room that prints, asks or exits.

Read `app` (the verbs, errors and exit codes), `console` (where output goes), then any verb.
Verbs import what they need when they run, so that `--help` never loads torch.
"""
