"""The row: a vector of `LANES` floats that numba can compute with, and the functions of rows.

Lanes are the channels of a block. A row is a numba type of its own whose arithmetic is lowered straight to
vector instructions, so what is in a register is decided by the code and not by an optimiser's guess. Where a
row meets a float, every lane meets it; functions of rows take single floats too. Rows in memory lie end to
end in flat float32 arrays.

numba's cache looks only at the file of the function it compiles, which is `cpu_loops.py`: that file holds a
checksum of this one, to be renewed with every change here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model
from numpy import float32

LANES = 16  # channels of a block: two AVX2 registers or one AVX-512 register
FOLDED = 8  # lanes that are left of a row when it waits to be summed

ZERO, ONE, TWO = float32(0), float32(1), float32(2)
LOG2E, LN2 = float32(1.4426950408889634), float32(0.6931471805599453)
ROUNDER = float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits of a float32
LOWEST, HIGHEST = float32(-126), float32(128)
NAN, INFINITE = float32(np.nan), float32(np.inf)
# Minimax fit of (2**f - 1) / f on [-1/2, 1/2]: 2**0 is exactly 1, so that slow decays are not biased.
E1, E2, E3 = float32(0.6931472029), float32(0.2402264791), float32(0.05550332469)
E4, E5, E6 = float32(0.009618437368), float32(0.001339887525), float32(0.0001535336101)
# The same to 6e-7 (3e-7 for |f| below 0.15, where a state remembers for long and errors add up), for decays.
S1, S2, S3 = float32(0.6931471825), float32(0.2402243614), float32(0.05550510064)
S4, S5 = float32(0.009662218392), float32(0.001332561602)
# Minimax fit of (atanh(s) / s - 1) / s**2 over s**2 on [0, 1/9].
T1, T2, T3, T4 = float32(0.3333315508), float32(0.2001255704), float32(0.1397883419), float32(0.1409576949)

# Contraction to fused multiply-adds is safe everywhere; reassociation is not: it would undo the rounding
# trick in `exp2`.
FUSED = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}
INLINE = {**FUSED, "inline": "always"}
COPIED = {**FUSED, "forceinline": True}

FLOAT, INTEGER = ir.FloatType(), ir.IntType(32)
Emit = Callable[..., ir.Value]


class RowType(types.Type):
    """The numba type of a row."""

    def __init__(self) -> None:
        super().__init__(name=f"row{LANES}")


ROW = RowType()


@register_model(RowType)
class RowModel(models.PrimitiveModel):
    """A row is one LLVM vector."""

    def __init__(self, manager: Any, kind: RowType) -> None:
        super().__init__(manager, kind, ir.VectorType(FLOAT, LANES))


def lanewise(emit: Emit) -> Callable[..., Any]:
    """Make a function of rows and floats out of one that emits instructions: a row unless all are floats."""

    def typed(*kinds: types.Type) -> tuple[Any, Callable[..., ir.Value]]:
        kind = ROW if ROW in kinds else types.float32

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
            pairs = zip(values, signature.args, strict=True)
            return emit(builder, *(widen(context, builder, value, given, kind) for value, given in pairs))

        return kind(*kinds), generate

    functions = {
        1: lambda typing_context, x: typed(x),
        2: lambda typing_context, x, y: typed(x, y),
        3: lambda typing_context, x, y, z: typed(x, y, z),
    }
    return intrinsic(functions[emit.__code__.co_argcount - 1])


def widen(context: Any, builder: Any, value: ir.Value, given: types.Type, wanted: types.Type) -> ir.Value:
    """Turn a float into a row of it where a row is wanted."""
    if given is ROW:
        return value
    value = context.cast(builder, value, given, types.float32)
    if wanted is not ROW:
        return value
    row = ir.VectorType(FLOAT, LANES)
    first = builder.insert_element(ir.Constant(row, ir.Undefined), value, INTEGER(0))
    return builder.shuffle_vector(first, ir.Constant(row, ir.Undefined), repeated(row, 0))


def repeated(like: ir.Type, number: int) -> ir.Constant:
    """Return the integer constant that fits a float, or one in every lane."""
    return ir.Constant(ir.VectorType(INTEGER, LANES), [number] * LANES) if like != FLOAT else INTEGER(number)


def as_integers(builder: Any, x: ir.Value) -> ir.Value:
    """Return the bits of floats."""
    return builder.bitcast(x, repeated(x.type, 0).type)


def scale_exponent(builder: Any, x: ir.Value, shifted: ir.Value) -> ir.Value:
    """Emit x * 2**n for shifted = n + ROUNDER, whose low bits hold n: added to the exponent of x."""
    n = builder.shl(as_integers(builder, shifted), repeated(x.type, 23))
    return builder.bitcast(builder.add(as_integers(builder, x), n), x.type)


def magnitude(builder: Any, x: ir.Value) -> ir.Value:
    """Clear the sign bit."""
    return builder.bitcast(builder.and_(as_integers(builder, x), repeated(x.type, 0x7FFFFFFF)), x.type)


def multiply_add(builder: Any, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """Emit x * y + z, rounded once where the processor can."""
    name = f"llvm.fmuladd.v{LANES}f32" if isinstance(x.type, ir.VectorType) else "llvm.fmuladd.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type] * 3), name)
    return builder.call(function, [x, y, z])


def pick(comparison: str) -> Emit:
    """The second of two operands where the comparison holds or either is not a number, else the first."""
    return lambda builder, x, y: builder.select(builder.fcmp_ordered(comparison, x, y), x, y)


scaled, absolute, fused = lanewise(scale_exponent), lanewise(magnitude), lanewise(multiply_add)
at_least, at_most = lanewise(pick(">")), lanewise(pick("<"))  # not-a-number passes if it comes second
where_positive = lanewise(
    lambda builder, x, yes, no: builder.select(
        builder.fcmp_ordered(">", x, ir.Constant(x.type, None)), yes, no
    )
)
where_number = lanewise(lambda builder, x, no: builder.select(builder.fcmp_ordered("ord", x, x), x, no))


def overload_operator(symbol: Callable[..., Any], emit: Emit) -> None:
    """Let an arithmetic operator take rows."""
    function = lanewise(emit)

    @overload(symbol, inline="always")
    def choose(x, y):
        def apply(x, y):
            return function(x, y)

        return apply if ROW in (x, y) and {x, y} <= {ROW, types.float32} else None


overload_operator(operator.add, lambda builder, x, y: builder.fadd(x, y))
overload_operator(operator.sub, lambda builder, x, y: builder.fsub(x, y))
overload_operator(operator.mul, lambda builder, x, y: builder.fmul(x, y))
overload_operator(operator.truediv, lambda builder, x, y: builder.fdiv(x, y))


def place(context: Any, builder: Any, kind: types.Type, array: ir.Value, index: ir.Value) -> ir.Value:
    """Return the address of a flat array's element."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


