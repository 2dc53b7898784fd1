"""Operators that are not in the table, where they depend on constants alone: ONNX Runtime computes them once.

What comes out is a constant like any other, and a weight if it is used as one. What went in is not trained, because the
result would not follow it. (This process has no credentials and no network, and its memory is bounded.) Operators that
depend on data are `behind`'s, or `keeping`'s.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from worker.compression.errors import CompressionError
from worker.compression.formats.exporting import quiet
from worker.compression.formats.onnx.folding import MAX_NUMBERS, RANDOM, constant
from worker.compression.formats.onnx.graph import DTYPES, Graph, Known, Node, Value
from worker.compression.formats.onnx.limits import check_time
from worker.compression.formats.onnx.normalising import QUANTIZED, WIDENED, attribute_proto
from worker.compression.formats.onnx.operators.common import plain_tensor
from worker.compression.formats.onnx.running import Runner, title
from worker.compression.formats.onnx.table import Call, find
from worker.compression.formats.verification import silent_options

IR_VERSION = 10


def compute_outside(graph: Graph) -> tuple[tuple[str, ...], set[str]]:
    """In place: nodes that are not in the table and depend on constants alone become constants.

    Returns the operators, and the file's constants that were computed with, which must not be trained.
    """
    outside = _Outside(graph)
    if any(find(node) is None for node in graph.all_nodes()):
        outside.visit(graph)
    return tuple(sorted(outside.operators)), outside.used


class _Outside:
    def __init__(self, graph: Graph) -> None:
        self.constants = graph.constants
        self.operators: set[str] = set()
        self.used: set[str] = set()
        self.results: set[str] = set()
        self.makers: dict[str, Node] = {}
        """Values that depend on constants alone → their nodes."""
        self.values: dict[str, Value] = {}
        """Those of them that were needed. They do not replace the nodes: a weight that is also transposed for an
        operator outside the table goes on being that weight elsewhere."""
        self.runner = Runner(plain_tensor)

    def visit(self, graph: Graph) -> None:
        kept = []
        for node in graph.nodes:
            if not self._is_fixed(node):
                for body in node.bodies():
                    self.visit(body)
            elif find(node) is not None:
                self.makers.update((name, node) for name in node.outputs if name)
            elif self._compute(node):
                continue
            kept.append(node)
        graph.nodes = kept

    def _is_fixed(self, node: Node) -> bool:
        known = all(not name or name in self.constants or name in self.makers for name in node.inputs)
        return bool(node.inputs) and known and not node.bodies() and node.operator not in RANDOM

    def _compute(self, node: Node) -> bool:
        """Whether the node's results are constants now."""
        check_time()
        inputs = [self._value(name) if name else None for name in node.inputs]
        if any(value is None and name for value, name in zip(inputs, node.inputs, strict=True)):
            return False
        results = by_onnx_runtime(node, [_known(value) for value in inputs])
        if results is None:
            return False
        self.operators.add(title(node))
        self._use(node)
        for name, result in zip(node.outputs, results, strict=True):
            if name:
                self.constants[name] = constant(name, result)
                self.results.add(name)
        return True

    def _use(self, node: Node) -> None:
        todo, seen = list(node.inputs), set(self.results)
        while todo:
            name = todo.pop()
            if name in seen or not name:
                continue
            seen.add(name)
            if name in self.constants:
                self.used.add(name)
            else:
                todo.extend(self.makers[name].inputs)

    def _value(self, name: str) -> Value | None:
        """None if it is too large or cannot be computed; the node stays then, and what is wrong with it is said."""
        todo = [name]
        while todo:  # not by recursion: chains may be long
            wanted = todo[-1]
            if wanted in self.constants or wanted in self.values:
                todo.pop()
                continue
            node = self.makers[wanted]
            missing = [n for n in node.inputs if n and n not in self.constants and n not in self.values]
            if missing:
                todo.extend(missing)
                continue
            try:
                given = [self.constants.get(n, self.values.get(n)) if n else None for n in node.inputs]
                results = self.runner.results(Call(node), given)
            except CompressionError:
                return None
            except Exception:
                return None
            if any(not _fits(result) for result in results):
                return None
            self.values.update(zip(node.outputs, results, strict=False))
        return self.constants.get(name, self.values.get(name))


def _fits(value: Value) -> bool:
    if isinstance(value, Tensor):
        return value.numel() <= MAX_NUMBERS
    return isinstance(value, Known) and value.numbers.size <= MAX_NUMBERS


def _known(value: Value | None) -> Known | None:
    if isinstance(value, Tensor):
        return Known(value.numpy(), value.dtype)
    assert value is None or isinstance(value, Known)
    return value


def by_onnx_runtime(node: Node, inputs: list[Known | None]) -> list[Known] | None:
    """The results of one node without sub-graphs; None where ONNX Runtime does not compute them or they are too large
    or no numbers."""
    if node.operator in QUANTIZED or sum(x.numbers.size for x in inputs if x is not None) > MAX_NUMBERS:
        return None
    given = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
    try:
        with quiet():
            session = onnxruntime.InferenceSession(
                _model(node, given).SerializeToString(), silent_options(), providers=["CPUExecutionProvider"]
            )
            arrays = session.run(None, {name: x.numbers for name, x in given.items()})
    except Exception:  # of many kinds, none of them public
        return None
    found = iter(arrays)
    results = [next(found) if name else None for name in node.outputs]
    if any(isinstance(x, np.ndarray) and x.size > MAX_NUMBERS for x in results):
        return None
    known = [
        _as_known(x) if name else Known(np.empty(0), torch.float32)
        for x, name in zip(results, node.outputs, strict=True)
    ]
    return None if any(x is None for x in known) else [x for x in known if x is not None]


def _model(node: Node, given: dict[str, Known]) -> onnx.ModelProto:
    count = len(node.inputs)
    names = [f"x{i}" if f"x{i}" in given else "" for i in range(count)]
    outputs = [f"y{i}" if name else "" for i, name in enumerate(node.outputs)]
    proto = onnx.NodeProto(op_type=node.operator, domain=node.domain, input=names, output=outputs)
    proto.attribute.extend(attribute_proto(name, value) for name, value in node.attributes.items())
    kinds = {dtype: number for number, dtype in DTYPES.items()}
    ports = [onnx.helper.make_tensor_value_info(n, kinds[x.dtype], x.numbers.shape) for n, x in given.items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs if name]
    imports = [onnx.helper.make_opsetid(node.domain, node.opset)]
    return onnx.helper.make_model(
        onnx.helper.make_graph([proto], "one", ports, results), opset_imports=imports, ir_version=IR_VERSION
    )


def _as_known(value: object) -> Known | None:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        return None
    dtype = DTYPES[onnx.helper.np_dtype_to_tensor_dtype(value.dtype)]
    return Known(value.astype(np.float32), torch.float32) if dtype in WIDENED else Known(value, dtype)
