"""The selective scan in Triton, forward and backward; `triton_ops.py` launches these kernels.

Letters as in README.md, and S for the segments a row is cut into where rows and channels alone would leave
the GPU idle. A program owns a block of channels of one row and one segment, walks through time with its
states in registers and computes in float32. Rates come scaled by log2(e): the hardware's exponential is
2**x.

A state tile is (STATES, BLOCK), states by channels, in memory too. The two directions spread it differently
over the threads of a warp, because they sum over different axes:

- forward: all states of a channel in one thread, so that y = C . h needs no other thread. It is the layout
  the compiler falls back to for a tile whose pointer it knows no alignment of: hence
  `do_not_specialize_on_alignment`.
- backward: the states of a channel over four threads, four channels in each, since the gradients of B and C
  are sums over channels. It is the layout of loading a tile in aligned pieces of 16 bytes.

`tests/kernels/test_triton_compile.py` compiles every kernel for every GPU and holds the compiler to this.

Sequences packed into a row are told apart by two (B, L) arrays of positions: `begins`, where the sequence
of a position begins (-1 if it continues what came before the row), and `stops`, where the next one begins
(L if none does). Loops run from boundary to boundary, so that a step costs nothing more for them; a state
is cleared by a select, never by a product with zero, which would let not-a-number through.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamba_sft.kernels.triton_math import LN2, exp2, inside, load_row, only_if, sigmoid, step_size

STATE_STRIDE = tl.constexpr(64)  # steps between two saved states


@triton.jit
def tile_of(block, channels: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr):
    """Return where a block's channels, its states and its tile of both are in memory, each with its mask."""
    at_d, at_n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    has_d, has_n = inside(at_d, channels, BLOCK), inside(at_n, N, STATES)
    at_state = at_n[:, None] * channels + at_d[None, :].to(tl.int64)
    return at_d, at_n, has_d, has_n, at_state, has_n[:, None] & has_d[None, :]


