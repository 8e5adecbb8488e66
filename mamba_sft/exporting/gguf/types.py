"""The GGUF methods of the published table, and the type each of them gives a tensor.

llama.cpp's mixes (S, M, L) differ only in what they do to attention and feed-forward tensors. A Mamba has
none, so the 22 names are 13 different sets of tensors. What is left of `llama_tensor_get_type` for this
architecture is below; the tests hold it against llama.cpp's own quantizer, and the sizes against the
published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from mamba_sft.exporting.gguf.names import refuse_unknown

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
_Type = GGMLQuantizationType
ALIGNMENT = 32
"""Every tensor starts at a multiple of this many bytes."""

# What a type becomes where the row is no multiple of its 256-value blocks.
_FALLBACK = {
    _Type.IQ3_S: _Type.IQ4_NL,
    _Type.IQ4_XS: _Type.IQ4_NL,
    _Type.Q2_K: _Type.Q4_0,
    _Type.Q3_K: _Type.Q4_0,
    _Type.Q4_K: _Type.Q5_0,
    _Type.Q5_K: _Type.Q5_1,
    _Type.Q6_K: _Type.Q8_0,
}


@dataclass(frozen=True)
class Method:
    """One way to store a model's weights.

    Args:
        name: As it is asked for and as the file is called, e.g. `Q4_K_M`.
        base: The type of the projections and the embedding.
        file_type: What `general.file_type` says.
    """

    name: str
    base: GGMLQuantizationType
    file_type: LlamaFileType

    @property
    def quantized(self) -> bool:
        """Whether it has fewer bits than the floating-point types."""
        return self.base not in (F32, F16, BF16)

    def tensor_type(self, name: str, shape: tuple[int, ...], *, tied: bool) -> GGMLQuantizationType:
        """Returns the type of one tensor.

        Args:
            name: Its GGUF name.
            shape: Rows first, as in PyTorch.
            tied: Whether the embedding is the output matrix too.
        """
        if not quantizable(name, shape):
            return F32
        if not self.quantized:
            return self.base
        kind = self.base
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            fits = shape[-1] % block_size(kind) == 0
            kind = _Type.Q6_K if fits and kind != _Type.Q8_0 else _Type.Q8_0
        if shape[-1] % block_size(kind):
            kind = _FALLBACK.get(kind, F16)
        return kind if shape[-1] % block_size(kind) == 0 else F16


def _method(name: str, base: GGMLQuantizationType, file_type: str | None = None) -> Method:
    return Method(name, base, LlamaFileType[f"MOSTLY_{file_type or name}"])


_QUANTIZED = [
    _method("Q2_K", _Type.Q2_K),
    *[_method(name, _Type.IQ3_S) for name in ("IQ3_XS", "IQ3_S", "IQ3_M")],
    _method("Q3_K_S", _Type.Q3_K),
    _method("Q3_K", _Type.Q3_K, "Q3_K_M"),
    *[_method(name, _Type.Q3_K) for name in ("Q3_K_M", "Q3_K_L")],
    *[_method(name, getattr(_Type, name)) for name in ("IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1")],
    _method("Q4_K_S", _Type.Q4_K),
    _method("Q4_K", _Type.Q4_K, "Q4_K_M"),
    _method("Q4_K_M", _Type.Q4_K),
    *[_method(name, getattr(_Type, name)) for name in ("Q5_0", "Q5_1")],
    _method("Q5_K_S", _Type.Q5_K),
    _method("Q5_K", _Type.Q5_K, "Q5_K_M"),
    _method("Q5_K_M", _Type.Q5_K),
    *[_method(name, getattr(_Type, name)) for name in ("Q6_K", "Q8_0")],
]
_FLOAT = [Method("F32", F32, LlamaFileType.ALL_F32), _method("F16", F16), _method("BF16", BF16)]
METHODS = {method.name: method for method in [*_QUANTIZED, *_FLOAT]}
"""Every method by its name: the 22 of the published table, then the three floating-point formats."""


def choose_methods(names: list[str]) -> list[Method]:
    """Returns the methods asked for, each once, in the table's order; `all` means the 22 quantized ones.

    Raises:
        UsageError: A name is not one of them.
    """
    refuse_unknown(names)
    wanted: set[str] = set()
    for name in names:
        if name.lower() == "all":
            wanted.update(method.name for method in _QUANTIZED)
        else:
            wanted.add(name.upper())
    return [method for name, method in METHODS.items() if name in wanted]


def quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a tensor may be anything but float32: a matrix that a projection multiplies with."""
    small = "_norm" in name or "ssm_conv1d" in name
    return len(shape) > 1 and name.endswith(".weight") and not small


def block_size(kind: GGMLQuantizationType) -> int:
    """Returns how many values of a row are quantized together."""
    return int(GGML_QUANT_SIZES[kind][0])


def stored_bytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Returns the bytes that a tensor of this type and shape takes, padding not counted."""
    values, size = GGML_QUANT_SIZES[kind]
    return prod(shape) // int(values) * int(size)


def padded(nbytes: int) -> int:
    """Returns the bytes up to where the next tensor starts."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
