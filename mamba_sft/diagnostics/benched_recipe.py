"""What `bench train` needs of a recipe, told before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from mamba_sft.data.sources import check_source
from mamba_sft.model.chat_template import check_template_file
from mamba_sft.model.checkpoint import resolve_base
from mamba_sft.recipe.builtin import is_here
from mamba_sft.recipe.recipe import Recipe
from mamba_sft.training.starting import find_start

REFUSED_BY_PEFT = "out_proj"


def check_recipe(recipe: Recipe) -> None:
    """Checks what can be checked without torch: base, template, data that are here, an adapter to start from.

    Raises:
        MambaSFTError: Something is missing or of the wrong kind.
    """
    if is_data_here(recipe):
        for source in recipe.data.sources:
            check_source(source)
    resolve_base(recipe.model.base, recipe.model.revision, weights=False)
    check_template_file(recipe.chat.template)
    find_start(recipe)


def is_data_here(recipe: Recipe) -> bool:
    """Returns whether every source of the recipe is here: a file, a directory, or what a glob names."""
    return not missing_sources(recipe)


def missing_sources(recipe: Recipe) -> list[str]:
    """Returns the sources, as the recipe names them, that are not on this machine."""
    return [source.path for source in recipe.data.sources if not is_here(source.path)]


def peer_targets(targets: Sequence[str]) -> list[str]:
    """Returns the LoRA targets without those that PEFT refuses on Mamba models."""
    return [name for name in targets if name.rpartition(".")[2] != REFUSED_BY_PEFT]
