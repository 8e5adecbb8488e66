"""The sizes of a Falcon-Mamba model, known without its weights: from a config.json, or by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_sft.errors import ModelError
from mamba_sft.model.checkpoint import is_hub_id, read_config, resolve_base
from mamba_sft.recipe.builtin import find_path
from mamba_sft.recipe.fields import ModelSection

KNOWN_7B = ("tiiuae/falcon-mamba-7b", "tiiuae/falcon-mamba-7b-instruct", "tiiuae/falcon-mamba-7b-pre-decay")
_7B_CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "num_hidden_layers": 64,
    "state_size": 16,
    "time_step_rank": 256,
    "conv_kernel": 4,
    "vocab_size": 65024,
    "tie_word_embeddings": False,
    "residual_in_fp32": True,
    "use_bias": False,
    "use_conv_bias": True,
}

_MOST = 1 << 31
"""No size is as large; a product of three still fits where memory is counted in floats."""


@dataclass(frozen=True)
class Shape:
    """What memory and arithmetic depend on.

    Args:
        layers: Blocks.
        hidden: d_model, the width of the residual.
        inner: D, the channels of a mixer.
        states: N, per channel.
        rank: R, of the time step.
        width: W, taps of the convolution.
        vocabulary: Rows of the embeddings and of the head.
        tied: Whether these are one matrix.
        residual_in_fp32: Whether the residual is kept in float32 whatever the weights are in.
        bias: Whether in_proj and out_proj have one.
        conv_bias: Whether the convolution has one.
    """

    layers: int
    hidden: int
    inner: int
    states: int
    rank: int
    width: int
    vocabulary: int
    tied: bool = False
    residual_in_fp32: bool = True
    bias: bool = False
    conv_bias: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Reads the values of a `config.json`; absent ones are those of `FalconMambaConfig`.

        Raises:
            ModelError: A size is not a positive number.
        """
        hidden = config.get("hidden_size", 768)
        rank = config.get("time_step_rank", "auto")
        inner, expand = config.get("intermediate_size"), config.get("expand", 2)
        if not all(isinstance(size, int) for size in (hidden, expand)):
            told = f"hidden_size {hidden!r:.100} and expand {expand!r:.100}"
            raise ModelError(f"the model's config.json has sizes that cannot be: {told}")
        sizes = {
            "layers": config.get("num_hidden_layers", 32),
            "hidden": hidden,
            "inner": inner or expand * hidden,
            "states": config.get("state_size", 16),
            "rank": -(-hidden // 16) if rank == "auto" else rank,
            "width": config.get("conv_kernel", 4),
            "vocabulary": config.get("vocab_size", 50280),
        }
        wrong = [
            f"{name} {size!r:.100}"
            for name, size in sizes.items()
            if not isinstance(size, int) or not 1 <= size < _MOST
        ]
        if wrong:
            raise ModelError("the model's config.json has sizes that cannot be: " + ", ".join(wrong))
        return cls(
            **sizes,
            tied=bool(config.get("tie_word_embeddings", True)),
            residual_in_fp32=bool(config.get("residual_in_fp32", True)),
            bias=bool(config.get("use_bias", False)),
            conv_bias=bool(config.get("use_conv_bias", True)),
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a mixer: name -> (inputs, outputs)."""
        return {
            "in_proj": (self.hidden, 2 * self.inner),
            "x_proj": (self.inner, self.rank + 2 * self.states),
            "dt_proj": (self.rank, self.inner),
            "out_proj": (self.inner, self.hidden),
        }

    @property
    def matrix(self) -> int:
        """Values of the embedding matrix."""
        return self.vocabulary * self.hidden

    @property
    def products(self) -> int:
        """Values of the matrices that a token is multiplied by in all layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def parameters(self) -> int:
        """All parameters of the base model."""
        vectors = self.inner * (self.width + self.conv_bias + self.states + 1 + 1) + self.hidden
        vectors += self.bias * (2 * self.inner + self.hidden)
        return self.products + self.layers * vectors + self.hidden + self.matrix * (1 if self.tied else 2)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of the state of one row in all layers: (D, N) in float32 and W - 1 inputs of `itemsize`."""
        return self.layers * self.inner * (4 * self.states + itemsize * (self.width - 1))


def find_shape(section: ModelSection) -> tuple[Shape, str]:
    """Returns the shape of a base and where it was read, fetching nothing for the models known by name.

    A directory's `config.json` counts; for a hub id the one in the hub's cache, then what is known of the
    published 7B, then the configuration (a few kilobytes) is fetched.

    Raises:
        ModelError: There is no such model, or it is of another kind.
    """
    if find_path(section.base).exists():
        directory = resolve_base(section.base, section.revision, weights=False)
        return Shape.from_config(read_config(directory)), str(directory / "config.json")
    cached = _cached_config(section)
    if cached is not None:
        return Shape.from_config(read_config(cached.parent)), "the hub cache"
    if section.base in KNOWN_7B:
        return Shape.from_config(_7B_CONFIG), "the published model's shape"
    directory = resolve_base(section.base, section.revision, weights=False)
    return Shape.from_config(read_config(directory)), "the hub"


def _cached_config(section: ModelSection) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if not is_hub_id(section.base):  # `resolve_base` says so better
        return None
    found = try_to_load_from_cache(section.base, "config.json", revision=section.revision)
    return Path(found) if isinstance(found, str) else None
