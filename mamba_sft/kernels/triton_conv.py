"""The causal convolution in Triton, forward and backward; `triton_ops.py` launches these kernels.

A program owns a block of channels and a span of one row. It walks along the span with the inputs that the
filter covers in registers, so every activation is read once (and W - 1 more at the edge of each span): the
memory is what limits this operation. `begins` is what it is in `triton_scan.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_sft.kernels.triton_math import load_row, only_if, sigmoid

UNROLL = tl.constexpr(4)  # positions loaded together, so that their latencies overlap


@triton.jit
def load_input(x, past, t, low, has_d, at_d, row: tl.constexpr, channels: tl.constexpr, W: tl.constexpr):
    """Load the input at position t, or what came before the row, or zero before position `low`."""
    here = load_row(x + t * row + at_d, only_if((t >= 0) & (t >= low), has_d))
    if past is not None:
        here += load_row(
            past + (t + W - 1) * channels + at_d, only_if((t < 0) & (t >= 1 - W) & (low < 0), has_d)
        )
    return here


@triton.jit(do_not_specialize=["length", "span"])
def forward(
    x, weight, bias, begins, past, y, x_batch, length, span,
    x_row: tl.constexpr, channels: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolve one span; program (block of channels, span, row).

    x, y (B, L, D); weight (W, D); bias (D,) or None; past, the W - 1 inputs before the row, (B, W - 1, D)
    or None.
    """
    at_d, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2).to(tl.int64)
    has_d = at_d < channels
    first = tl.program_id(1).to(tl.int64) * span
    last = tl.minimum(first + span, length)
    x += row * x_batch
    y += row * length * channels
    if past is not None:
        past += row * (W - 1) * channels
    low = -1
    if begins is not None:
        begins += row * length
        low = tl.load(begins + first)

    taps, seen = (), ()
    for k in tl.static_range(W):
        taps = taps + (load_row(weight + k * channels + at_d, has_d),)
    for k in tl.static_range(W - 1):
        seen = seen + (load_input(x, past, first - (W - 1) + k, low, has_d, at_d, x_row, channels, W),)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = load_row(bias + at_d, has_d)

    for t in range(first, last, UNROLL):
        new = ()
        for i in tl.static_range(UNROLL):
            new = new + (load_row(x + (t + i) * x_row + at_d, only_if(t + i < last, has_d)),)
        for i in tl.static_range(UNROLL):
            if begins is not None:
                fresh = tl.load(begins + t + i, mask=t + i < last, other=-1) == t + i
                kept = ()
                for k in tl.static_range(W - 1):
                    kept = kept + (tl.where(fresh, 0.0, seen[k]),)
                seen = kept
            seen = seen + (new[i],)
            y_t = shift
            for k in tl.static_range(W):
                y_t += taps[k] * seen[k]
            if SILU:
                y_t *= sigmoid(y_t)
            tl.store(y + (t + i) * channels + at_d, y_t, mask=only_if(t + i < last, has_d))
            seen = seen[1:]


@triton.jit(do_not_specialize=["length", "span"])
def backward(
    x, dy, weight, bias, begins, past, dx, dpast, dweight, dbias, x_batch, dy_batch, length, span,
    x_row: tl.constexpr, dy_row: tl.constexpr, channels: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Walk back along one span, from W - 1 positions behind it, whose outputs saw its inputs.

    dx (B, L, D); dpast (B, W - 1, D) float32 or None; dweight (B, spans, W, D) and dbias (B, spans, D)
    float32 or None, the sums over each span.
    """
    at_d, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2).to(tl.int64)
    has_d = at_d < channels
    first = tl.program_id(1).to(tl.int64) * span
    last = tl.minimum(first + span, length)
    x += row * x_batch
    dy += row * dy_batch
    dx += row * length * channels
    if past is not None:
        past += row * (W - 1) * channels
    if begins is not None:
        begins += row * length

    taps, sums, owed, seen = (), (), (), ()
    for k in tl.static_range(W):
        taps = taps + (load_row(weight + k * channels + at_d, has_d),)
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    shift = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        shift = load_row(bias + at_d, has_d)
    bias_sum = tl.zeros([BLOCK], tl.float32)

    # owed[k]: what the outputs behind t owe to the input at t - k; seen[k]: the input that tap k meets at t.
    t = last + W - 2
    for k in tl.static_range(W):
        owed = owed + (tl.zeros([BLOCK], tl.float32),)
        s = t - (W - 1) + k
        seen = seen + (load_input(x, past, s, -W, only_if(s < length, has_d), at_d, x_row, channels, W),)
    next_out = load_row(dy + t * dy_row + at_d, only_if(t < length, has_d))
    while t >= first:
        # The next step is loaded while this one is computed.
        out = next_out
        next_out = load_row(dy + (t - 1) * dy_row + at_d, only_if((t - 1 < length) & (t > 0), has_d))
        next_x = load_input(x, past, t - W, -W, only_if(t - W < length, has_d), at_d, x_row, channels, W)
        used, fresh = seen, t < 0
        if begins is not None:
            low = tl.load(begins + t, mask=t < length, other=-1)
            fresh = low == t
            used = ()
            for k in tl.static_range(W):
                used = used + (tl.where((low < 0) | (t - (W - 1) + k >= low), seen[k], 0.0),)
        if SILU:
            pre = shift
            for k in tl.static_range(W):
                pre += taps[k] * used[k]
            gate = sigmoid(pre)
            out *= gate * (1.0 + pre * (1.0 - gate))
        paid = ()
        for k in tl.static_range(W):
            paid = paid + (owed[k] + taps[W - 1 - k] * out,)
        tl.store(dx + t * channels + at_d, paid[0], mask=only_if(t < last, has_d))
        own = tl.where(t < last, out, 0.0)  # the span behind this one counts its own outputs
        bias_sum += own
        added = ()
        for k in tl.static_range(W):
            added = added + (sums[k] + own * used[k],)
        sums, owed = added, ()
        for k in tl.static_range(1, W):
            owed = owed + (tl.where(fresh, 0.0, paid[k]),)
        owed = owed + (tl.zeros([BLOCK], tl.float32),)
        seen = (next_x,) + seen[: W - 1]
        t -= 1

    if dpast is not None:
        if first == 0:
            for k in tl.static_range(W - 1):
                tl.store(dpast + (row * (W - 1) + W - 2 - k) * channels + at_d, owed[k], mask=has_d)
    place = row * tl.num_programs(1) + tl.program_id(1)
    if dweight is not None:
        for k in tl.static_range(W):
            tl.store(dweight + (place * W + k) * channels + at_d, sums[k], mask=has_d)
    if dbias is not None:
        tl.store(dbias + place * channels + at_d, bias_sum, mask=has_d)
