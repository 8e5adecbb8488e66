"""One token at a time on a CPU: what a mixer does between its projections when it decodes.

The same mathematics as `causal_conv1d` and `selective_scan`, for a single position and without gradients:
the states of the cache are overwritten where they lie, and nothing is prepared that only a long row repays.
The loops are compiled by numba, with the rows of `cpu_rows.py`; here lanes are the states of one channel,
which is how the cache stores them.

Operands come as addresses of contiguous float32 memory, since making arrays of them takes longer than the
loops do. Shapes leave out the time axis, which is 1.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numpy import float32

from mamba_sft.kernels.cpu_rows import (
    FUSED,
    LANES,
    LOG2E,
    ZERO,
    exp2,
    floats_at,
    get,
    lane,
    load,
    row_of,
    sigmoid,
    softplus,
    store,
    sum_lanes,
)

ROWS_CHECKSUM = "d5d684553761f0e7"  # of cpu_rows.py: a change there has to change this file too


@njit(**FUSED)
def add_norm_step(batch, size, residual, mixed, weight, epsilon, total, normed):
    """Put the sum of two (B, hidden_size) into total, and its RMS norm times a weight into normed."""
    shape = (batch, size)
    residual, mixed = carray(floats_at(residual), shape), carray(floats_at(mixed), shape)
    total, normed = carray(floats_at(total), shape), carray(floats_at(normed), shape)
    weight = carray(floats_at(weight), (size,))
    for b in range(batch):
        squares = row_of(ZERO)
        for d in range(0, size, LANES):
            width = min(LANES, size - d)
            row = load(residual[b], d, width) + load(mixed[b], d, width)
            store(row, total[b], d, width)
            squares = squares + row * row
        factor = float32(1 / np.sqrt(sum_lanes(squares) / size + epsilon))
        for d in range(size):
            normed[b, d] = weight[d] * (total[b, d] * factor)


@njit(**FUSED)
def conv_step(batch, channels, taps, xz, state, weight, bias, x):
    """Move the convolution one position on and apply SiLU.

    Args:
        batch: B.
        channels: D.
        taps: W.
        xz: The input in the first D columns, (B, 2 D).
        state: The last W inputs, (B, D, W); shifted, and the new one appended.
        weight: (D, W).
        bias: (D,), or 0 for none.
        x: Where the result goes, (B, D).
    """
    xz, x = carray(floats_at(xz), (batch, 2 * channels)), carray(floats_at(x), (batch, channels))
    state = carray(floats_at(state), (batch, channels, taps))
    weight = carray(floats_at(weight), (channels, taps))
    with_bias, bias = bias != 0, carray(floats_at(bias), (channels,))
    for b in range(batch):
        for d in range(channels):
            total = bias[d] if with_bias else ZERO
            for k in range(taps - 1):
                state[b, d, k] = state[b, d, k + 1]
                total += weight[d, k] * state[b, d, k]
            state[b, d, taps - 1] = xz[b, d]
            x[b, d] = total + weight[d, taps - 1] * xz[b, d]
        for d in range(0, channels, LANES):
            width = min(LANES, channels - d)
            row = load(x[b], d, width)
            store(row * sigmoid(row), x[b], d, width)


@njit(**FUSED)
def norm_step(batch, rank, states, parts, dt_epsilon, b_epsilon, c_epsilon):
    """Divide dt, B and C, the columns of (B, R + 2 N), each by its root mean square, in place."""
    parts = carray(floats_at(parts), (batch, rank + 2 * states))
    for b in range(batch):
        first = 0
        for size, epsilon in ((rank, dt_epsilon), (states, b_epsilon), (states, c_epsilon)):
            total = ZERO
            for j in range(first, first + size):
                total += parts[b, j] * parts[b, j]
            factor = float32(1 / np.sqrt(total / size + epsilon))
            for j in range(first, first + size):
                parts[b, j] *= factor
            first += size


@njit(**FUSED)
def scan_step(batch, channels, states, rank, x, dt, dt_bias, A_log, parts, D, xz, state, y):
    """Move the recurrence one position on: `selective_scan` with softplus, skip and gate.

    Args:
        batch: B.
        channels: D.
        states: N.
        rank: R.
        x: (B, D).
        dt: Step sizes before bias and softplus, (B, D).
        dt_bias: (D,).
        A_log: (D, N), the decay rates being -exp(A_log).
        parts: B and C in the last 2 N columns, (B, R + 2 N).
        D: (D,).
        xz: The gate in the last D columns, (B, 2 D).
        state: (B, D, N), overwritten.
        y: Where the result goes, (B, D).
    """
    x, xz = carray(floats_at(x), (batch, channels)), carray(floats_at(xz), (batch, 2 * channels))
    dt, y = carray(floats_at(dt), (batch, channels)), carray(floats_at(y), (batch, channels))
    dt_bias, D = carray(floats_at(dt_bias), (channels,)), carray(floats_at(D), (channels,))
    A_log, state = (
        carray(floats_at(A_log), (channels, states)),
        carray(floats_at(state), (batch, channels, states)),
    )
    parts = carray(floats_at(parts), (batch, rank + 2 * states))
    at_b, at_c = rank, rank + states
    sums = np.zeros(LANES, float32)
    for b in range(batch):
        part = parts[b]
        for d0 in range(0, channels, LANES):
            width = min(LANES, channels - d0)
            steps, _ = softplus(load(dt[b], d0, width) + load(dt_bias, d0, width))
            vx, vz = load(x[b], d0, width), load(xz[b], channels + d0, width)
            for j in range(width):
                step, h, logs = lane(steps, j), state[b, d0 + j], A_log[d0 + j]
                push, total = step * lane(vx, j), row_of(ZERO)
                for n in range(0, states, LANES):
                    size = min(LANES, states - n)
                    rate = (ZERO - LOG2E) * exp2(LOG2E * load(logs, n, size))
                    value = exp2(step * rate) * load(h, n, size) + push * load(part, at_b + n, size)
                    store(value, h, n, size)
                    total = total + value * load(part, at_c + n, size)
                sums[j] = sum_lanes(total)
            result = (get(sums, 0) + load(D, d0, width) * vx) * (vz * sigmoid(vz))
            store(result, y[b], d0, width)
