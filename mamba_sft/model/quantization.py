"""Which projections of a base are stored in 4 or 8 bits: the same ones on every machine.

bitsandbytes (0.50.2, read 2026-11-27) has a second layout for 4-bit weights, blocks of 32 rows, into which it
packs a weight the first time a CPU with AVX512-BF16 evaluates it. A projection that has other than whole
blocks ends in an assertion there, so it stays in the compute dtype, on all devices: what was trained on one
is then merged, and goes on, on another. And no weight of ours is ever packed, because a packed one lets no
gradient through any more, reads as noise to what dequantizes it (DoRA), and rounds inputs and products to
bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mamba_sft.errors import ModelError
from mamba_sft.model.shape import Shape

UNQUANTIZED = ("lm_head", "dt_proj")
"""Kept in the compute dtype when the rest is quantized. The chunked loss multiplies by `lm_head.weight`;
`dt_proj` sits in the exponent of every state's decay, and keeping it takes 0.2 GB of a 7B model."""
PROJECTIONS = ("in_proj", "x_proj", "out_proj")
"""The others, which are quantized where their shape allows it."""
NF4_ROWS, NF4_COLUMNS = 32, 64
"""A packed weight is whole blocks of 32 rows, and its scales, one for 64 values, a whole number to a row."""
SMALLEST = (192, 384)
"""Rows and columns of the smallest projection that is stored in 4 bits: `out_proj` of the tiny base."""
_ALLOWED = 0.2
"""Relative RMS error of what `check_nf4` computes; rounding normal numbers to 4 bits makes 0.1 of it."""


def nf4_misfit(rows: int, columns: int) -> str | None:
    """Returns why a matrix is not stored in 4 bits, as a clause, or None if it is."""
    for count, what, block in ((rows, "rows", NF4_ROWS), (columns, "columns", NF4_COLUMNS)):
        if count % block:
            return f"its {count:,} {what} are not a multiple of {block}"
    return None


def quantizes(name: str, size: Sequence[int], quantization: str) -> bool:
    """Returns whether `load_model` quantizes a tensor.

    Args:
        name: As checkpoints have it, e.g. `backbone.layers.0.mixer.in_proj.weight`.
        size: Its dimensions: of a projection, rows (outputs) and columns (inputs).
        quantization: `model.quantization`.
    """
    module, _, kind = name.rpartition(".")
    if kind != "weight" or module.rpartition(".")[2] not in PROJECTIONS:
        return False
    rows, columns = size
    return quantization == "int8" or (quantization == "nf4" and nf4_misfit(rows, columns) is None)


def quantized_projections(shape: Shape, quantization: str) -> list[str]:
    """Returns the names of the projections that are quantized in every layer."""
    sizes = {name: (outputs, inputs) for name, (inputs, outputs) in shape.projections.items()}
    return [name for name in PROJECTIONS if quantizes(f"{name}.weight", sizes[name], quantization)]


def misfits(shape: Shape, quantization: str) -> dict[str, str]:
    """Returns the projections that only their shape keeps from being quantized, each with the reason."""
    if quantization != "nf4":
        return {}
    reasons = {name: nf4_misfit(*reversed(shape.projections[name])) for name in PROJECTIONS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def bitsandbytes_config(
    quantization: str,
    dtype: torch.dtype,
    unquantized: Iterable[str],
    *,
    storage: torch.dtype = torch.uint8,
) -> Any:
    """Returns the `BitsAndBytesConfig` that loads a base.

    Args:
        quantization: `nf4` or `int8`.
        dtype: What 4-bit weights are turned into for a product.
        unquantized: Names of the modules that are left as they are.
        storage: What 4-bit weights are stored as, several in one number.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(unquantized))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=list(unquantized),
    )


def never_pack(model: torch.nn.Module) -> None:
    """Keeps every 4-bit weight of a model in the layout that training reads, in place, on any CPU."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def settle_int8(model: torch.nn.Module) -> None:
    """Moves the scales of 8-bit weights to where products read them, in place.

    bitsandbytes does so at a layer's first call, in two steps: a second thread would find no weight.
    """
    from bitsandbytes.nn import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt) and module.weight.CB is not None:
            module.init_8bit_state()


def check_nf4() -> None:
    """Evaluates with, then trains through, a 4-bit layer of the smallest real shape, on the GPU or the CPU.

    Raises:
        ModelError: Values or gradients are not those of the weight.
        Exception: Whatever bitsandbytes raises where it cannot compute.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = SMALLEST
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer.to(device)
    never_pack(layer)
    x = torch.randn(4, columns, generator=generator).to(device)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    trained = layer.train()(x.requires_grad_())
    (gradient,) = torch.autograd.grad(trained.sum(), x)
    weight = weight.to(device)
    product = x.detach() @ weight.T
    _compare("an evaluated product", evaluated, product)
    _compare("a trained product", trained.detach(), product)
    _compare("a gradient", gradient, weight.sum(0).expand_as(gradient))


def _compare(what: str, found: torch.Tensor, exact: torch.Tensor) -> None:
    off = float((found - exact).norm() / exact.norm())
    if not off < _ALLOWED:
        raise ModelError(f"{what} of a 4-bit weight is off by {off:.0%} of its size")
