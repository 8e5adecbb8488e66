"""What a run will take, before anything is loaded: memory, time, disk, and whether it fits.

Read `environment` (this machine), `gpu_names` and `gpus` (the GPUs people have), `course` (which rows each
step takes), `mixture` (the same where sources are mixed), `schedule` (the learning rate of each step),
`extent` (rows to steps, and whether they are too few), `settling` (all that follows from prepared rows),
`curves` (all of that over the tokens, to be drawn), `memory` (bytes at the peak), `speed` (tokens per
second), `storage` (what a run writes, and whether there is room), `plan` (all of it for one recipe, with what
to change), `fitting` (the refusal of what cannot fit), `communication`, `sharing` and `many` (the same
on many GPUs: what they send, and what each holds).
"""
