"""What a saved PEFT adapter adds to each tensor of its base, without PEFT and without a model.

Read straight from `adapter_model.safetensors` and `adapter_config.json`, so that a merge can walk a
checkpoint of any size. Everything is float32 until the caller rounds the sum, once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mamba_sft.errors import MergeError, ModelError
from mamba_sft.merging.request import check_adapter_files
from mamba_sft.model.adapter_config import OTHERS, matches, read_adapter_config, used
from mamba_sft.model.tensor_headers import read_header
from mamba_sft.run import ADAPTER_CONFIG, ADAPTER_WEIGHTS

EMBEDDINGS, HEAD = "backbone.embeddings.weight", "lm_head.weight"
_UNSUPPORTED = ("fan_in_fan_out", "modules_to_save", *OTHERS)
"""Settings that change what an adapter means, or where its tensors go, in ways a sum cannot express."""
_WRAPPED = "base_model.model."
"""What PEFT puts before the name of everything it wraps."""
_ROWS, _BIAS = ".trainable_tokens_delta", "lora_B.bias"
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)$"
)


@dataclass
class LowRank:
    """The LoRA or DoRA of one linear module with weight (out, in), all in float32.

    Args:
        a: (r, in).
        b: (out, r).
        scale: What B A is multiplied with.
        magnitude: DoRA's length of every output row, (out,), or None.
        bias: LoRA's own bias of B, (out,), not yet scaled, or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def merge(self, rows: torch.Tensor, start: int) -> None:
        """Makes rows of the base weight W into rows of W + scale * B A, in place and in their own precision.

        For DoRA those are then scaled to the trained lengths.

        Args:
            rows: (n, in) rows of the base weight from `start` on; float32 for a merge, float64 to check one.
            start: Which row of the weight the first one is.
        """
        part = slice(start, start + rows.shape[0])
        rows.addmm_(self.b[part].to(rows.dtype), self.a.to(rows.dtype), alpha=self.scale)
        if self.magnitude is not None:
            length = torch.linalg.vector_norm(rows, dim=1)
            rows.mul_((self.magnitude[part].to(rows.dtype) / length).unsqueeze(1))


