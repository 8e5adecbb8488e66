"""Training without an adapter: all weights of the model, and the checkpoint that they become.

The weights are float32 while they are trained, whatever the recipe's number format is: the steps of training
are too small for 16 bits to hold. With `dtype: bfloat16` the products are computed in it, under autocast, and
what is written at the end is rounded to it, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mamba_sft.errors import ModelError
from mamba_sft.model.adapter import load_weights as load_adapter_weights
from mamba_sft.model.adapter import own_gradient, save_adapter, save_tokenizer
from mamba_sft.model.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    base_fingerprint,
    read_tensors,
    resolve_base,
)
from mamba_sft.model.checksums import new_digest
from mamba_sft.model.loading import resolve_dtype
from mamba_sft.model.shards import part_of
from mamba_sft.model.tensor_files import DTYPES, Layout, as_bytes, read_rows, row_blocks, write_shard
from mamba_sft.run import MODEL_FACTS

if TYPE_CHECKING:
    from mamba_sft.model.chat_template import TemplateSetup
    from mamba_sft.recipe.fields import ModelSection

SHARD_BYTES = 5_000_000_000
"""The most that one file of a checkpoint holds, unless a single tensor is larger."""
_STORED = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ModelFacts:
    """What training recorded of a model whose weights it trained, beside it.

    Args:
        base: The model it began as, as the recipe names it.
        revision: The hub revision of that, or None.
        fingerprint: From `checkpoint.base_fingerprint`, of that.
        checksums: Digest of every tensor of this model, by name.
    """

    base: str
    revision: str | None
    fingerprint: str
    checksums: dict[str, str]


def in_float32(section: ModelSection) -> ModelSection:
    """Returns the section that loads the same model with the weights that are trained."""
    return section.model_copy(update={"dtype": "float32"})


def train_all_weights(model: Any) -> Any:
    """Makes every weight of a model trainable, in place, and returns the model.

    Args:
        model: A FalconMamba language model in float32, with our mixer installed.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def without_wrapper(model: Any) -> Any:
    """Returns the FalconMamba language model itself, which an adapter may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_undecayed(name: str) -> bool:
    """Returns whether weight decay would harm a weight of the model, by its name.

    Mamba marks the rates `A_log` and the skips `D` so (`_no_weight_decay`); norms and biases scale and shift,
    where nothing is gained by being near 0. `transformers` (5.23.0, read 2026-11-27) leaves out biases and
    most norms, but knows neither `A_log` and `D` nor the last norm, `norm_f`.
    """
    parts = name.split(".")
    return parts[-1] in ("A_log", "D", "bias") or any("norm" in part for part in parts)


def dead_weights(
    model: Any, gradient_of: Callable[[torch.Tensor], torch.Tensor | None] = own_gradient
) -> list[str]:
    """Returns the names of the trainable weights that the last backward did not reach.

    Args:
        model: After a backward, before the gradients are cleared.
        gradient_of: Returns a parameter's whole gradient, or None where it has none. One is held at a time.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    reached = {
        name: gradient.any() for name, p in trained.items() if (gradient := gradient_of(p)) is not None
    }
    found = torch.stack(list(reached.values())).tolist() if reached else []  # waits once
    alive = dict(zip(reached, found, strict=True))
    return [name for name in trained if not alive.get(name)]


def load_weights(model: Any, directory: str | Path) -> None:
    """Gives a model the weights of a checkpoint, in place; one that is sharded takes its parts of them.

    Args:
        model: Of the checkpoint's shape.
        directory: The checkpoint.

    Raises:
        ModelError: The checkpoint is broken, or of another model.
    """
    entries, own = read_tensors(Path(directory)), dict(model.state_dict())
    odd = [
        *(set(entries) ^ set(own)),
        *(name for name in entries if name in own and tuple(own[name].shape) != tuple(entries[name].shape)),
    ]
    if odd:
        raise ModelError(f"the checkpoint in `{directory}` is of another model: `{sorted(odd)[0]}`")
    with torch.no_grad():
        for name, entry in entries.items():
            own[name].copy_(part_of(read_rows(entry).to(own[name].dtype), own[name]))


def load_trained(model: Any, directory: str | Path) -> None:
    """Gives a model what `save_trained` wrote: the adapter's values, or all weights where it has none."""
    if hasattr(model, "peft_config"):
        load_adapter_weights(model, directory)
    else:
        load_weights(model, directory)


def save_trained(
    model: Any,
    directory: Path,
    *,
    section: ModelSection,
    setup: TemplateSetup,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes what was trained: the adapter, or the model where it has none. See `save_adapter`."""
    if hasattr(model, "peft_config"):
        save_adapter(model, directory, section=section, setup=setup, weights=weights)
    else:
        save_model(model, directory, section=section, setup=setup, weights=weights)


def save_model(
    model: Any,
    directory: Path,
    *,
    section: ModelSection,
    setup: TemplateSetup,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a model as a checkpoint that `transformers` loads, in the number format of the recipe.

    Args:
        model: As it was trained, in float32.
        directory: Where to; made if absent.
        section: The base it began as; its `dtype` is what is written.
        setup: The tokenizer and special tokens it was trained with.
        weights: From `whole_tensors`, where one process writes what several hold.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype = resolve_dtype(section, model.device)
    tensors = dict(model.state_dict() if weights is None else weights)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    checksums: dict[str, str] = {}

    def blocks(layout: Layout) -> Iterator[torch.Tensor]:
        tensor, digest = tensors[layout.name], new_digest()
        for start, stop in row_blocks(layout.shape):
            rows = (tensor[start:stop] if tensor.ndim else tensor).to(dtype).cpu()
            digest.update(as_bytes(rows))
            yield rows
        checksums[layout.name] = digest.hexdigest()

    layouts = [Layout(name, _STORED[dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    shards = _shards(layouts)
    names = [SINGLE_NAME]
    if len(shards) > 1:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
        _write_index(directory, dict(zip(names, shards, strict=True)))
    for name, shard in zip(names, shards, strict=True):
        write_shard(directory / name, shard, blocks)
    config = copy(model.config)
    config.dtype, config.architectures = dtype, ["FalconMambaForCausalLM"]
    config.save_pretrained(directory)
    save_tokenizer(setup.tokenizer, directory)
    model.generation_config.save_pretrained(directory)
    base = resolve_base(section.base, section.revision)
    facts = ModelFacts(section.base, section.revision, base_fingerprint(base), checksums)
    (directory / MODEL_FACTS).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")


def _shards(layouts: list[Layout]) -> list[list[Layout]]:
    """The tensors in their order, as many in a file as its size allows."""
    shards: list[list[Layout]] = [[]]
    for layout in layouts:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + layout.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(layout)
    return shards


def _write_index(directory: Path, shards: dict[str, list[Layout]]) -> None:
    places = {layout.name: name for name, shard in shards.items() for layout in shard}
    size = sum(layout.nbytes for shard in shards.values() for layout in shard)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
