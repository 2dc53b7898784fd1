"""Arithmetic, comparison and logic, element by element with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from worker.compression.formats.onnx.graph import Known
from worker.compression.formats.onnx.operators.arithmetic import cast as cast_known
from worker.compression.formats.onnx.operators.common import like, plain_tensor, widened
from worker.compression.formats.onnx.table import EVERY, Call, known, operator

Operand = Any
"""A tensor or a Python number; at least one of two is a tensor, unless both are constants."""


def _tensors(*operands: Operand) -> tuple[Operand, ...]:
    return tuple(widened(x) for x in operands)


def _aligned(call: Call, a: Operand, b: Operand) -> tuple[Operand, Operand]:
    """Before opset 7, `broadcast` with `axis` said where the second operand begins."""
    if call.opset < 7 and isinstance(a, Tensor) and isinstance(b, Tensor) and call.attribute("broadcast", 0):
        start = call.attribute("axis")
        if start is not None:
            b = b.reshape([*b.shape, *[1] * (a.ndim - start - b.ndim)])
    return a, b


@operator("Add", numbers=(0, 1), weights={0: "addend", 1: "addend"})
def add(call: Call, a: Operand, b: Operand) -> Tensor:
    a, b = _aligned(call, a, b)
    x, y = _tensors(a, b)
    return like(y + x if not isinstance(x, Tensor) else x + y, _typed(a, b))


@operator("Sub", numbers=(0, 1))
def sub(call: Call, a: Operand, b: Operand) -> Tensor:
    a, b = _aligned(call, a, b)
    x, y = _tensors(a, b)
    return like(x - y, _typed(a, b))


@operator("Mul", numbers=(0, 1), weights={0: "factor", 1: "factor"})
def mul(call: Call, a: Operand, b: Operand) -> Tensor:
    a, b = _aligned(call, a, b)
    x, y = _tensors(a, b)
    return like(y * x if not isinstance(x, Tensor) else x * y, _typed(a, b))


@operator("Div", numbers=(0, 1))
def div(call: Call, a: Operand, b: Operand) -> Tensor:
    a, b = _aligned(call, a, b)
    x, y = _tensors(a, b)
    kind = _typed(a, b)
    if kind.dtype.is_floating_point or kind.dtype.is_complex:
        return x / y
    if not isinstance(x, Tensor):
        x = torch.full_like(y, x)
    return like(torch.div(x, y, rounding_mode="trunc"), kind)


def _typed(*operands: Operand) -> Tensor:
    return next(x for x in operands if isinstance(x, Tensor))


@operator("Pow", numbers=(0, 1))
def power(call: Call, a: Operand, b: Operand) -> Tensor:
    a, b = _aligned(call, a, b)
    x, y = _tensors(a, b)
    if isinstance(a, Tensor):
        if not a.dtype.is_floating_point and isinstance(y, Tensor) and y.dtype.is_floating_point:
            x = x.double()
        return like(torch.pow(x, y), a)
    return torch.pow(x, y)


@operator("Mod", numbers=(1,))
def mod(call: Call, a: Operand, b: Operand) -> Tensor:
    x, y = _tensors(a, b)
    return like(torch.fmod(x, y) if call.attribute("fmod", 0) else torch.remainder(x, y), a)


@operator("Min", "Max")
def extremum(call: Call, *inputs: Tensor) -> Tensor:
    function = torch.minimum if call.node.operator == "Min" else torch.maximum
    result = widened(inputs[0])
    for other in inputs[1:]:
        result = function(result, widened(other))
    return like(result, inputs[0])


@operator("Sum", "Mean", weights={EVERY: "addend"})
def total(call: Call, *inputs: Tensor) -> Tensor:
    result = inputs[0]
    for other in inputs[1:]:
        result = result + other
    return result / len(inputs) if call.node.operator == "Mean" else result


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Log": torch.log,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}


@operator(*_UNARY)
def unary(call: Call, x: Tensor) -> Tensor:
    if x.dtype == torch.uint64:
        return x.clone() if call.node.operator == "Abs" else like((widened(x) != 0).long(), x)  # Abs, Sign
    return like(_UNARY[call.node.operator](widened(x)), x)


# ---------------------------------------------------------------------------------------------------------- comparisons

_COMPARISONS: dict[str, Callable[[Any, Any], Tensor]] = {
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
}


@operator(*_COMPARISONS, numbers=(1,))
def compare(call: Call, a: Tensor, b: Operand) -> Tensor:
    a, b = _aligned(call, a, b)
    return _COMPARISONS[call.node.operator](widened(a), widened(b))


@operator("And", "Or", "Xor")
def logical(call: Call, a: Tensor, b: Tensor) -> Tensor:
    a, b = _aligned(call, a, b)
    return {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}[call.node.operator](a, b)


_BITWISE: dict[str, Callable[[Any, Any], Tensor]] = {
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}


@operator(*_BITWISE, since=18, numbers=(1,))
def bitwise(call: Call, a: Tensor, b: Operand) -> Tensor:
    x, y = _tensors(a, b)
    return like(_BITWISE[call.node.operator](x, y), a)


@operator("BitwiseNot", since=18)
def bitwise_not(call: Call, x: Tensor) -> Tensor:
    return like(torch.bitwise_not(widened(x)), x)


@operator("BitShift", since=11)
def bit_shift(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Numbers without a sign are filled with zeros from the left, which torch's shift does not do for 64 bits."""
    bits, signed = torch.iinfo(a.dtype).bits, torch.iinfo(a.dtype).min < 0
    x, y = a.long(), b.long()
    far = (y < 0) | (y >= bits)
    inside = torch.where(far, bits - 1, y)
    if call.required("direction") == "LEFT":
        return torch.where(far, 0, x << inside).to(a.dtype)
    shifted = x >> inside
    if bits == 64 and not signed:
        shifted = torch.where(inside > 0, shifted & ((1 << (63 - (inside - 1).clamp(min=0))) - 1), x)
    return (shifted if signed else torch.where(far, 0, shifted)).to(a.dtype)


