"""What is already in a run directory to go on from: the newest checkpoint, and the recipe it is of."""

from __future__ import annotations

import logging
from pathlib import Path
from shlex import quote
from typing import Any

from mamba_sft.errors import RecipeError, TrainingError
from mamba_sft.planning.extent import with_accumulation
from mamba_sft.recipe.builtin import find_path
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import Run
from mamba_sft.run_contents import is_finished
from mamba_sft.training.resume_points import find_good, is_proven

logger = logging.getLogger(__name__)

CHANGEABLE = (
    "train.logging_steps", "train.save_total_limit", "train.report_to", "model.kernels",
    "train.checkpointing", "train.stream_tokens", "train.auto_batch", "train.log_activations",
    "train.grace_seconds",
    "train.on_spike",  # changes numbers, but a run that it stopped could not go on otherwise
    "eval.sample_steps", "train.parallel",
)  # fmt: skip
"""Fields that may change between a run and its resumption, because no number in it changes by more than
rounding: a run that ran out of memory goes on with less of it."""
LENGTH = ("train.max_steps", "train.num_train_epochs")
"""Fields that say how long a run is: its schedule was made for that length."""


def newest_resume_point(run: Run) -> Path | None:
    """Returns the newest resume point of a run that is what was written."""
    return find_good(run)[0]


def processes_at_start(run: Run) -> int | None:
    """Returns with how many processes a run was started, or None where nothing says so.

    They decide how many rows an optimizer step reads. A run that goes on with more or fewer of them reads
    the same rows in each step.
    """
    length = run.read_data().get("length")
    found = length.get("processes") if isinstance(length, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def find_resume_point(run: Run, recipe: Recipe) -> tuple[Recipe, Path | None]:
    """Returns the recipe with what the run settled of it, and the resume point that `--resume` goes on from.

    That is None for a run that ended before its first one: it begins again.

    Raises:
        RecipeError: The recipe is not the one the run was started with; the message lists what differs.
        TrainingError: The run is finished, or all of its resume points are damaged.
    """
    Run.open(run)
    trained = _where_things_are_now(Recipe.load(run.recipe), recipe, run.read_data())
    if recipe.train.gradient_accumulation_steps is None and trained.train.gradient_accumulation_steps:
        recipe = with_accumulation(recipe, trained.train.gradient_accumulation_steps)
    changed = [entry for entry in differences(trained, recipe) if entry[0] not in CHANGEABLE]
    if changed:
        lines = [f"  `{name}` was {old!r}, now {new!r}" for name, old, new in changed]
        own = f"go on with its own: `{run.resume_command}`, or set another `output_dir`"
        longer = any(name in LENGTH for name, _, _ in changed)
        raise RecipeError(
            "\n".join([f"`{run.path}` was started with another recipe:", *lines]),
            hint=_more(run, trained) if longer else own,
        )
    if is_finished(run) and run.report.is_file():  # without its page, that is what is left to do
        raise TrainingError(
            f"`{run.path}` is finished",
            hint=f"next: `mamba-sft {_next(recipe)} {quote(str(run.path))}`; {_more(run, recipe)}",
        )
    return recipe, _newest_good(run)


def own_recipe_moved(file: Path, recipe: Recipe) -> Recipe:
    """Returns a run's own recipe with the directory that the run is in now as `output_dir`.

    A run that was copied to another machine, or whose drive is mounted elsewhere, names its first place.

    Args:
        file: The file that the recipe was read from.
        recipe: What was read; returned as it is where `file` is not in a run.
    """
    run = Run(file.parent)
    here = file.name == run.recipe.name and run.environment.is_file()
    if not here or Path(recipe.output_dir).resolve() == run.path.resolve():
        return recipe
    logger.info("the run was started in `%s` and is in `%s` now", recipe.output_dir, run.path)
    return recipe.model_copy(update={"output_dir": str(run.path)})


def _where_things_are_now(trained: Recipe, recipe: Recipe, known: dict[str, Any]) -> Recipe:
    """The recipe of a run with the places that another one names for the same things.

    Where things are decides nothing. What they are is compared too: rows and prompts by their digests, the
    base by its fingerprint, as far as data.json has them (`known`); the adapter is in the resume point.
    """
    moved: dict[str, Any] = {"output_dir": recipe.output_dir}
    model, data = trained.model, trained.data
    if "sources" in known and len(data.sources) == len(recipe.data.sources):
        pairs = zip(data.sources, recipe.data.sources, strict=True)
        sources = [old.model_copy(update={"path": new.path}) for old, new in pairs]
        moved["data"] = data.model_copy(update={"sources": sources})
    if "prompts" in known and trained.eval.prompts and recipe.eval.prompts:
        moved["eval"] = trained.eval.model_copy(update={"prompts": recipe.eval.prompts})
    if model.adapter and recipe.model.adapter:
        model = model.model_copy(update={"adapter": recipe.model.adapter})
    if "base" in known and find_path(recipe.model.base).is_dir():
        model = model.model_copy(update={"base": recipe.model.base})
    return trained.model_copy(update=moved | {"model": model})


def _newest_good(run: Run) -> Path | None:
    """The resume point to go on from; says which newer ones are damaged, and how."""
    resume_point, faults = find_good(run)
    if resume_point is None and faults:
        raise TrainingError(
            "\n".join([f"`{run.path}` has no checkpoint that is what was written:", *_indented(faults)]),
            hint="a disk or a copy damaged them; bring them back, or start anew with `--overwrite`",
        )
    for fault in faults:
        logger.warning("%s; going on from the checkpoint before it", fault)
    if resume_point is not None and not is_proven(resume_point):
        logger.warning(
            "`%s` was saved by an earlier version, without hashes: that its files are undamaged is not known",
            resume_point,
        )
    return resume_point


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _next(recipe: Recipe) -> str:
    """The verb that follows training: a model that was trained whole needs no merge."""
    return "merge" if recipe.trains == "adapter" else "export"


def _more(run: Run, recipe: Recipe) -> str:
    """How to train on when a run's own steps are done: its learning rate has come down to its end."""
    first = "" if run.result else f"finish it first, with `{run.resume_command}`; "
    if recipe.trains == "model":
        model = quote(str(run.model))
        return f"{first}to train on, start from its model: `model.base={model} output_dir=runs/NAME`"
    path, merged = quote(str(run.path)), quote(str(run.merged))
    return (
        f"{first}to train on, start a new run from its adapter: `model.adapter={path} "
        f"output_dir=runs/NAME`; or `mamba-sft merge {path}`, then `model.base={merged} "
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
