"""Arithmetic on shapes: operators on `Known` values, in Python numbers, so that free axes stay free.

A function returns an array (the dtype of the first input is kept), a `Known`, or `NotImplemented` when the result is
not known: the operator's torch function then does it on tensors.
"""

from __future__ import annotations

import math
import operator as op
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from worker.compression.formats.onnx.graph import DTYPES, NUMPY, Known
from worker.compression.formats.onnx.operators.common import product, split_count
from worker.compression.formats.onnx.reading import MAX_RANK
from worker.compression.formats.onnx.table import Call, known, shape_arithmetic

MAX_NUMBERS = 2**16


@shape_arithmetic("Identity")
def identity(call: Call, x: Known) -> Known:
    return x


def _elementwise(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `shape_arithmetic`; what broadcasting makes large is not known."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def bounded(call: Call, *inputs: Known) -> Any:
            large = math.prod(np.broadcast_shapes(*(x.shape for x in inputs))) > MAX_NUMBERS
            return NotImplemented if large else function(call, *inputs)

        return shape_arithmetic(*names)(bounded)

    return register


def _each(function: Callable[..., Any], *inputs: Known) -> np.ndarray:
    """Elementwise with broadcasting, on objects."""
    arrays = [x.numbers.astype(object) for x in inputs]
    with np.errstate(all="ignore"):
        result = np.frompyfunc(function, len(arrays), 1)(*arrays)
    return np.asarray(result, dtype=object)


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, (float, torch.SymFloat)) or isinstance(b, (float, torch.SymFloat)):
        return a / b
    if isinstance(a, int) and isinstance(b, int):
        return math.trunc(a / b) if abs(a) < 2**52 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)
    return a // b  # sizes are not negative


def _modulo(a: Any, b: Any) -> Any:
    return a % b


def _power(a: Any, b: Any) -> Any:
    """Python's own would have any number of digits, or be complex."""
    if isinstance(a, int) and isinstance(b, int):
        if (a.bit_length() - 1) * b >= 64:
            raise OverflowError(f"{a} to the power of {b} does not fit into 64 bits")
        return a**b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return float(np.power(float(a), b))
    return a**b


_BINARY: dict[str, Callable[..., Any]] = {
    "Add": op.add,
    "Sub": op.sub,
    "Mul": op.mul,
    "Mod": _modulo,
    "Pow": _power,
    "Min": lambda a, b: torch.sym_min(a, b),
    "Max": lambda a, b: torch.sym_max(a, b),
}
_COMPARISONS: dict[str, Callable[..., Any]] = {
    "Equal": op.eq,
    "Less": op.lt,
    "Greater": op.gt,
    "LessOrEqual": op.le,
    "GreaterOrEqual": op.ge,
}


@_elementwise(*_BINARY)
def binary(call: Call, *inputs: Known) -> Any:
    if call.node.operator == "Mod" and call.attribute("fmod", 0):
        return NotImplemented
    result = inputs[0].numbers
    for other in inputs[1:]:
        result = _each(_BINARY[call.node.operator], known(result, inputs[0].dtype), other)
    return result


@_elementwise("Div")
def divide(call: Call, a: Known, b: Known) -> Any:
    if any(isinstance(n, (int, float)) and n == 0 for n in b.numbers.ravel().tolist()):
        return NotImplemented
    return _each(_divide, a, b)


@_elementwise(*_COMPARISONS)
def compare(call: Call, a: Known, b: Known) -> Known:
    return known(_each(_decided, known(_each(_COMPARISONS[call.node.operator], a, b), torch.bool)), torch.bool)


def _decided(answer: Any) -> Any:
    """Whether a size is -1, say, is known even if the size is not: exporters ask that before every `Expand`."""
    if isinstance(answer, torch.SymBool):
        for plain, asked in ((True, answer), (False, torch.sym_not(answer))):
            if statically_known_true(asked):
                return plain
    return answer


