"""Operators outside the table at the end of a network, such as the one that picks the boxes of a detector.

No gradient has to pass through what lies behind the last weight. So such operators, and everything that is computed
from them, are taken off when the file is read: the network ends at the values that they take, which are outputs now and
keep their size. They are put back, as they were, into the `.onnx` file that is written; a `.pt2` ends before them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import onnx

from worker.compression.errors import UnsupportedModel
from worker.compression.formats.onnx.folding import RANDOM
from worker.compression.formats.onnx.graph import Node
from worker.compression.formats.onnx.labels import drop_unused, names_of
from worker.compression.formats.onnx.normalising import MAX_NODES, QUANTIZED
from worker.compression.formats.onnx.reading import Source
from worker.compression.formats.onnx.running import title
from worker.compression.formats.onnx.schemas import ONNX_DOMAINS
from worker.compression.formats.onnx.table import find
from worker.compression.formats.program import Behind

WEIGHT = "weight"
"""The role of what makes an operator a layer."""

MAX_VALUES = 64
"""That a network can have as outputs for what lies behind it; detectors have less than ten."""


def take_off(source: Source, fixed: Collection[str]) -> Behind | None:
    """In place. None, and nothing changed, where no operator is outside the table but those that something trained lies
    behind (`keeping` is for them). `fixed`: inputs that will be constants."""
    if len(source.model.graph.node) > MAX_NODES:
        return None
    end = _End(source.model)
    if not end.taken or not 0 < len(end.values) <= MAX_VALUES or end.borrowed & set(fixed):
        return None
    return end.cut(source)


def not_possible(behind: Behind, why: str) -> UnsupportedModel:
    """The error for a file that could be read without what lies behind it."""
    return UnsupportedModel(
        f"The model uses operators that are not supported: {', '.join(behind.operators)}. They lie behind everything "
        f"that is trained, and could be left as they are, but {why}.",
        hint="Export the network with float32 weights and a free batch axis, or without these operators.",
    )


class _End:
    """What would be taken off: `taken`, indices of nodes; `values`, what they take from the network; `borrowed`, what
    they take from the inputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.nodes = model, list(model.graph.node)
        self.opsets = {_domain(entry.domain): int(entry.version) for entry in model.opset_import}
        self.functions = {(_domain(f.domain), f.name) for f in model.functions}
        self.weights = {tensor.name for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input} - self.weights
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.moving, self.sizes = self._moving()
        self.operators: set[str] = set()
        self.made: set[str] = set()
        self.taken = self._from_the_first_outside()
        self.values: dict[str, None] = {}
        self.borrowed: set[str] = set()
        for i in sorted(self.taken):
            self._follow(names_of(self.nodes[i]))
        self.values = dict.fromkeys(sorted(self.values, key=lambda name: self.maker[name]))

    def _moving(self) -> tuple[set[str], set[str]]:
        """Values that depend on data (or chance), and those of them that depend on nothing but shapes."""
        moving: set[str] = set(self.inputs)
        sizes: set[str] = set()
        for node in self.nodes:
            found = moving.intersection(names_of(node))
            if found or node.op_type in RANDOM:
                results = [name for name in node.output if name]
                moving.update(results)
                if node.op_type in ("Shape", "Size") or (found and found <= sizes):
                    sizes.update(results)
        return moving, sizes

    def _from_the_first_outside(self) -> set[int]:
        needed = {value.name for value in self.model.graph.output}
        used = set()
        for i in range(len(self.nodes) - 1, -1, -1):
            if needed.intersection(self.nodes[i].output):
                used.add(i)
                needed.update(names_of(self.nodes[i]))
        taken, trained_behind = set(), self._before_weights(used)
        for i in sorted(used):
            node = self.nodes[i]
            outside = self._is_outside(node) and bool(self.moving.intersection(node.output)) and i not in trained_behind
            if outside:
                self.operators.add(title(self._as_node(node)))
            if outside or self.made.intersection(names_of(node)):
                taken.add(i)
                self.made.update(name for name in node.output if name)
        return taken

    def _as_node(self, node: onnx.NodeProto) -> Node:
        domain = _domain(node.domain)
        return Node(node.op_type, [], [], {}, self.opsets.get(domain, 1), domain)

    def _is_outside(self, node: onnx.NodeProto) -> bool:
        if (_domain(node.domain), node.op_type) in self.functions or node.op_type in ("Constant", *QUANTIZED):
            return False
        return find(self._as_node(node)) is None

    def _follow(self, names: Iterator[str]) -> None:
        """Sizes and constants are computed again behind the network; everything else comes out of it."""
        todo = list(names)
        while todo:
            name = todo.pop()
            if not name or name in self.made or name in self.values or name in self.weights:
                continue
            i = self.maker.get(name)
            if i is None:
                self.borrowed |= {name} & self.inputs
            elif name in self.moving and name not in self.sizes:
                self.values[name] = None
            elif i not in self.taken:
                self.taken.add(i)
                todo.extend(names_of(self.nodes[i]))

    def _before_weights(self, used: Collection[int]) -> set[int]:
        """Those of the nodes `used` that something trained lies behind."""
        ranks = {tensor.name: len(tensor.dims) for tensor in self.model.graph.initializer}
        before: set[int] = set()
        wanted: set[str] = set()
        for i in sorted(used, reverse=True):
            if any(name in wanted for name in self.nodes[i].output if name):
                before.add(i)
            if i in before or self._is_trained(self.nodes[i], ranks):
                wanted.update(names_of(self.nodes[i]))
        return before

    def _is_trained(self, node: onnx.NodeProto, ranks: Mapping[str, int]) -> bool:
        if (_domain(node.domain), node.op_type) in self.functions:
            return True
        entry = find(self._as_node(node))
        roles = entry.weights if entry else {}
        weights = (name for position, name in enumerate(node.input) if roles.get(position) == WEIGHT)
        return any(ranks.get(name, 0) >= 2 for name in weights) and not _is_lookup(node)

    def cut(self, source: Source) -> Behind:
        graph = self.model.graph
        behind = onnx.GraphProto(name="behind")
        behind.node.extend(self.nodes[i] for i in sorted(self.taken))
        behind.output.extend(graph.output)
        wanted = {name for node in behind.node for name in names_of(node)}
        for tensor in graph.initializer:
            if tensor.name in wanted:
                external = tensor.data_location == onnx.TensorProto.EXTERNAL
                behind.initializer.append(
                    onnx.numpy_helper.from_array(source.array(tensor), tensor.name) if external else tensor
                )
        kept = [value for value in graph.output if value.name not in self.made]
        names = {value.name for value in kept}
        values = [onnx.ValueInfoProto(name=name) for name in self.values if name not in names]
        del graph.output[:]
        graph.output.extend([*kept, *values])
        drop_unused(graph)
        domains = {_domain(node.domain) for node in behind.node}
        return Behind(
            behind.SerializeToString(),
            tuple(sorted(self.operators)),
            tuple(value.name for value in values),
            {domain: self.opsets.get(domain, 1) for domain in domains},
        )


def _is_lookup(node: onnx.NodeProto) -> bool:
    """`Gather` of a constant by what was found is no embedding here: anchors, names, sizes."""
    return node.op_type == "Gather"


def _domain(domain: str) -> str:
    return "" if domain in ONNX_DOMAINS else domain