@operator("BitCast", since=26)
def bit_cast(call: Call, x: Tensor) -> Tensor:
    return x.contiguous().view(call.dtype("to"))


@operator("Not")
def not_(call: Call, x: Tensor) -> Tensor:
    return torch.logical_not(x)


@operator("Where", either=(1, 2))
def where(call: Call, condition: Tensor, a: Tensor | Known, b: Tensor | Known) -> Tensor:
    return torch.where(condition, _plain(a), _plain(b))


def _plain(x: Tensor | Known) -> Tensor:
    """One number becomes a scalar of its dtype: where() would take float64 for a Python float."""
    if isinstance(x, Tensor):
        return x
    if x.numbers.size == 1 and x.numbers.ndim == 0:
        return torch.scalar_tensor(x.numbers.item(), dtype=x.dtype)
    return plain_tensor(x)


@operator("IsNaN")
def is_nan(call: Call, x: Tensor) -> Tensor:
    return torch.isnan(x)


@operator("IsInf", since=10)
def is_infinite(call: Call, x: Tensor) -> Tensor:
    positive, negative = call.attribute("detect_positive", 1), call.attribute("detect_negative", 1)
    if positive and negative:
        return torch.isinf(x)
    limit = float("inf") if positive else float("-inf")
    return x == limit if positive or negative else torch.zeros_like(x, dtype=torch.bool)


@operator("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    return _cast(x, call.dtype("to"))


@operator("CastLike", raw=True)
def cast_like(call: Call, x: Any, target: Any) -> Any:
    if isinstance(x, Known):
        found = cast_known(call, x, known(0, target.dtype) if isinstance(target, Tensor) else target)
        return plain_tensor(x).to(target.dtype) if found is NotImplemented else found
    return _cast(x, target.dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


@operator("Clip")
def clip_attributes(call: Call, x: Tensor) -> Tensor:
    return _clip(x, call.attribute("min"), call.attribute("max"))


@operator("Clip", since=11, numbers=(1, 2))
def clip(call: Call, x: Tensor, low: Operand = None, high: Operand = None) -> Tensor:
    return _clip(x, low, high)


def _clip(x: Tensor, low: Operand, high: Operand) -> Tensor:
    if (low, high) == (0.0, 6.0) and x.dtype.is_floating_point:
        return torch.nn.functional.relu6(x)
    if low is None and high is None:
        return x
    wide, low, high = _tensors(x, low, high)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        for bound, function in ((low, torch.maximum), (high, torch.minimum)):
            if bound is not None:
                bound = bound if isinstance(bound, Tensor) else torch.scalar_tensor(bound, dtype=wide.dtype)
                wide = function(wide, bound)
        return like(wide, x)
    return like(torch.clamp(wide, low, high), x)
