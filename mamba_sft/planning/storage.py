"""What a run writes, file by file: its adapter or model, and the checkpoints that are there at once."""

from __future__ import annotations

import math
import stat
from pathlib import Path

from mamba_sft.disk import require_space
from mamba_sft.errors import TrainingError
from mamba_sft.recipe.fields import TrainSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.wording import size_text

ANOTHER_PLACE = "choose another directory: `output_dir=runs/NAME`"

FILES = 6 << 20
"""Bytes of everything else beside an adapter: tokenizer, template, states of the schedule; rounded up."""


def adapter_bytes(trained: int) -> int:
    """Returns the size of an adapter's weights, which are float32.

    Args:
        trained: Values that are trained.
    """
    return 4 * trained


def result_bytes(recipe: Recipe, trained: int) -> int:
    """Returns the size of what a run leaves: the weights of its adapter, or of a model in its own precision.

    Args:
        recipe: What would be trained.
        trained: Values that are trained.
    """
    if recipe.adapter is None and recipe.model.dtype == "bfloat16":
        return 2 * trained
    return adapter_bytes(trained)


def checkpoint_sizes(trained: int, optim: str) -> list[int]:
    """Returns the sizes of the large files of a checkpoint: trained weights, in float32, and optimizer state.

    Args:
        trained: Values that are trained.
        optim: `train.optim`.
    """
    per_value = 8 if optim == "adamw_torch_fused" else 2
    return [adapter_bytes(trained), per_value * trained]


def checkpoints_at_once(train: TrainSection, *, steps: int, keeps_best: bool) -> int:
    """Returns how many checkpoints are there at the same time, at most.

    The oldest goes when a new one is complete, so there is one more than are kept while that is written.

    Args:
        train: How often one is saved, and how many are kept.
        steps: Optimizer steps of the run.
        keeps_best: Whether the one with the lowest validation loss stays, however old it is.
    """
    every = train.save_steps if train.save_steps >= 1 else max(1, math.ceil(train.save_steps * steps))
    saved = math.ceil(steps / every)
    return min(saved, max(train.save_total_limit, 2 if keeps_best else 1) + 1)


def run_sizes(recipe: Recipe, trained: int, *, steps: int, keeps_best: bool) -> list[int]:
    """Returns the sizes of the files that a run needs room for at the same time: its result and checkpoints.

    See `result_bytes` and `checkpoints_at_once` for the arguments.
    """
    count = checkpoints_at_once(recipe.train, steps=steps, keeps_best=keeps_best)
    checkpoints = [*checkpoint_sizes(trained, recipe.train.optim), FILES] * count
    return [result_bytes(recipe, trained), FILES, *checkpoints]


def refuse_too_small_a_disk(
    run: Run, recipe: Recipe, trained: int, *, steps: int, validates: bool, resumes: bool
) -> None:
    """Checks that the disk has room for what a run leaves and its checkpoints, before weights are loaded.

    What is there counts as room: all of an earlier run, which goes, or the checkpoints of one that goes on.

    Args:
        run: Where it will be written.
        recipe: What would be trained.
        trained: Values that are trained.
        steps: Optimizer steps of the run.
        validates: Whether there are validation rows.
        resumes: Whether it goes on with what is there.

    Raises:
        TrainingError: It has not.
    """
    keeps_best = validates and recipe.eval.load_best_model_at_end
    sizes = run_sizes(recipe, trained, steps=steps, keeps_best=keeps_best)
    there = _bytes_below(run.checkpoints if resumes else run.path)
    checkpoint = sum(checkpoint_sizes(trained, recipe.train.optim)) + FILES
    hint = (
        f"free some space, keep fewer checkpoints (`train.save_total_limit=1`; each takes "
        f"{size_text(checkpoint)}), or {ANOTHER_PLACE}"
    )
    require_space(
        run.path, _without(sizes, there), f"{recipe.trains} and checkpoints take", TrainingError, hint
    )


def _bytes_below(directory: Path) -> int:
    """What the files below a directory take; one that has several names counts once."""
    found = (path.lstat() for path in directory.rglob("*"))
    sizes = {(entry.st_dev, entry.st_ino): entry.st_size for entry in found if stat.S_ISREG(entry.st_mode)}
    return sum(sizes.values())


def _without(sizes: list[int], there: int) -> list[int]:
    """The sizes of the files that are still to come when `there` bytes are written."""
    left = []
    for size in sizes:
        left.append(max(0, size - there))
        there = max(0, there - size)
    return left
