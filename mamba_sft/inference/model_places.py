"""What is at a place that was named: a run, an adapter, a checkpoint, a hub's model, a GGUF file. No torch.

So that a name that is wrong is told at once, before seconds of loading libraries.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from mamba_sft.errors import AdapterError, UsageError
from mamba_sft.llama_cpp.reading import check_file, is_gguf
from mamba_sft.model.base_facts import BaseFacts
from mamba_sft.model.checkpoint import read_config, resolve_base
from mamba_sft.recipe.builtin import expanded
from mamba_sft.recipe.fields import ModelSection
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.run import ADAPTER_CONFIG, BASE_FACTS, Run
from mamba_sft.wording import shown


@dataclass(frozen=True)
class ModelPlace:
    """What was asked for: a model, and an adapter on top of it unless it is complete by itself.

    Args:
        name: What to call it: where it was found.
        section: The model.
        adapter: The adapter's directory, or None.
        recipe: What it was trained by, where it is known: it has the system message.
        facts: What was saved with the adapter of its base; None for a checkpoint, where the recipe tells.
        gguf: The GGUF file that it is, or None; there is no section of a model then that could be loaded.
    """

    name: str
    section: ModelSection
    adapter: Path | None = None
    recipe: Recipe | None = None
    facts: BaseFacts | None = None
    gguf: Path | None = None


def no_adapter(name: str) -> UsageError:
    """Returns what to say of a model that has no adapter where one is needed."""
    return UsageError(
        f"`{name}` has no adapter to switch off, so there is no base to compare with",
        hint="compare a run that trained an adapter, which has it beside its base",
    )


def find_place(where: Run | str | Path, *, merged: bool = False, needs_adapter: bool = False) -> ModelPlace:
    """Returns what is at `where`. Of a model of the hub that is not here yet, the configuration is fetched.

    Args:
        where: A run (its base with its adapter on top, or the model where it trained all weights), a
            checkpoint or the adapter directory of one, a model directory, a GGUF file or a hub id.
        merged: Take the run's merged checkpoint rather than base and adapter.
        needs_adapter: Refuse a model without an adapter.

    Raises:
        UsageError: The run has no adapter, or no merged checkpoint.
        ModelError: There is no such model.
        AdapterError: The adapter does not say what its base is.
        MambaSFTError: It is a GGUF file, and what reads these is not installed.
    """
    name = str(where.path if isinstance(where, Run) else where)
    found = _find(where, name, merged)
    if needs_adapter and found.adapter is None:
        raise no_adapter(name)
    if found.gguf is None:
        resolve_base(found.section.base, found.section.revision, weights=False)
    return found


def _find(where: Run | str | Path, name: str, merged: bool) -> ModelPlace:
    path = where.path if isinstance(where, Run) else expanded(str(where))
    if is_gguf(path):
        return _find_gguf(name, path, merged)
    if isinstance(where, Run) or Run(path).recipe.is_file():
        return _find_in_run(name, Run.open(path), merged)
    if merged:
        raise UsageError(
            f"`{path}` is not a run, so it has no merged checkpoint", hint="leave `--merged` out"
        )
    if (path / ADAPTER_CONFIG).is_file():
        return _find_adapter(name, path)
    return ModelPlace(name, _section_of(str(where)), recipe=_recipe_of(path))


def _find_gguf(name: str, path: Path, merged: bool) -> ModelPlace:
    if merged:
        raise UsageError(f"`{path}` is one model: there is nothing to merge", hint="leave `--merged` out")
    check_file(path)
    return ModelPlace(name, ModelSection(base=str(path)), recipe=_recipe_of(path), gguf=path)


def _recipe_of(path: Path) -> Recipe | None:
    """What a model or adapter in a run was trained by, as training, merging or exporting left it there."""
    place = path.resolve()
    for run in map(Run, place.parents[:2]):
        own, holding = (run.adapter, run.model, run.merged), (run.checkpoints, run.export)
        if (place in own or place.parent in holding) and run.recipe.is_file():
            return Recipe.load(str(run.recipe))
    return None


def _find_in_run(name: str, run: Run, merged: bool) -> ModelPlace:
    recipe = Recipe.load(str(run.recipe))
    if merged and run.model.is_dir():
        raise UsageError(
            f"`{run.path}` has no merged checkpoint: it trained all weights, and `{run.model}` is the model",
            hint="leave `--merged` out",
        )
    if merged:
        if not run.merged.is_dir():
            raise UsageError(
                f"`{run.path}` has no merged checkpoint",
                hint=f"`mamba-sft merge {shlex.quote(str(run.path))}` makes one",
            )
        return ModelPlace(name, _section_of(str(run.merged)), recipe=recipe)
    if run.model.is_dir():
        return ModelPlace(name, _section_of(str(run.model)), recipe=recipe)
    if not run.adapter.is_dir():
        raise UsageError(
            f"`{run.path}` has no {recipe.trains} yet: its training has not finished",
            hint=f"go on with `{run.resume_command}`, end it with `{run.resume_command} --finish`, or "
            "give one of its checkpoints",
        )
    return ModelPlace(name, recipe.model, run.adapter, recipe, BaseFacts.read(run.adapter))


def _find_adapter(name: str, path: Path) -> ModelPlace:
    run = Run(path.resolve().parent.parent)
    if run.checkpoints == path.resolve().parent and run.recipe.is_file():
        recipe = Recipe.load(str(run.recipe))
        return ModelPlace(name, recipe.model, path, recipe)
    facts = BaseFacts.read(path)
    known = {name: getattr(facts, name) for name in ("base", "revision", "dtype", "quantization")}
    try:
        section = ModelSection.model_validate(known)
    except ValueError as error:
        raise AdapterError(f"`{path / BASE_FACTS}` names no base: {shown(facts.base)}") from error
    return ModelPlace(name, section, path, _recipe_of(path), facts)


def _section_of(base: str) -> ModelSection:
    """A section that loads a checkpoint in the precision it was saved in."""
    config = read_config(resolve_base(base, weights=False))
    saved = str(config.get("dtype") or config.get("torch_dtype") or "auto")
    known = {"bfloat16", "float16", "float32"}
    return ModelSection.model_validate({"base": base, "dtype": saved if saved in known else "auto"})
