"""Which constants of a file are weights: told by what they are used for.

A file does not say what was trained. A constant of floating point that reaches a weight's position of an operator
(`weights` in the table) is trained, also when it is transposed, reshaped, cast or computed with on the way. Running
statistics, masks, scales of one number and shapes are not; nor are whole numbers of 8 bits, which get a role of their
own there.
"""

from __future__ import annotations

import numpy as np
import torch

from worker.compression.formats.onnx.graph import Graph, Known, Node
from worker.compression.formats.onnx.limits import check_time
from worker.compression.formats.onnx.table import EVERY, find

WHOLE = "whole numbers"
"""The role of a weight that was quantized, without an operator that says so."""
WEAK = {"addend", "factor"}
"""Roles of operands that are as often a plain number or a mask: only several finite numbers of a usual size count."""
EIGHT_BITS = (torch.int8, torch.uint8)
LARGEST_WEIGHT = 1e4
"""Beyond that an addend is a mask (−10⁴, −10⁹, −3.4·10³⁸)."""


def roles(graph: Graph) -> dict[str, str]:
    """Constant → role, for every constant that is trained, or would be if it were no whole numbers."""
    finder = _Finder(graph)
    for node in graph.all_nodes():
        finder.visit(node)
    return finder.roles


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.constants = graph.constants
        self.sources: dict[str, frozenset[str]] = {
            name: frozenset([name] if value.dtype.is_floating_point or value.dtype in EIGHT_BITS else [])
            for name, value in graph.constants.items()
        }
        """Values that come from constants alone → those among these that may be weights."""
        self.products: set[str] = set()
        """Results of operators with a weight."""
        self.roles: dict[str, str] = {}

    def visit(self, node: Node) -> None:
        check_time()
        inputs = [name for name in node.inputs if name]
        if inputs and not node.bodies() and all(name in self.sources for name in inputs):
            found = frozenset().union(*(self.sources[name] for name in inputs))
            self.sources.update((name, found) for name in node.outputs if name)
            return
        entry = find(node)
        if entry is None:
            return
        for i, name in enumerate(node.inputs):
            role = entry.weights.get(i, entry.weights.get(EVERY))
            if role is None or not self.sources.get(name):
                continue
            for constant in self.sources[name]:
                if self._is_weight(constant, role, node):
                    is_whole = self.constants[constant].dtype in EIGHT_BITS
                    self.roles.setdefault(constant, WHOLE if is_whole else role)
            if role == "weight":
                self.products.update(node.outputs)

    def _is_weight(self, name: str, role: str, node: Node) -> bool:
        value = self.constants[name]
        if value.numbers.size == 0:
            return False
        if value.dtype in EIGHT_BITS:
            return role == "weight" and value.numbers.ndim > 1
        if role not in WEAK:
            return value.numbers.size > 1 or value.numbers.ndim > 0
        if value.numbers.size == 1:
            return value.numbers.ndim > 0 and role == "addend" and any(n in self.products for n in node.inputs)
        return _usual(value)


def _usual(value: Known) -> bool:
    low, high = float(np.min(value.numbers)), float(np.max(value.numbers))
    return low > -LARGEST_WEIGHT and high < LARGEST_WEIGHT
