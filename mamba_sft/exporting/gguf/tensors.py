"""Which GGUF tensor each tensor of a FalconMamba becomes, and what happens to its values on the way.

Names and shapes are those of llama.cpp's own converter (`MambaModel` in its conversion scripts). Two
transforms change values. The recurrence is stored as A = -exp(A_log). And `ssm_x` is scaled, to bridge a
difference in an epsilon: `transformers` (5.23.0, read 2026-11-27) normalises dt, B and C with `mixer_rms_eps`
(1e-6), llama.cpp (commit 11246cf, read 2026-11-27) with the file's only one, the model's `layer_norm_epsilon`
(1e-5). With x the output of `x_proj`, which has no bias, and c =
layer_norm_epsilon / mixer_rms_eps,

    (sqrt(c) x) / sqrt(mean((sqrt(c) x)^2) + layer_norm_epsilon) = x / sqrt(mean(x^2) + mixer_rms_eps)

so x_proj times sqrt(c) gives llama.cpp the very norms that the model was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from mamba_sft.errors import ModelError
from mamba_sft.merging.saved_adapter import EMBEDDINGS, HEAD

DEFAULT_NORM_EPS, DEFAULT_MIXER_EPS = 1e-5, 1e-6
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")
_LAYER_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_NAMES = {
    EMBEDDINGS: "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    HEAD: "output.weight",
}


@dataclass(frozen=True)
class ExportTensor:
    """One tensor on its way into a GGUF file.

    Args:
        source: Its name in the checkpoint.
        name: Its name in the file.
        shape: Its shape in the file, rows first as in PyTorch; the file lists it the other way round.
        scale: What its values are multiplied with.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    scale: float = 1.0

    @property
    def values(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    def transform(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns rows of the checkpoint, (n, ...), as rows of the file, (n, ...), in float32."""
        rows = rows.float().reshape(len(rows), *self.shape[1:])
        if self.name.endswith(".ssm_a"):
            return -torch.exp(rows)
        return rows * self.scale if self.scale != 1.0 else rows


def epsilon_scale(config: Mapping[str, Any]) -> float:
    """Returns what x_proj is multiplied with so that llama.cpp normalises as `transformers` does."""
    mixer = float(config.get("mixer_rms_eps", DEFAULT_MIXER_EPS))
    return float((float(config.get("layer_norm_epsilon", DEFAULT_NORM_EPS)) / mixer) ** 0.5)


def export_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], *, tied: bool, fix_epsilon: bool = True
) -> list[ExportTensor]:
    """Returns the tensors of a GGUF file, in the order of the checkpoint.

    Args:
        shapes: The checkpoint's tensors, by name.
        config: Its `config.json`.
        tied: Whether the head is the embedding: then it is not written again.
        fix_epsilon: Scale x_proj, see above.

    Raises:
        ModelError: llama.cpp has no place for a tensor, or cannot run the model's shape.
    """
    scale = epsilon_scale(config) if fix_epsilon else 1.0
    tensors = []
    for source, shape in shapes.items():
        if source == HEAD and tied:
            continue
        name = gguf_name(source)
        if name is None:
            raise ModelError(
                f"`{source}` has no place in a GGUF file of this architecture",
                hint="llama.cpp runs FalconMamba without biases in its projections (`use_bias: false`)",
            )
        if name.endswith("ssm_conv1d.weight"):
            shape = (shape[0], shape[-1])  # noqa: PLW2901  # (I, 1, K): one channel a group
        tensors.append(ExportTensor(source, name, shape, scale if name.endswith("ssm_x.weight") else 1.0))
    _check_runnable(shapes, {tensor.name for tensor in tensors})
    return tensors


def _check_runnable(shapes: Mapping[str, tuple[int, ...]], names: set[str]) -> None:
    hidden = shapes[EMBEDDINGS][1]
    inner = shapes["backbone.layers.0.mixer.in_proj.weight"][0] // 2  # its rows: x and the gate
    if inner != 2 * hidden:
        raise ModelError(
            f"llama.cpp runs Mamba models whose inner size is twice the hidden size, not {inner} to {hidden}",
            hint="`--format hf` exports any shape",
        )
    missing = sorted(
        {f"blk.{i}.{leaf}" for i in range(layers(shapes)) for leaf in _LAYER_NAMES.values()} - names
    )
    if missing:
        raise ModelError(
            f"llama.cpp needs {len(missing)} tensors that this model lacks, such as `{missing[0]}`",
            hint="a convolution without bias (`use_conv_bias: false`) cannot be written as GGUF",
        )


def layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns how many blocks the model has."""
    return 1 + max(int(match[1]) for name in shapes if (match := _LAYER.fullmatch(name)))


def gguf_name(source: str) -> str | None:
    """Returns the GGUF name of a checkpoint's tensor, or None if there is none."""
    if match := _LAYER.fullmatch(source):
        leaf = _LAYER_NAMES.get(match[2])
        return None if leaf is None else f"blk.{match[1]}.{leaf}"
    return _NAMES.get(source)