@dataclass
class SavedAdapter:
    """An adapter as saved: low-rank updates by module, and rows and whole tensors that replace the base's.

    Args:
        path: The directory it was read from.
        config: `adapter_config.json`.
        modules: What is stored for each linear module, e.g. `backbone.layers.0.mixer.in_proj`: keys by part.
        rows: By tensor name, the row numbers (k,) and their trained values (k, d).
        whole: By tensor name, values that replace the tensor: trained biases, resized embeddings.
    """

    path: Path
    config: dict[str, Any]
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    _latest: tuple[str, LowRank] | None = None

    def low_rank(self, module: str) -> LowRank:
        """Returns the update of one module, from the file unless it was the last one asked for.

        An adapter of high rank is gigabytes, of which a merge needs one module at a time.

        Raises:
            MergeError: The module's tensors are not those that the config describes.
        """
        if self._latest is None or self._latest[0] != module:
            keys = self.modules[module]
            with _open(self.path / ADAPTER_WEIGHTS) as file:
                parts = {part: file.get_tensor(key).float() for part, key in keys.items()}
            self._latest = module, _low_rank(self, module, parts)
        return self._latest[1]

    def stored(self, prefix: str) -> dict[str, torch.Tensor]:
        """Returns the low-rank tensors of the modules whose names begin with `prefix`, in float32.

        Keys are PEFT's, without the `base_model.model.` that a wrapped model puts before them.
        """
        keys = [
            key
            for module, parts in self.modules.items()
            if module.startswith(prefix)
            for key in parts.values()
        ]
        with _open(self.path / ADAPTER_WEIGHTS) as file:
            return {key.removeprefix(_WRAPPED): file.get_tensor(key).float() for key in keys}

    def touches(self, name: str) -> bool:
        """Returns whether the adapter changes the tensor."""
        module, _, kind = name.rpartition(".")
        parts = self.modules.get(module, {})
        if (kind == "weight" and parts) or (kind == "bias" and _BIAS in parts):
            return True
        return name in self.rows or name in self.whole

    def targets(self, module: str) -> bool:
        """Returns whether the adapter's config names the module, as PEFT matches names, in every layer."""
        names = self.config.get("target_modules") or []
        if self.config.get("layers_to_transform") is not None or self.config.get("exclude_modules"):
            return False
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def merge(self, name: str, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Merges everything the adapter knows about rows [start, start + n) of a tensor.

        Args:
            name: The tensor's name in the checkpoint.
            rows: (n, ...) rows of the base, changed in place; their dtype is the precision of the sum.
            start: Which row of the tensor the first one is.

        Returns:
            The merged rows, in the dtype of `rows`.
        """
        module, _, kind = name.rpartition(".")
        if name in self.whole:
            rows.copy_(self.whole[name][start : start + rows.shape[0]])
        if module in self.modules and self.touches(name):
            factors = self.low_rank(module)
            if kind == "weight":
                factors.merge(rows, start)
            elif factors.bias is not None:
                rows.add_(factors.bias[start : start + rows.shape[0]], alpha=factors.scale)
        if name in self.rows:
            ids, values = self.rows[name]
            inside = (ids >= start) & (ids < start + rows.shape[0])
            rows[ids[inside] - start] = values[inside].to(rows.dtype)
        return rows


def read_adapter(path: Path) -> SavedAdapter:
    """Reads a saved PEFT LoRA.

    Raises:
        MergeError: There is none, it is damaged, or it holds something that is not a sum of low-rank
            updates, trained rows and biases.
    """
    check_adapter_files(path)
    adapter = SavedAdapter(path, _read_config(path / ADAPTER_CONFIG))
    try:
        read_header(path / ADAPTER_WEIGHTS)
    except ModelError as error:
        raise MergeError(error.message, hint=error.hint) from error
    unknown = []
    with _open(path / ADAPTER_WEIGHTS) as file:
        for key in sorted(file.keys()):
            value = file.get_tensor(key).float()
            if not torch.isfinite(value).all():
                raise MergeError(
                    f"`{path / ADAPTER_WEIGHTS}` has NaN or infinity in `{key}`",
                    hint="the training diverged; take an earlier checkpoint",
                )
            if not _file_tensor(adapter, key, value):
                unknown.append(key)
    if unknown:
        raise MergeError(
            f"`{path / ADAPTER_WEIGHTS}` holds tensors that cannot be merged: " + ", ".join(unknown[:5]),
            hint="merge handles LoRA, rsLoRA, DoRA, trained token rows and biases",
        )
    return adapter


def _file_tensor(adapter: SavedAdapter, key: str, value: torch.Tensor) -> bool:
    """Puts a tensor of the file where it belongs; False if it belongs nowhere."""
    name = key.removeprefix(_WRAPPED)
    plain = name.replace(".base_layer", "").replace(".token_adapter", "")
    if match := _FACTOR.match(name):
        adapter.modules.setdefault(match["module"], {})[match["part"]] = key
    elif plain.endswith(_ROWS):
        module = plain.removesuffix(_ROWS)
        adapter.rows[f"{module}.weight"] = (_row_ids(adapter, module, len(value)), value.clone())
    elif plain in (EMBEDDINGS, HEAD) or plain.endswith(".bias"):
        adapter.whole[plain] = value.clone()
    else:
        return False
    return True


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The file, mapped only inside the block, so that what was read does not stay resident."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise MergeError(f"`{path}` is truncated or not a safetensors file: {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    config = read_adapter_config(path, MergeError)
    if config.get("peft_type") != "LORA":
        raise MergeError(f"`{path}` is an adapter of type {config.get('peft_type')!r:.80}; only LORA merges")
    if uses := used(config, _UNSUPPORTED):
        raise MergeError(f"`{path}` uses what cannot be merged: " + ", ".join(uses))
    return config


def _row_ids(adapter: SavedAdapter, module: str, count: int) -> torch.Tensor:
    """The row numbers of a module's trained rows, as PEFT's config has them: a list, or one by module."""
    listed = adapter.config.get("trainable_token_indices")
    ids: list[int] | None = listed if isinstance(listed, list) else _by_pattern(listed or {}, module, None)
    if ids is None or len(ids) != count:
        raise MergeError(
            f"`{adapter.path}` has {count} trained rows for `{module}`, but its config names "
            f"{len(ids) if ids is not None else 'none'}"
        )
    return torch.tensor(ids)


def _by_pattern(values: dict[str, Any], module: str, default: Any) -> Any:
    """Looks a module up as PEFT does: by a regular expression for the end of its name."""
    for pattern, value in values.items():
        if matches(pattern, module):
            return value
    return default


def _low_rank(adapter: SavedAdapter, module: str, parts: dict[str, torch.Tensor]) -> LowRank:
    config = adapter.config
    a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        shapes = {part: tuple(value.shape) for part, value in parts.items()}
        raise MergeError(
            f"the adapter of `{module}` in `{adapter.path}` is not of rank {rank}: it has {shapes}",
            hint="adapter_config.json and adapter_model.safetensors must be of the same training",
        )
    magnitude = parts.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise MergeError(
            f"`{adapter.path}`: use_dora is {config.get('use_dora')}, but `{module}` has "
            f"{'no' if magnitude is None else 'a'} magnitude vector"
        )
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return LowRank(a, b, scale, magnitude, parts.get(_BIAS))
