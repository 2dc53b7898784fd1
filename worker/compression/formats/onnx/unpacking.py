"""Weights that a file keeps in a form of its own, as constants in torch's.

Recurrent layers: one weight for each direction and use, gates in torch's order, so that they are trained and cut like
those of a .pt2; a file that computes them is served by the operator itself. Linear models: their attributes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from worker.compression.errors import UnsupportedModel
from worker.compression.formats.onnx.graph import UNPACKED, Graph, Known, Node
from worker.compression.formats.onnx.labels import MACHINE_LEARNING
from worker.compression.formats.onnx.limits import check_time
from worker.compression.formats.onnx.operators.recurrent import GATES, unpacked

USES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_peephole")
LINEAR = ("LinearClassifier", "LinearRegressor")
ARRANGING = {
    ("", name) for name in ("Expand", "Slice", "Split", "Concat", "Squeeze", "Unsqueeze", "Tile", "Transpose", "Gather")
}
"""Operators that make zeros of zeros."""


def unpack_weights(graph: Graph) -> None:
    """In place."""
    _unpack_recurrent(graph)
    _unpack_linear(graph)


def _unpack_recurrent(graph: Graph) -> None:
    """Nodes that share their weights go on sharing them."""
    made: dict[tuple[str, ...], list[str]] = {}
    zeros: set[str] = set()
    for node in graph.all_nodes():
        check_time()
        if _is_zero(graph, node, zeros):
            zeros.update(node.outputs)
        if node.operator not in GATES or node.domain:
            continue
        for i in range(5, min(len(node.inputs), 7)):
            if node.inputs[i] in zeros or _is_zero_constant(graph, node.inputs[i]):
                node.inputs[i] = ""  # of zeros anyway; one tensor for several layers would tie their hidden units
        inputs = [*node.inputs, *[""] * (8 - len(node.inputs))]
        sources = (inputs[1], inputs[2], inputs[3], inputs[7])
        if all(not name or name in graph.constants for name in sources) and inputs[1] and inputs[2]:
            key = (node.operator, *sources)
            if key not in made:
                made[key] = _unpack(graph, node.operator, sources)
            node.inputs = [inputs[0], *inputs[4:7], *made[key]]
            node.domain = UNPACKED


def _is_zero(graph: Graph, node: Node, zeros: set[str]) -> bool:
    if node.operator == "ConstantOfShape" and not node.domain:
        value = node.attributes.get("value")
        return value is None or not value.numbers.any()
    if node.key not in ARRANGING or not node.inputs:
        return False
    data = node.inputs if node.operator == "Concat" else node.inputs[:1]
    return all(name in zeros or _is_zero_constant(graph, name) for name in data)


def _is_zero_constant(graph: Graph, name: str) -> bool:
    return name in graph.constants and not graph.constants[name].numbers.any()


def _unpack(graph: Graph, kind: str, sources: Sequence[str]) -> list[str]:
    values = [graph.constants[name] if name else None for name in sources]
    arrays = [None if value is None else value.numbers for value in values]
    names = []
    w, r, b, p = arrays
    for d, direction in enumerate(unpacked(kind, w, r, b, p, np.concatenate)):
        for use, array in zip(USES, direction, strict=True):
            if array is None:
                names.append("")
                continue
            dtype = next(v.dtype for v in values if v is not None)
            name = _free(graph, f"{sources[0]}.{use}{'_reverse' if d else ''}")
            graph.constants[name] = Known(np.ascontiguousarray(array), dtype, name)
            names.append(name)
    return names


def _free(graph: Graph, name: str) -> str:
    while name in graph.constants:
        name = f"{name}_"
    return name


def _unpack_linear(graph: Graph) -> None:
    """`coefficients [targets · in]` and `intercepts [targets]` of linear models."""
    for node in graph.all_nodes():
        if node.domain != MACHINE_LEARNING or node.operator not in LINEAR or len(node.inputs) != 1:
            continue
        numbers = np.array(node.attributes.pop("coefficients", None) or [], np.float32)
        intercepts = node.attributes.pop("intercepts", None)
        targets = len(intercepts or []) or node.attributes.get("targets", 1)
        if numbers.size == 0 or targets < 1 or numbers.size % targets:
            raise UnsupportedModel(f"The operator {node} has {numbers.size} coefficients for {targets} targets.")
        values = {"coefficients": numbers.reshape(targets, -1)}
        if intercepts:
            values["intercepts"] = np.array(intercepts, np.float32)
        for use, array in values.items():
            name = _free(graph, f"{node.name or node.operator}.{use}")
            graph.constants[name] = Known(array, torch.float32, name)
            node.inputs.append(name)
