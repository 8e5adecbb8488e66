"""Whether a recipe fits a device, how much more would, and what to change if it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from mamba_sft.errors import TrainingError
from mamba_sft.model.shape import find_shape
from mamba_sft.planning.communication import Mode
from mamba_sft.planning.environment import describe_device
from mamba_sft.planning.extent import settled_accumulation
from mamba_sft.planning.gpus import Accelerator, recognized
from mamba_sft.planning.memory import Policy, Work, peak, planned_parts, weights, with_length
from mamba_sft.planning.sharing import shared_parts
from mamba_sft.planning.speed import estimate
from mamba_sft.recipe.fields import AdapterSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.wording import size_text

logger = logging.getLogger(__name__)

MOST_ROWS, MOST_LENGTH = 4096, 1 << 20
"""The bounds of the recipe's fields."""
TOLERANCE = 0.1
"""How far off the plan may be: `train` refuses what misses by more, and warns of what is closer."""
ROOM = 0.97
"""How much of the memory a fix may fill."""
SHOWN = 3
_STREAMS = (None, 8192, 4096, 2048, 1024, 512)


@dataclass(frozen=True)
class Fix:
    """Overrides with which a recipe fits.

    Args:
        overrides: `section.field=value` texts.
        peak: The planned peak with them, bytes.
        slowdown: Planned time per token over that of the recipe as it is; 1 where speeds are not known.
    """

    overrides: tuple[str, ...]
    peak: int
    slowdown: float


def largest_rows(work: Work, usable: int) -> int:
    """Returns the largest micro-batch that fits, 0 if none does."""
    return _largest(lambda rows: peak(planned_parts(replace(work, rows=rows))) <= usable, MOST_ROWS)


def largest_length(work: Work, usable: int) -> int:
    """Returns the longest row that fits at the work's micro-batch, up to the longest a recipe allows."""
    return _largest(lambda length: peak(planned_parts(with_length(work, length))) <= usable, MOST_LENGTH)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fixes(
    work: Work, accumulation: int | None, accelerator: Accelerator, *, mode: Mode = "ddp", processes: int = 1
) -> list[Fix]:
    """Returns up to three ways to make a recipe fit, the fastest first, that leave what is learned as it is.

    Tried are all smaller micro-batches (with accumulation in proportion), checkpointing policies and lengths
    of streamed chunks. Only where nothing of it fits, what is learned may change: a run of all weights gets
    an optimizer with 8-bit states, or LoRA; one of LoRA gets NF4, which rounds the weights. What a recipe
    refuses beside its `train.parallel` is left out.

    Args:
        work: What does not fit.
        accumulation: `train.gradient_accumulation_steps`; None where `train.batch_ramp` says the batch.
        accelerator: The device.
        mode: `train.parallel`.
        processes: How many train together.
    """

    def fitting(of: Work) -> list[Fix]:
        return _best(_fitting(of, accumulation, accelerator, mode, processes))

    found = fitting(work)
    if found:
        return found[:SHOWN]
    for override, changed, most in _other_ways(work, mode):
        other = fitting(changed)[:most]
        found += [replace(fix, overrides=(override, *fix.overrides)) for fix in other]
    return found


def _best(found: Iterable[Fix]) -> list[Fix]:
    """The fixes, the fastest first, without those that only add to another."""
    ordered = sorted(found, key=lambda fix: (round(fix.slowdown, 2), len(fix.overrides), fix.peak))
    chosen: list[Fix] = []
    for fix in ordered:
        if not any(set(other.overrides) <= set(fix.overrides) for other in chosen):
            chosen.append(fix)
    return chosen


def _other_ways(work: Work, mode: Mode) -> Iterator[tuple[str, Work, int]]:
    """What changes what is learned: an override, the work with it, and how many fixes with it to show."""
    if work.is_full:
        if work.optim == "adamw_torch_fused" and mode == "ddp":  # bitsandbytes knows no parts of parameters
            yield "train.optim=adamw_8bit", replace(work, optim="adamw_8bit"), 1
        yield "adapter={}", replace(work, adapter=AdapterSection()), SHOWN - 1
    elif work.quantization != "nf4":
        yield "model.quantization=nf4", replace(work, quantization="nf4"), SHOWN


