"""Sixteen float32 in one value, for numba: the same block of sixteen rows goes through a search together.

Numba's own vectoriser gives up on loops with several running sums; here the lanes are a type, so that sums stay in
registers, on any CPU (LLVM splits the vector where registers are narrower). Every operation is IEEE, nothing is fused or
reordered: a lane gives the bits that scalar float32 code gives, and lanes never mix.

Operators + − · / take lanes or a float on either side. What Python has no operator for: `rint` (ties to even), `absolute`,
`smaller`, `larger` and `where_less`, whose comparisons are false for NaN; and the loads and stores.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

WIDTH = 16


class LanesType(types.Type):
    """numba's view of sixteen float32."""

    def __init__(self) -> None:
        super().__init__("Lanes")


LANES = LanesType()
VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)
BYTES = ir.VectorType(ir.IntType(8), WIDTH)


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VECTOR)


def _lane_count(kind: Any) -> bool:
    return isinstance(kind, LanesType | types.Float)


def _widened(builder: Any, kind: Any, value: Any) -> Any:
    """Lanes of a float in every lane; lanes as they are."""
    if isinstance(kind, LanesType):
        return value
    if kind is not types.float32:
        value = builder.fptrunc(value, ir.FloatType())
    nothing = ir.Constant(VECTOR, ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(INTEGERS, [0] * WIDTH))


def _binary(symbol: Callable[..., Any], instruction: str) -> None:
    @type_callable(symbol)  # type: ignore[untyped-decorator]
    def typer(context: Any) -> Callable[[Any, Any], Any]:
        def result(a: Any, b: Any) -> Any:
            mixed = _lane_count(a) and _lane_count(b) and LANES in (a, b)
            return LANES if mixed else None

        return result

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = (_widened(builder, kind, value) for kind, value in zip(signature.args, arguments, strict=True))
        return getattr(builder, instruction)(a, b)

    for pair in ((LanesType, LanesType), (LanesType, types.Float), (types.Float, LanesType)):
        lower_builtin(symbol, *pair)(emit)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary(_symbol, _instruction)


def _function(arity: int, build: Callable[..., Any]) -> Any:
    """An intrinsic of `arity` lanes or floats that returns lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return build(builder, *(_widened(builder, kind, value) for kind, value in zip(signature.args, arguments, strict=True)))

    if arity == 1:

        @intrinsic  # type: ignore[untyped-decorator]
        def one(typing: Any, a: Any) -> Any:
            return (LANES(a), emit) if _lane_count(a) else None

        return one
    if arity == 2:

        @intrinsic  # type: ignore[untyped-decorator]
        def two(typing: Any, a: Any, b: Any) -> Any:
            return (LANES(a, b), emit) if _lane_count(a) and _lane_count(b) else None

        return two

    @intrinsic  # type: ignore[untyped-decorator]
    def four(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return (LANES(a, b, c, d), emit) if all(map(_lane_count, (a, b, c, d))) else None

    return four


def _library(name: str) -> Callable[..., Any]:
    """LLVM's own function on a vector of floats."""

    def build(builder: Any, value: Any) -> Any:
        full = f"llvm.{name}.v{WIDTH}f32"
        known = builder.module.globals.get(full)
        return builder.call(known or ir.Function(builder.module, ir.FunctionType(VECTOR, [VECTOR]), full), [value])

    return build


def _less(builder: Any, a: Any, b: Any, then: Any, otherwise: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), then, otherwise)


def _half(builder: Any, value: Any) -> Any:
    def constant(number: int) -> Any:
        return ir.Constant(INTEGERS, [number] * WIDTH)

    bits = builder.bitcast(value, INTEGERS)
    odd = builder.and_(builder.lshr(bits, constant(13)), constant(1))
    bits = builder.and_(builder.add(builder.add(bits, odd), constant(0xFFF)), constant(0xFFFFE000))
    normal = builder.bitcast(bits, VECTOR)
    # float32 between 0.5 and 1 is spaced as float16's subnormals are.
    magic = ir.Constant(VECTOR, [0.75] * WIDTH)
    subnormal = builder.fsub(builder.fadd(value, magic), magic)
    magnitude = _library("fabs")(builder, value)
    return _less(builder, magnitude, ir.Constant(VECTOR, [2.0**-14] * WIDTH), subnormal, normal)


def _binade(builder: Any, value: Any) -> Any:
    exponent = ir.Constant(INTEGERS, [0x7F800000] * WIDTH)
    return builder.bitcast(builder.and_(builder.bitcast(value, INTEGERS), exponent), VECTOR)


spread = _function(1, lambda builder, a: a)
"""spread(float): that float in every lane."""

rint = _function(1, _library("rint"))
absolute = _function(1, _library("fabs"))
half = _function(1, _half)
"""Rounded to float16's spacing, ties to even, zeros to +0; from 65520 up it is 65536 or more, float16's infinity."""

binade = _function(1, _binade)
"""The power of two at or below the magnitude; 0 below 2^−126."""

smaller = _function(2, lambda builder, a, b: _less(builder, a, b, a, b))
"""a where a < b, else b."""
larger = _function(2, lambda builder, a, b: _less(builder, b, a, a, b))
"""a where a > b, else b."""
where_less = _function(4, _less)
"""where_less(a, b, then, otherwise): lane by lane, by a < b."""


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [builder.mul(index, ir.Constant(index.type, WIDTH))]), vector.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, index: Any) -> Any:
    """Lanes from elements 16·index … of a flat float32 array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], arguments[0], arguments[1], VECTOR), align=4)

    return LANES(array, types.intp), emit


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Lanes to elements 16·index … of a flat float32 array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _widened(builder, signature.args[2], arguments[2])
        builder.store(value, _pointer(context, builder, signature.args[0], arguments[0], arguments[1], VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


@intrinsic  # type: ignore[untyped-decorator]
def store_bytes(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Lanes, integers from −128 to 255, to bytes 16·index … of a flat uint8 array; negative ones in two's complement."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low = builder.trunc(builder.fptosi(arguments[2], INTEGERS), BYTES)
        builder.store(low, _pointer(context, builder, signature.args[0], arguments[0], arguments[1], BYTES), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


@intrinsic  # type: ignore[untyped-decorator]
def store_quads(typing: Any, array: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Lanes a, b, c, d, integers from 0 to 255, to elements 16·index … of a flat uint32 array: a in the lowest byte."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        joined = builder.fptosi(arguments[2], INTEGERS)
        for position, value in enumerate(arguments[3:], 1):
            shift = ir.Constant(INTEGERS, [8 * position] * WIDTH)
            joined = builder.or_(joined, builder.shl(builder.fptosi(value, INTEGERS), shift))
        builder.store(joined, _pointer(context, builder, signature.args[0], arguments[0], arguments[1], INTEGERS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, a, b, c, d), emit
