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
    SOFTPLUS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Run the recurrence over one segment; program (block of channels, segment, row).

    u, dt, z, y (B, L, D), rows `*_row` apart; A (N, D) scaled; BC (B, L, 2 N) float32, B before C; D, bias
    (D,); entry, the states before each segment, (B, S, N, D); saved (B, ceil(L / STRIDE), N, D) or
    None; final (B, N, D). z, D, bias, entry, saved, and stops with begins may be None. A segment is a
    multiple of STRIDE.
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
        saved += (row * tl.cdiv(length, STRIDE) + first // STRIDE) * N * channels

    next_u, next_dt = load_row(u + at_d, has_d), load_row(dt + at_d, has_d)
    t = first
    while t < last:
        stop = tl.minimum(last, (t // STRIDE + 1) * STRIDE)
        if begins is not None:
            stop = tl.minimum(stop, tl.load(stops + row * length + t))
            if tl.load(begins + row * length + t) == t:
                h = tl.zeros([STATES, BLOCK], tl.float32)
        if saved is not None:
            if t % STRIDE == 0:
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
def rows_of(x, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Return the WINDOW (1, 2 or 4) rows of a tile (WINDOW, BLOCK) as a tuple."""
    if WINDOW == 1:
        return (tl.reshape(x, (BLOCK,)),)
    elif WINDOW == 2:
        return tl.split(tl.permute(x, (1, 0)))
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (2, 2, BLOCK)), (0, 2, 1)))
        first, third = tl.split(tl.permute(even, (1, 0)))
        second, fourth = tl.split(tl.permute(odd, (1, 0)))
        return first, second, third, fourth


@triton.jit
def stacked(rows, WINDOW: tl.constexpr):
    """Return the tensors of a tuple as one, in a new last dimension."""
    if WINDOW == 1:
        return tl.expand_dims(rows[0], -1)
    elif WINDOW == 2:
        return tl.join(rows[0], rows[1])
    else:
        x = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
        return tl.reshape(x, x.shape[:-2] + (4,))


@triton.jit
def fold(x):
    """Add up the first dimension of a tile (PARTS, A, B), in one exchange between threads."""
    PARTS: tl.constexpr = x.shape[0]
    if PARTS == 1:
        return tl.sum(x, axis=0)
    else:
        x = tl.reshape(x, (PARTS // 2, 2, x.shape[1], x.shape[2]))
        one, other = tl.split(tl.permute(x, (0, 2, 3, 1)))
        return tl.sum(one + other, axis=0)


@triton.jit
def rows_at(pointer, row: tl.constexpr, at_w, at_d, live):
    """Load the positions of a window as float32, (WINDOW, BLOCK), zero where there is none."""
    return load_row(pointer + at_w[:, None] * row + at_d[None, :], live)


@triton.jit
def rows_from(pointer, t, row: tl.constexpr, at_w, at_d):
    """Return pointers to the positions of a window that begins at t.

    A window of four steps needs all registers: there the offsets are added up first, so that no pointer of
    each thread's own is kept through the loop for each tensor. For two steps the compiler spills without it.
    """
    at = t.to(tl.int64) * row
    if at_w.shape[0] == 4:
        return pointer + (at + (at_w[:, None] * row + at_d[None, :]))
    else:
        return pointer + at + at_w[:, None] * row + at_d[None, :]


@triton.jit
def next_rows(dt, u, t, count, dt_row, u_row, at_w, at_d, has_d):
    """Load what the first walk needs of a window at t."""
    live = (at_w < count)[:, None] & has_d[None, :]
    dt_w = tl.load(rows_from(dt, t, dt_row, at_w, at_d), mask=live, other=0.0)
    u_w = tl.load(rows_from(u, t, u_row, at_w, at_d), mask=live, other=0.0)
    return dt_w, u_w


@triton.jit
def window_rows(u, dt, dy, z, t, u_row, dt_row, dy_row, z_row, at_w, at_d, live):
    """Load what a window needs of each activation, as it lies in memory: half the registers in 16 bits."""
    z_w = None
    u_w = tl.load(rows_from(u, t, u_row, at_w, at_d), mask=live, other=0.0)
    dt_w = tl.load(rows_from(dt, t, dt_row, at_w, at_d), mask=live, other=0.0)
    dy_w = tl.load(rows_from(dy, t, dy_row, at_w, at_d), mask=live, other=0.0)
    if z is not None:
        z_w = tl.load(rows_from(z, t, z_row, at_w, at_d), mask=live, other=0.0)
    return u_w, dt_w, dy_w, z_w


@triton.jit
def over_states(x, PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Add up what a thread has of the states of a channel: (GROUP, BLOCK) becomes (PARTS, BLOCK)."""
    return tl.sum(tl.reshape(x, (GROUP // PARTS, PARTS, BLOCK)), axis=0)


@triton.jit
def over_channels(x, LANES: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Add up what a thread has of the channels of a state: (GROUP, BLOCK) becomes (GROUP, LANES)."""
    return tl.sum(tl.reshape(x, (GROUP, LANES, BLOCK // LANES)), axis=2)


@triton.jit
def there_and_back(
    h, g, rate_sum, rate, steps, flows, outs, BC, count, at_n, has_n,
    WINDOW: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, LANES: tl.constexpr, GATED: tl.constexpr, RATE_WANTED: tl.constexpr,
):  # fmt: skip
    """Take group k of the states through a window and back.

    h is the state before the window and g the gradient of the state behind it; returned are that of h, the
    gradient of A so far, and of every step y before the gate, sum(g B) and sum(g A a h), (WINDOW, BLOCK).
    Steps from `count` on do not exist: their size is 0, which leaves the state alone. What a thread has of
    the sums is kept until the end: then those of all steps are exchanged between threads at once.
    """
    befores, decays = (h,), ()
    for step in tl.static_range(WINDOW):
        b = tl.load(BC + step * 2 * N + at_n, mask=only_if(step < count, has_n), other=0.0)
        decay = exp2(steps[step][None, :] * rate)
        h = decay * h + flows[step][None, :] * b[:, None]
        befores = befores + (h,)
        decays = decays + (decay,)
    ys, inputs, rates, dBs, dCs = (), (), (), (), ()
    for step in tl.static_range(WINDOW - 1, -1, -1):
        has_b = only_if(step < count, has_n)
        b = tl.load(BC + step * 2 * N + at_n, mask=has_b, other=0.0)
        c = tl.load(BC + step * 2 * N + N + at_n, mask=has_b, other=0.0)
        after, out = befores[step + 1], outs[step]
        if GATED:
            ys = (over_states(after * c[:, None], PARTS, GROUP, BLOCK),) + ys
        dCs = (over_channels(after * out[None, :], LANES, GROUP, BLOCK),) + dCs
        g += out[None, :] * c[:, None]
        dBs = (over_channels(g * flows[step][None, :], LANES, GROUP, BLOCK),) + dBs
        inputs = (over_states(g * b[:, None], PARTS, GROUP, BLOCK),) + inputs
        g *= decays[step]
        by_decay = g * befores[step]
        rates = (over_states(by_decay * rate, PARTS, GROUP, BLOCK),) + rates
        if RATE_WANTED:
            rate_sum += by_decay * steps[step][None, :]
    return g, rate_sum, dBs, dCs, ys, inputs, rates


@triton.jit
def exchanged(
    dBs, dCs, ys, inputs, rates, dBC, count, at_w,
    WINDOW: tl.constexpr, k: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Add up between threads what each has of the sums of a window."""
    dBC_w = tl.join(stacked(dBs, WINDOW), stacked(dCs, WINDOW))  # GROUP, LANES, WINDOW, 2
    dBC_w = fold(tl.reshape(tl.permute(dBC_w, (1, 2, 3, 0)), (LANES, WINDOW, 2 * GROUP)))
    at_bc = tl.arange(0, 2 * GROUP)
    at_in = at_bc % GROUP
    tl.store(
        dBC + at_w[:, None] * 2 * N + (at_bc // GROUP * N + at_in)[None, :],
        dBC_w, mask=(at_w < count)[:, None] & inside(at_in, N - k * GROUP, GROUP)[None, :],
    )  # fmt: skip
    y_w = None
    if GATED:
        y_w = fold(tl.permute(stacked(ys, WINDOW), (0, 2, 1)))
    by_input = fold(tl.permute(stacked(inputs, WINDOW), (0, 2, 1)))
    by_rate = fold(tl.permute(stacked(rates, WINDOW), (0, 2, 1)))
    return y_w, by_input, by_rate


@triton.jit(do_not_specialize=["length", "segment", "first_part", "parts", "span"])
def backward(
    u, dt, z, dy, A, BC, D, bias, stops, begins, saved, later, scratch,
    du, ddt, dz, dBC, dA, dD, dbias, earlier,
    u_batch, dt_batch, z_batch, dy_batch, length, segment, first_part, parts, span,
    u_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr, dy_row: tl.constexpr,
    channels: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Go back through one segment, chunk by chunk; program (block of channels, segment, row).

    Operands as in `forward`; later, the gradients of the states behind each segment, (B, S, N, D) or None.
    A first walk through a chunk of STRIDE steps, from its saved state, leaves the state before every window
    of WINDOW steps in scratch (programs, ceil(STRIDE / WINDOW), STATES, BLOCK); then the windows are taken
    from the last to the first, GROUP states at a time. A window begins where its sequence does, and then no
    state is kept: it is zero. A launch takes the segments from `first_part` on, of `parts`.

    du, ddt, dz (B, L, D); dBC (blocks, B, span, 2 N), a sum over each block of channels, beginning where the
    first segment of the launch does; dA (B, S, N, D), dD
    and dbias (B, S, D) unless None; earlier (B, S, N, D), the gradients of the states before each segment.
    """
    block, part, row = tl.program_id(0), tl.program_id(1) + first_part, tl.program_id(2).to(tl.int64)
    blocks, rows = tl.num_programs(0), tl.num_programs(2)
    GROUPS: tl.constexpr = STATES // GROUP
    LANES: tl.constexpr = max(BLOCK // 4, 1)
    PARTS: tl.constexpr = min(GROUP, 32 // LANES)
    at_d, at_n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, GROUP)
    has_d = inside(at_d, channels, BLOCK)
    at_state = at_n[:, None] * channels + at_d[None, :]
    at_slot = at_n[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    at_w = tl.arange(0, WINDOW)
    first = part * segment
    last = tl.minimum(first + segment, length)
    place = row * parts + part

    has_ns, has_states, rates, gs, rate_sums = (), (), (), (), ()
    for k in tl.static_range(GROUPS):
        has_n = inside(at_n, N - k * GROUP, GROUP)
        has_state = has_n[:, None] & has_d[None, :]
        has_ns, has_states = has_ns + (has_n,), has_states + (has_state,)
        rates = rates + (tl.load(A + k * GROUP * channels + at_state, mask=has_state, other=0.0),)
        g = tl.zeros([GROUP, BLOCK], tl.float32)
        rate_sums = rate_sums + (g,)
        if later is not None:
            g = tl.load(later + (place * N + k * GROUP) * channels + at_state, mask=has_state, other=0.0)
        gs = gs + (g,)
    skip_sum = tl.zeros([WINDOW, BLOCK], tl.float32)
    bias_sum = tl.zeros([WINDOW, BLOCK], tl.float32)

    u += row * u_batch
    dt += row * dt_batch
    dy += row * dy_batch
    du += row * length * channels
    ddt += row * length * channels
    if z is not None:
        z += row * z_batch
        dz += row * length * channels
    BC += row * length * 2 * N
    dBC += ((block * rows + row) * span - first_part * segment) * 2 * N
    if begins is not None:
        stops += row * length
        begins += row * length
    saved += row * tl.cdiv(length, STRIDE) * N * channels
    program = (row * tl.num_programs(1) + tl.program_id(1)) * blocks + block
    scratch += program * tl.cdiv(STRIDE, WINDOW) * STATES * BLOCK

    has_w = (at_w < WINDOW)[:, None] & has_d[None, :]
    chunk = tl.cdiv(last, STRIDE) - 1
    while chunk * STRIDE >= first:
        start = chunk * STRIDE
        stop = tl.minimum(start + STRIDE, last)
        hs = ()
        for k in tl.static_range(GROUPS):
            at_saved = (chunk.to(tl.int64) * N + k * GROUP + at_n)[:, None] * channels + at_d[None, :]
            hs = hs + (tl.load(saved + at_saved, mask=has_states[k], other=0.0),)
        shift = None
        if bias is not None:
            shift = rows_at(bias, 0, at_w, at_d, has_w)
        end = tl.minimum(start + WINDOW, stop)
        halt, fresh = stop, False
        if begins is not None:
            halt, fresh = tl.load(stops + start), tl.load(begins + start) == start
            end = tl.minimum(end, halt)
        t = start
        dt_n, u_n = next_rows(dt, u, t, end - t, dt_row, u_row, at_w, at_d, has_d)
        while t < stop:
            slot = scratch + (t - start) // WINDOW * STATES * BLOCK + at_slot
            new = ()
            for k in tl.static_range(GROUPS):
                h = hs[k]
                if begins is not None:
                    h = tl.where(fresh, 0.0, h)
                    tl.store(slot + k * GROUP * BLOCK, h, mask=only_if(fresh == 0, at_slot >= 0))
                else:
                    tl.store(slot + k * GROUP * BLOCK, h)
                new = new + (h,)
            hs = new
            end_n = tl.minimum(end + WINDOW, stop)
            if end < stop:  # the state behind the chunk is nobody's
                if begins is not None:
                    fresh = end == halt
                    halt = tl.load(stops + end)
                live = (at_w < end - t)[:, None] & has_d[None, :]
                dt_w = step_size(dt_n.to(tl.float32), shift, SOFTPLUS)
                dt_w = tl.where(live, dt_w, 0.0)
                steps = rows_of(dt_w, WINDOW, BLOCK)
                flows = rows_of(dt_w * u_n.to(tl.float32), WINDOW, BLOCK)
                at = t.to(tl.int64)
                new = ()
                for k in tl.static_range(GROUPS):
                    if k == GROUPS - 1:  # the next window is loaded while this one is computed
                        if begins is not None:
                            end_n = tl.minimum(end_n, halt)
                        dt_n, u_n = next_rows(dt, u, end, end_n - end, dt_row, u_row, at_w, at_d, has_d)
                    h = hs[k]
                    for step in tl.static_range(WINDOW):
                        has_b = only_if(t + step < end, has_ns[k])
                        b = tl.load(BC + (at + step) * 2 * N + k * GROUP + at_n, mask=has_b, other=0.0)
                        h = exp2(steps[step][None, :] * rates[k]) * h + flows[step][None, :] * b[:, None]
                    new = new + (h,)
                hs = new
            t, end = end, end_n
        tl.debug_barrier()  # what one thread wrote, another may read

        end = stop
        begun = start
        if begins is not None:
            begun = tl.load(begins + end - 1)
        begin = tl.maximum(start, begun)
        t = begin + (end - 1 - begin) // WINDOW * WINDOW
        live = (at_w < end - t)[:, None] & has_d[None, :]
        u_n, dt_n, dy_n, z_n = window_rows(u, dt, dy, z, t, u_row, dt_row, dy_row, z_row, at_w, at_d, live)
        while end > start:
            fresh = begun == t
            if GROUPS == 1:  # where the window before lies; of two groups, the second has a register for it
                if begins is not None:
                    begun = tl.load(begins + t - 1, mask=t > start, other=-1)
            slot = scratch + (t - start) // WINDOW * STATES * BLOCK + at_slot
            at = t.to(tl.int64)
            live = (at_w < end - t)[:, None] & has_d[None, :]
            u_w = u_n.to(tl.float32)
            raw_w = dt_n.to(tl.float32)
            dt_w = tl.where(live, step_size(raw_w, shift, SOFTPLUS), 0.0)
            dy_w = dy_n.to(tl.float32)
            out_w = dy_w
            if z is not None:
                z_w = z_n.to(tl.float32)
                gate_w = sigmoid(z_w)
                out_w *= z_w * gate_w
                dy_w *= gate_w * (1.0 + z_w * (1.0 - gate_w))  # and y makes dz of it
            steps = rows_of(dt_w, WINDOW, BLOCK)
            flows = rows_of(dt_w * u_w, WINDOW, BLOCK)
            outs = rows_of(out_w, WINDOW, BLOCK)

            new_gs, new_sums = (), ()
            for k in tl.static_range(GROUPS):
                if begins is not None:
                    h = tl.load(slot + k * GROUP * BLOCK, mask=only_if(fresh == 0, at_slot >= 0), other=0.0)
                else:
                    h = tl.load(slot + k * GROUP * BLOCK)
                if k > 0 and k == GROUPS - 1:
                    if begins is not None:
                        begun = tl.load(begins + t - 1, mask=t > start, other=-1)
                g, rate_sum, dBs, dCs, ys, inputs, by_rates = there_and_back(
                    h, gs[k], rate_sums[k], rates[k], steps, flows, outs,
                    BC + at * 2 * N + k * GROUP, end - t, at_n, has_ns[k],
                    WINDOW, N, GROUP, BLOCK, PARTS, LANES, z is not None, dA is not None,
                )  # fmt: skip
                if k == GROUPS - 1:  # the window before is loaded while the sums of this one are exchanged
                    begin = tl.maximum(start, begun)
                    t_n = begin + (t - 1 - begin) // WINDOW * WINDOW
                    live_n = (at_w < tl.where(t > start, t - t_n, 0))[:, None] & has_d[None, :]
                    u_n, dt_n, dy_n, z_n = window_rows(
                        u, dt, dy, z, t_n, u_row, dt_row, dy_row, z_row, at_w, at_d, live_n
                    )
                    here = at_d
                    if WINDOW == 4:  # the same, but no pointer to it is kept in registers through the loop
                        here += tl.multiple_of(tl.minimum(t, 0), 16)
                    if D is not None:
                        skip = rows_at(D, 0, at_w, here, has_w)
                    if bias is not None:
                        shift = rows_at(bias, 0, at_w, here, has_w)
                    if SOFTPLUS:
                        raw_w = load_row(rows_from(dt, t, dt_row, at_w, at_d), live)
                    if GROUPS > 1:  # four registers less in between
                        u_w = load_row(rows_from(u, t, u_row, at_w, at_d), live)
                more_y, more_input, more_rate = exchanged(
                    dBs, dCs, ys, inputs, by_rates, dBC + at * 2 * N + k * GROUP, end - t, at_w,
                    WINDOW, k, N, GROUP, LANES, z is not None,
                )  # fmt: skip
                if k == 0:
                    y_w, by_input, by_rate = more_y, more_input, more_rate
                else:
                    by_input += more_input
                    by_rate += more_rate
                    if z is not None:
                        y_w += more_y
                if begins is not None:
                    g = tl.where(fresh, 0.0, g)
                new_gs = new_gs + (g,)
                new_sums = new_sums + (rate_sum,)
            gs, rate_sums = new_gs, new_sums
            if z is not None:
                if D is not None:
                    y_w += skip * u_w
                tl.store(rows_from(dz, t, channels, at_w, at_d), dy_w * y_w, mask=live)
            by_u = dt_w * by_input
            if D is not None:
                by_u += skip * out_w
            tl.store(rows_from(du, t, channels, at_w, at_d), by_u, mask=live)
            by_dt = u_w * by_input + by_rate * LN2
            if SOFTPLUS:
                if bias is not None:
                    raw_w += shift
                by_dt *= sigmoid(raw_w)
            tl.store(rows_from(ddt, t, channels, at_w, at_d), by_dt, mask=live)
            skip_sum += out_w * u_w
            bias_sum += tl.where(live, by_dt, 0.0)
            end, t = t, t_n
        chunk -= 1

    left = chunk + 1 - first // STRIDE  # 0; what is computed from it only here takes no register before
    at_end = (block + left) * BLOCK + tl.arange(0, BLOCK)
    for k in tl.static_range(GROUPS):
        at_k = ((place + left) * N + k * GROUP + at_n)[:, None] * channels + at_end[None, :]
        tl.store(earlier + at_k, gs[k], mask=has_states[k])
        if dA is not None:
            tl.store(dA + at_k, rate_sums[k], mask=has_states[k])
    if dD is not None:
        tl.store(dD + place * channels + at_d, tl.sum(skip_sum, axis=0), mask=at_d < channels)
    if dbias is not None:
        tl.store(dbias + place * channels + at_d, tl.sum(bias_sum, axis=0), mask=at_d < channels)
