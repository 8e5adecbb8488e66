"""The `triton` backend: launches the kernels of `triton_scan.py` and `triton_conv.py` as autograd functions.

Inputs may be float32, bfloat16 or float16; everything inside is float32. Nothing is compiled until a shape
is first used, and then once: Triton keeps what it compiled on disk.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from mamba_sft.kernels import triton_conv, triton_math, triton_scan
from mamba_sft.kernels.reference import sequence_starts
from mamba_sft.kernels.triton_scan import CHUNK

INTERPRETED = triton.knobs.runtime.interpret
MAX_STATES = 64  # the largest N
FORWARD_TILE, BACKWARD_TILE = 1024, 512  # states times channels of a warp: 32 and 16 per thread
FORWARD_CHANNELS, BACKWARD_CHANNELS, CONV_CHANNELS = 64, 32, 128  # the most channels of a program
RESIDENT, WAVES = (
    8,
    2,
)  # programs of the backward that a multiprocessor's registers hold; how often to fill the card
MIN_SEGMENT = 4 * CHUNK.value  # a shorter one costs more in joining than it brings
SPAN = 128  # positions per program of the convolution
_boundaries = WeakTensorKeyDictionary()  # every layer of a model asks for those of the same tensor, twice
COMPILE = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


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
    if A.shape[1] > MAX_STATES:
        raise ValueError(f"backend 'triton' takes N up to {MAX_STATES}, got {A.shape[1]}")
    operands = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    boundaries = sequence_boundaries(seq_idx)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        return Scan.apply(*operands, dt_softplus, boundaries)
    y, final_state, _ = _scan_forward(*operands, dt_softplus, boundaries, keep=False)
    return y, final_state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(y, final_state)`; see `mamba_sft.kernels.causal_conv1d` for the arguments."""
    history, length = weight.shape[1] - 1, x.shape[1]
    past = None if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
    begins = sequence_boundaries(seq_idx)[1]
    y = Convolution.apply(x, weight, bias, past, activation == "silu", begins)

    if length < history:
        past = x.new_zeros(x.shape[0], history, x.shape[2]) if past is None else past
        tail = torch.cat([past[:, length:], x], dim=1)
    else:
        tail = x[:, length - history :]
    if begins is not None:
        places = torch.arange(length - history, length, device=x.device)
        last = begins[:, -1:]
        tail = torch.where(((places >= last) | (last < 0))[..., None], tail, 0.0)
    return y, tail.transpose(1, 2)


