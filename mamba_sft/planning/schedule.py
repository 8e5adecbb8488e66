"""Learning-rate schedules: the recipe's names, what they mean to the trainer, and the rate of each step.

`wsd` (warm-up, stable, decay) is what Falcon-Mamba was pre-trained with (arXiv 2410.05355): the rate stays
at its peak and falls only in the last part of the run. After the warm-up every schedule is that of
`transformers`. The warm-up is ours: theirs begins at a rate of 0, which makes the first step for nothing, and
a run of one step too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

DECAY_SHARE = 0.2
"""Share of the run that `wsd` spends decaying (Hägele et al., arXiv 2405.18392, find 10-20% enough)."""

TRAINER_NAMES = {
    "wsd": "warmup_stable_decay",
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}


def scheduler_arguments(name: str, steps: int, warmup: int = 0) -> dict[str, float | str]:
    """Returns the `scheduler_specific_kwargs` of `transformers` for a schedule of `steps` optimizer steps."""
    if name != TRAINER_NAMES["wsd"]:
        return {}
    decay = max(1, round(DECAY_SHARE * steps))
    return {"num_decay_steps": min(decay, max(1, steps - warmup)), "decay_type": "1-sqrt"}


def warmup_count(warmup_steps: float, steps: int) -> int:
    """Returns the steps that `train.warmup_steps`, a number or a share, means in a run of `steps`."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * steps)


def make_scheduler(name: str, optimizer: Optimizer, *, warmup: int, steps: int) -> Any:
    """Returns a schedule of `transformers` whose rate is above 0 at the first step and at the last.

    Of `warmup` steps, step s (from 0) has (s + 1) / (warmup + 1) of the peak; the one after them has all of
    it. A schedule of `transformers` that is no function of the step, such as `reduce_lr_on_plateau`, has no
    warm-up there either and is returned as it is.

    Args:
        name: As `transformers` calls it.
        optimizer: Whose rate is set.
        warmup: Steps of the warm-up.
        steps: Optimizer steps of the whole run.
    """
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    left = max(1, steps - warmup)
    arguments = scheduler_arguments(name, steps, warmup)
    made = get_scheduler(name, optimizer, 0, left, scheduler_specific_kwargs=arguments)
    if not isinstance(made, LambdaLR):
        return made
    return LambdaLR(optimizer, [partial(_share, warmup, after) for after in made.lr_lambdas])


def _share(warmup: int, after: Callable[[int], float], step: int) -> float:
    """Share of the peak that a step has."""
    return (step + 1) / (warmup + 1) if step < warmup else after(step - warmup)
