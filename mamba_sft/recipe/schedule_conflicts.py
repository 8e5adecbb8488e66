"""What the fields of the learning rate and of the batch owe each other.

Lengths of the schedule's parts are added up here as far as a recipe tells them: shares, and steps where
`max_steps` is set. What is left is checked in `planning/schedule.py`, where the run's steps are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mamba_sft.recipe.fields import TrainSection

Keys = tuple[str | int, ...]

SPANS = ("warmup_steps", "stable_steps", "decay_steps")
"""The parts of `wsd`, in their order."""
_ROUNDING = 1e-9


class Problem(NamedTuple):
    """A clash, told at `path`: `text` follows the name of that field, `fields` are the others in it."""

    path: Keys
    text: str
    fields: tuple[Keys, ...] = ()


def rate_conflicts(train: TrainSection) -> Iterator[Problem]:
    """Finds the clashes between the fields of the learning rate."""
    kind = train.lr_scheduler_type
    if kind != "wsd":
        for name in ("decay", "stable_steps", "decay_steps"):
            if getattr(train, name) is not None:
                yield Problem(
                    ("train", name),
                    f"is a part of `wsd`, and `train.lr_scheduler_type` is `{kind}`; leave it out, or set "
                    "`train.lr_scheduler_type: wsd`",
                    (("train", "lr_scheduler_type"),),
                )
    if kind == "constant" and train.min_lr_ratio is not None:
        yield Problem(
            ("train", "min_lr_ratio"),
            "is where the learning rate ends, and `train.lr_scheduler_type: constant` does not fall; "
            "leave it out",
            (("train", "lr_scheduler_type"),),
        )
    if train.decay == "exponential" and train.min_lr_ratio == 0:
        yield Problem(
            ("train", "min_lr_ratio"),
            "must be above 0 when `train.decay` is `exponential`, which never comes to 0; "
            "leave it out for 1/256",
            (("train", "decay"),),
        )
    if kind == "wsd":
        yield from _span_conflicts(train)


def _span_conflicts(train: TrainSection) -> Iterator[Problem]:
    if train.decay_steps == 0:
        yield Problem(
            ("train", "decay_steps"),
            "must be above 0; for a rate that does not fall set `train.lr_scheduler_type: constant`",
            (("train", "lr_scheduler_type"),),
        )
    given = [name for name in SPANS if getattr(train, name) is not None]
    last = given[-1]
    if last == "warmup_steps":
        return  # a warm-up that is too long is told with the run's length
    shares = [_share(getattr(train, name), train.max_steps) for name in given]
    total = sum(share for share in shares if share is not None)
    *others, own = (f"`{name}: {_shown(getattr(train, name))}`" for name in given)
    come = f"{', '.join(others)} and {own} come to {total:.6g} of"
    fields = tuple(("train", name) for name in (*given[:-1], "max_steps"))
    if total > 1 + _ROUNDING:
        yield Problem(("train", last), f"must leave room: {come} the run; shorten one", fields)
    elif len(given) == len(SPANS) and None not in shares and total < 1 - _ROUNDING:
        text = f"must end with the run: {come} it; leave `stable_steps` out, and it is what is left"
        yield Problem(("train", last), text, fields)


def _share(span: float | str, steps: int) -> float | None:
    """What a length is of the run, None where that is not known yet."""
    if isinstance(span, str) or (span >= 1 and steps <= 0):
        return None
    return span / steps if span >= 1 else span


def _shown(span: float | str) -> str:
    return span if isinstance(span, str) else f"{span:g}"


def ramp_conflicts(train: TrainSection) -> Iterator[Problem]:
    """Finds the clashes between the fields of the batch."""
    ramp = train.batch_ramp
    if ramp is None:
        if train.batch_scaling:
            yield Problem(
                ("train", "batch_scaling"),
                "scales the learning rate with a batch that grows, and there is no `train.batch_ramp`; "
                "add one, or leave it out",
                (("train", "batch_ramp"),),
            )
        return
    if ramp.from_ > ramp.to:
        yield Problem(
            ("train", "batch_ramp", "from"),
            f"must be at most `to` ({ramp.to:,}), got {ramp.from_:,}: a batch grows",
            (("train", "batch_ramp", "to"),),
        )
    if train.gradient_accumulation_steps is not None:
        yield Problem(
            ("train", "gradient_accumulation_steps"),
            "does not go with `train.batch_ramp`, which says how many rows a step has; leave it out",
            (("train", "batch_ramp"),),
        )