@_elementwise("Not", "And", "Or", "Xor")
def logical(call: Call, a: Known, b: Known | None = None) -> Any:
    if a.is_symbolic or (b is not None and b.is_symbolic):
        return NotImplemented
    if b is None:
        return np.logical_not(a.numbers)
    return {"And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor}[call.node.operator](a.numbers, b.numbers)


@shape_arithmetic("Neg", "Abs", "Sqrt", "Floor", "Ceil")
def unary(call: Call, x: Known) -> Any:
    if call.node.operator in ("Neg",):
        return _each(op.neg, x)
    if x.is_symbolic:
        function = {"Sqrt": torch.sym_sqrt, "Floor": math.floor, "Ceil": math.ceil, "Abs": abs}[call.node.operator]
        result = _each(function, x)
        return _each(torch.sym_float, known(result, x.dtype)) if x.dtype.is_floating_point else result
    return getattr(np, {"Sqrt": "sqrt", "Floor": "floor", "Ceil": "ceil", "Abs": "abs"}[call.node.operator])(x.numbers)


@shape_arithmetic("Cast", "CastLike")
def cast(call: Call, x: Known, target: Known | None = None) -> Any:
    to = call.attribute("to")
    dtype = target.dtype if target is not None else DTYPES.get(to)
    if dtype is None or x.dtype.is_complex or dtype.is_complex:
        return NotImplemented
    if not x.is_symbolic:
        if dtype in (torch.bfloat16, torch.float16) or x.dtype == torch.bfloat16:
            return NotImplemented
        numbers = x.numbers
        if dtype != torch.bool and not dtype.is_floating_point and numbers.dtype.kind == "f":
            if not np.isfinite(numbers).all():
                return NotImplemented
            numbers = np.trunc(numbers).astype(np.int64)
        return Known(numbers.astype(NUMPY[dtype]), dtype)
    if dtype == torch.bool:
        return known(_each(lambda n: n != 0, x), dtype)
    function = torch.sym_float if dtype.is_floating_point else torch.sym_int
    if x.dtype == torch.bool:
        return NotImplemented
    return known(_each(function, x), dtype)


@_elementwise("Where")
def where(call: Call, condition: Known, a: Known, b: Known) -> Any:
    if condition.is_symbolic:
        return NotImplemented
    result = np.where(condition.numbers, a.numbers.astype(object), b.numbers.astype(object))
    return known(result, a.dtype)


# ----------------------------------------------------------------------------------------------------- arrangements


@shape_arithmetic("Concat")
def concat(call: Call, *inputs: Known) -> Any:
    return np.concatenate([x.numbers.astype(object) for x in inputs], call.attribute("axis", 0))


@shape_arithmetic("Gather")
def gather(call: Call, x: Known, indices: Known) -> Any:
    return NotImplemented if indices.is_symbolic else np.take(x.numbers, indices.numbers, call.attribute("axis", 0))


@shape_arithmetic("Unsqueeze")
def unsqueeze(call: Call, x: Known, axes: Known | None = None) -> Any:
    where_ = call.attribute("axes") if axes is None else axes.numbers.ravel().tolist()
    return np.expand_dims(x.numbers, tuple(int(a) for a in where_))


@shape_arithmetic("Squeeze")
def squeeze(call: Call, x: Known, axes: Known | None = None) -> Any:
    where_ = call.attribute("axes") if axes is None else axes.numbers.ravel().tolist()
    return np.squeeze(x.numbers, None if where_ is None else tuple(int(a) for a in where_))


@shape_arithmetic("Slice")
def slice_(
    call: Call,
    x: Known,
    starts: Known | None = None,
    ends: Known | None = None,
    axes: Known | None = None,
    steps: Known | None = None,
) -> Any:
    if any(k is not None and k.is_symbolic for k in (starts, ends, axes, steps)):
        return NotImplemented

    def numbers(value: Known | None, name: str) -> Any:
        return call.attribute(name) if value is None else value.numbers.ravel().tolist()

    first, last = numbers(starts, "starts"), numbers(ends, "ends")
    where_ = numbers(axes, "axes") or list(range(len(first)))
    stride = numbers(steps, "steps") or [1] * len(first)
    key: list[Any] = [slice(None)] * x.numbers.ndim
    for a, i, j, step in zip(where_, first, last, stride, strict=True):
        key[int(a)] = slice(int(i), None if step < 0 and j <= -(2**31) else int(j), int(step))
    return x.numbers[tuple(key)]


@shape_arithmetic("Split")
def split(call: Call, x: Known, sizes: Known | None = None) -> Any:
    axis = call.attribute("axis", 0)
    lengths = call.attribute("split") if sizes is None else sizes.numbers.ravel().tolist()
    length = x.numbers.shape[axis]
    if lengths is None:
        parts = split_count(call)
        lengths = [-(-length // parts)] * (parts - 1)
        lengths.append(length - sum(lengths))
    return tuple(known(a, x.dtype) for a in np.split(x.numbers, np.cumsum(lengths)[:-1], axis))


@shape_arithmetic("Reshape")
def reshape(call: Call, x: Known, shape: Known | None = None) -> Any:
    sizes = call.attribute("shape") if shape is None else shape.numbers.ravel().tolist()
    if shape is not None and shape.is_symbolic:
        return NotImplemented
    if not call.attribute("allowzero", 0):
        sizes = [x.numbers.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.numbers.reshape([int(n) for n in sizes])


@shape_arithmetic("Transpose")
def transpose(call: Call, x: Known) -> Any:
    return np.transpose(x.numbers, call.attribute("perm"))


@shape_arithmetic("Flatten")
def flatten(call: Call, x: Known) -> Any:
    axis = call.attribute("axis", 1) % (x.numbers.ndim + 1)
    return x.numbers.reshape(math.prod(x.shape[:axis]), -1)


@shape_arithmetic("Expand")
def expand(call: Call, x: Known, shape: Known) -> Any:
    if shape.is_symbolic or math.prod(shape.numbers.tolist()) > MAX_NUMBERS:
        return NotImplemented
    sizes = np.broadcast_shapes(x.shape, tuple(int(n) for n in shape.numbers.tolist()))
    return NotImplemented if math.prod(sizes) > MAX_NUMBERS else np.broadcast_to(x.numbers, sizes)


@shape_arithmetic("Tile")
def tile(call: Call, x: Known, repeats: Known) -> Any:
    if repeats.is_symbolic or x.numbers.size * math.prod(max(n, 1) for n in repeats.numbers.tolist()) > MAX_NUMBERS:
        return NotImplemented
    return np.tile(x.numbers, repeats.numbers)


@shape_arithmetic("Shape")
def shape_(call: Call, x: Known) -> Known:
    return known(np.array(x.shape[call.attribute("start", 0) : call.attribute("end")], np.int64))


@shape_arithmetic("Size")
def size(call: Call, x: Known) -> Known:
    return known(np.array(x.numbers.size, np.int64))


@shape_arithmetic("ConstantOfShape")
def constant_of_shape(call: Call, shape: Known) -> Any:
    if shape.is_symbolic or math.prod(shape.numbers.tolist()) > MAX_NUMBERS:
        return NotImplemented
    value = call.attribute("value") or Known(np.zeros(1, np.float32), torch.float32)
    sizes = [int(n) for n in shape.numbers.tolist()]
    return Known(np.full(sizes, value.numbers.ravel()[0], value.numbers.dtype), value.dtype)


@shape_arithmetic("Range")
def range_(call: Call, start: Known, limit: Known, delta: Known) -> Any:
    if start.is_symbolic or limit.is_symbolic or delta.is_symbolic:
        return NotImplemented
    first, last, step = (x.numbers.item() for x in (start, limit, delta))
    count = max(math.ceil((last - first) / step), 0) if step else 0
    return NotImplemented if count > MAX_NUMBERS else (first + np.arange(count) * step).astype(start.numbers.dtype)


@shape_arithmetic("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def reduce(call: Call, x: Known, axes: Known | None = None) -> Any:
    where_ = call.attribute("axes") if axes is None else axes.numbers.ravel().tolist()
    if x.numbers.ndim > 1 or (where_ == [] and call.attribute("noop_with_empty_axes", 0)):
        return NotImplemented
    numbers = x.numbers.ravel().tolist()
    if not numbers:
        return NotImplemented
    if call.node.operator == "ReduceProd":
        if len(numbers) > MAX_RANK:
            return NotImplemented  # of no shape; Python's number may have any number of digits
        result = product(numbers)
    elif call.node.operator == "ReduceSum":
        result = sum(numbers[1:], start=numbers[0])
    else:
        function = torch.sym_max if call.node.operator == "ReduceMax" else torch.sym_min
        result = numbers[0]
        for n in numbers[1:]:
            result = function(result, n)
    return known([result] if x.numbers.ndim and call.attribute("keepdims", 1) else result, x.dtype)


@shape_arithmetic("NonZero")
def nonzero(call: Call, x: Known) -> Any:
    return NotImplemented if x.is_symbolic else known(np.array(np.nonzero(x.numbers), np.int64))


@shape_arithmetic("ScatterND")
def scatter_nd(call: Call, x: Known, indices: Known, updates: Known) -> Any:
    if indices.is_symbolic or call.attribute("reduction", "none") != "none":
        return NotImplemented
    result = x.numbers.astype(object)
    for at in np.ndindex(indices.numbers.shape[:-1]):
        result[tuple(indices.numbers[at])] = updates.numbers[at]
    return result
