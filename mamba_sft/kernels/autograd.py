"""Both operations as autograd functions, for whichever backend computes them.

A backend is a module, `cpu` or `triton_ops`, with `NAME` and `MAX_STATES`; with `scan_boundaries(seq_idx, u)`
and `conv_boundaries(seq_idx, x, history)`, which turn sequence numbers into what its loops want; and with
`scan_forward`, `scan_backward`, `conv_forward` and `conv_backward`, which know nothing of autograd.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def selective_scan(
    kernels: ModuleType,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, final_state)`; see `mamba_sft.kernels.selective_scan` for the arguments."""
    if A.shape[1] > kernels.MAX_STATES:
        raise ValueError(f"backend {kernels.NAME!r} takes N up to {kernels.MAX_STATES}, got {A.shape[1]}")
    operands = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    boundaries = kernels.scan_boundaries(seq_idx, u)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        return Scan.apply(kernels, *operands, dt_softplus, boundaries)
    y, final_state, _ = kernels.scan_forward(*operands, dt_softplus, boundaries, keep=False)
    return y, final_state


def causal_conv1d(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, final_state)`; see `mamba_sft.kernels.causal_conv1d` for the arguments."""
    history, length = weight.shape[1] - 1, x.shape[1]
    past = None if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
    begins = kernels.conv_boundaries(seq_idx, x, history)
    y = Convolution.apply(kernels, x, weight, bias, past, activation == "silu", begins)

    if length < history:
        past = x.new_zeros(x.shape[0], history, x.shape[2]) if past is None else past
        tail = torch.cat([past[:, length:], x], dim=1)
    else:
        tail = x[:, length - history :]
    if seq_idx is not None:
        places = torch.arange(length - history, length, device=x.device)
        last = torch.as_tensor(begins)[:, -1:]  # negative where that sequence continues the past
        tail = torch.where(((places >= last) | (last < 0))[..., None], tail, 0.0)
    return y, tail.transpose(1, 2)


class Scan(torch.autograd.Function):
    """A backend's scan and its gradient, for whichever operands require one."""

    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, *operands: Any) -> tuple[Tensor, Tensor]:
        """Save the operands and one state per chunk."""
        y, final_state, saved = kernels.scan_forward(*operands, keep=True)
        *tensors, ctx.dt_softplus, ctx.boundaries = operands
        ctx.kernels = kernels
        ctx.save_for_backward(*tensors, saved)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return a gradient for each operand of the forward that requires one."""
        *tensors, saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(tensors[0])
        wanted = ctx.needs_input_grad[1:]
        gradients = ctx.kernels.scan_backward(
            *tensors, ctx.dt_softplus, ctx.boundaries, saved, dy, dfinal, wanted
        )
        return None, *_chosen(gradients, tensors, wanted), None, None


class Convolution(torch.autograd.Function):
    """A backend's convolution and its gradient."""

    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, *operands: Any) -> Tensor:
        """Convolve; the input is all that has to be kept."""
        *tensors, ctx.with_silu, ctx.begins = operands
        ctx.kernels = kernels
        ctx.save_for_backward(*tensors)
        return kernels.conv_forward(*operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Convolve again, and give every input its share."""
        tensors = ctx.saved_tensors  # once: activation checkpointing recomputes on the first look
        wanted = ctx.needs_input_grad[1:]
        gradients = ctx.kernels.conv_backward(*tensors, ctx.with_silu, ctx.begins, dy, wanted)
        return None, *_chosen(gradients, tensors, wanted), None, None


def _chosen(
    gradients: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients that are wanted, each in the type of what it is the gradient of."""
    return [g.to(x.dtype) if want else None for g, x, want in zip(gradients, tensors, wanted, strict=False)]
