"""The `triton` backend: launches `triton_scan.py` and `triton_conv.py`, on behalf of `autograd.py`.

Inputs may be float32, bfloat16 or float16; everything inside is float32. Nothing is compiled until a shape
is first used, and then once: Triton keeps what it compiled on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton.backends.nvidia.compiler import CUDAOptions

from mamba_sft.kernels import launching, triton_conv, triton_math, triton_scan
from mamba_sft.kernels.reference import sequence_starts

INTERPRETED = triton.knobs.runtime.interpret
NAME, MAX_STATES = "triton", 64
FORWARD_TILE, BACKWARD_TILE = 1024, 512  # states times channels of a warp: 32 and 16 per thread
FORWARD_CHANNELS, BACKWARD_CHANNELS, CONV_CHANNELS = 64, 32, 128  # the most channels of a program
STATE_STRIDE = 64  # the most steps between two saved states, and what segments are multiples of
MIN_SEGMENT = 4 * STATE_STRIDE  # a shorter one costs more in joining than it brings
PARTIAL_BYTES = 256 << 20  # the most that partial sums of dB and dC may take
SPAN = 128  # positions per program of the convolution
COMPILE = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
PTXAS_KNOWN = frozenset(CUDAOptions.__dataclass_fields__)  # options that this Triton takes
BY_ROW = (0, 1, 3, 4, 6, 8)  # operands that have a row for each row of the batch
_boundaries = WeakTensorKeyDictionary()  # every layer of a model asks for those of the same tensor, twice


def conv_boundaries(seq_idx: Tensor | None, x: Tensor, history: int) -> Tensor | None:
    """Return `begins`, as `scan_boundaries` does."""
    return scan_boundaries(seq_idx, x)[1]


def scan_boundaries(seq_idx: Tensor | None, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
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


def scan_forward(
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
    stride = _stride(u, N, A.requires_grad)
    saved = torch.empty(batch, -(-length // stride), N, channels, **new) if keep else None
    final = torch.empty(batch, N, channels, **new)
    y = torch.empty(batch, length, channels, dtype=u.dtype, device=u.device)
    entry = None if initial_state is None else initial_state.detach().float().transpose(1, 2).contiguous()
    shape = {"channels": channels, "N": N, **tile(N, FORWARD_TILE, FORWARD_CHANNELS)}
    blocks = triton.cdiv(channels, shape["BLOCK"])

    with _on(u):
        if parts > 1:
            local = torch.empty(batch, parts, N, channels, **new)
            total = torch.empty(batch, parts, channels, **new)
            triton_scan.segment_states[(blocks, parts - 1, batch)](
                u, dt, rates, BC, dt_bias, stops, begins, local, total,
                u.stride(0), dt.stride(0), length, segment, parts, u.stride(1), dt.stride(1),
                SOFTPLUS=dt_softplus, **shape, **COMPILE,
            )  # fmt: skip
            entry = _joined(rates, begins, entry, local, total, segment, length, REVERSE=False, **shape)
        triton_scan.forward[(blocks, parts, batch)](
            u, dt, z, rates, BC, D, dt_bias, stops, begins, entry, y, saved, final,
            u.stride(0), dt.stride(0), 0 if z is None else z.stride(0), length, segment,
            u.stride(1), dt.stride(1), 0 if z is None else z.stride(1),
            SOFTPLUS=dt_softplus, STRIDE=stride, **shape, **COMPILE,
            **launching.forward_options(_capability(u), PTXAS_KNOWN),
        )  # fmt: skip
    return y.to(dtype), final.transpose(1, 2), saved


def scan_backward(
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
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first nine operands, of A, D and dt_bias only where wanted."""
    operands = (u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus)
    batch, token = u.shape[0], _partial_bytes(u, A.shape[1])
    rows = max(1, PARTIAL_BYTES // (token * min(MIN_SEGMENT, u.shape[1])))
    if batch <= rows:
        return _with_best_choice(operands, boundaries, saved, dy, dfinal, wanted)
    parts = []
    for at in range(0, batch, rows):
        some = slice(at, at + rows)
        mine = tuple(x[some] if i in BY_ROW and x is not None else x for i, x in enumerate(operands))
        bounds = tuple(None if x is None else x[some] for x in boundaries)
        end = None if dfinal is None else dfinal[some]
        parts.append(_with_best_choice(mine, bounds, saved[some], dy[some], end, wanted))
    return tuple(_together(i, [part[i] for part in parts]) for i in range(9))


def _together(at: int, found: list[Tensor | None]) -> Tensor | None:
    """Join the gradients of an operand that were found for some rows each."""
    if found[0] is None:
        return None
    return torch.cat(found) if at in BY_ROW else torch.stack(found).sum(0)


def _with_best_choice(
    operands: tuple[Any, ...],
    boundaries: tuple[Tensor | None, Tensor | None],
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Run the backward as the table says, or on a GPU as was fastest there.

    Which way is fastest may differ from one search to the next, and with it the order of float32 sums: where
    PyTorch is told to be deterministic, and while a graph is captured, the table decides.
    """
    u, N = operands[0], operands[2].shape[1]
    choice = launching.Choice(launching.window(_capability(u), N, wanted[2]))

    def run(choice: launching.Choice) -> tuple[Tensor | None, ...]:
        return _backward(*operands, boundaries, saved, dy, dfinal, wanted, choice)

    if not _may_search(u):
        return run(choice)
    ways = launching.candidates(choice)
    return run(launching.fastest(_key(operands, boundaries, wanted), ways, lambda way: _seconds(run, way)))


def _may_search(u: Tensor) -> bool:
    if INTERPRETED or not u.is_cuda or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _key(operands: tuple[Any, ...], boundaries: tuple[Any, ...], wanted: tuple[bool, ...]) -> str:
    """Say what the fastest way depends on; lengths to the next power of two, as packing makes many."""
    u, N = operands[0], operands[2].shape[1]
    device = torch.cuda.get_device_properties(u.device)
    absent = [x is None for x in (*operands[5:9], boundaries[0])]
    shape = (u.shape[0], triton.next_power_of_2(u.shape[1]), u.shape[2], N)
    source = hashlib.sha256(Path(triton_scan.__file__).read_bytes()).hexdigest()[:16]
    return repr((
        device.name, device.major, device.minor, shape, [str(x.dtype) for x in operands[:2]], absent,
        operands[9], wanted[2], triton.__version__, source,
    ))  # fmt: skip


def _seconds(run: Callable[[launching.Choice], Any], way: launching.Choice) -> float:
    """Time one way on the current stream: the best of three, after one that compiles."""
    run(way)
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(way)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def _backward(
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
    wanted: tuple[bool, ...],
    choice: launching.Choice,
) -> tuple[Tensor | None, ...]:
    """Run the backward one way; as `scan_backward`, whose rows are few enough here."""
    (batch, length, channels), N = u.shape, A.shape[1]
    stops, begins = boundaries
    u, dt, z, dy = (_rows(x) for x in (u, dt, z, dy))
    D, dt_bias = _dense(D), _dense(dt_bias)
    rates, BC = _rates(A), torch.cat([B, C], dim=-1).float()
    token = batch * _partial_bytes(u, N)
    parts, segment = _segments(u, triton.cdiv(token * length, PARTIAL_BYTES), choice.waves)
    most = max(PARTIAL_BYTES // token // STATE_STRIDE, 1) * STATE_STRIDE  # positions whose sums may be kept
    segment = min(segment, most)
    parts = triton.cdiv(length, segment)
    new = {"dtype": torch.float32, "device": u.device}
    later = None if dfinal is None else dfinal.float().transpose(1, 2).contiguous()
    z_strides = (0, 0) if z is None else (z.stride(0), z.stride(1))
    du, ddt, dz = (
        None if x is None else torch.empty(u.shape, dtype=x.dtype, device=x.device) for x in (u, dt, z)
    )
    per_segment = torch.empty(2, batch, parts, N, channels, **new)
    earlier, dA = per_segment[0], per_segment[1] if wanted[2] else None
    dD, dbias = (
        torch.empty(batch, parts, channels, **new) if want else None for want in (wanted[5], wanted[7])
    )

    with _on(u):
        if parts > 1:
            shape = {"channels": channels, "N": N, **tile(N, FORWARD_TILE, FORWARD_CHANNELS)}
            blocks = triton.cdiv(channels, shape["BLOCK"])
            local = torch.empty(batch, parts, N, channels, **new)
            total = torch.empty(batch, parts, channels, **new)
            triton_scan.segment_gradients[(blocks, parts - 1, batch)](
                dt, z, dy, rates, BC, dt_bias, begins, local, total,
                dt.stride(0), z_strides[0], dy.stride(0), length, segment, parts,
                dt.stride(1), z_strides[1], dy.stride(1),
                SOFTPLUS=dt_softplus, **shape, **COMPILE,
            )  # fmt: skip
            later = _joined(rates, begins, later, local, total, segment, length, REVERSE=True, **shape)

        shape = {"channels": channels, "N": N, **tile(N, BACKWARD_TILE, BACKWARD_CHANNELS)}
        blocks, steps = triton.cdiv(channels, shape["BLOCK"]), choice.window
        stride = _stride(u, N, wanted[2])
        group = min(shape["STATES"], choice.group_tile // shape["BLOCK"])
        at_once = min(parts, max(1, PARTIAL_BYTES // (token * segment)))  # segments of one launch
        span = at_once * segment
        programs = batch * at_once * blocks
        scratch = torch.empty(programs, stride // steps, shape["STATES"], shape["BLOCK"], **new)
        partial = torch.empty(blocks, batch, min(span, length), 2 * N, **new)
        dBC = torch.empty(batch, length, 2 * N, **new)
        for part in range(0, parts, at_once):
            triton_scan.backward[(blocks, min(at_once, parts - part), batch)](
                u, dt, z, dy, rates, BC, D, dt_bias, stops, begins, saved, later, scratch,
                du, ddt, dz, partial, dA, dD, dbias, earlier,
                u.stride(0), dt.stride(0), z_strides[0], dy.stride(0), length, segment,
                part, parts, partial.shape[2],
                u.stride(1), dt.stride(1), z_strides[1], dy.stride(1),
                SOFTPLUS=dt_softplus, WINDOW=steps, GROUP=group, STRIDE=stride, **shape, **COMPILE,
                **launching.backward_options(_capability(u), steps, PTXAS_KNOWN),
            )  # fmt: skip
            here = dBC[:, part * segment : part * segment + span]
            torch.sum(partial[:, :, : here.shape[1]], 0, out=here)
    dB, dC = dBC.split(N, dim=-1)
    dA = None if dA is None else dA.sum((0, 1)).t()
    dD, dbias = (None if x is None else x.sum((0, 1)) for x in (dD, dbias))
    return du, ddt, dA, dB, dC, dD, dz, dbias, earlier[:, 0].transpose(1, 2)


def _joined(
    rates: Tensor,
    begins: Tensor | None,
    given: Tensor | None,
    local: Tensor,
    total: Tensor,
    segment: int,
    length: int,
    **shape: Any,
) -> Tensor:
    """Return the states before all segments, or the gradients behind them, (B, S, N, D); see `connect`."""
    joined = torch.empty_like(local)
    batch, parts = local.shape[:2]
    triton_scan.connect[(triton.cdiv(shape["channels"], shape["BLOCK"]), batch)](
        rates, begins, given, local, total, joined, length, segment, parts, **shape, **COMPILE
    )
    return joined


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    with_silu: bool,
    begins: Tensor | None,
) -> Tensor:
    """Return y, (B, L, D), in the dtype of x; past is (B, W - 1, D)."""
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


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    with_silu: bool,
    begins: Tensor | None,
    dy: Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the first four operands, of all but x only where wanted."""
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
            x, dy, _taps(weight), _dense(bias), begins, _dense(past),
            dx, dpast, dweight, dbias, x.stride(0), dy.stride(0), length, SPAN,
            x.stride(1), dy.stride(1), channels, width, CONV_CHANNELS, with_silu, **COMPILE,
        )  # fmt: skip
    dweight = None if dweight is None else dweight.sum((0, 1)).t()
    return dx, dweight, None if dbias is None else dbias.sum((0, 1)), dpast


def _rows(x: Tensor | None) -> Tensor | None:
    """Return x with channels contiguous, in a type that the GPU can convert."""
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


def _segments(u: Tensor, pieces: int = 1, waves: int = launching.WAVES) -> tuple[int, int]:
    """Return how many segments a row is cut into, and their length.

    Cutting costs a second run through the forward, so it is done only where rows and channels do not fill
    the GPU, or where what is kept of all of them would not fit: then each of `pieces` launches fills it.
    """
    batch, length, channels = u.shape
    multiprocessors = 1 if INTERPRETED else launching.card_of(u.device).multiprocessors
    programs = batch * triton.cdiv(channels, BACKWARD_CHANNELS)
    filled = max(1, round(waves * launching.RESIDENT * multiprocessors / programs))
    parts = max(1, min(filled * pieces, length // MIN_SEGMENT))
    segment = triton.cdiv(triton.cdiv(length, parts), STATE_STRIDE) * STATE_STRIDE
    return triton.cdiv(length, segment), segment


def _partial_bytes(u: Tensor, N: int) -> int:
    """Return the bytes of partial sums of dB and dC for a token: one of each for every block of channels."""
    block = tile(N, BACKWARD_TILE, BACKWARD_CHANNELS)["BLOCK"]
    return 4 * 2 * N * triton.cdiv(u.shape[2], block)


def _stride(u: Tensor, N: int, rate_wanted: bool) -> int:
    """Return how many steps lie between two saved states."""
    if INTERPRETED or not u.is_cuda:
        return STATE_STRIDE
    return launching.state_stride(launching.card_of(u.device), N, rate_wanted)


def _capability(u: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(u.device) if u.is_cuda else (8, 0)


def _on(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Launch on the GPU that holds x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