def _fitting(
    work: Work, accumulation: int | None, accelerator: Accelerator, mode: Mode, processes: int
) -> Iterator[Fix]:
    before = estimate(work, accelerator)
    divisors = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if work.rows % n == 0]
    names: tuple[Policy, ...] = ("none", "block") if work.is_full else ("none", "mamba", "block")
    policies = sorted(names, key=lambda name: name != work.policy)
    for divisor, policy, stream in product(divisors, policies, _STREAMS if mode == "ddp" else (None,)):
        overrides = []
        if divisor > 1:
            overrides.append(f"train.per_device_train_batch_size={work.rows // divisor}")
            if accumulation is not None:
                overrides.append(f"train.gradient_accumulation_steps={accumulation * divisor}")
        if policy != work.policy:
            overrides.append(f"train.checkpointing={policy}")
        chunk = work.chunk if stream is None else stream
        if stream is not None and stream >= work.chunk:
            continue
        if stream is not None:
            overrides.append(f"train.stream_tokens={stream}")
        changed = replace(work, rows=work.rows // divisor, policy=policy, chunk=chunk)
        size, after = _size(changed, mode, processes), estimate(changed, accelerator)
        if size <= ROOM * accelerator.usable_bytes:
            slowdown = before.tokens_per_second / after.tokens_per_second if before and after else 1.0
            yield Fix(tuple(overrides), size, slowdown)


def _size(work: Work, mode: Mode, processes: int) -> int:
    """The memory of each process; where they cut the model in parts, each has loaded all of it."""
    return max(peak(shared_parts(mode, planned_parts(work), work, processes)), weights(work))


def trained_values(recipe: Recipe, *, trained_rows: int) -> int:
    """Returns how many values a run trains.

    Args:
        recipe: What would be trained.
        trained_rows: Rows of the vocabulary that are trained.
    """
    shape, _ = find_shape(recipe.model)
    anywhere = Accelerator("", 0, 0, type="cpu")
    return Work.of(recipe, shape, anywhere, length=1, trained_rows=trained_rows).trained


def advice(found: list[Fix]) -> str:
    """Returns the fixes as a hint.

    Args:
        found: From `fixes`.
    """
    ways = ["`" + " ".join(fix.overrides) + "`" for fix in found]
    if not ways:
        return "no batch, checkpointing or streaming makes it fit here; it needs a device with more memory"
    return "add " + ", or ".join(ways)


def refuse_what_cannot_fit(recipe: Recipe, *, longest: int, trained_rows: int, processes: int = 1) -> None:
    """Checks a run against the memory of the device it would train on, before weights are loaded.

    With `train.auto_batch` a micro-batch may be run row by row, so one row has to fit. The reference backend
    is not checked: what it keeps is not planned.

    Args:
        recipe: What would be trained.
        longest: Tokens of the longest row.
        trained_rows: Rows of the vocabulary that are trained.
        processes: How many train together.

    Raises:
        TrainingError: The plan exceeds the memory by more than it can be off.
    """
    accelerator = recognized(describe_device())
    usable = accelerator.usable_bytes
    if recipe.model.kernels == "reference" or not usable or not longest:
        return
    shape, _ = find_shape(recipe.model)
    work = Work.of(recipe, shape, accelerator, length=longest, trained_rows=trained_rows)
    least = replace(work, rows=1) if recipe.train.auto_batch else work
    planned = _size(least, recipe.train.parallel, processes)
    if planned <= usable:
        return
    what = f"this run needs {size_text(planned)} by plan, and {accelerator.name} has {size_text(usable)}"
    accumulation = None if recipe.train.batch_ramp else settled_accumulation(recipe.train, None)
    mode = recipe.train.parallel
    hint = advice(fixes(work, accumulation, accelerator, mode=mode, processes=processes))
    if planned > (1 + TOLERANCE) * usable:
        raise TrainingError(what, hint=f"{hint}; see `mamba-sft plan`")
    logger.warning("%s: it may run out of memory; %s", what, hint)
