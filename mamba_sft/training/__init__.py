"""From a recipe to a run directory.

    first_checks: what files and names tell, before torch is loaded
    preparation:  data, settings, memory and disk: all checks that need no weights
    fine_tuning:  load, attach  ->  answers before  ->  train  ->  answers after  ->  save
                                    (sample_answers)     |
                                       trainer (TRL's, as configured)
                                         +- arguments      TRL's configuration, from the recipe
                                         +- step_loader    all rows of an optimizer step at once
                                         +- figures        loss and metrics, left on the device
                                         |    fused_head     log-probabilities of trained positions
                                         +- steps          ours, when rows are streamed or split:
                                         |    streaming      exact gradients, a chunk at a time
                                         |    out_of_memory  a micro-batch in parts
                                         +- largest_residual  what float16 may not hold
                                         +- activations    what is kept for the backward
                                         +- callbacks      metrics on disk, Ctrl-C, an adapter that learns
                                         +- saving         what a full disk does not take
                                         +- sharding       FSDP: each process holds a part of the model
                                         +- zero           ZeRO-2: the whole model, a part of the optimizer
                                         +- dealing        sample prompts, some to each process
                                         +- resumable      writes resume points, and goes on from them
                                         |    resume_points  directories written whole, known by their hashes
                                         +- bad_steps      a loss or gradient that is no number
                                         +- spikes         steps far outside of their course, and their rows
                                         +- counts         tokens, losses and time of all sessions
                                         +- pace           tokens a second, memory, time a step
                                         +- live_report, step_samples    told while it runs
                                         +- random_state, resuming, data_record (are the rows the same)

`starting` finds the adapter that a run goes on from, where it starts from one; `overwriting` says what a new
run may take the place of; `keeping` holds a trained adapter in memory until a disk takes it;
`launching` starts the processes of a run on many GPUs, and says what ended them.

Read `preparation` and `fine_tuning` first, then `trainer`, then what it uses.
"""
