"""Explicit SIMD for numba: a vector of lanes as a value, loaded, combined and stored in compiled code.

LLVM does not by itself keep a block of accumulators in registers across a loop, which is what the recurrence needs.
``Vector`` is LLVM's own vector type, 64 bytes wide (16 float32 or 8 float64 lanes), so that one source serves
AVX2, AVX-512 and NEON. Arithmetic between vectors, and between a vector and a number, is written with operators.
"""

import math
import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from m2rnn.ops.backends.cpu.layout import VECTOR_BYTES


class Vector(types.Type):
    """``lanes`` numbers of type ``dtype`` in registers."""

    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        self.lanes = VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vector({dtype}, {self.lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector):
        element = ir.FloatType() if vector.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def _call(builder: Any, name: str, *args: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """Call LLVM's intrinsic ``name`` for the vector type of the last argument."""
    vector = args[-1].type
    suffix = f"v{vector.count}f{32 if isinstance(vector.element, ir.FloatType) else 64}"
    result = vector.element if "reduce" in name else vector
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), f"{name}.{suffix}"
    )
    return builder.call(function, args, fastmath=fastmath)


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), lanes)


def _as_vector(context: Any, builder: Any, value: Any, source: Any, target: Vector) -> Any:
    if source == target:
        return value
    return _splat(builder, context.cast(builder, value, source, target.dtype), context.get_value_type(target))


def _place(builder: Any, pointer: Any, index: Any, llvm_type: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), llvm_type.as_pointer())


_OPERATORS = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}


def _define_operator(symbol: Any, instruction: str) -> None:
    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            vectors = [a for a in args if isinstance(a, Vector)]
            if len(args) == 2 and vectors and all(a == vectors[0] or isinstance(a, types.Number) for a in args):
                return signature(vectors[0], *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (_as_vector(context, builder, x, t, sig.return_type) for x, t in zip(args, sig.args, strict=True))
        return getattr(builder, instruction)(a, b)

    for operands in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, *operands)(lower)


for _symbol, _instruction in _OPERATORS.items():
    _define_operator(_symbol, _instruction)


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """The lanes that start at ``array[index]``."""
    vector = Vector(array.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _place(builder, *args, context.get_value_type(vector))
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write the lanes of ``value`` to ``array[index:]``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _place(builder, *args[:2], context.get_value_type(value))
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def element(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index]``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.gep(args[0], [args[1]]))

    return array.dtype(array, types.intp), codegen


