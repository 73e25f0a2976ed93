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

VECTOR_BYTES = 64


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


def _element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, llvm_type: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), llvm_type.as_pointer())


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
    """The lanes that start at ``array[index]`` of a contiguous one-dimensional array; no bounds check."""
    vector = Vector(array.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, array, *args, context.get_value_type(vector))
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write the lanes of ``value`` to ``array[index:]``; no bounds check."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, array, *args[:2], context.get_value_type(value))
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def element(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index]`` of a contiguous one-dimensional array; no bounds check, no negative indices."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_element_pointer(context, builder, array, *args, context.get_value_type(array.dtype)))

    return array.dtype(array, types.intp), codegen


@intrinsic
def put(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value`` for a contiguous one-dimensional array; no bounds check, no negative indices."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _element_pointer(context, builder, array, *args[:2], context.get_value_type(array.dtype))
        builder.store(context.cast(builder, args[2], value, array.dtype), pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def zeros_like(typingctx: Any, array: Any) -> Any:
    """A vector of zeros of the array's dtype."""
    vector = Vector(array.dtype)
    return vector(array), lambda context, builder, sig, args: ir.Constant(context.get_value_type(vector), None)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` rounded once; any of the three may be a number."""
    vector = next(x for x in (a, b, c) if isinstance(x, Vector))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        operands = (_as_vector(context, builder, x, t, vector) for x, t in zip(args, sig.args, strict=True))
        return _call(builder, "llvm.fma", *operands)

    return vector(a, b, c), codegen


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


@intrinsic
def total(typingctx: Any, x: Any) -> Any:
    """The sum of the lanes, by a tree of fixed shape."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        count = x.lanes
        while count > 1:
            count //= 2
            halves = (
                builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), count), list(lanes)))
                for lanes in (range(count), range(count, 2 * count))
            )
            value = builder.fadd(*halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return x.dtype(x), codegen


# (exp(r) - 1 - r) / r² for |r| ≤ ln(2)/2, lowest power first: a minimax fit (relative error 1.3e-8 of exp(r) - 1) for
# float32, the Taylor series for float64
_EXPM1 = {
    32: (0.499999981496, 0.166665434243, 0.0416672007077, 0.00836654712769, 0.00138825167214),
    64: tuple(1 / math.factorial(n) for n in range(2, 15)),
}


@intrinsic
def tanh(typingctx: Any, x: Any) -> Any:
    """tanh of each lane to within two units in the last place; ±inf gives ±1, NaN stays NaN, ±0 keeps its sign.

    With e = exp(2|x|) - 1 = 2ⁿ (exp(r) - 1) + (2ⁿ - 1), where 2|x| = n ln 2 + r and |r| ≤ ln(2)/2,
    tanh|x| = e / (e + 2): nothing cancels, so small arguments keep their relative accuracy.
    """
    bits = x.dtype.bitwidth
    mantissa, bias = (23, 127) if bits == 32 else (52, 1023)
    saturation = 9.5 if bits == 32 else 20.0  # tanh rounds to 1 from here on
    # ln 2 in two words, of which n times the first is exact; n is too small in float32 for the second to matter
    ln2_high, ln2_low = (math.log(2), 0.0) if bits == 32 else (0.6931471803691238, 1.9082149292705877e-10)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = context.get_value_type(x)
        integers = ir.VectorType(ir.IntType(bits), x.lanes)

        def number(value: float) -> Any:
            return ir.Constant(vector, [value] * x.lanes)

        def integer(value: int) -> Any:
            return ir.Constant(integers, [value] * x.lanes)

        def fma(a: Any, b: Any, c: Any) -> Any:
            return _call(builder, "llvm.fma", a, b, c)

        magnitude = _call(builder, "llvm.fabs", args[0])
        saturated = builder.fcmp_ordered(">", magnitude, number(saturation))  # false for NaN, which passes
        magnitude = builder.select(saturated, number(saturation), magnitude)
        argument = builder.fadd(magnitude, magnitude)
        rounder = number(1.5 * 2.0**mantissa)  # adding it rounds to an integer and leaves that in the low bits
        rounded = fma(magnitude, number(2.0 / math.log(2)), rounder)
        n = builder.fsub(rounded, rounder)
        r = fma(n, number(-ln2_high), argument)
        if ln2_low:
            r = fma(n, number(-ln2_low), r)
        series, power_of_r = [number(c) for c in _EXPM1[bits]], r
        while len(series) > 1:  # in pairs (Estrin), since the latency of one long chain is what would take the time
            pairs = zip(series[::2], series[1::2], strict=False)
            series = [fma(odd, power_of_r, even) for even, odd in pairs] + series[len(series) & ~1 :]
            power_of_r = builder.fmul(power_of_r, power_of_r)
        expm1_r = fma(builder.fmul(r, r), series[0], r)
        exponent = builder.shl(builder.bitcast(rounded, integers), integer(mantissa))
        power = builder.bitcast(builder.add(exponent, integer(bias << mantissa)), vector)
        e = fma(power, expm1_r, builder.fsub(power, number(1.0)))
        denominator = builder.fadd(e, number(2.0))
        # the quotient, with what rounding took from the denominator and from the quotient itself put back
        reciprocal = builder.fdiv(number(1.0), denominator)
        quotient = builder.fmul(e, reciprocal)
        lost = builder.fsub(e, builder.fsub(denominator, number(2.0)))
        residual = fma(builder.fneg(quotient), denominator, e)
        residual = fma(builder.fneg(quotient), lost, residual)
        quotient = fma(residual, reciprocal, quotient)
        return _call(builder, "llvm.copysign", quotient, args[0])

    return x(x), codegen


# Elements of tensors of any dtype, read and written through their address. The code of a dtype is a run-time value,
# so that one compiled kernel serves float32, float64, bfloat16 and float16 tensors.
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)


def _typed_pointer(builder: Any, address: Any, llvm_type: Any) -> Any:
    return builder.inttoptr(address, llvm_type.as_pointer())


def _define_read(llvm_type: Any, result: types.Float, convert: Any) -> Any:
    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return convert(builder, builder.load(_typed_pointer(builder, args[0], llvm_type)))

        return result(types.int64), codegen

    return read


def _bfloat16_to_float32(builder: Any, bits: Any) -> Any:
    wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
    return builder.bitcast(wide, ir.FloatType())


def _float32_to_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest even; a NaN becomes the quiet NaN."""
    word = ir.IntType(32)
    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, word(0x7FC0), rounded), ir.IntType(16))


read_float32 = _define_read(ir.FloatType(), types.float32, lambda builder, x: x)
read_float64 = _define_read(ir.DoubleType(), types.float64, lambda builder, x: x)
read_bfloat16 = _define_read(ir.IntType(16), types.float32, _bfloat16_to_float32)
read_float16 = _define_read(ir.HalfType(), types.float32, lambda builder, x: builder.fpext(x, ir.FloatType()))


def _define_write(llvm_type: Any, value_type: types.Float, convert: Any) -> Any:
    @intrinsic
    def write(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.store(convert(builder, args[1]), _typed_pointer(builder, args[0], llvm_type))
            return context.get_dummy_value()

        return types.void(types.int64, value_type), codegen

    return write


write_float32 = _define_write(ir.FloatType(), types.float32, lambda builder, x: x)
write_float64 = _define_write(ir.DoubleType(), types.float64, lambda builder, x: x)
write_bfloat16 = _define_write(ir.IntType(16), types.float32, _float32_to_bfloat16)
write_float16 = _define_write(ir.HalfType(), types.float32, lambda builder, x: builder.fptrunc(x, ir.HalfType()))
