"""An ONNX graph as the importer works on it: functions are gone, every name is unique, attributes are Python values.

Values are told apart by what may be done with them. A tensor (`torch.Tensor`) is data, or computed from data or
weights. A `Known` value is known before the network runs: a constant of the file, a shape, or arithmetic on these. Its
numbers are Python's (some may be `SymInt`s while `torch.export` traces), so that it can be a size, an axis or a
condition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    14: torch.complex64,
    15: torch.complex128,
    16: torch.bfloat16,
}
"""`TensorProto.DataType` → torch, as far as torch computes with it."""
NUMPY: dict[torch.dtype, np.dtype] = {
    dtype: np.dtype(str(dtype).removeprefix("torch.")) for dtype in DTYPES.values() if dtype != torch.bfloat16
} | {torch.bfloat16: np.dtype(np.float32)}
"""The dtype of a `Known` value's numbers."""

UNPACKED = "espalier.unpacked"
"""The domain of operators whose weights are in torch's form (`unpacking`); no message says it."""


@dataclass(frozen=True)
class Known:
    """Numbers that are known before the network runs.

    `numbers`: a NumPy array of the fitting dtype, or of objects if it holds a `SymInt`, `SymFloat` or `SymBool`.
    `constant`: the name under which the file's constant is registered, if it is one.
    """

    numbers: np.ndarray
    dtype: torch.dtype
    constant: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    @property
    def is_symbolic(self) -> bool:
        return self.numbers.dtype == object

    def python(self) -> Any:
        """A number, or nested lists of numbers."""
        return self.numbers.tolist()


@dataclass(frozen=True)
class Items:
    """An ONNX sequence: how many elements it has is known before the network runs."""

    values: tuple[torch.Tensor | Known, ...]


@dataclass(frozen=True)
class Absent:
    """An optional value that is not there."""


Value = torch.Tensor | Known | Items | Absent
"""What a name stands for while the graph runs."""


@dataclass
class Node:
    """One call. An empty input name is an input that was left out; an empty output name one that nobody wants."""

    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    opset: int
    domain: str = ""
    name: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.domain, self.operator

    def __str__(self) -> str:
        title = self.operator if self.domain in ("", UNPACKED) else f"{self.domain}.{self.operator}"
        return f"{title} {self.name!r}" if self.name else title

    def bodies(self) -> list[Graph]:
        """The sub-graphs of `If`, `Loop` and `Scan`."""
        return [value for value in self.attributes.values() if isinstance(value, Graph)]

    def names(self) -> list[str]:
        """Everything that it takes or gives, its sub-graphs included."""
        names = [*self.inputs, *self.outputs]
        for body in self.bodies():
            names.extend(port.name for port in body.outputs)
            for inner in body.nodes:
                names.extend(inner.names())
        return [name for name in names if name]


@dataclass(frozen=True)
class Port:
    """An input or output. `shape`: sizes, names of free axes, None where nothing is said; None if not even the rank."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int | str | None, ...] | None


@dataclass
class Graph:
    """Nodes in an order in which they can run. `constants`: of the whole model, sub-graphs included."""

    nodes: list[Node]
    inputs: list[Port]
    outputs: list[Port]
    constants: dict[str, Known] = field(default_factory=dict)

    def all_nodes(self) -> Iterator[Node]:
        """Every node, those of sub-graphs before the node that holds them."""
        for node in self.nodes:
            for body in node.bodies():
                yield from body.all_nodes()
            yield node
