"""The loops behind the `cpu` backend, compiled by numba on first use and cached on disk after that.

A *task* is one batch row times one block of channels (for the backward scan: one group of blocks). A loop
function runs tasks `first` to `last` and releases the GIL, so `cpu.py` can run slices of the tasks in
threads; what a task writes depends on nothing but its inputs, hence the same bits come out whatever the
number of threads.

Channels are the SIMD axis: a block's values at one position are a row, which `cpu_rows.py` defines.
Everything is float32; the decay rates come scaled by log2(e), since the exponential computed here is 2**x.

Activations come as flat arrays with explicit strides (`_row_view` in `cpu.py`): element (b, t, d) of x is
`x[b * batch_stride + t * row_stride + d]`, so that the halves of a projection need no copy. In working
arrays row i is at `i * LANES`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy import float32

from mamba_sft.kernels.cpu_rows import (
    FOLDED,
    FUSED,
    INFINITE,
    INLINE,
    LANES,
    LN2,
    NAN,
    ONE,
    ZERO,
    absolute,
    add_sums,
    at_least,
    clear,
    decay,
    fold,
    get,
    lane,
    load,
    load_early,
    put,
    row_of,
    sigmoid,
    softplus,
    store,
    where_number,
    working_rows,
)
from mamba_sft.kernels.cpu_rows import (
    exp2 as exp2,  # noqa: PLC0414 - for those who measure it
)

ROWS_CHECKSUM = "d5d684553761f0e7"  # of cpu_rows.py: a change there has to change this file too

STATE_STRIDE = (
    64  # steps between two saved states: the trace of one chunk (128 KB at N = 16) fits in the L2 cache
)
MAX_STATES = 64  # the largest N
AHEAD = 4  # steps by which rows are prefetched
LIMIT = float32(125)  # up to which exponents of decays may skip the clamps


@njit(**INLINE)
def load_state(source, b, d0, width, states, state):
    """Copy (B, D, N) into state rows, zero beyond `width`."""
    clear(state, states)
    for n in range(states):
        for j in range(width):
            state[n * LANES + j] = source[b, d0 + j, n]


@njit(**INLINE)
def store_state(state, states, target, b, d0, width):
    """Copy state rows out to (B, D, N)."""
    for n in range(states):
        for j in range(width):
            target[b, d0 + j, n] = state[n * LANES + j]


@njit(**INLINE)
def step_size(dt, with_softplus):
    """What the recurrence uses of a row of raw step sizes, and its derivative.

    Not-a-number is made the one whose low bits are zero, because `exp2` adds to the bits of its result.
    """
    dt = where_number(dt, NAN)
    return softplus(dt) if with_softplus else (dt, row_of(ONE))


@njit(**INLINE)
def fastest_rate(rate, states):
    """The largest |rate| of each channel; not-a-number counts as infinite."""
    fastest = row_of(ZERO)
    for n in range(states):
        fastest = at_least(fastest, where_number(absolute(get(rate, n * LANES)), INFINITE))
    return fastest


@njit(**INLINE)
def is_bounded(longest, fastest):
    """Whether no step of a chunk is longer than what `decay` can do without clamps."""
    bounded = True
    for j in range(LANES):
        bounded &= lane(longest, j) * lane(fastest, j) < LIMIT
    return bounded


@njit(**INLINE)
def advance_step(states, h, rate, B, C, vdt, vdu, acc, bounded):
    """Move h one step on and return acc + C . h."""
    for n in range(states):
        at = n * LANES
        value = decay(vdt, get(rate, at), bounded) * get(h, at) + vdu * B[n]
        put(h, at, value)
        acc = acc + C[n] * value
    return acc


@njit(**FUSED)
def advance(start, stop, states, h, rate, B, C, starts, dts, dus, ys, bounded):
    """Run the recurrence over one chunk, adding C . h to ys."""
    for t in range(start, stop):
        i = (t - start) * LANES
        if starts[t]:
            clear(h, states)
        vdt, vdu, acc = get(dts, i), get(dus, i), get(ys, i)
        if bounded:
            put(ys, i, advance_step(states, h, rate, B[t], C[t], vdt, vdu, acc, True))
        else:
            put(ys, i, advance_step(states, h, rate, B[t], C[t], vdt, vdu, acc, False))


@njit(**FUSED)
def scan_forward(
    first, last, u, dt, z, strides, A, B, C, D, bias, with_softplus, gated, starts, initial, y, saved, final
):
    """Run the recurrence for tasks (b, block): y (B, L, D), the final states, and a state for every chunk.

    A is (N, D), scaled; D and bias (D,); B, C (B, L, N); starts (B, L) bytes; initial and final (B, D, N);
    saved (tasks, chunks, N * LANES), or nothing if it has no chunks. strides has a batch and a row stride
    each for u, dt, z.
    """
    _, length, states = B.shape
    channels, blocks = D.shape[0], (D.shape[0] + LANES - 1) // LANES
    working = working_rows(2 * states).reshape(2, states * LANES)
    h, rate = working[0], working[1]
    tile = working_rows(3 * STATE_STRIDE).reshape(3, STATE_STRIDE * LANES)
    dts, dus, ys = tile[0], tile[1], tile[2]

    for task in range(first, last):
        b, block = task // blocks, task % blocks
        d0 = block * LANES
        width = min(LANES, channels - d0)
        skip, vbias = load(D, d0, width), load(bias, d0, width)
        load_state(initial, b, d0, width, states, h)
        for n in range(states):
            put(rate, n * LANES, load(A[n], d0, width))
        fastest = fastest_rate(rate, states)

        for start in range(0, length, STATE_STRIDE):
            stop = min(start + STATE_STRIDE, length)
            if saved.shape[1] > 0:
                for at in range(0, states * LANES, LANES):
                    put(saved[task, start // STATE_STRIDE], at, get(h, at))
            longest = row_of(ZERO)
            for t in range(start, stop):
                i = (t - start) * LANES
                vu = load_early(u, b * strides[0] + t * strides[1] + d0, width, AHEAD * strides[1])
                vdt = load_early(dt, b * strides[2] + t * strides[3] + d0, width, AHEAD * strides[3])
                vdt, _ = step_size(vdt + vbias, with_softplus)
                longest = at_least(longest, where_number(absolute(vdt), INFINITE))
                put(dts, i, vdt)
                put(dus, i, vdt * vu)
                put(ys, i, skip * vu)
            bounded = is_bounded(longest, fastest)
            advance(start, stop, states, h, rate, B[b], C[b], starts[b], dts, dus, ys, bounded)
            for t in range(start, stop):
                acc = get(ys, (t - start) * LANES)
                if gated:
                    vz = load_early(z, b * strides[4] + t * strides[5] + d0, width, AHEAD * strides[5])
                    acc = acc * (vz * sigmoid(vz))
                store(acc, y, (b * length + t) * channels + d0, width)
        store_state(h, states, final, b, d0, width)


@njit(**INLINE)
def replay_step(states, h, rate, B, C, vdt, vdu, trace, first, bounded):
    """Move h one step on, keep each decay and decayed state from trace[first] on, and return C . h."""
    acc = row_of(ZERO)
    for n in range(states):
        at = n * LANES
        fading = decay(vdt, get(rate, at), bounded)
        kept = fading * get(h, at)
        value = kept + vdu * B[n]
        put(h, at, value)
        put(trace, first + 2 * at, fading)
        put(trace, first + 2 * at + LANES, kept)
        acc = acc + C[n] * value
    return acc


@njit(**FUSED)
def replay(start, stop, states, h, rate, B, C, starts, dts, us, ys, trace, bounded):
    """Run the recurrence again over one chunk, keeping what `sweep` needs of it; ys becomes C . h."""
    for t in range(start, stop):
        i = (t - start) * LANES
        if starts[t]:
            clear(h, states)
        vdt = get(dts, i)
        vdu, first = vdt * get(us, i), 2 * i * states
        if bounded:
            put(ys, i, replay_step(states, h, rate, B[t], C[t], vdt, vdu, trace, first, True))
        else:
            put(ys, i, replay_step(states, h, rate, B[t], C[t], vdt, vdu, trace, first, False))


@njit(**INLINE)
def sweep(i, t, states, g, rate, B, C, vdt, vdu, vy, trace, waiting_b, waiting_c, dB, dC, wanted, dA):
    """Take one step back: g, the gradient of the state after t, becomes that of the state before t.

    Returns the sums over n of rate * g * kept and of B * g.
    """
    by_rate, by_input = row_of(ZERO), row_of(ZERO)
    for n in range(states):
        at, kept_at = n * LANES, 2 * (i * states + n) * LANES
        bn, cn = B[t, n], C[t, n]
        kept = get(trace, kept_at + LANES)
        total = get(g, at) + cn * vy
        by_input = by_input + bn * total
        fold(waiting_b, n * FOLDED, vdu * total)
        fold(waiting_c, n * FOLDED, vy * (kept + vdu * bn))
        put(g, at, get(trace, kept_at) * total)
        along = total * kept
        by_rate = by_rate + get(rate, at) * along
        if wanted:
            put(dA, at, get(dA, at) + vdt * along)
    for n in range(0, states, FOLDED):
        add_sums(waiting_b, n * FOLDED, dB[t], n)
        add_sums(waiting_c, n * FOLDED, dC[t], n)
    return by_rate, by_input


@njit(**FUSED)
def scan_backward(
    first, last, u, dt, z, dy, strides, A, B, C, D, bias, with_softplus, gated, starts, saved, dfinal,
    rate_wanted, du, ddt, dz, dA, dB, dC, dD, dbias, dinitial,
):  # fmt: skip
    """Go back through tasks (b, group of blocks): replay each chunk from its saved state, then sweep it.

    Inputs as in `scan_forward`, strides with a fourth pair for dy. du, ddt, dz (B, L, D); dA (B, N, D); dB,
    dC (groups, B, L, N rounded up to a multiple of 8) start from zero; dD, dbias (B, D); dfinal, dinitial
    (B, D, N).
    """
    _, length, states = B.shape
    channels, blocks = D.shape[0], (D.shape[0] + LANES - 1) // LANES
    groups, chunks = dB.shape[0], (length + STATE_STRIDE - 1) // STATE_STRIDE
    trace = working_rows(2 * STATE_STRIDE * states)
    working = working_rows(5 * states).reshape(5, states * LANES)
    h, g, rate, rate_sum, rate_part = working[0], working[1], working[2], working[3], working[4]
    tile = working_rows(4 * STATE_STRIDE).reshape(4, STATE_STRIDE * LANES)
    us, dts, slopes, ys = tile[0], tile[1], tile[2], tile[3]
    waiting = np.zeros((2, dB.shape[3] * FOLDED), float32)
    waiting_b, waiting_c = waiting[0], waiting[1]

    for task in range(first, last):
        b, group = task // groups, task % groups
        for block in range(group * blocks // groups, (group + 1) * blocks // groups):
            d0 = block * LANES
            width = min(LANES, channels - d0)
            skip, vbias = load(D, d0, width), load(bias, d0, width)
            skip_sum, bias_sum = row_of(ZERO), row_of(ZERO)
            load_state(dfinal, b, d0, width, states, g)
            for n in range(states):
                put(rate, n * LANES, load(A[n], d0, width))
            fastest = fastest_rate(rate, states)
            clear(rate_sum, states)
            clear(rate_part, states)

            for chunk in range(chunks - 1, -1, -1):
                start, stop = chunk * STATE_STRIDE, min((chunk + 1) * STATE_STRIDE, length)
                for n in range(states):
                    put(h, n * LANES, get(saved[b * blocks + block, chunk], n * LANES))
                longest = row_of(ZERO)
                for t in range(start, stop):
                    i = (t - start) * LANES
                    vu = load_early(u, b * strides[0] + t * strides[1] + d0, width, AHEAD * strides[1])
                    vdt = load_early(dt, b * strides[2] + t * strides[3] + d0, width, AHEAD * strides[3])
                    vdt, slope = step_size(vdt + vbias, with_softplus)
                    longest = at_least(longest, where_number(absolute(vdt), INFINITE))
                    put(us, i, vu)
                    put(dts, i, vdt)
                    put(slopes, i, slope)
                bounded = is_bounded(longest, fastest)
                replay(start, stop, states, h, rate, B[b], C[b], starts[b], dts, us, ys, trace, bounded)

                for t in range(stop - 1, start - 1, -1):
                    i = (t - start) * LANES
                    vy = load_early(dy, b * strides[6] + t * strides[7] + d0, width, -AHEAD * strides[7])
                    if gated:
                        vz = load_early(z, b * strides[4] + t * strides[5] + d0, width, -AHEAD * strides[5])
                        s = sigmoid(vz)
                        vdz = vy * (get(ys, i) + skip * get(us, i)) * s * (ONE + vz * (ONE - s))
                        store(vdz, dz, (b * length + t) * channels + d0, width)
                        vy = vy * s * vz
                    put(ys, i, vy)

                skip_part, bias_part = row_of(ZERO), row_of(ZERO)
                for t in range(stop - 1, start - 1, -1):
                    i = (t - start) * LANES
                    at = (b * length + t) * channels + d0
                    vu, vdt, vy = get(us, i), get(dts, i), get(ys, i)
                    by_rate, by_input = sweep(
                        t - start, t, states, g, rate, B[b], C[b], vdt, vdt * vu, vy, trace, waiting_b,
                        waiting_c, dB[group, b], dC[group, b], rate_wanted, rate_part,
                    )  # fmt: skip
                    if starts[b, t]:
                        clear(g, states)
                    store(vdt * by_input + skip * vy, du, at, width)
                    by_dt = get(slopes, i) * (vu * by_input + LN2 * by_rate)
                    store(by_dt, ddt, at, width)
                    skip_part = skip_part + vy * vu
                    bias_part = bias_part + by_dt
                skip_sum = skip_sum + skip_part  # short sums first: less rounding in long rows
                bias_sum = bias_sum + bias_part
                if rate_wanted:
                    for at in range(0, states * LANES, LANES):
                        put(rate_sum, at, get(rate_sum, at) + get(rate_part, at))
                    clear(rate_part, states)

            store_state(g, states, dinitial, b, d0, width)
            store(skip_sum, dD[b], d0, width)
            store(bias_sum, dbias[b], d0, width)
            if rate_wanted:
                for n in range(states):
                    store(get(rate_sum, n * LANES), dA[b, n], d0, width)


@njit(**FUSED)
def conv_forward(first, last, x, strides, weight, bias, with_silu, begins, past, y):
    """Convolve tasks (b, block): y (B, L, D).

    weight is (W, D); begins (B, L) the first input that each position may see, counted from -(W - 1), the
    first row of past (B, W - 1, D).
    """
    taps, channels = weight.shape
    length, blocks = begins.shape[1], (channels + LANES - 1) // LANES
    tap = working_rows(taps)

    for task in range(first, last):
        b, block = task // blocks, task % blocks
        d0 = block * LANES
        width = min(LANES, channels - d0)
        vbias = load(bias, d0, width)
        for k in range(taps):
            put(tap, k * LANES, load(weight[k], d0, width))
        for t in range(length):
            earliest = t - (taps - 1)
            acc = vbias
            for s in range(max(earliest, begins[b, t]), t + 1):
                if s < 0:
                    vx = load(past[b, s + taps - 1], d0, width)
                else:
                    vx = load_early(x, b * strides[0] + s * strides[1] + d0, width, AHEAD * strides[1])
                acc = acc + get(tap, (s - earliest) * LANES) * vx
            if with_silu:
                acc = acc * sigmoid(acc)
            store(acc, y, (b * length + t) * channels + d0, width)


@njit(**FUSED)
def conv_backward(
    first, last, x, dy, strides, weight, bias, with_silu, begins, past, dx, dweight, dbias, dpast
):
    """Gradients for tasks (b, block): dx (B, L, D), dweight (B, W, D), dbias (B, D), dpast (B, W - 1, D).

    dx and dpast start from zero; each position adds to the inputs it saw. strides has a pair for x, then
    for dy.
    """
    taps, channels = weight.shape
    length, blocks = begins.shape[1], (channels + LANES - 1) // LANES
    working = working_rows(4 * taps).reshape(4, taps * LANES)
    tap, window, sums, parts = working[0], working[1], working[2], working[3]

    for task in range(first, last):
        b, block = task // blocks, task % blocks
        d0 = block * LANES
        width = min(LANES, channels - d0)
        vbias = load(bias, d0, width)
        for k in range(taps):
            put(tap, k * LANES, load(weight[k], d0, width))
        clear(sums, taps)
        clear(parts, taps)
        bias_sum, bias_part = row_of(ZERO), row_of(ZERO)
        for t in range(length):
            earliest = t - (taps - 1)
            lowest = max(earliest, begins[b, t])
            acc = vbias
            for s in range(lowest, t + 1):
                k = (s - earliest) * LANES
                if s < 0:
                    vx = load(past[b, s + taps - 1], d0, width)
                else:
                    vx = load_early(x, b * strides[0] + s * strides[1] + d0, width, AHEAD * strides[1])
                put(window, k, vx)
                acc = acc + get(tap, k) * vx
            vy = load_early(dy, b * strides[2] + t * strides[3] + d0, width, AHEAD * strides[3])
            if with_silu:
                gate = sigmoid(acc)
                vy = vy * (gate * (ONE + acc * (ONE - gate)))
            bias_part = bias_part + vy
            for s in range(lowest, t + 1):
                k = (s - earliest) * LANES
                put(parts, k, get(parts, k) + vy * get(window, k))
                if s < 0:
                    target, at = dpast[b, s + taps - 1], d0
                else:
                    target, at = dx, (b * length + s) * channels + d0
                store(load(target, at, width) + vy * get(tap, k), target, at, width)
            if (
                t % STATE_STRIDE == STATE_STRIDE - 1 or t == length - 1
            ):  # short sums first: less rounding in long rows
                for k in range(0, taps * LANES, LANES):
                    put(sums, k, get(sums, k) + get(parts, k))
                clear(parts, taps)
                bias_sum, bias_part = bias_sum + bias_part, row_of(ZERO)
        for k in range(taps):
            store(get(sums, k * LANES), dweight[b, k], d0, width)
        store(bias_sum, dbias[b], d0, width)