@intrinsic
def put(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number = context.cast(builder, args[2], value, array.dtype)
        builder.store(number, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def offset(typingctx: Any, array: Any, count: Any) -> Any:
    """The array that starts at ``array[count]``."""
    return array(array, types.intp), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def array_at(typingctx: Any, address: Any, like: Any) -> Any:
    """The array that starts at an address and has the dtype of ``like``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], args[1].type)

    return like(types.int64, like), codegen


@intrinsic
def exists(typingctx: Any, array: Any) -> Any:
    """Whether the array's address is not 0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(array), codegen


@intrinsic
def lanes_of(typingctx: Any, array: Any) -> Any:
    """Lanes of a vector of the array's dtype, a constant."""
    count = Vector(array.dtype).lanes
    return types.intp(array), lambda context, builder, sig, args: context.get_constant(types.intp, count)


@intrinsic
def zeros_like(typingctx: Any, array: Any) -> Any:
    """A vector of zeros of the array's dtype."""
    vector = Vector(array.dtype)
    return vector(array), lambda context, builder, sig, args: ir.Constant(context.get_value_type(vector), None)


def _define_fma(negate: bool) -> Any:
    @intrinsic
    def fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        vector = next(x for x in (a, b, c) if isinstance(x, Vector))

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            a, b, c = (_as_vector(context, builder, x, t, vector) for x, t in zip(args, sig.args, strict=True))
            return _call(builder, "llvm.fma", builder.fneg(a) if negate else a, b, c)

        return vector(a, b, c), codegen

    return fused


fma = _define_fma(negate=False)  # a · b + c rounded once; any of the three may be a number
fnma = _define_fma(negate=True)  # c - a · b, likewise


@intrinsic
def clamp(typingctx: Any, x: Any, limit: Any) -> Any:
    """Each lane limited to [-limit, limit]; a NaN stays a NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        high = _as_vector(context, builder, args[1], limit, x)
        low = builder.fneg(high)
        value = builder.select(builder.fcmp_ordered(">", value, high), high, value)
        return builder.select(builder.fcmp_ordered("<", value, low), low, value)

    return x(x, limit), codegen


def _shuffle(builder: Any, a: Any, b: Any, lanes: Any) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))


def _fold(builder: Any, value: Any, count: int) -> Any:
    """``value``'s lanes summed to ``count`` lanes: halves are added until so many are left."""
    while value.type.count > count:
        half = value.type.count // 2
        low, high = (_shuffle(builder, value, value, lanes) for lanes in (range(half), range(half, 2 * half)))
        value = builder.fadd(low, high)
    return value


@intrinsic
def total(typingctx: Any, x: Any) -> Any:
    """The sum of the lanes, by a tree of fixed shape."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(_fold(builder, args[0], 1), ir.Constant(ir.IntType(32), 0))

    return x.dtype(x), codegen


@intrinsic
def put_totals(typingctx: Any, out: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """``out[index : index + 4]`` = the sums of the lanes of four vectors: together they take fewer shuffles."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b, c, d = (_fold(builder, x, 4) for x in args[2:])
        ab, cd = (
            builder.fadd(_shuffle(builder, x, y, (0, 1, 4, 5)), _shuffle(builder, x, y, (2, 3, 6, 7)))
            for x, y in ((a, b), (c, d))
        )
        sums = builder.fadd(_shuffle(builder, ab, cd, (0, 2, 4, 6)), _shuffle(builder, ab, cd, (1, 3, 5, 7)))
        builder.store(sums, _place(builder, *args[:2], sums.type), align=out.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(out, types.intp, a, b, c, d), codegen


# (tanh(h) / h - 1) / h² in powers of h², lowest first, for |h| ≤ 3/8 ln 2: minimax fits, of tanh(h) to 4e-9 and 8e-18
_TANH = {
    32: (-0.3333321414778092, 0.133226301558233952, -0.0512177057456956113),
    64: (
        -0.333333333333323889, 0.133333333329779375, -0.0539682535154985391, 0.02186946115353069,
        -0.00886234783135277514, 0.00357624308597166844, -0.00130690440548698243,
    ),
}  # fmt: skip


@intrinsic
def tanh(typingctx: Any, x: Any) -> Any:
    """tanh of each lane to within two units in the last place; ±inf gives ±1, NaN stays NaN, ±0 keeps its sign.

    With |x| = h + n ln(2) / 2, τ = tanh(h) and P = 2ⁿ, the addition theorem gives

        tanh|x| = N / (N + 2 (1 - τ)),    N = (P + 1) τ + (P - 1)

    which is τ exactly where n = 0. h lies between -1/8 and 3/8 of ln 2, not around 0: N cancels where n = 1 and τ < 0.
    """
    bits = x.dtype.bitwidth
    mantissa, bias = (23, 127) if bits == 32 else (52, 1023)
    saturation = 9.5 if bits == 32 else 20.0  # tanh rounds to 1 from here on

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = context.get_value_type(x)
        integers = ir.VectorType(ir.IntType(bits), x.lanes)

        def number(value: float) -> Any:
            return ir.Constant(vector, [value] * x.lanes)

        def integer(value: int) -> Any:
            return ir.Constant(integers, [value] * x.lanes)

        def fma(a: Any, b: Any, c: Any) -> Any:
            return _call(builder, "llvm.fma", a, b, c)

        word = builder.bitcast(args[0], integers)
        sign = builder.and_(word, integer(1 << bits - 1))
        magnitude = builder.bitcast(builder.xor(word, sign), vector)
        saturated = builder.fcmp_ordered(">", magnitude, number(saturation))  # false for NaN, which passes
        magnitude = builder.select(saturated, number(saturation), magnitude)

        rounder = number(1.5 * 2.0**mantissa)  # adding it rounds to an integer and leaves that in the low bits
        rounded = builder.fadd(fma(magnitude, number(2 / math.log(2)), number(-0.25)), rounder)
        h = fma(builder.fsub(rounded, rounder), number(-math.log(2) / 2), magnitude)
        square = builder.fmul(h, h)
        series = number(_TANH[bits][-1])
        for coefficient in reversed(_TANH[bits][:-1]):
            series = fma(series, square, number(coefficient))
        tau = fma(builder.fmul(h, square), series, h)

        exponent = builder.shl(builder.bitcast(rounded, integers), integer(mantissa))
        power = builder.bitcast(builder.add(exponent, integer(bias << mantissa)), vector)
        numerator = fma(tau, builder.fadd(power, number(1.0)), builder.fadd(power, number(-1.0)))
        denominator = builder.fadd(numerator, fma(tau, number(-2.0), number(2.0)))
        quotient = builder.bitcast(builder.fdiv(numerator, denominator), integers)
        return builder.bitcast(builder.or_(quotient, sign), vector)

    return x(x), codegen


# Elements of tensors of any dtype, read and written through their address. The code of a dtype is a run-time value,
# so that one compiled kernel serves float32, float64, bfloat16 and float16 tensors. What follows works on single
# numbers and on vectors of them.


def _same_shape(element: Any, like: Any) -> Any:
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def _integers(like: Any, bits: int, value: int) -> Any:
    element = ir.IntType(bits)
    return ir.Constant(_same_shape(element, like), [value] * like.count if isinstance(like, ir.VectorType) else value)


def _bfloat16_to_float32(builder: Any, bits: Any) -> Any:
    wide = builder.zext(bits, _same_shape(ir.IntType(32), bits.type))
    return builder.bitcast(builder.shl(wide, _integers(bits.type, 32, 16)), _same_shape(ir.FloatType(), bits.type))


def _float32_to_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest even; a NaN becomes the quiet NaN."""

    def word(x: int) -> Any:
        return _integers(value.type, 32, x)

    bits = builder.bitcast(value, word(0).type)
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(is_nan, word(0x7FC0), rounded)
    return builder.trunc(rounded, _same_shape(ir.IntType(16), value.type))


# By the codes of layout.py: the type in memory, that of a number in a register, and how to get from one to the other
_KINDS = (
    (ir.FloatType(), ir.FloatType(), lambda builder, x: x, lambda builder, x: x),
    (ir.DoubleType(), ir.DoubleType(), lambda builder, x: x, lambda builder, x: x),
    (ir.IntType(16), ir.FloatType(), _bfloat16_to_float32, _float32_to_bfloat16),
    (
        ir.HalfType(), ir.FloatType(),
        lambda builder, x: builder.fpext(x, _same_shape(ir.FloatType(), x.type)),
        lambda builder, x: builder.fptrunc(x, _same_shape(ir.HalfType(), x.type)),
    ),
)  # fmt: skip


def _convert(builder: Any, value: Any, element: Any) -> Any:
    source = value.type.element if isinstance(value.type, ir.VectorType) else value.type
    if source == element:
        return value
    narrows = element == ir.FloatType()
    return (builder.fptrunc if narrows else builder.fpext)(value, _same_shape(element, value.type))


def _read(builder: Any, kind: Any, address: Any, count: int) -> Any:
    memory = ir.VectorType(kind[0], count) if count > 1 else kind[0]
    pointer = builder.inttoptr(address, memory.as_pointer())
    return kind[2](builder, builder.load(pointer, align=1))


def _write(builder: Any, kind: Any, address: Any, value: Any) -> None:
    value = kind[3](builder, _convert(builder, value, kind[1]))
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _define_copies(code: int) -> Any:
    kind = _KINDS[code]

    @intrinsic
    def read(typingctx: Any, out: Any, index: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            element = context.get_value_type(out.dtype)
            value = _convert(builder, _read(builder, kind, args[2], 1), element)
            builder.store(value, _place(builder, *args[:2], element))
            return context.get_dummy_value()

        return types.void(out, types.intp, types.int64), codegen

    @intrinsic
    def write(typingctx: Any, address: Any, array: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(_place(builder, *args[1:], context.get_value_type(array.dtype)))
            _write(builder, kind, args[0], value)
            return context.get_dummy_value()

        return types.void(types.int64, array, types.intp), codegen

    return read, write


# read(out, i, address): out[i] = the number there; write(address, array, i): the inverse
(
    (read_float32, write_float32), (read_float64, write_float64),
    (read_bfloat16, write_bfloat16), (read_float16, write_float16),
) = map(_define_copies, range(4))  # fmt: skip


@intrinsic
def read_lanes(typingctx: Any, out: Any, index: Any, address: Any, dtype: Any) -> Any:
    """``out[index : index + lanes]`` = the numbers of a dtype, given by its code, that lie there."""
    lanes = Vector(out.dtype).lanes

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for code, kind in enumerate(_KINDS):
            with builder.if_then(builder.icmp_signed("==", args[3], ir.Constant(args[3].type, code))):
                value = _convert(builder, _read(builder, kind, args[2], lanes), context.get_value_type(out.dtype))
                builder.store(value, _place(builder, *args[:2], value.type), align=out.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.int64, types.int64), codegen


@intrinsic
def write_lanes(typingctx: Any, address: Any, array: Any, index: Any, dtype: Any) -> Any:
    """The inverse of ``read_lanes``."""
    vector = Vector(array.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _place(builder, *args[1:3], context.get_value_type(vector))
        value = builder.load(pointer, align=array.dtype.bitwidth // 8)
        for code, kind in enumerate(_KINDS):
            with builder.if_then(builder.icmp_signed("==", args[3], ir.Constant(args[3].type, code))):
                _write(builder, kind, args[0], value)
        return context.get_dummy_value()

    return types.void(types.int64, array, types.intp, types.int64), codegen