@intrinsic
def row_of(typing_context, value):
    """Return a row with the value in every lane."""
    return ROW(types.float32), lambda context, builder, signature, arguments: widen(
        context, builder, arguments[0], types.float32, ROW
    )


@intrinsic
def floats_at(typing_context, address):
    """Turn the address of float32 memory, as `Tensor.data_ptr` returns it, into a pointer for `carray`."""
    return types.CPointer(types.float32)(
        types.intp
    ), lambda context, builder, signature, arguments: builder.inttoptr(arguments[0], FLOAT.as_pointer())


@intrinsic
def get(typing_context, array, index):
    """Read the row that starts at an element of a flat array."""

    def generate(context, builder, signature, arguments):
        pointer = place(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(pointer, ir.VectorType(FLOAT, LANES).as_pointer()), align=4)

    return ROW(array, types.intp), generate


@intrinsic
def put(typing_context, array, index, row):
    """Write a row to a flat array, starting at an element."""

    def generate(context, builder, signature, arguments):
        *where, row = arguments
        pointer = place(context, builder, signature.args[0], *where)
        builder.store(row, builder.bitcast(pointer, row.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, row), generate


@intrinsic
def lane(typing_context, row, index):
    """Read one lane of a row."""
    return types.float32(
        row, types.intp
    ), lambda context, builder, signature, arguments: builder.extract_element(*arguments)


@intrinsic
def sum_lanes(typing_context, row):
    """Add the lanes of a row, halves onto each other."""

    def generate(context, builder, signature, arguments):
        (x,) = arguments
        for width in (LANES >> k for k in range(1, LANES.bit_length())):
            low, high = list(range(width)), list(range(width, 2 * width))
            x = builder.fadd(shuffle(builder, x, x, low), shuffle(builder, x, x, high))
        return builder.extract_element(x, INTEGER(0))

    return types.float32(row), generate


@intrinsic
def with_lane(typing_context, row, index, value):
    """Replace one lane of a row."""
    return row(
        row, types.intp, types.float32
    ), lambda context, builder, signature, arguments: builder.insert_element(
        arguments[0], arguments[2], arguments[1]
    )


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line that holds `array[index]`; the index may lie outside the array."""

    def generate(context, builder, signature, arguments):
        pointer = place(context, builder, signature.args[0], *arguments)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, INTEGER, INTEGER, INTEGER])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, INTEGER(0), INTEGER(3), INTEGER(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def shuffle(builder: Any, x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
    """Pick lanes of two vectors, those of the second numbered on from those of the first."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INTEGER, len(lanes)), lanes))


@intrinsic
def fold(typing_context, waiting, index, row):
    """Add the lanes of a row onto each other until `FOLDED` are left, and keep these for `add_sums`."""

    def generate(context, builder, signature, arguments):
        *where, x = arguments
        for width in (LANES >> k for k in range(1, (LANES // FOLDED).bit_length())):
            low, high = list(range(width)), list(range(width, 2 * width))
            x = builder.fadd(shuffle(builder, x, x, low), shuffle(builder, x, x, high))
        pointer = place(context, builder, signature.args[0], *where)
        builder.store(x, builder.bitcast(pointer, x.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(waiting, types.intp, row), generate


# What to pick from a pair of vectors, and from how many lanes further on to add to it: after three rounds the
# sums of eight vectors are the lanes of one.
TRANSPOSE = (
    ([0, 8, 1, 9, 4, 12, 5, 13], 2),
    ([0, 1, 8, 9, 4, 5, 12, 13], 2),
    ([0, 1, 2, 3, 8, 9, 10, 11], 4),
)


@intrinsic
def add_sums(typing_context, waiting, index, target, start):
    """Add to 8 elements of a flat array the sums of 8 folded rows, transposing them on the way."""

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(FLOAT, FOLDED)

        def pointer(which, offset):
            where = builder.add(arguments[which + 1], ir.IntType(64)(offset))
            address = place(context, builder, signature.args[which], arguments[which], where)
            return builder.bitcast(address, kind.as_pointer())

        rows = [builder.load(pointer(0, FOLDED * k), align=4) for k in range(FOLDED)]
        for lanes, step in TRANSPOSE:
            rows = [
                builder.fadd(shuffle(builder, x, y, lanes), shuffle(builder, x, y, [k + step for k in lanes]))
                for x, y in zip(rows[::2], rows[1::2], strict=True)
            ]
        total = pointer(2, 0)
        builder.store(builder.fadd(builder.load(total, align=4), rows[0]), total, align=4)
        return context.get_dummy_value()

    return types.void(waiting, types.intp, target, types.intp), generate


@njit(**INLINE)
def exp2(x):
    """2**x to 1 ulp; below -126 it stays at 2**-126, and not-a-number stays what it is."""
    x = at_most(HIGHEST, at_least(LOWEST, x))
    shifted = x + ROUNDER
    f = x - (shifted - ROUNDER)
    p = ((((E6 * f + E5) * f + E4) * f + E3) * f + E2) * f + E1
    return scaled(p * f + ONE, shifted)


@njit(**INLINE)
def decay(dt, rate, bounded):
    """2**(dt * rate): to 2.5e-7, and much faster, given that dt * rate is a number between -125 and 125."""
    if not bounded:
        return exp2(dt * rate)
    shifted = fused(dt, rate, ROUNDER)
    f = fused(dt, rate, ROUNDER - shifted)
    p = (((S5 * f + S4) * f + S3) * f + S2) * f + S1
    return scaled(p * f + ONE, shifted)


@njit(**INLINE)
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return ONE / (ONE + exp2((ZERO - LOG2E) * x))


@njit(**INLINE)
def softplus(x):
    """log(1 + exp(x)) and its derivative, to 2 ulp for any x: log1p(e) = 2 atanh(e / (2 + e))."""
    e = exp2((ZERO - LOG2E) * absolute(x))
    s = e / (TWO + e)
    q = s * s
    log1p = TWO * (s + s * q * (((T4 * q + T3) * q + T2) * q + T1))
    inverse = ONE / (ONE + e)
    return where_positive(x, x, ZERO) + log1p, where_positive(x, inverse, e * inverse)


@njit(**COPIED)
def load(source, start, width):
    """Read the row of the `width` floats that start at `source[start]`, with zeros after them."""
    if width == LANES:
        return get(source, start)
    row = row_of(ZERO)
    for j in range(width):
        row = with_lane(row, j, source[start + j])
    return row


@njit(**COPIED)
def load_early(source, start, width, ahead):
    """The same, and prefetch the row that lies `ahead` of it.

    Consecutive steps are a whole row of the activations apart, most often in another page of memory, where
    the hardware does not prefetch.
    """
    prefetch(source, start + ahead)
    return load(source, start, width)


@njit(**COPIED)
def store(row, target, start, width):
    """Write the first `width` floats of a row."""
    if width == LANES:
        put(target, start, row)
    else:
        for j in range(width):
            target[start + j] = lane(row, j)


@njit(**COPIED)
def clear(rows, count):
    """Zero the first rows."""
    for n in range(count):
        put(rows, n * LANES, row_of(ZERO))


@njit(**COPIED)
def working_rows(count):
    """Uninitialised memory for rows, beginning with a cache line."""
    memory = np.empty(count * LANES + 16, float32)
    start = (-memory.ctypes.data % 64) // 4
    return memory[start : start + count * LANES]
