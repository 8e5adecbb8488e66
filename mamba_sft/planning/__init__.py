"""What a run will take, before anything is loaded: memory, time, disk, and whether it fits.

Read `environment` (this machine), `gpus` (the GPUs people have), `schedule` (the learning rate of each step),
`extent` (rows to steps, and whether they are too few), `memory` (bytes at the peak), `speed` (tokens per
second), `storage` (what a run writes, and whether there is room), `plan` (all of it for one recipe, with what
to change), `fitting` (the refusal of what cannot fit), `communication` and `many` (the same on many GPUs:
what they send, and what each holds).
"""
