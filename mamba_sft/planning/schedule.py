"""The learning rate of every step: the recipe's schedules, settled before training starts.

`wsd` (warm-up, stable, decay) is what Falcon-Mamba was pre-trained with (arXiv 2410.05355): the rate stays
at its peak and falls only in the last part of the run. A recipe that says no more than the kind of schedule
gets that of `transformers` after the warm-up, to the bit. The warm-up is ours: theirs begins at a rate of 0,
which makes the first step for nothing, and a run of one step too.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mamba_sft.errors import RecipeError
from mamba_sft.planning.course import ramped_size
from mamba_sft.recipe.spans import token_count
from mamba_sft.wording import count_text

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from mamba_sft.recipe.fields import TrainSection

DECAY_SHARE = 0.2
"""Share of the run that `wsd` spends decaying (Hägele et al., arXiv 2405.18392, find 10-20% enough)."""
EXPONENTIAL_MINIMUM = 1 / 256
"""Share of the peak at which Falcon-Mamba's exponential decay ended (arXiv 2410.05355)."""

TRAINER_NAMES = {
    "wsd": "warmup_stable_decay",
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}


class Phases(NamedTuple):
    """Steps of a schedule's parts; in a run that the warm-up fills, a step of the others counts as well."""

    warmup: int
    stable: int
    decay: int


def learning_rates(train: TrainSection, tokens: np.ndarray) -> np.ndarray:
    """Returns the learning rate of every step of a run, (S,) float64.

    With the peak eta, s steps from 0, W of them warm-up, S in all, and the ratio m = `min_lr_ratio`:

        warm-up      eta * (s + 1) / (W + 1)
        constant     eta
        linear       eta * (m + (1 - m) * (1 - p))
        cosine       eta * (m + (1 - m) * (1 + cos(pi * p)) / 2)         (Loshchilov and Hutter, 1608.03983)
        wsd, linear and 1-sqrt, in the decay
                     eta * (m + (1 - m) * (1 - p)), eta * (m + (1 - m) * (1 - sqrt(p)))
                                                                         (Hägele et al., 2405.18392)
        wsd, exponential, in the decay
                     eta * m^p = eta * exp(-p * log(eta / (m * eta)))    (Falcon-Mamba, 2410.05355)

    p rises evenly from the peak's last step, where it is 0, to the last step of the run, where it is 1, so
    that the run ends at m * eta. Where m is 0, p = 1 would come one step after the last: no step is for
    nothing, and the rates are those of `transformers`.

    With `batch_scaling`, all of it times sqrt(b / to): Falcon-Mamba's BatchScaling, which keeps the noise
    temperature of Adam, eta / sqrt(b), constant while the batch b grows (2410.05355; the square root is that
    of Malladi et al., 2205.10287). b is the size that the ramp asks for. The last step of an epoch has the
    rows that are left, maybe few, and its rate does not dip for it.

    Args:
        train: The recipe's `train`.
        tokens: (S,) tokens of each step; they say where the ramp is, and how many steps `20M tokens` are.

    Raises:
        RecipeError: The parts of the schedule do not go into the run.
    """
    return np.array([train.learning_rate * share for share in _shares(train, tokens)[:-1]])


def make_scheduler(optimizer: Optimizer, train: TrainSection, tokens: np.ndarray) -> LambdaLR:
    """Returns the schedule for an optimizer whose rate is the peak; a step's rate follows from its number.

    Args:
        optimizer: Whose rate is set.
        train: The recipe's `train`.
        tokens: (S,) tokens of each step of the run.

    Raises:
        RecipeError: The parts of the schedule do not go into the run.
    """
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, partial(_at, _shares(train, tokens)))


def _at(shares: list[float], step: int) -> float:
    return shares[min(step, len(shares) - 1)]


def find_phases(train: TrainSection, tokens: np.ndarray) -> Phases:
    """Returns how many steps each part of the schedule has.

    A share of the run is rounded to steps, of the warm-up upwards; tokens are the fewest steps that read as
    many: of the warm-up the first ones, of the decay the last ones, of the stable part those after the
    warm-up. What such rounding is too many or too few, by a step for each part, is made up for.

    Args:
        train: The recipe's `train`.
        tokens: (S,) tokens of each step.

    Raises:
        RecipeError: The parts are longer than the run, or all are given and shorter.
    """
    steps = len(tokens)
    warmup = _warmup(train, tokens)
    left = max(1, steps - warmup)
    if train.lr_scheduler_type != "wsd":
        return Phases(warmup, 0, left) if train.lr_scheduler_type != "constant" else Phases(warmup, left, 0)
    stable, decay = train.stable_steps, train.decay_steps
    stable_count = None if stable is None else _count("stable_steps", stable, tokens[warmup:], steps)
    if decay is not None:
        decay_count = _count("decay_steps", decay, tokens[::-1], steps)
    elif stable_count is not None:
        decay_count = max(1, steps - warmup - stable_count)
    else:
        decay_count = max(1, round(DECAY_SHARE * steps))
    if stable is not None or decay is not None:
        _check_sum(train, steps, (warmup, stable_count, decay_count))
    decay_count = min(decay_count, left)
    return Phases(warmup, left - decay_count, decay_count)


