"""What is already in a run directory to go on from: the newest checkpoint, and the recipe it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mamba_sft.errors import RecipeError, TrainingError
from mamba_sft.planning.extent import with_accumulation
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run

CHANGEABLE = (
    "train.logging_steps", "train.save_total_limit", "train.report_to", "model.kernels",
    "train.checkpointing", "train.stream_tokens", "train.auto_batch", "train.log_activations",
)  # fmt: skip
"""Fields that may change between a run and its resumption, because no number in it changes by more than
rounding: a run that ran out of memory goes on with less of it."""
LENGTH = ("train.max_steps", "train.num_train_epochs")
"""Fields that say how long a run is: its schedule was made for that length."""
_STATE = "trainer_state.json"


def newest_resume_point(run: Run) -> Path | None:
    """Returns the newest complete checkpoint of a run: one whose trainer state, written last, can be read."""
    complete = []
    for state in run.checkpoints.glob(f"checkpoint-*/{_STATE}"):
        try:
            complete.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
        except (ValueError, KeyError):
            continue
    return max(complete)[1] if complete else None


def step_of(resume_point: Path) -> int:
    """Returns the step after which a checkpoint was saved."""
    state = json.loads((resume_point / _STATE).read_text(encoding="utf-8"))
    return int(state["global_step"])


def find_resume_point(run: Run, recipe: Recipe) -> tuple[Recipe, Path]:
    """Returns the recipe with what the run settled of it, and the checkpoint that `--resume` goes on from.

    Raises:
        RecipeError: The recipe is not the one the run was started with; the message lists what differs.
        TrainingError: The run is finished, or has no complete checkpoint.
    """
    Run.open(run)
    trained = Recipe.load(run.recipe)
    if recipe.train.gradient_accumulation_steps is None and trained.train.gradient_accumulation_steps:
        recipe = with_accumulation(recipe, trained.train.gradient_accumulation_steps)
    changed = [entry for entry in differences(trained, recipe) if entry[0] not in CHANGEABLE]
    if changed:
        lines = [f"  `{name}` was {old!r}, now {new!r}" for name, old, new in changed]
        own = f"go on with its own: `mamba-sft train {run.recipe} --resume`, or set another `output_dir`"
        longer = any(name in LENGTH for name, _, _ in changed)
        raise RecipeError(
            "\n".join([f"`{run.path}` was started with another recipe:", *lines]),
            hint=_way_to_more(run) if longer else own,
        )
    if run.adapter.is_dir():
        raise TrainingError(
            f"`{run.path}` is finished", hint=f"next: `mamba-sft merge {run.path}`; {_way_to_more(run)}"
        )
    resume_point = newest_resume_point(run)
    if resume_point is None:
        raise TrainingError(
            f"`{run.path}` has no complete checkpoint to resume from", hint="start anew with `--overwrite`"
        )
    return recipe, resume_point


def _way_to_more(run: Run) -> str:
    """How to train on when a run's own steps are done: its learning rate has come down to its end."""
    first = "" if run.adapter.is_dir() else f"finish it first, with `mamba-sft train {run.recipe} --resume`; "
    return (
        f"{first}to train on, start a new run from its adapter: `model.adapter={run.path} "
        f"output_dir=runs/NAME`; or `mamba-sft merge {run.path}`, then `model.base={run.merged} "
        "output_dir=runs/NAME`"
    )


def differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """Returns the fields in which two recipes differ, as (dotted name, old value, new value)."""
    left, right = _flat(old.model_dump()), _flat(new.model_dump())
    return [
        (name, left.get(name), right.get(name))
        for name in sorted({*left, *right})
        if left.get(name) != right.get(name)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