@triton.jit(
    do_not_specialize=["length", "segment"], do_not_specialize_on_alignment=["A", "entry", "saved", "final"]
)
def forward(
    u, dt, z, A, BC, D, bias, stops, begins, entry, y, saved, final,
    u_batch, dt_batch, z_batch, length, segment,
    u_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr,
    channels: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Run the recurrence over one segment; program (block of channels, segment, row).

    u, dt, z, y (B, L, D), rows `*_row` apart; A (N, D) scaled; BC (B, L, 2 N) float32, B before C; D, bias
    (D,); entry, the states before each segment, (B, S, N, D); saved (B, ceil(L / STATE_STRIDE), N, D) or
    None; final (B, N, D). z, D, bias, entry, saved, and stops with begins may be None. A segment is a
    multiple of STATE_STRIDE.
    """
    block, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(1)
    at_d, at_n, has_d, has_n, at_state, has_state = tile_of(block, channels, N, STATES, BLOCK)
    first = part * segment
    last = tl.minimum(first + segment, length)

    rate = tl.load(A + at_state, mask=has_state, other=0.0)
    h = tl.zeros([STATES, BLOCK], tl.float32)
    if entry is not None:
        h = tl.load(entry + (row * parts + part) * N * channels + at_state, mask=has_state, other=0.0)
    skip = None
    if D is not None:
        skip = load_row(D + at_d, has_d)
    shift = None
    if bias is not None:
        shift = load_row(bias + at_d, has_d)

    start = first.to(tl.int64)
    u += row * u_batch + start * u_row
    dt += row * dt_batch + start * dt_row
    if z is not None:
        z += row * z_batch + start * z_row
    y += (row * length + start) * channels
    BC += (row * length + start) * 2 * N
    if saved is not None:
        saved += (row * tl.cdiv(length, STATE_STRIDE) + first // STATE_STRIDE) * N * channels

    next_u, next_dt = load_row(u + at_d, has_d), load_row(dt + at_d, has_d)
    t = first
    while t < last:
        stop = tl.minimum(last, (t // STATE_STRIDE + 1) * STATE_STRIDE)
        if begins is not None:
            stop = tl.minimum(stop, tl.load(stops + row * length + t))
            if tl.load(begins + row * length + t) == t:
                h = tl.zeros([STATES, BLOCK], tl.float32)
        if saved is not None:
            if t % STATE_STRIDE == 0:
                tl.store(saved + at_state, h, mask=has_state)
                saved += N * channels
        for now in range(t, stop):
            u_t, dt_t = next_u, step_size(next_dt, shift, SOFTPLUS)
            more = only_if(now + 1 < last, has_d)  # the next step is loaded while this one is computed
            u += u_row
            dt += dt_row
            next_u, next_dt = load_row(u + at_d, more), load_row(dt + at_d, more)
            b = tl.load(BC + at_n, mask=has_n, other=0.0)
            c = tl.load(BC + N + at_n, mask=has_n, other=0.0)
            BC += 2 * N
            h = exp2(dt_t[None, :] * rate) * h + (dt_t * u_t)[None, :] * b[:, None]
            y_t = tl.sum(h * c[:, None], axis=0)
            if skip is not None:
                y_t += skip * u_t
            if z is not None:
                z_t = load_row(z + at_d, has_d)
                z += z_row
                y_t *= z_t * sigmoid(z_t)
            tl.store(y + at_d, y_t, mask=has_d)
            y += channels
        t = stop

    if part == parts - 1:
        tl.store(final + row * N * channels + at_state, h, mask=has_state)


@triton.jit(do_not_specialize=["length", "segment", "parts"], do_not_specialize_on_alignment=["A", "local"])
def segment_states(
    u, dt, A, BC, bias, stops, begins, local, total,
    u_batch, dt_batch, length, segment, parts,
    u_row: tl.constexpr, dt_row: tl.constexpr,
    channels: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Find what each segment but the last adds to the state behind it: local (B, S, N, D).

    Also its sum of step sizes, total (B, S, D), from which its decay follows: exp(A sum(dt)), as A is
    constant.
    """
    block, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at_d, at_n, has_d, has_n, at_state, has_state = tile_of(block, channels, N, STATES, BLOCK)
    first = part * segment
    last = first + segment
    place = row * parts + part

    rate = tl.load(A + at_state, mask=has_state, other=0.0)
    shift = None
    if bias is not None:
        shift = load_row(bias + at_d, has_d)
    h = tl.zeros([STATES, BLOCK], tl.float32)
    sum_dt = tl.zeros([BLOCK], tl.float32)
    start = first.to(tl.int64)
    u += row * u_batch + start * u_row
    dt += row * dt_batch + start * dt_row
    BC += (row * length + start) * 2 * N

    next_u, next_dt = load_row(u + at_d, has_d), load_row(dt + at_d, has_d)
    t = first
    while t < last:
        stop = last
        if begins is not None:
            stop = tl.minimum(stop, tl.load(stops + row * length + t))
            h = tl.where(tl.load(begins + row * length + t) == t, 0.0, h)
        for now in range(t, stop):
            u_t, dt_t = next_u, step_size(next_dt, shift, SOFTPLUS)
            more = only_if(now + 1 < last, has_d)
            u += u_row
            dt += dt_row
            next_u, next_dt = load_row(u + at_d, more), load_row(dt + at_d, more)
            b = tl.load(BC + at_n, mask=has_n, other=0.0)
            BC += 2 * N
            h = exp2(dt_t[None, :] * rate) * h + (dt_t * u_t)[None, :] * b[:, None]
            sum_dt += dt_t
        t = stop

    tl.store(local + place * N * channels + at_state, h, mask=has_state)
    tl.store(total + place * channels + at_d, sum_dt, mask=at_d < channels)


@triton.jit(do_not_specialize=["length", "segment", "parts"], do_not_specialize_on_alignment=["A", "local"])
def segment_gradients(
    dt, z, dy, A, BC, bias, begins, local, total,
    dt_batch, z_batch, dy_batch, length, segment, parts,
    dt_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr,
    channels: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Find what each segment but the first adds to the gradient of the state before it: local (B, S, N, D).

    And, as in `segment_states`, its sum of step sizes: total (B, S, D).
    """
    block, part, row = tl.program_id(0), tl.program_id(1) + 1, tl.program_id(2).to(tl.int64)
    at_d, at_n, has_d, has_n, at_state, has_state = tile_of(block, channels, N, STATES, BLOCK)
    first = part * segment
    last = tl.minimum(first + segment, length)

    rate = tl.load(A + at_state, mask=has_state, other=0.0)
    shift = None
    if bias is not None:
        shift = load_row(bias + at_d, has_d)
    g = tl.zeros([STATES, BLOCK], tl.float32)
    sum_dt = tl.zeros([BLOCK], tl.float32)
    end = (last - 1).to(tl.int64)
    dt += row * dt_batch + end * dt_row
    dy += row * dy_batch + end * dy_row
    if z is not None:
        z += row * z_batch + end * z_row
    BC += (row * length + end) * 2 * N

    next_dt, next_dy = load_row(dt + at_d, has_d), load_row(dy + at_d, has_d)
    t = last
    while t > first:
        begin = first
        fresh = False
        if begins is not None:
            begin = tl.load(begins + row * length + t - 1)
            fresh = begin >= first
            begin = tl.maximum(begin, first)
        for back in range(0, t - begin):
            dt_t, out = step_size(next_dt, shift, SOFTPLUS), next_dy
            more = only_if(t - back - 1 > first, has_d)
            dt -= dt_row
            dy -= dy_row
            next_dt, next_dy = load_row(dt + at_d, more), load_row(dy + at_d, more)
            c = tl.load(BC + N + at_n, mask=has_n, other=0.0)
            BC -= 2 * N
            if z is not None:
                z_t = load_row(z + at_d, has_d)
                z -= z_row
                out *= z_t * sigmoid(z_t)
            g = exp2(dt_t[None, :] * rate) * (g + out[None, :] * c[:, None])
            sum_dt += dt_t
        if begins is not None:
            g = tl.where(fresh, 0.0, g)
        t = begin

    tl.store(local + (row * parts + part) * N * channels + at_state, g, mask=has_state)
    tl.store(total + (row * parts + part) * channels + at_d, sum_dt, mask=at_d < channels)


@triton.jit(do_not_specialize=["length", "segment", "parts"])
def connect(
    A, begins, given, local, total, joined, length, segment, parts,
    channels: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Join what segments found alone: joined (B, S, N, D), the states before them.

    With REVERSE the gradients behind them. given (B, N, D), the state before the row or the gradient behind
    it, or None.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at_d, _, has_d, _, at_state, has_state = tile_of(block, channels, N, STATES, BLOCK)
    rate = tl.load(A + at_state, mask=has_state, other=0.0)
    value = tl.zeros([STATES, BLOCK], tl.float32)
    if given is not None:
        value = tl.load(given + row * N * channels + at_state, mask=has_state, other=0.0)
    for i in range(0, parts):
        part = i
        if REVERSE:
            part = parts - 1 - i
        place = row * parts + part
        tl.store(joined + place * N * channels + at_state, value, mask=has_state)
        if i + 1 < parts:
            decay = exp2(tl.load(total + place * channels + at_d, mask=has_d, other=0.0)[None, :] * rate)
            value *= decay
            if begins is not None:
                end = tl.minimum((part + 1) * segment, length) - 1
                value = tl.where(tl.load(begins + row * length + end) >= part * segment, 0.0, value)
            value += tl.load(local + place * N * channels + at_state, mask=has_state, other=0.0)


@triton.jit
def there_and_back(
    count, before, g, rate_sum, skip_sum, bias_sum,
    u, dt, z, dy, BC, du, ddt, dz, dBC, rate, skip, shift, has_d, has_n,
    STEP: tl.constexpr, WINDOW: tl.constexpr,
    u_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr,
    channels: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, SOFTPLUS: tl.constexpr,
    RATE_WANTED: tl.constexpr,
):  # fmt: skip
    """Take step STEP of a window, the rest of the window in a call of this function, and the step back.

    `before` is the state before the step and g the gradient of the state behind the window; returned is
    that of `before`. From `count` on steps do not exist: their size is 0, which leaves the state alone.
    What is cheap to load or compute again is, since the decays and states of a window nearly fill the
    registers.
    """
    live_d, live_n = only_if(STEP < count, has_d), only_if(STEP < count, has_n)
    at_n = tl.arange(0, STATES)
    u_t = load_row(u + STEP * u_row, live_d)
    dt_t = tl.where(STEP < count, step_size(load_row(dt + STEP * dt_row, live_d), shift, SOFTPLUS), 0.0)
    inflow = dt_t * u_t
    b = tl.load(BC + STEP * 2 * N + at_n, mask=live_n, other=0.0)
    decay = exp2(dt_t[None, :] * rate)
    after = decay * before + inflow[None, :] * b[:, None]
    if STEP + 1 < WINDOW:
        g, rate_sum, skip_sum, bias_sum = there_and_back(
            count, after, g, rate_sum, skip_sum, bias_sum,
            u, dt, z, dy, BC, du, ddt, dz, dBC, rate, skip, shift, has_d, has_n,
            STEP + 1, WINDOW, u_row, dt_row, z_row, dy_row, channels, N, STATES, SOFTPLUS, RATE_WANTED,
        )  # fmt: skip

    b = tl.load(BC + STEP * 2 * N + at_n, mask=live_n, other=0.0)
    c = tl.load(BC + STEP * 2 * N + N + at_n, mask=live_n, other=0.0)
    out = load_row(dy + STEP * dy_row, live_d)
    if z is not None:
        z_t = load_row(z + STEP * z_row, live_d)
        gate = sigmoid(z_t)
        y_t = load_row(dz + STEP * channels, live_d)  # before the gate, left there by the first walk
        tl.store(dz + STEP * channels, out * y_t * gate * (1.0 + z_t * (1.0 - gate)), mask=live_d)
        out *= z_t * gate
    tl.store(dBC + STEP * 2 * N + N + at_n, tl.sum(after * out[None, :], axis=1), mask=live_n)
    g += out[None, :] * c[:, None]
    tl.store(dBC + STEP * 2 * N + at_n, tl.sum(g * inflow[None, :], axis=1), mask=live_n)
    by_input = tl.sum(g * b[:, None], axis=0)
    g *= decay
    by_decay = g * before
    by_rate = tl.sum(by_decay * rate, axis=0)
    if RATE_WANTED:
        rate_sum += by_decay * dt_t[None, :]
    by_u = dt_t * by_input
    if skip is not None:
        by_u += skip * out
    tl.store(du + STEP * channels, by_u, mask=live_d)
    u_t = load_row(u + STEP * u_row, live_d)
    by_dt = u_t * by_input + by_rate * LN2
    if SOFTPLUS:
        raw = load_row(dt + STEP * dt_row, live_d)
        if shift is not None:
            raw += shift
        by_dt *= sigmoid(raw)
    tl.store(ddt + STEP * channels, by_dt, mask=live_d)
    return g, rate_sum, skip_sum + out * u_t, bias_sum + tl.where(live_d, by_dt, 0.0)


@triton.jit(do_not_specialize=["length", "segment"])
def backward(
    u, dt, z, dy, A, BC, D, bias, stops, begins, saved, later, scratch,
    du, ddt, dz, dBC, dA, dD, dbias, earlier,
    u_batch, dt_batch, z_batch, dy_batch, length, segment,
    u_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr,
    channels: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Go back through one segment, chunk by chunk; program (block of channels, segment, row).

    Operands as in `forward`; later, the gradients of the states behind each segment, (B, S, N, D) or None.
    A first walk through a chunk, from its saved state, leaves the state before every window of WINDOW steps
    in scratch (programs, ceil(STATE_STRIDE / WINDOW), STATES, BLOCK) and y before the gate in dz; then the
    windows are taken from the last to the first. A window begins where its sequence does, and then no state
    is kept: it is zero.

    du, ddt, dz (B, L, D); dBC (blocks, B, L, 2 N), a sum over each block of channels; dA (B, S, N, D), dD
    and dbias (B, S, D) unless None; earlier (B, S, N, D), the gradients of the states before each segment.
    """
    block, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, parts, rows = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    at_d, at_n, has_d, has_n, at_state, has_state = tile_of(block, channels, N, STATES, BLOCK)
    at_slot = at_n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = part * segment
    last = tl.minimum(first + segment, length)
    place = row * parts + part

    rate = tl.load(A + at_state, mask=has_state, other=0.0)
    g = tl.zeros([STATES, BLOCK], tl.float32)
    if later is not None:
        g = tl.load(later + place * N * channels + at_state, mask=has_state, other=0.0)
    skip = None
    if D is not None:
        skip = load_row(D + at_d, has_d)
    shift = None
    if bias is not None:
        shift = load_row(bias + at_d, has_d)
    rate_sum = tl.zeros([STATES, BLOCK], tl.float32)
    skip_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)

    u += row * u_batch + at_d
    dt += row * dt_batch + at_d
    dy += row * dy_batch + at_d
    du += row * length * channels + at_d
    ddt += row * length * channels + at_d
    if z is not None:
        z += row * z_batch + at_d
        dz += row * length * channels + at_d
    BC += row * length * 2 * N
    dBC += (block * rows + row) * length * 2 * N
    if begins is not None:
        stops += row * length
        begins += row * length
    saved += row * tl.cdiv(length, STATE_STRIDE) * N * channels
    scratch += (place * blocks + block) * tl.cdiv(STATE_STRIDE, WINDOW) * STATES * BLOCK

    chunk = tl.cdiv(last, STATE_STRIDE) - 1
    while chunk * STATE_STRIDE >= first:
        start = chunk * STATE_STRIDE
        stop = tl.minimum(start + STATE_STRIDE, last)
        h = tl.load(saved + chunk.to(tl.int64) * N * channels + at_state, mask=has_state, other=0.0)
        t = start
        while t < stop:
            end = tl.minimum(t + WINDOW, stop)
            slot = scratch + (t - start) // WINDOW * STATES * BLOCK + at_slot
            if begins is not None:
                end = tl.minimum(end, tl.load(stops + t))
                fresh = tl.load(begins + t) == t
                h = tl.where(fresh, 0.0, h)
                tl.store(slot, h, mask=only_if(fresh == 0, at_slot >= 0))
            else:
                tl.store(slot, h)
            at = t.to(tl.int64)
            for step in tl.static_range(WINDOW):
                live = t + step < end
                u_t = load_row(u + (at + step) * u_row, only_if(live, has_d))
                dt_t = step_size(load_row(dt + (at + step) * dt_row, only_if(live, has_d)), shift, SOFTPLUS)
                dt_t = tl.where(live, dt_t, 0.0)
                b = tl.load(BC + (at + step) * 2 * N + at_n, mask=only_if(live, has_n), other=0.0)
                h = exp2(dt_t[None, :] * rate) * h + (dt_t * u_t)[None, :] * b[:, None]
                if z is not None:
                    c = tl.load(BC + (at + step) * 2 * N + N + at_n, mask=only_if(live, has_n), other=0.0)
                    y_t = tl.sum(h * c[:, None], axis=0)
                    if skip is not None:
                        y_t += skip * u_t
                    tl.store(dz + (at + step) * channels, y_t, mask=only_if(live, has_d))
            t = end
        tl.debug_barrier()  # what one thread wrote, another may read

        end = stop
        while end > start:
            begin = start
            if begins is not None:
                begin = tl.maximum(start, tl.load(begins + end - 1))
            t = begin + (end - 1 - begin) // WINDOW * WINDOW
            slot = scratch + (t - start) // WINDOW * STATES * BLOCK + at_slot
            fresh = False
            if begins is not None:
                fresh = tl.load(begins + t) == t
                h = tl.load(slot, mask=only_if(fresh == 0, at_slot >= 0), other=0.0)
            else:
                h = tl.load(slot)
            at = t.to(tl.int64)
            z_t, dz_t = None, None
            if z is not None:
                z_t, dz_t = z + at * z_row, dz + at * channels
            g, rate_sum, skip_sum, bias_sum = there_and_back(
                end - t, h, g, rate_sum, skip_sum, bias_sum,
                u + at * u_row, dt + at * dt_row, z_t, dy + at * dy_row, BC + at * 2 * N,
                du + at * channels, ddt + at * channels, dz_t, dBC + at * 2 * N,
                rate, skip, shift, has_d, has_n,
                0, WINDOW, u_row, dt_row, z_row, dy_row, channels, N, STATES, SOFTPLUS, dA is not None,
            )  # fmt: skip
            if begins is not None:
                g = tl.where(fresh, 0.0, g)
            end = t
        chunk -= 1

    tl.store(earlier + place * N * channels + at_state, g, mask=has_state)
    if dA is not None:
        tl.store(dA + place * N * channels + at_state, rate_sum, mask=has_state)
    if dD is not None:
        tl.store(dD + place * channels + at_d, skip_sum, mask=at_d < channels)
    if dbias is not None:
        tl.store(dbias + place * channels + at_d, bias_sum, mask=at_d < channels)
