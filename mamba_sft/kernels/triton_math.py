"""What the Triton kernels share: elementary functions in float32, loads and masks."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Minimax fit of (atanh(s) / s - 1) / s**2 over s**2 on [0, 1/9].
T1 = tl.constexpr(0.3333315508)
T2 = tl.constexpr(0.2001255704)
T3 = tl.constexpr(0.1397883419)
T4 = tl.constexpr(0.1409576949)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter knows no assembly


@triton.jit
def exp2(x):
    """2**x in one instruction, which flushes subnormal results to zero."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x in one instruction."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return reciprocal(1.0 + exp2(x * -LOG2E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to a few ulp for any x: log1p(e) = 2 atanh(e / (2 + e))."""
    e = exp2(tl.abs(x) * -LOG2E)
    s = e * reciprocal(2.0 + e)
    q = s * s
    return tl.maximum(x, 0.0) + 2.0 * (s + s * q * (((q * T4 + T3) * q + T2) * q + T1))


@triton.jit
def load_row(pointer, mask):
    """Load one position of an activation as float32, zero outside the mask."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def only_if(flag, mask):
    """Narrow a mask to nothing unless a scalar flag is set (the interpreter cannot take `flag & mask`)."""
    return tl.where(flag, mask, False)


@triton.jit
def step_size(raw, shift, SOFTPLUS: tl.constexpr):
    """Turn a row of raw step sizes into what the recurrence uses."""
    if shift is not None:
        raw += shift
    if SOFTPLUS:
        raw = softplus(raw)
    return raw


@triton.jit
def inside(at, size: tl.constexpr, BLOCK: tl.constexpr):
    """Which indices below BLOCK exist; a constant where all do, so that the mask costs nothing."""
    if size % BLOCK == 0:
        return tl.full([at.shape[0]], 0, tl.int32) == 0
    else:
        return at < size
