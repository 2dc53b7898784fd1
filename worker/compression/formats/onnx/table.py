"""The table from ONNX operators to functions, and what a function declares about its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from worker.compression.errors import UnsupportedModel
from worker.compression.formats.onnx.graph import DTYPES, NUMPY, Graph, Known, Node, Value

MICROSOFT = "com.microsoft"
KEPT = "espalier.kept"
"""The domain of nodes that ONNX Runtime goes on computing (`keeping`)."""
EVERY = -1
"""As a position: every input from there on (of a variadic operator)."""

Run = Callable[[Graph, list[Value]], list[Value]]


@dataclass(frozen=True)
class Call:
    """What an operator's function gets besides its inputs."""

    node: Node
    run: Run | None = None
    """Runs a sub-graph with the values of its inputs (`If`, `Loop`, `Scan`)."""

    @property
    def opset(self) -> int:
        """Of the operator's own domain."""
        return self.node.opset

    @property
    def output_count(self) -> int:
        return len(self.node.outputs)

    def wants(self, i: int) -> bool:
        """Whether anybody takes output `i`."""
        return i < len(self.node.outputs) and bool(self.node.outputs[i])

    def attribute(self, name: str, default: Any = None) -> Any:
        """A Python value: int, float, str, a list of these, `Known` for tensors, `Graph`."""
        return self.node.attributes.get(name, default)

    def required(self, name: str) -> Any:
        if name not in self.node.attributes:
            raise self.error(f"lacks its attribute {name!r}")
        return self.node.attributes[name]

    def dtype(self, name: str, default: torch.dtype = torch.float32) -> torch.dtype:
        """An attribute that is a `TensorProto.DataType`, as torch's."""
        value = self.attribute(name)
        if value is None:
            return default
        if value not in DTYPES:
            raise self.error(f"makes numbers of the type {value}, which cannot be computed with here")
        return DTYPES[value]

    def error(self, what: str) -> UnsupportedModel:
        """`raise call.error("has an axis that …")`"""
        return UnsupportedModel(f"The operator {self.node} {what}.", hint=ERROR_HINT)


ERROR_HINT = "Export the network again, with another opset or without this part."


@dataclass(frozen=True)
class Operator:
    """One entry of the table: a function for a range of opsets, see `operators` for what is declared."""

    name: str
    function: Callable[..., Any]
    domain: str = ""
    since: int = 1
    known: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    either: tuple[int, ...] = ()
    raw: bool = False
    weights: Mapping[int, str] = field(default_factory=dict)


TABLE: dict[tuple[str, str], list[Operator]] = {}
"""(domain, name) → entries, newest first."""

ARITHMETIC: dict[str, Callable[..., Any]] = {}
"""Operator → function on `Known` values, for arithmetic on shapes (`shape_arithmetic`)."""


def operator(
    *names: str,
    domain: str = "",
    since: int = 1,
    known: tuple[int, ...] = (),
    numbers: tuple[int, ...] = (),
    either: tuple[int, ...] = (),
    raw: bool = False,
    weights: Mapping[int, str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a function into the table. See the docstring of `operators`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            entries = TABLE.setdefault((domain, name), [])
            if any(entry.since == since for entry in entries):
                raise ValueError(f"{name} since {since} is in the table twice")
            entries.append(Operator(name, function, domain, since, known, numbers, either, raw, weights or {}))
            entries.sort(key=lambda entry: -entry.since)
        return function

    return register


def shape_arithmetic(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a function on `Known` values into `ARITHMETIC`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ARITHMETIC.update(dict.fromkeys(names, function))
        return function

    return register


def find(node: Node) -> Operator | None:
    """The entry for a node, by its domain, name and opset."""
    return next((entry for entry in TABLE.get(node.key, ()) if entry.since <= node.opset), None)


def is_at(positions: tuple[int, ...] | Mapping[int, str], position: int) -> bool:
    return position in positions or EVERY in positions


def known(numbers: Any, dtype: torch.dtype = torch.int64) -> Known:
    """A `Known` value from Python numbers, among which may be symbolic ones."""
    if isinstance(numbers, np.ndarray) and numbers.dtype != object:
        return Known(numbers, dtype)
    array = np.array(numbers, dtype=object)
    if all(isinstance(n, (int, float, bool, complex, np.generic)) for n in array.flat):
        array = array.astype(NUMPY[dtype])
    return Known(array, dtype)
