"""Computing once what does not depend on inputs or weights, and choosing branches whose condition is known."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from worker.compression.errors import CompressionError
from worker.compression.formats.onnx.graph import Absent, Graph, Items, Known, Node, Value
from worker.compression.formats.onnx.operators.common import plain_tensor
from worker.compression.formats.onnx.running import Runner, evaluate_known
from worker.compression.formats.onnx.table import Call, find

MAX_NUMBERS = 2**24
"""Larger results are computed when the network runs."""
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
SIZED_BY_INPUT = ("Expand", "Tile", "ConstantOfShape", "Range", "Pad", "Resize", "Upsample", "OneHot", "EyeLike")
"""A few numbers may ask these for any amount of memory: left to the run, unless the result is small."""


def fold(graph: Graph, weights: Collection[str]) -> None:
    """In place: nodes on constants alone become constants, `Identity` and known branches go."""
    folder = _Folder(graph, weights)
    graph.nodes = folder.nodes(graph.nodes)
    graph.outputs = [replace(port, name=folder.alias.get(port.name, port.name)) for port in graph.outputs]
    drop_unused(graph)


def drop_unused(graph: Graph) -> None:
    """Nodes and constants that no output needs; a node's results that nobody takes lose their name."""
    needed = {port.name for port in graph.outputs}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            node.outputs = [name if name in needed else "" for name in node.outputs]
            kept.append(node)
            needed.update(node.names())
    graph.nodes = kept[::-1]
    graph.constants = {name: value for name, value in graph.constants.items() if name in needed}


class _Folder:
    def __init__(self, graph: Graph, weights: Collection[str]) -> None:
        self.constants = graph.constants
        self.weights = weights
        self.alias: dict[str, str] = {}
        self.runner = Runner(plain_tensor)

    def nodes(self, nodes: list[Node]) -> list[Node]:
        kept: list[Node] = []
        for node in nodes:
            node.inputs = [self.alias.get(name, name) for name in node.inputs]
            if node.operator == "Identity" and not node.domain and node.inputs:
                self.alias[node.outputs[0]] = node.inputs[0]
            elif node.operator == "If" and self._is_constant(node.inputs[0]):
                branch = "then_branch" if bool(self.constants[node.inputs[0]].numbers.all()) else "else_branch"
                body: Graph = node.attributes[branch]
                kept.extend(self.nodes(body.nodes))
                for name, port in zip(node.outputs, body.outputs, strict=False):
                    self.alias[name] = self.alias.get(port.name, port.name)
            elif not self._fold(node):
                for body in node.bodies():
                    body.nodes = self.nodes(body.nodes)
                    body.outputs = [replace(p, name=self.alias.get(p.name, p.name)) for p in body.outputs]
                kept.append(node)
        return kept

    def _is_constant(self, name: str) -> bool:
        return name in self.constants and name not in self.weights

    def _fold(self, node: Node) -> bool:
        """Whether the node's results are constants now."""
        if not node.inputs or node.operator in RANDOM or node.bodies():
            return False
        if not all(not name or self._is_constant(name) for name in node.inputs):
            return False
        inputs = [self.constants[name] if name else None for name in node.inputs]
        if find(node) is None or sum(x.numbers.size for x in inputs if x is not None) > MAX_NUMBERS:
            return False
        call = Call(node)
        try:
            results = evaluate_known(call, inputs)
            if results is None:
                if node.operator in SIZED_BY_INPUT:
                    return False
                results = self.runner.results(call, list(inputs))
        except CompressionError:
            raise
        except Exception:
            return False  # it is found out, and said, when the network runs
        named = dict(zip(node.outputs, results, strict=False))
        if any(isinstance(r, Tensor) and r.numel() > MAX_NUMBERS for r in results):
            return False
        if any(isinstance(r, (Items, Absent)) for r in results):
            return False
        for name, result in named.items():
            if name:
                self.constants[name] = constant(name, result)
        return True


def constant(name: str, value: Value) -> Known:
    assert isinstance(value, (Known, Tensor))
    if isinstance(value, Known):
        return Known(value.numbers, value.dtype, name)
    return Known(value.detach().numpy(), value.dtype, name)
