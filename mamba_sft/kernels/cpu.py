"""The `cpu` backend: runs the loops of `cpu_loops.py` in threads, on behalf of `autograd.py`.

Inputs may be float32, bfloat16 or float16; everything inside is float32. The forward of the scan keeps one
state per `STATE_STRIDE` steps, nothing else of its own; the backward replays one chunk at a time from there.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mamba_sft.kernels import cpu_loops as loops
from mamba_sft.kernels.reference import sequence_starts

logger = logging.getLogger(__name__)

NAME, MAX_STATES = "cpu", loops.MAX_STATES
GROUPS = 32  # the most partial sums of dB and dC per batch row, hence the most threads on one row
SMALL = 1 << 18  # state updates below which threads cost more than they bring


def scan_boundaries(seq_idx: Tensor | None, u: Tensor) -> np.ndarray:
    """(B, L) bytes: 1 where the state restarts."""
    starts = sequence_starts(seq_idx)
    return np.zeros(u.shape[:2], np.uint8) if starts is None else starts.to(torch.uint8).contiguous().numpy()


def conv_boundaries(seq_idx: Tensor | None, x: Tensor, history: int) -> np.ndarray:
    """(B, L): the first input that each position sees, -history where that is the past before the row."""
    starts = sequence_starts(seq_idx)
    if starts is None:
        return np.full(x.shape[:2], -history)
    return torch.where(starts, torch.arange(x.shape[1]), -history).cummax(1).values.numpy()


def _empty(*shape: int) -> Tensor:
    """Return uninitialised float32 memory, if it is large in huge pages: numpy asks for them, torch does not.

    The kernel hands out memory page by page on first use, and for small pages that took a tenth of the time
    of a scan with its gradient.
    """
    memory = np.empty(math.prod(shape) + 16, np.float32)
    start = (-memory.ctypes.data % 64) // 4
    return torch.from_numpy(memory[start : start + math.prod(shape)].reshape(shape))


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
    starts: np.ndarray,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the final state, and (if kept) the state at the start of every chunk."""
    (batch, length, channels), states = u.shape, A.shape[1]
    tasks = batch * _blocks(channels)
    chunks = -(-length // loops.STATE_STRIDE) if keep else 0
    y = _empty(batch, length, channels)
    final_state = torch.empty(batch, channels, states)
    saved = _empty(tasks, chunks, states * loops.LANES)
    rows = [_row_view(x) for x in (u, dt, u if z is None else z)]
    _run(
        loops.scan_forward,
        tasks,
        u.numel() * states,
        *(flat for flat, _, _ in rows),
        np.array([stride for _, *strides in rows for stride in strides]),
        *_parameters(A, B, C, D, dt_bias),
        dt_softplus,
        z is not None,
        starts,
        _dense(initial_state, final_state.shape),
        y.view(-1).numpy(),
        saved.numpy(),
        final_state.numpy(),
    )
    return y.to(u.dtype), final_state, saved


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
    starts: np.ndarray,
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Return the float32 gradients of the first nine operands; those of absent ones mean nothing."""
    (batch, length, channels), states, rate_wanted = u.shape, A.shape[1], wanted[2]
    groups = min(_blocks(channels), GROUPS, max(4, channels // (4 * states)))  # half an activation of memory
    du, ddt = _empty(2, batch, length, channels)
    dz = _empty(batch, length, channels) if z is not None else torch.empty(0)
    dA = torch.empty(batch, states, channels) if rate_wanted else torch.empty(batch, states, 0)
    dB, dC = _empty(2, groups, batch, length, -(-states // 8) * 8).zero_()
    dD, dbias = torch.empty(2, batch, channels)
    dinitial = torch.empty(batch, channels, states)
    rows = [_row_view(x) for x in (u, dt, u if z is None else z, dy)]
    _run(
        loops.scan_backward,
        batch * groups,
        u.numel() * states,
        *(flat for flat, _, _ in rows),
        np.array([stride for _, *strides in rows for stride in strides]),
        *_parameters(A, B, C, D, dt_bias),
        dt_softplus,
        z is not None,
        starts,
        saved.numpy(),
        _dense(dfinal, dinitial.shape),
        rate_wanted,
        *(x.view(-1).numpy() for x in (du, ddt, dz)),
        *(x.numpy() for x in (dA, dB, dC, dD, dbias, dinitial)),
    )
    dB, dC = (partial.sum(0)[..., :states] for partial in (dB, dC))
    return du, ddt, dA.sum(0).t(), dB, dC, dD.sum(0), dz, dbias.sum(0), dinitial


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, with_silu: bool, begins: np.ndarray
) -> Tensor:
    """Return y, (B, L, D), in the dtype of x; past is (B, W - 1, D)."""
    batch, length, channels = x.shape
    y = _empty(batch, length, channels)
    flat, *strides = _row_view(x)
    _run(
        loops.conv_forward,
        batch * _blocks(channels),
        x.numel() * weight.shape[1],
        flat,
        np.array(strides),
        *_filters(x, weight, bias, past, with_silu, begins),
        y.view(-1).numpy(),
    )
    return y.to(x.dtype)


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    with_silu: bool,
    begins: np.ndarray,
    dy: Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Return the float32 gradients of the first four operands; those of absent ones mean nothing."""
    (batch, length, channels), width = x.shape, weight.shape[1]
    dx, dpast = torch.zeros(batch, length, channels), torch.zeros(batch, width - 1, channels)
    dweight, dbias = torch.empty(batch, width, channels), torch.empty(batch, channels)
    rows = [_row_view(x), _row_view(dy)]
    _run(
        loops.conv_backward,
        batch * _blocks(channels),
        x.numel() * width,
        *(flat for flat, _, _ in rows),
        np.array([stride for _, *strides in rows for stride in strides]),
        *_filters(x, weight, bias, past, with_silu, begins),
        dx.view(-1).numpy(),
        *(g.numpy() for g in (dweight, dbias, dpast)),
    )
    return dx, dweight.sum(0).t(), dbias.sum(0), dpast


def _blocks(channels: int) -> int:
    return -(-channels // loops.LANES)


def _row_view(x: Tensor) -> tuple[np.ndarray, int, int]:
    """Return float32 memory that starts at x[0, 0, 0], and the batch and row strides of x in it."""
    x = x.detach().float()
    if x.stride(2) != 1:
        x = x.contiguous()
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).numpy(), x.stride(0), x.stride(1)


def _dense(x: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 C-contiguous memory with the values of x, or zeros if there is no x."""
    return np.zeros(shape, np.float32) if x is None else x.detach().float().contiguous().numpy()


def _copied(x: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return what `_dense` does, in memory of its own.

    Weights are read this way: memory that numpy has looked at can never be given back by torch, and FSDP
    does so with the whole weights after every block.
    """
    if x is None:
        return np.zeros(shape, np.float32)
    return x.detach().float().clone(memory_format=torch.contiguous_format).numpy()


def _parameters(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, bias: Tensor | None
) -> tuple[np.ndarray, ...]:
    rates = (A.detach().float() * 1.4426950408889634).t()
    channels = (A.shape[0],)
    return (
        _dense(rates, rates.shape),
        _dense(B, B.shape),
        _dense(C, C.shape),
        _copied(D, channels),
        _copied(bias, channels),
    )


def _filters(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, with_silu: bool, begins: np.ndarray
) -> tuple[Any, ...]:
    channels, width = weight.shape
    weight, bias = _copied(weight.t(), (width, channels)), _copied(bias, (channels,))
    return weight, bias, with_silu, begins, _dense(past, (x.shape[0], width - 1, channels))


def _run(loop: Callable[..., None], tasks: int, work: int, *arguments: Any) -> None:
    """Run all tasks of a loop, with the help of threads if there is enough work."""
    _announce()
    threads = min(torch.get_num_threads(), tasks) if work >= SMALL else 1
    if threads == 1:
        loop(0, tasks, *arguments)
        return
    slices = min(tasks, 8 * threads)  # more slices than threads: something else may be holding up a core
    remaining = iter([(tasks * i // slices, tasks * (i + 1) // slices) for i in range(slices)])

    def work_off() -> None:
        for first, last in remaining:
            loop(first, last, *arguments)

    helpers = [_pool(os.getpid(), threads).submit(work_off) for _ in range(threads - 1)]
    work_off()
    for helper in helpers:
        helper.result()


@functools.cache
def _announce() -> None:
    """Say once why the first call takes long, where it does."""
    if not _were_compiled():
        logger.info("compiling the CPU kernels, once: some 20 s; then they are read from numba's cache")


def _were_compiled() -> bool:
    """Whether numba's cache holds the loops as they are now, going by the dates of the files."""
    cache, source = Path(loops.scan_forward.stats.cache_path), Path(loops.__file__)
    kept = [path.stat().st_mtime for path in cache.glob(f"{source.stem}.scan_forward-*.nbi")]
    return bool(kept) and max(kept) >= source.stat().st_mtime


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a forked child does not inherit its parent's and gets new ones."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mamba-sft-cpu")
