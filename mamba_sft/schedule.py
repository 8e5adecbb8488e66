"""Learning-rate schedules: the recipe's names, and what they mean to the trainer.

`wsd` (warm-up, stable, decay) is what Falcon-Mamba was pre-trained with (arXiv 2410.05355): the rate stays
at its peak and falls only in the last part of the run.
"""

from __future__ import annotations

DECAY_SHARE = 0.2
"""Share of the run that `wsd` spends decaying (Hägele et al., arXiv 2405.18392, find 10-20% enough)."""

TRAINER_NAMES = {
    "wsd": "warmup_stable_decay",
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}


def scheduler_arguments(name: str, num_training_steps: int) -> dict[str, float | str]:
    """Returns the trainer's `lr_scheduler_kwargs` for a schedule of `num_training_steps` optimizer steps."""
    if name != "wsd":
        return {}
    return {"num_decay_steps": max(1, round(DECAY_SHARE * num_training_steps)), "decay_type": "1-sqrt"}