def warmup_count(warmup_steps: float, steps: int) -> int:
    """Returns the steps that `train.warmup_steps`, a number or a share, means in a run of `steps`."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * steps)


def _warmup(train: TrainSection, tokens: np.ndarray) -> int:
    span = train.warmup_steps
    if isinstance(span, str):
        return _reading("warmup_steps", span, tokens)
    return warmup_count(span, len(tokens))


def _count(name: str, span: float | str, tokens: np.ndarray, steps: int) -> int:
    """The steps that a length means, of those whose tokens these are, in a run of `steps`."""
    if isinstance(span, str):
        return _reading(name, span, tokens)
    return int(span) if span >= 1 or span == 0 else max(1, round(span * steps))


def _reading(name: str, span: str, tokens: np.ndarray) -> int:
    """The fewest steps, from the first of these, that read a number of tokens."""
    read, wanted = np.cumsum(tokens), token_count(span)
    there = int(read[-1]) if len(read) else 0
    if wanted > there:
        raise RecipeError(
            f"`train.{name}` is `{span}`, and the steps that it could take read {count_text(there, 'token')}",
            hint=f"shorten it: a share of the run fits any, such as `train.{name}=0.1`",
        )
    return int(np.searchsorted(read, wanted)) + 1


def _check_sum(train: TrainSection, steps: int, counts: tuple[int, int | None, int]) -> None:
    spans = {
        name: (getattr(train, name), count)
        for name, count in zip(("warmup_steps", "stable_steps", "decay_steps"), counts, strict=True)
        if getattr(train, name) is not None
    }
    total = sum(count or 0 for _, count in spans.values())
    if train.decay_steps is None:
        total += 1  # at least
    rounded = sum(isinstance(span, str) or 0 < span < 1 for span, _ in spans.values())
    short = len(spans) == len(counts) and total < steps - rounded
    if total <= steps + rounded and not short:
        return
    parts = ", ".join(f"`{name}: {_shown(span)}` is {count:,}" for name, (span, count) in spans.items())
    text = f"the parts of the schedule do not make the {count_text(steps, 'step')} of the run: {parts}"
    raise RecipeError(
        f"{text}, and `decay_steps` has to be 1 at least" if train.decay_steps is None else text,
        hint="leave out `train.stable_steps`, and it is what is left" if short else "shorten one of them",
    )


def _shown(span: float | str) -> str:
    return span if isinstance(span, str) else f"{span:g}"


def _shares(train: TrainSection, tokens: np.ndarray) -> list[float]:
    """The share of the peak that each step has, and one more: what would come after the last."""
    phases = find_phases(train, tokens)
    shares = [_share(train, phases, step) for step in range(len(tokens) + 1)]
    ramp = train.batch_ramp
    if ramp is None or not train.batch_scaling:
        return shares
    read = [0, *np.cumsum(tokens).tolist()]
    return [
        share * math.sqrt(ramped_size(ramp, before) / ramp.to)
        for share, before in zip(shares, read, strict=True)
    ]


def _share(train: TrainSection, phases: Phases, step: int) -> float:
    """The share of the peak that a step has by the schedule."""
    warmup, stable, decay = phases
    if step < warmup:
        return (step + 1) / (warmup + 1)
    after, low = step - warmup, _lowest(train)
    if train.lr_scheduler_type == "wsd":
        return _decayed(train, after - stable, decay, low) if after >= stable else 1.0
    if train.lr_scheduler_type == "constant":
        return 1.0
    length = decay if low == 0 else max(1, decay - 1)
    after = min(after, length)
    if train.lr_scheduler_type == "linear":
        factor = (length - after) / length
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * (after / length)))
    return factor * (1.0 - low) + low


def _decayed(train: TrainSection, number: int, decay: int, low: float) -> float:
    """The share at a step of wsd's decay, counted from 0."""
    done = min(1.0, (number + (low > 0)) / decay)
    if train.decay == "exponential":
        return float(low**done)
    factor = 1.0 - done if train.decay == "linear" else 1.0 - math.sqrt(done)
    return factor * (1.0 - low) + low


def _lowest(train: TrainSection) -> float:
    if train.min_lr_ratio is not None:
        return train.min_lr_ratio
    return EXPONENTIAL_MINIMUM if train.decay == "exponential" else 0.0
