"""A recipe's tokenizer and rows, as training reads them and as a merge measures on them. Needs no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_sft.data.packing import pack
from mamba_sft.data.preparing import PreparedData, prepare_data
from mamba_sft.model.chat_template import TemplateSetup, prepare_tokenizer
from mamba_sft.model.loading import load_config, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

    from mamba_sft.recipe.fields import DataSection
    from mamba_sft.recipe.recipe import Recipe


def read_corpus(recipe: Recipe, *, rejected: Path | None = None) -> tuple[TemplateSetup, PreparedData]:
    """Returns the recipe's tokenizer, ready to chat, and its rows as tokens.

    Args:
        recipe: Names the base, the template and the data.
        rejected: Where bad rows are listed, or None to list them nowhere.

    Raises:
        MambaSFTError: The base, its tokenizer, the template or the data cannot be used.
    """
    config = load_config(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    setup = prepare_tokenizer(tokenizer, recipe.chat, named_ids(config), embedding_rows=config.vocab_size)
    data = prepare_data(recipe.data, setup, system=recipe.chat.system, seed=recipe.seed, rejected=rejected)
    return setup, data


def named_ids(config: Any) -> set[int]:
    """Returns the token ids that a model's config gives a meaning; some configs list several."""
    ids: set[int] = set()
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids


def as_trained(dataset: Dataset | None, data: DataSection, seed: int) -> Any:
    """Returns the rows as the trainer takes them: packed when `data.packing` is on. None stays None."""
    if dataset is None or not data.packing or data.max_length is None:
        return dataset
    return pack(dataset, data.max_length, seed)
