"""The loops behind the `cpu` backend, compiled by numba on first use and cached on disk after that.

A *task* is one batch row times one block of channels (for the backward scan: one group of blocks). A loop
function runs tasks `first` to `last` and releases the GIL, so `cpu.py` can run slices of the tasks in
threads; what a task writes depends on nothing but its inputs, hence the same bits come out whatever the
number of threads.

Channels are the SIMD axis: every innermost loop runs over the `LANES` channels of a block, held in arrays
on the stack whose sizes are constants. That is what lets LLVM keep rows in vector registers without
aliasing checks. Everything is float32; the decay rates come scaled by log2(e), since the exponential
computed here is 2**x.

Activations come as flat arrays with explicit strides (`_row_view` in `cpu.py`): element (b, t, d) of x is
`x[b * batch_stride + t * row_stride + d]`, so that the halves of a projection need no copy.

All of it is one file because numba's cache looks only at the file of the function it compiles.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import float32

LANES = 32  # channels of a block: four AVX2 registers or two AVX-512 ones
CHUNK = 64  # steps between two saved states: the trace of one chunk (256 KB at N = 16) fits in the L2 cache
MAX_STATES = 64  # the largest N
STATE_ROWS, TILE_ROWS = 5 * MAX_STATES, 4 * CHUNK
AHEAD = 4  # steps by which rows are prefetched

ZERO, ONE, TWO = float32(0), float32(1), float32(2)
LOG2E, LN2 = float32(1.4426950408889634), float32(0.6931471805599453)
ROUNDER = float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits of a float32
LOWEST, HIGHEST = float32(-126), float32(128)
# Minimax fit of (2**f - 1) / f on [-1/2, 1/2]: 2**0 is exactly 1, so that slow decays are not biased.
E1, E2, E3 = float32(0.6931472029), float32(0.2402264791), float32(0.05550332469)
E4, E5, E6 = float32(0.009618437368), float32(0.001339887525), float32(0.0001535336101)
# Minimax fit of (atanh(s) / s - 1) / s**2 over s**2 on [0, 1/9].
T1, T2, T3, T4 = float32(0.3333315508), float32(0.2001255704), float32(0.1397883419), float32(0.1409576949)

# Contraction to fused multiply-adds is safe everywhere; reassociation (needed to sum a row in vector
# registers) is not: it would undo the rounding trick in `exp2`. So they are given function by function.
FUSED = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}
INLINE = {**FUSED, "inline": "always"}
SUMMED = {**FUSED, "fastmath": {"contract", "reassoc", "nsz"}, "forceinline": True}
COPIED = {**FUSED, "forceinline": True}


@intrinsic(prefer_literal=True)
def stack_rows(typing_context, count):
    """Return a pointer to `count` rows of uninitialised floats in the stack frame of the caller."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    array_type = ir.ArrayType(ir.FloatType(), count.literal_value * LANES)

    def generate(context, builder, signature, arguments):
        pointer = cgutils.alloca_once(builder, array_type)
        pointer.align = 64
        return builder.bitcast(pointer, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(count), generate


@intrinsic
def power_of_two(typing_context, shifted):
    """Return 2**n for n + ROUNDER, whose low bits hold n: they become the exponent of the result."""

    def generate(context, builder, signature, arguments):
        integer = ir.IntType(32)
        bits = builder.bitcast(arguments[0], integer)
        bits = builder.add(builder.shl(bits, ir.Constant(integer, 23)), ir.Constant(integer, 127 << 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), generate


@njit(**INLINE)
def exp2(x):
    """2**x to 1 ulp; below -126 it stays at 2**-126, and not-a-number stays what it is."""
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    shifted = x + ROUNDER
    f = x - (shifted - ROUNDER)
    p = ((((E6 * f + E5) * f + E4) * f + E3) * f + E2) * f + E1
    return (p * f + ONE) * power_of_two(shifted)


@njit(**INLINE)
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return ONE / (ONE + exp2(-LOG2E * x))


@njit(**INLINE)
def softplus(x):
    """log(1 + exp(x)) and its derivative, to 2 ulp for any x: log1p(e) = 2 atanh(e / (2 + e))."""
    e = exp2(-LOG2E * abs(x))
    s = e / (TWO + e)
    q = s * s
    log1p = TWO * (s + s * q * (((T4 * q + T3) * q + T2) * q + T1))
    inverse = ONE / (ONE + e)
    return (x if x > ZERO else ZERO) + log1p, (inverse if x > ZERO else e * inverse)


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line that holds `array[index]`; the index may lie outside the array."""

    def generate(context, builder, signature, arguments):
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(view.data, [arguments[1]]), ir.IntType(8).as_pointer())
        integer = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, integer, integer, integer])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, integer(0), integer(3), integer(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@njit(**COPIED)
def load(source, start, width, row, ahead):
    """Copy `width` floats into a row, fill it up with zeros, and prefetch the row `ahead` of this one.

    Consecutive steps are a whole row of the activations apart, most often in another page of memory, where
    the hardware does not prefetch.
    """
    part = source[start : start + width]
    for j in range(width):
        row[j] = part[j]
    for j in range(width, LANES):
        row[j] = ZERO
    for j in range(0, LANES, 16):
        prefetch(source, start + ahead + j)


@njit(**COPIED)
def store(row, target, start, width):
    """Copy the first `width` floats of a row out."""
    part = target[start : start + width]
    for j in range(width):
        part[j] = row[j]


@njit(**INLINE)
def load_state(source, b, d0, width, states, state):
    """Copy (B, D, N) into state rows: (N, LANES), zero beyond `width`."""
    for n in range(states):
        for j in range(LANES):
            state[n, j] = ZERO
        for j in range(width):
            state[n, j] = source[b, d0 + j, n]


@njit(**INLINE)
def store_state(state, states, target, b, d0, width):
    """Copy state rows out to (B, D, N)."""
    for n in range(states):
        for j in range(width):
            target[b, d0 + j, n] = state[n, j]


@njit(**INLINE)
def step_sizes(bias, with_softplus, dt, slope):
    """Turn a row of raw step sizes into what the recurrence uses, in place, and its derivative."""
    for j in range(LANES):
        dt[j] += bias[j]
        slope[j] = ONE
    if with_softplus:
        for j in range(LANES):
            dt[j], slope[j] = softplus(dt[j])


@njit(**INLINE)
def clear(rows, count):
    """Zero the first rows."""
    for n in range(count):
        for j in range(LANES):
            rows[n, j] = ZERO


@njit(**FUSED)
def scan_forward(
    first, last, u, dt, z, strides, A, B, C, D, bias, with_softplus, gated, starts, initial, y, saved, final
):
    """Run the recurrence for tasks (b, block): y (B, L, D), the final states, and a state for every chunk.

    A is (N, D), scaled; D and bias (D,); B, C (B, L, N); starts (B, L) bytes; initial and final (B, D, N);
    saved (tasks, chunks, N, LANES), or nothing if it has no chunks. strides has a batch and a row stride
    each for u, dt, z.
    """
    _, length, states = B.shape
    channels, blocks = D.shape[0], (D.shape[0] + LANES - 1) // LANES
    h = carray(stack_rows(MAX_STATES), (MAX_STATES, LANES))
    rate = carray(stack_rows(MAX_STATES), (MAX_STATES, LANES))
    row = carray(stack_rows(8), (8, LANES))
    vu, vdt, vz, vdu, acc = row[0], row[1], row[2], row[3], row[4]
    slope, skip, vbias = row[5], row[6], row[7]

    for task in range(first, last):
        b, block = task // blocks, task % blocks
        d0 = block * LANES
        width = min(LANES, channels - d0)
        load(D, d0, width, skip, 0)
        load(bias, d0, width, vbias, 0)
        load_state(initial, b, d0, width, states, h)
        for n in range(states):
            load(A[n], d0, width, rate[n], 0)

        for t in range(length):
            if t % CHUNK == 0 and saved.shape[1] > 0:
                for n in range(states):
                    for j in range(LANES):
                        saved[task, t // CHUNK, n, j] = h[n, j]
            if starts[b, t]:
                clear(h, states)
            load(u, b * strides[0] + t * strides[1] + d0, width, vu, AHEAD * strides[1])
            load(dt, b * strides[2] + t * strides[3] + d0, width, vdt, AHEAD * strides[3])
            step_sizes(vbias, with_softplus, vdt, slope)
            for j in range(LANES):
                vdu[j] = vdt[j] * vu[j]
                acc[j] = skip[j] * vu[j]
            for n in range(states):
                bn, cn = B[b, t, n], C[b, t, n]
                for j in range(LANES):
                    value = exp2(vdt[j] * rate[n, j]) * h[n, j] + vdu[j] * bn
                    h[n, j] = value
                    acc[j] += cn * value
            if gated:
                load(z, b * strides[4] + t * strides[5] + d0, width, vz, AHEAD * strides[5])
                for j in range(LANES):
                    acc[j] *= vz[j] * sigmoid(vz[j])
            store(acc, y, (b * length + t) * channels + d0, width)
        store_state(h, states, final, b, d0, width)


@njit(**INLINE)
def replay(start, stop, states, h, rate, B, C, starts, dts, us, ys, trace):
    """Run the recurrence again over one chunk, keeping each decay and decayed state; ys becomes C . h."""
    for t in range(start, stop):
        i = t - start
        if starts[t]:
            clear(h, states)
        for j in range(LANES):
            ys[i, j] = ZERO
        for n in range(states):
            bn, cn = B[t, n], C[t, n]
            for j in range(LANES):
                decay = exp2(dts[i, j] * rate[n, j])
                kept = decay * h[n, j]
                value = kept + dts[i, j] * us[i, j] * bn
                h[n, j] = value
                ys[i, j] += cn * value
                trace[i, n, 0, j] = decay
                trace[i, n, 1, j] = kept


@njit(**SUMMED)
def dot(x, y):
    """Sum of the products of two rows."""
    total = ZERO
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@njit(**INLINE)
def sweep(
    i, t, states, g, rate, B, C, vdt, vdu, vy, trace, by_rate, by_input, totals, hs, dB, dC, wanted, dA
):
    """Take one step back: g, the gradient of the state after t, becomes that of the state before t."""
    for j in range(LANES):
        by_rate[j] = ZERO
        by_input[j] = ZERO
    for n in range(states):
        bn, cn = B[t, n], C[t, n]
        for j in range(LANES):
            kept = trace[i, n, 1, j]
            total = g[n, j] + cn * vy[j]
            totals[j] = total
            hs[j] = kept + vdu[j] * bn
            by_rate[j] += rate[n, j] * total * kept
            by_input[j] += bn * total
            g[n, j] = trace[i, n, 0, j] * total
        dB[t, n] += dot(vdu, totals)
        dC[t, n] += dot(vy, hs)
        if wanted:
            for j in range(LANES):
                dA[n, j] += vdt[j] * totals[j] * trace[i, n, 1, j]


@njit(**FUSED)
def scan_backward(
    first, last, u, dt, z, dy, strides, A, B, C, D, bias, with_softplus, gated, starts, saved, dfinal,
    rate_wanted, du, ddt, dz, dA, dB, dC, dD, dbias, dinitial,
):  # fmt: skip
    """Go back through tasks (b, group of blocks): replay each chunk from its saved state, then sweep it.

    Inputs as in `scan_forward`, strides with a fourth pair for dy. du, ddt, dz (B, L, D); dA (B, N, D); dB,
    dC (groups, B, L, N) start from zero; dD, dbias (B, D); dfinal, dinitial (B, D, N).
    """
    _, length, states = B.shape
    channels, blocks = D.shape[0], (D.shape[0] + LANES - 1) // LANES
    groups, chunks = dB.shape[0], (length + CHUNK - 1) // CHUNK
    trace = np.empty((CHUNK, states, 2, LANES), float32)
    state = carray(stack_rows(STATE_ROWS), (5, MAX_STATES, LANES))
    h, g, rate, rate_sum, rate_part = state[0], state[1], state[2], state[3], state[4]
    tile = carray(stack_rows(TILE_ROWS), (4, CHUNK, LANES))
    us, dts, slopes, ys = tile[0], tile[1], tile[2], tile[3]
    row = carray(stack_rows(13), (13, LANES))
    skip, vbias, vz, out, by_rate, by_input = row[0], row[1], row[2], row[3], row[4], row[5]
    skip_sum, bias_sum, skip_part, bias_part = row[6], row[7], row[8], row[9]
    vdu, totals, hs = row[10], row[11], row[12]

    for task in range(first, last):
        b, group = task // groups, task % groups
        for block in range(group * blocks // groups, (group + 1) * blocks // groups):
            d0 = block * LANES
            width = min(LANES, channels - d0)
            load(D, d0, width, skip, 0)
            load(bias, d0, width, vbias, 0)
            load_state(dfinal, b, d0, width, states, g)
            for n in range(states):
                load(A[n], d0, width, rate[n], 0)
            clear(rate_sum, states)
            clear(rate_part, states)
            clear(row[6:8], 2)

            for chunk in range(chunks - 1, -1, -1):
                start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, length)
                for n in range(states):
                    for j in range(LANES):
                        h[n, j] = saved[b * blocks + block, chunk, n, j]
                for t in range(start, stop):
                    i = t - start
                    load(u, b * strides[0] + t * strides[1] + d0, width, us[i], AHEAD * strides[1])
                    load(dt, b * strides[2] + t * strides[3] + d0, width, dts[i], AHEAD * strides[3])
                    step_sizes(vbias, with_softplus, dts[i], slopes[i])
                replay(start, stop, states, h, rate, B[b], C[b], starts[b], dts, us, ys, trace)

                clear(row[8:10], 2)
                for t in range(stop - 1, start - 1, -1):
                    i = t - start
                    at = (b * length + t) * channels + d0
                    if gated:
                        load(z, b * strides[4] + t * strides[5] + d0, width, vz, -AHEAD * strides[5])
                        load(dy, b * strides[6] + t * strides[7] + d0, width, out, -AHEAD * strides[7])
                        for j in range(LANES):
                            s = sigmoid(vz[j])
                            before_gate = ys[i, j] + skip[j] * us[i, j]
                            ys[i, j] = out[j] * s * vz[j]
                            out[j] *= before_gate * s * (ONE + vz[j] * (ONE - s))
                        store(out, dz, at, width)
                    else:
                        load(dy, b * strides[6] + t * strides[7] + d0, width, ys[i], -AHEAD * strides[7])
                    for j in range(LANES):
                        vdu[j] = dts[i, j] * us[i, j]
                    sweep(
                        i, t, states, g, rate, B[b], C[b], dts[i], vdu, ys[i], trace, by_rate, by_input,
                        totals, hs, dB[group, b], dC[group, b], rate_wanted, rate_part,
                    )  # fmt: skip
                    if starts[b, t]:
                        clear(g, states)
                    for j in range(LANES):
                        out[j] = dts[i, j] * by_input[j] + skip[j] * ys[i, j]
                        skip_part[j] += ys[i, j] * us[i, j]
                    store(out, du, at, width)
                    for j in range(LANES):
                        out[j] = slopes[i, j] * (us[i, j] * by_input[j] + LN2 * by_rate[j])
                        bias_part[j] += out[j]
                    store(out, ddt, at, width)
                for j in range(LANES):  # short sums first: less rounding in long rows
                    skip_sum[j] += skip_part[j]
                    bias_sum[j] += bias_part[j]
                if rate_wanted:
                    for n in range(states):
                        for j in range(LANES):
                            rate_sum[n, j] += rate_part[n, j]
                    clear(rate_part, states)

            store_state(g, states, dinitial, b, d0, width)
            store(skip_sum, dD[b], d0, width)
            store(bias_sum, dbias[b], d0, width)
            if rate_wanted:
                for n in range(states):
                    store(rate_sum[n], dA[b, n], d0, width)


@njit(**FUSED)
def conv_forward(first, last, x, strides, weight, bias, with_silu, begins, past, y):
    """Convolve tasks (b, block): y (B, L, D).

    weight is (W, D); begins (B, L) the first input that each position may see, counted from -(W - 1), the
    first row of past (B, W - 1, D).
    """
    width_of_filter, channels = weight.shape
    length, blocks = begins.shape[1], (channels + LANES - 1) // LANES
    taps = np.empty((width_of_filter, LANES), float32)
    row = carray(stack_rows(3), (3, LANES))
    vbias, vx, acc = row[0], row[1], row[2]

    for task in range(first, last):
        b, block = task // blocks, task % blocks
        d0 = block * LANES
        width = min(LANES, channels - d0)
        load(bias, d0, width, vbias, 0)
        for k in range(width_of_filter):
            load(weight[k], d0, width, taps[k], 0)
        for t in range(length):
            earliest = t - (width_of_filter - 1)
            for j in range(LANES):
                acc[j] = vbias[j]
            for s in range(max(earliest, begins[b, t]), t + 1):
                if s < 0:
                    load(past[b, s + width_of_filter - 1], d0, width, vx, 0)
                else:
                    load(x, b * strides[0] + s * strides[1] + d0, width, vx, AHEAD * strides[1])
                for j in range(LANES):
                    acc[j] += taps[s - earliest, j] * vx[j]
            if with_silu:
                for j in range(LANES):
                    acc[j] *= sigmoid(acc[j])
            store(acc, y, (b * length + t) * channels + d0, width)


@njit(**FUSED)
def conv_backward(
    first, last, x, dy, strides, weight, bias, with_silu, begins, past, dx, dweight, dbias, dpast
):
    """Gradients for tasks (b, block): dx (B, L, D), dweight (B, W, D), dbias (B, D), dpast (B, W - 1, D).

    dx and dpast start from zero; each position adds to the inputs it saw. strides has a pair for x, then
    for dy.
    """
    width_of_filter, channels = weight.shape
    length, blocks = begins.shape[1], (channels + LANES - 1) // LANES
    taps = np.empty((width_of_filter, LANES), float32)
    window = np.empty((width_of_filter, LANES), float32)
    sums = np.empty((width_of_filter, LANES), float32)
    parts = np.empty((width_of_filter, LANES), float32)
    row = carray(stack_rows(5), (5, LANES))
    vbias, vd, acc, bias_sum, bias_part = row[0], row[1], row[2], row[3], row[4]

    for task in range(first, last):
        b, block = task // blocks, task % blocks
        d0 = block * LANES
        width = min(LANES, channels - d0)
        load(bias, d0, width, vbias, 0)
        for k in range(width_of_filter):
            load(weight[k], d0, width, taps[k], 0)
        clear(sums, width_of_filter)
        clear(parts, width_of_filter)
        clear(row[3:5], 2)
        for t in range(length):
            earliest = t - (width_of_filter - 1)
            lowest = max(earliest, begins[b, t])
            for j in range(LANES):
                acc[j] = vbias[j]
            for s in range(lowest, t + 1):
                k = s - earliest
                if s < 0:
                    load(past[b, s + width_of_filter - 1], d0, width, window[k], 0)
                else:
                    load(x, b * strides[0] + s * strides[1] + d0, width, window[k], AHEAD * strides[1])
                for j in range(LANES):
                    acc[j] += taps[k, j] * window[k, j]
            load(dy, b * strides[2] + t * strides[3] + d0, width, vd, AHEAD * strides[3])
            if with_silu:
                for j in range(LANES):
                    gate = sigmoid(acc[j])
                    vd[j] *= gate * (ONE + acc[j] * (ONE - gate))
            for j in range(LANES):
                bias_part[j] += vd[j]
            for s in range(lowest, t + 1):
                k = s - earliest
                for j in range(LANES):
                    parts[k, j] += vd[j] * window[k, j]
                if s < 0:
                    target = dpast[b, s + width_of_filter - 1, d0 : d0 + width]
                else:
                    start = (b * length + s) * channels + d0
                    target = dx[start : start + width]
                for j in range(width):
                    target[j] += vd[j] * taps[k, j]
            if t % CHUNK == CHUNK - 1 or t == length - 1:  # short sums first: less rounding in long rows
                for k in range(width_of_filter):
                    for j in range(LANES):
                        sums[k, j] += parts[k, j]
                for j in range(LANES):
                    bias_sum[j] += bias_part[j]
                    bias_part[j] = ZERO
                clear(parts, width_of_filter)
        for k in range(width_of_filter):
            store(sums[k], dweight[b, k], d0, width)
        store(bias_sum, dbias[b], d0, width)
