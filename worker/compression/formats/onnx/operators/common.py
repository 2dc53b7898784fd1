"""What several families need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker.compression.formats.onnx.graph import Known
from worker.compression.formats.onnx.reading import as_torch
from worker.compression.formats.onnx.table import Call

UNSIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
"""torch stores these, but computes little with them."""


def widened(x: Any) -> Any:
    """The same whole numbers in a type that torch computes with. (uint64 beyond 2⁶³ wraps.)"""
    return x.to(UNSIGNED[x.dtype]) if isinstance(x, Tensor) and x.dtype in UNSIGNED else x


def like(result: Tensor, x: Any) -> Tensor:
    """Back to the dtype that was widened."""
    return result.to(x.dtype) if isinstance(x, Tensor) and x.dtype != result.dtype else result


def axis(value: int, rank: int) -> int:
    """A negative axis counts from the end."""
    return value + rank if value < 0 else value


def axes(values: Sequence[int], rank: int) -> list[int]:
    return [axis(int(value), rank) for value in values]


def product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def split_count(call: Call) -> int:
    """Of the parts of a `Split` that says no sizes."""
    parts = int(call.attribute("num_outputs", call.output_count))
    if parts > call.output_count:
        raise call.error(f"has {call.output_count} results for {parts} parts")
    return parts


def plain_tensor(value: Known) -> Tensor:
    """A known value as a tensor, made on the spot."""
    if not value.is_symbolic:
        return as_torch(value.numbers, value.dtype)
    numbers = [torch.scalar_tensor(n, dtype=value.dtype) for n in value.numbers.ravel().tolist()]
    return torch.stack(numbers).reshape(value.numbers.shape) if value.numbers.ndim else numbers[0]
