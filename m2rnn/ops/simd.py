"""Explicit SIMD for numba: a vector of lanes as a value, loaded, combined and stored in compiled code.

LLVM does not by itself keep a block of accumulators in registers across a loop, which is what the recurrence needs.
``Vector`` is LLVM's own vector type, 64 bytes wide (16 float32 or 8 float64 lanes), so that one source serves
AVX2, AVX-512 and NEON. Arithmetic between vectors, and between a vector and a number, is written with operators.
"""

import math
import operator
from typing import Any

import numpy as np
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


@intrinsic
def tanh(typingctx: Any, x: Any) -> Any:
    """tanh of each lane to within two units in the last place; ±inf gives ±1, NaN stays NaN, ±0 keeps its sign.

    With e = exp(2|x|) - 1 = 2ⁿ (exp(r) - 1) + (2ⁿ - 1), where 2|x| = n ln 2 + r and |r| ≤ ln(2)/2,
    tanh|x| = e / (e + 2): no cancellation anywhere, so small arguments keep their relative accuracy.
    """
    single = x.dtype == types.float32
    mantissa = 23 if single else 52
    bias = 127 if single else 1023
    terms = 7 if single else 14  # of the series of exp(r) - 1: the next one is under half a unit in the last place
    saturation = 9.5 if single else 20.0  # tanh rounds to 1 from here on
    ln2_high = 0.693145751953125 if single else 0.693147180369123816490  # n * ln2_high is exact

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = context.get_value_type(x)
        integers = ir.VectorType(ir.IntType(mantissa + 9 if single else 64), x.lanes)

        def constant(value: float) -> Any:
            return ir.Constant(vector, [value] * x.lanes)

        def shifted(value: int) -> Any:
            return ir.Constant(integers, [value] * x.lanes)

        magnitude = _call(builder, "llvm.fabs", args[0])
        too_large = builder.fcmp_ordered(">", magnitude, constant(saturation))  # false for NaN, which passes
        magnitude = builder.select(too_large, constant(saturation), magnitude)
        twice = builder.fadd(magnitude, magnitude)
        # adding 1.5 · 2^mantissa rounds to an integer and leaves it in the low bits
        rounder = constant(1.5 * 2.0**mantissa)
        rounded = _call(builder, "llvm.fma", twice, constant(1 / math.log(2)), rounder)
        n = builder.fsub(rounded, rounder)
        r = _call(builder, "llvm.fma", n, constant(-ln2_high), twice)
        r = _call(builder, "llvm.fma", n, constant(-_LN2_LOW[single]), r)
        series = constant(1 / math.factorial(terms))
        for term in range(terms - 1, 1, -1):
            series = _call(builder, "llvm.fma", series, r, constant(1 / math.factorial(term)))
        expm1_r = _call(builder, "llvm.fma", builder.fmul(r, r), series, r)
        exponent = builder.shl(builder.bitcast(rounded, integers), shifted(mantissa))
        power = builder.bitcast(builder.add(exponent, shifted(bias << mantissa)), vector)
        expm1 = _call(builder, "llvm.fma", power, expm1_r, builder.fsub(power, constant(1.0)))
        # expm1 / (expm1 + 2), with the rounding of the sum and of the quotient put back in
        denominator = builder.fadd(expm1, constant(2.0))
        lost = builder.fsub(expm1, builder.fsub(denominator, constant(2.0)))
        reciprocal = builder.fdiv(constant(1.0), denominator)
        quotient = builder.fmul(expm1, reciprocal)
        minus_quotient = builder.fneg(quotient)
        residual = _call(builder, "llvm.fma", minus_quotient, denominator, expm1)
        residual = _call(builder, "llvm.fma", minus_quotient, lost, residual)
        quotient = _call(builder, "llvm.fma", residual, reciprocal, quotient)
        return _call(builder, "llvm.copysign", quotient, args[0])

    return x(x), codegen


# ln 2 less its leading bits (ln2_high above), to the precision of the second word
_LN2_LOW = {True: 1.428606820309417e-06, False: 1.90821492927058770002e-10}


# Elements of tensors of any dtype, read and written through their address. The code of a dtype is a run-time value,
# so that one compiled kernel serves float32, float64, bfloat16 and float16 tensors.
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)
ITEM_BYTES = np.array([4, 8, 2, 2])


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
