"""Learning-rate schedules: the recipe's names, and what they mean to the trainer.

`wsd` (warm-up, stable, decay) is what Falcon-Mamba was pre-trained with (arXiv 2410.05355): the rate stays
at its peak and falls only in the last part of the run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mamba_sft.recipe.recipe import Recipe

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


def count_steps(recipe: Recipe, rows: int, processes: int) -> int:
    """Returns the optimizer steps that `rows` training rows give under the recipe's batch size and epochs."""
    if recipe.train.max_steps > 0:
        return recipe.train.max_steps
    batches = math.ceil(rows / (recipe.train.per_device_train_batch_size * processes))
    return math.ceil(
        recipe.train.num_train_epochs * math.ceil(batches / recipe.train.gradient_accumulation_steps)
    )
