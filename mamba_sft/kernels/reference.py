"""The definition of both operations: loops that can be checked by hand, differentiable by autograd.

They run in float64 when the input is float64 and in float32 otherwise, on any device, and are what every
other backend is tested against. Shapes are those of the public functions in `mamba_sft.kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, final_state)`; see `mamba_sft.kernels.selective_scan` for the arguments."""
    dtype = compute_dtype(u)
    batch, length, channels = u.shape
    x, dt, A, B, C = (operand.to(dtype) for operand in (u, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = softplus(dt)

    if initial_state is None:
        h = torch.zeros(batch, channels, A.shape[1], dtype=dtype, device=u.device)
    else:
        h = initial_state.to(dtype)
    starts = sequence_starts(seq_idx)
    outputs = []
    for t in range(length):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0.0, h)
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)

    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * silu(z.to(dtype))
    return y.to(u.dtype), h


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, final_state)`; see `mamba_sft.kernels.causal_conv1d` for the arguments."""
    dtype = compute_dtype(x)
    batch, length, channels = x.shape
    width = weight.shape[1]
    weight = weight.to(dtype)
    if initial_state is None:
        past = torch.zeros(batch, width - 1, channels, dtype=dtype, device=x.device)
    else:
        past = initial_state.to(dtype).transpose(1, 2)
    inputs = torch.cat([past, x.to(dtype)], dim=1)

    # The inputs before the row belong to its first sequence, so they carry that sequence's number: 0.
    starts = sequence_starts(seq_idx)
    if starts is None:
        numbers = torch.zeros(batch, length, dtype=torch.int64, device=x.device)
    else:
        numbers = starts.cumsum(1)
    numbers = pad(numbers, (width - 1, 0))

    y = torch.zeros(batch, length, channels, dtype=dtype, device=x.device)
    if bias is not None:
        y = y + bias.to(dtype)
    for tap in range(width):
        same_sequence = numbers[:, tap : tap + length] == numbers[:, width - 1 :]
        y = y + weight[:, tap] * torch.where(same_sequence[..., None], inputs[:, tap : tap + length], 0.0)
    if activation == "silu":
        y = silu(y)

    same_sequence = numbers[:, length:] == numbers[:, -1:]
    final_state = torch.where(same_sequence[..., None], inputs[:, length:], 0.0).transpose(1, 2)
    return y.to(x.dtype), final_state.to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that states and sums are held in: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sequence_starts(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L) bool: where a new sequence starts inside the row; never at t = 0, which continues the past."""
    if seq_idx is None:
        return None
    return pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
