"""`dt_proj` without its bias, which the scan adds in float32.

The bias is several times larger than the product it is added to, so rounding their sum to bfloat16 would put
an error of up to 1% on every step size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mamba_sft.kernels.twin import make_twin


def project_dt(dt_proj: nn.Module, dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """Apply `dt_proj` to (B, L, R) and leave its bias to the scan.

    The module is called whatever it is (LoRA around NF4, say), as a twin whose innermost layer has no bias:
    wrappers that look at the bias (DoRA takes it off again) see none either, and no other thread sees any
    change.

    Args:
        dt_proj: The projection, bare or wrapped.
        dt: Normed activations, (B, L, R).

    Returns:
        The (B, L, D) products, and the bias (D,) to be added to them. The bias is None where the module has
        none or has added it itself: offloaded weights come only when the module is called.
    """
    bias = innermost(dt_proj)._parameters.get("bias")
    if bias is None or bias.is_meta:
        return dt_proj(dt), None
    if torch.compiler.is_compiling():  # traced, not executed: nothing is swapped while the graph runs
        path = "base_layer." * _depth(dt_proj) + "bias"
        zeros = bias.new_zeros(()).expand_as(bias)
        return torch.func.functional_call(dt_proj, {path: zeros}, (dt,), tie_weights=False), bias
    return _without_bias(dt_proj)(dt), bias


def innermost(linear: Any) -> Any:
    """Return the layer that PEFT has wrapped, or the layer itself if it is bare."""
    while "base_layer" in linear._modules:
        linear = linear._modules["base_layer"]
    return linear


def _depth(linear: Any) -> int:
    base = linear._modules.get("base_layer")
    return 0 if base is None else 1 + _depth(base)


def _without_bias(linear: nn.Module) -> nn.Module:
    twin, base = make_twin(linear), linear._modules.get("base_layer")
    if base is None:
        twin._parameters["bias"] = None
    else:
        twin._modules["base_layer"] = _without_bias(base)
    return twin