def sequence_boundaries(seq_idx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return `stops` and `begins`, (B, L) int32: where the next sequence begins, and where this one did.

    Behind the last sequence that is L; the one that continues what came before the row has begun at -1.
    """
    if seq_idx is None:
        return None, None
    known = _boundaries.get(seq_idx)
    if known is not None and known[0] == seq_idx._version:
        return known[1:]
    starts = sequence_starts(seq_idx)
    length = starts.shape[1]
    places = torch.arange(length, device=starts.device, dtype=torch.int32)
    begins = torch.where(starts, places, -1).cummax(1).values
    following = torch.where(starts, places, length).flip(1).cummin(1).values.flip(1)
    stops = torch.nn.functional.pad(following[:, 1:], (0, 1), value=length)
    stops, begins = stops.to(torch.int32).contiguous(), begins.to(torch.int32).contiguous()
    _boundaries[seq_idx] = (seq_idx._version, stops, begins)
    return stops, begins


class Scan(torch.autograd.Function):
    """`_scan_forward` and its gradient, for whichever operands require one."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:
        """Save the operands and one state per chunk."""
        y, final_state, saved = _scan_forward(*operands, keep=True)
        *tensors, ctx.dt_softplus, ctx.boundaries = operands
        ctx.save_for_backward(*tensors, saved)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        """Walk back; returns a gradient for each operand of the forward that requires one."""
        *tensors, saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(tensors[0])
        wanted = ctx.needs_input_grad
        gradients = _scan_backward(
            *tensors, ctx.dt_softplus, ctx.boundaries, saved, dy, dfinal, (wanted[2], wanted[5], wanted[7])
        )
        chosen = zip(gradients, tensors, wanted, strict=False)
        return *(g.to(x.dtype) if want else None for g, x, want in chosen), None, None


def _scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    boundaries: tuple[Tensor | None, Tensor | None],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, the final state, and if kept the state at the start of every chunk."""
    (batch, length, channels), N = u.shape, A.shape[1]
    stops, begins = boundaries
    dtype = u.dtype
    u, dt, z = (_rows(x) for x in (u, dt, z))
    D, dt_bias = _dense(D), _dense(dt_bias)
    rates, BC = _rates(A), torch.cat([B, C], dim=-1).float()
    parts, segment = _segments(u)
    new = {"dtype": torch.float32, "device": u.device}
    saved = torch.empty(batch, -(-length // CHUNK.value), N, channels, **new) if keep else None
    final = torch.empty(batch, N, channels, **new)
    y = torch.empty(batch, length, channels, dtype=u.dtype, device=u.device)
    entry = None if initial_state is None else initial_state.detach().float().transpose(1, 2).contiguous()
    shape = {"channels": channels, "N": N, **tile(N, FORWARD_TILE, FORWARD_CHANNELS)}
    blocks = triton.cdiv(channels, shape["BLOCK"])

    with _on(u):
        if parts > 1:
            local, joined = torch.empty(2, batch, parts, N, channels, **new)
            total = torch.empty(batch, parts, channels, **new)
            triton_scan.segment_states[(blocks, parts - 1, batch)](
                u, dt, rates, BC, dt_bias, stops, begins, local, total,
                u.stride(0), dt.stride(0), length, segment, parts, u.stride(1), dt.stride(1),
                SOFTPLUS=dt_softplus, **shape, **COMPILE,
            )  # fmt: skip
            triton_scan.connect[(blocks, batch)](
                rates,
                begins,
                entry,
                local,
                total,
                joined,
                length,
                segment,
                parts,
                REVERSE=False,
                **shape,
                **COMPILE,
            )
            entry = joined
        triton_scan.forward[(blocks, parts, batch)](
            u, dt, z, rates, BC, D, dt_bias, stops, begins, entry, y, saved, final,
            u.stride(0), dt.stride(0), 0 if z is None else z.stride(0), length, segment,
            u.stride(1), dt.stride(1), 0 if z is None else z.stride(1),
            SOFTPLUS=dt_softplus, **shape, **COMPILE,
        )  # fmt: skip
    return y.to(dtype), final.transpose(1, 2), saved


def _scan_backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    boundaries: tuple[Tensor | None, Tensor | None],
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first nine operands; wanted are those of A, D and dt_bias."""
    (batch, length, channels), N = u.shape, A.shape[1]
    stops, begins = boundaries
    u, dt, z, dy = (_rows(x) for x in (u, dt, z, dy))
    D, dt_bias = _dense(D), _dense(dt_bias)
    rates, BC = _rates(A), torch.cat([B, C], dim=-1).float()
    parts, segment = _segments(u)
    new = {"dtype": torch.float32, "device": u.device}
    later = None if dfinal is None else dfinal.float().transpose(1, 2).contiguous()
    z_strides = (0, 0) if z is None else (z.stride(0), z.stride(1))
    du, ddt, dz = (
        None if x is None else torch.empty(u.shape, dtype=x.dtype, device=x.device) for x in (u, dt, z)
    )
    per_segment = torch.empty(2, batch, parts, N, channels, **new)
    earlier, dA = per_segment[0], per_segment[1] if wanted[0] else None
    dD, dbias = (torch.empty(batch, parts, channels, **new) if want else None for want in wanted[1:])

    with _on(u):
        if parts > 1:
            shape = {"channels": channels, "N": N, **tile(N, FORWARD_TILE, FORWARD_CHANNELS)}
            blocks = triton.cdiv(channels, shape["BLOCK"])
            local, joined = torch.empty(2, batch, parts, N, channels, **new)
            total = torch.empty(batch, parts, channels, **new)
            triton_scan.segment_gradients[(blocks, parts - 1, batch)](
                dt, z, dy, rates, BC, dt_bias, begins, local, total,
                dt.stride(0), z_strides[0], dy.stride(0), length, segment, parts,
                dt.stride(1), z_strides[1], dy.stride(1),
                SOFTPLUS=dt_softplus, **shape, **COMPILE,
            )  # fmt: skip
            triton_scan.connect[(blocks, batch)](
                rates,
                begins,
                later,
                local,
                total,
                joined,
                length,
                segment,
                parts,
                REVERSE=True,
                **shape,
                **COMPILE,
            )
            later = joined

        shape = {"channels": channels, "N": N, **tile(N, BACKWARD_TILE, BACKWARD_CHANNELS)}
        blocks, steps = triton.cdiv(channels, shape["BLOCK"]), window(_capability(u), N, wanted[0])
        slots = triton.cdiv(CHUNK.value, steps)
        scratch = torch.empty(batch * parts * blocks, slots, shape["STATES"], shape["BLOCK"], **new)
        dBC = torch.empty(blocks, batch, length, 2 * N, **new)
        triton_scan.backward[(blocks, parts, batch)](
            u, dt, z, dy, rates, BC, D, dt_bias, stops, begins, saved, later, scratch,
            du, ddt, dz, dBC, dA, dD, dbias, earlier,
            u.stride(0), dt.stride(0), z_strides[0], dy.stride(0), length, segment,
            u.stride(1), dt.stride(1), z_strides[1], dy.stride(1),
            SOFTPLUS=dt_softplus, WINDOW=steps, **shape, **COMPILE,
        )  # fmt: skip
    dB, dC = dBC.sum(0).split(N, dim=-1)
    dA = None if dA is None else dA.sum((0, 1)).t()
    dD, dbias = (None if x is None else x.sum((0, 1)) for x in (dD, dbias))
    return du, ddt, dA, dB, dC, dD, dz, dbias, earlier[:, 0].transpose(1, 2)


class Convolution(torch.autograd.Function):
    """The convolution and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        past: Tensor | None,
        with_silu: bool,
        begins: Tensor | None,
    ) -> Tensor:
        """Convolve; the input is all that has to be kept."""
        ctx.save_for_backward(x, weight, bias, past)
        ctx.with_silu, ctx.begins = with_silu, begins
        dtype, x = x.dtype, _rows(x)
        batch, length, channels = x.shape
        y = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(channels, CONV_CHANNELS), triton.cdiv(length, SPAN), batch)
        with _on(x):
            triton_conv.forward[grid](
                x, _taps(weight), _dense(bias), begins, _dense(past), y, x.stride(0), length, SPAN,
                x.stride(1), channels, weight.shape[1], CONV_CHANNELS, with_silu, **COMPILE,
            )  # fmt: skip
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Convolve again, and give every input its share."""
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes on the first look
        x, weight, bias, past = saved
        wanted = ctx.needs_input_grad
        x, dy = _rows(x), _rows(dy)
        (batch, length, channels), width = x.shape, weight.shape[1]
        spans = triton.cdiv(length, SPAN)
        new = {"dtype": torch.float32, "device": x.device}
        dx = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
        dpast = torch.zeros(batch, width - 1, channels, **new) if wanted[3] else None
        dweight = torch.empty(batch, spans, width, channels, **new) if wanted[1] else None
        dbias = torch.empty(batch, spans, channels, **new) if wanted[2] else None
        with _on(x):
            triton_conv.backward[(triton.cdiv(channels, CONV_CHANNELS), spans, batch)](
                x, dy, _taps(weight), _dense(bias), ctx.begins, _dense(past),
                dx, dpast, dweight, dbias, x.stride(0), dy.stride(0), length, SPAN,
                x.stride(1), dy.stride(1), channels, width, CONV_CHANNELS, ctx.with_silu, **COMPILE,
            )  # fmt: skip
        gradients = (
            dx,
            None if dweight is None else dweight.sum((0, 1)).t(),
            None if dbias is None else dbias.sum((0, 1)),
            dpast,
        )
        chosen = zip(gradients, saved, wanted, strict=False)
        return *(g.to(value.dtype) if want else None for g, value, want in chosen), None, None


def _rows(x: Tensor | None) -> Tensor | None:
    """Return x with channels contiguous, in a type that the card can convert."""
    if x is None:
        return None
    x = x.detach()
    if x.dtype == torch.bfloat16 and _capability(x) < (8, 0):
        x = x.float()
    return x if x.stride(2) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    """Return x without gaps, or None if there is nothing of it."""
    return None if x is None or x.numel() == 0 else x.detach().contiguous()


def _rates(A: Tensor) -> Tensor:
    return (A.detach().float() * triton_math.LOG2E.value).t().contiguous()


def _taps(weight: Tensor) -> Tensor:
    return weight.detach().float().t().contiguous()


def tile(N: int, size: int, most: int) -> dict[str, int]:
    """Return the power of two that holds N states, and how many channels a program takes with them."""
    states = triton.next_power_of_2(N)
    return {"STATES": states, "BLOCK": min(most, size // states)}


def _segments(u: Tensor) -> tuple[int, int]:
    """Return how many segments a row is cut into, and their length.

    Cutting costs a second run through the forward, so it is done only where rows and channels do not fill
    the card.
    """
    batch, length, channels = u.shape
    cards = 1 if INTERPRETED else torch.cuda.get_device_properties(u.device).multi_processor_count
    programs = batch * triton.cdiv(channels, BACKWARD_CHANNELS)
    parts = max(1, min(round(WAVES * RESIDENT * cards / programs), length // MIN_SEGMENT))
    segment = triton.cdiv(triton.cdiv(length, parts), CHUNK.value) * CHUNK.value
    return triton.cdiv(length, segment), segment


def window(capability: tuple[int, int], N: int, rate_wanted: bool) -> int:
    """Return how long a window the compiler can keep in registers on cards of a compute capability."""
    if N > 16:
        return 2
    return 3 if rate_wanted or capability[0] == 10 else 4


def _capability(u: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(u.device) if u.is_cuda else (8, 0)


def _on(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Launch on the card that holds x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
