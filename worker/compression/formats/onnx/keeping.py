"""Operators outside the table that depend on data: they stay as they are, and ONNX Runtime computes them one by one
(`formats.kept`), while the network is trained around them.

`keep` chooses them before the network runs. How large their results are has to be known to trace it: `learn_sizes`
finds that out by running the network, at first with operators that only watch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from worker.compression.errors import UnsupportedModel
from worker.compression.formats.kept import OPERATOR, Kept, Size
from worker.compression.formats.onnx.folding import RANDOM
from worker.compression.formats.onnx.graph import DTYPES, Graph, Known, Node, Port
from worker.compression.formats.onnx.normalising import QUANTIZED, WIDENED, attribute_proto
from worker.compression.formats.onnx.outside import IR_VERSION
from worker.compression.formats.onnx.running import missing, title
from worker.compression.formats.onnx.table import KEPT, Call, find, operator
from worker.compression.formats.onnx.trying import is_known
from worker.compression.formats.verification import random_tensor, relative_error

MAX_BYTES = 2**20
"""Of a node, which travels in every call."""
TOLERANCE = 1e-3
"""Between a sample in a batch and the same one alone, as a share of the output's scale."""
BATCH = "batch"
KINDS = {dtype: number for number, dtype in DTYPES.items() if dtype not in WIDENED and not dtype.is_complex}
HINT = "Export the network without it: what prepares data or decodes results belongs outside of it."


def keep(graph: Graph, weights: Collection[str]) -> list[Keeper]:
    """In place: what is in no table becomes a call that ONNX Runtime answers.

    Raises `UnsupportedModel` with all operators of which that is not possible.
    """
    outside = [node for node in graph.all_nodes() if find(node) is None]
    absent = [node for node in outside if not _can_be_kept(node, graph.constants)]
    if outside and (absent or not _is_trained(graph, weights)):
        raise missing(absent or outside)
    keepers = [Keeper(node) for node in outside]
    for node, keeper in zip(outside, keepers, strict=True):
        node.operator, node.domain, node.opset, node.attributes = "Kept", KEPT, 1, {"keeper": keeper}
    return keepers


def learn_sizes(
    keepers: Sequence[Keeper], module: nn.Module, ports: Sequence[Port], examples: Sequence[Tensor]
) -> None:
    """Runs the network with other sizes of its free axes than those of `examples`, with which it runs, and with zeros.

    Raises `UnsupportedModel` when the size of a result does not follow from the sizes of what goes in.
    """
    axes = dict.fromkeys(
        _axis(p, i) for p in ports for i, n in enumerate(p.shape or ()) if i == 0 or not isinstance(n, int)
    )
    with torch.no_grad():
        with contextlib.suppress(UnsupportedModel):
            module(*map(torch.zeros_like, examples))
        varied: set[Any] = set()
        problem: UnsupportedModel | None = None
        for factors in [*({axis: 2} for axis in axes), dict.fromkeys(axes, 2), dict.fromkeys(axes, 3)]:
            try:
                module(*_scaled(ports, examples, factors))
                varied.update(factors)
            except UnsupportedModel as error:  # some axes may have to be of one size
                problem = error
    if problem is not None and varied < axes.keys():
        raise problem
    for keeper in keepers:
        keeper.settle()


def check_samples(
    keepers: Sequence[Keeper], module: nn.Module, ports: Sequence[Port], examples: Sequence[Tensor]
) -> None:
    """Raises `UnsupportedModel` when a sample's results are others in a batch than alone."""
    samples = _scaled(ports, examples, {BATCH: 2})
    with torch.no_grad():
        together = module(*samples)
        alone = [module(*(x[i : i + 1] for x in samples)) for i in range(len(samples[0]))]
    if not all(_agree(whole, pieces) for whole, pieces in zip(together, zip(*alone, strict=True), strict=True)):
        names = ", ".join(sorted({keeper.title for keeper in keepers}))
        raise UnsupportedModel(
            f"The model uses operators that are not supported: {names}. ONNX Runtime computes them, but what the "
            "network gives for a sample depends on the other samples of the batch, or on chance.",
            hint=HINT,
        )


def _agree(whole: Tensor, pieces: Sequence[Tensor]) -> bool:
    """One after the other along some axis (a state has the batch in its midst), or the same whatever goes in."""
    joined = [torch.cat(list(pieces), axis) for axis in range(whole.ndim)]
    is_constant = all(relative_error(whole, piece) <= TOLERANCE for piece in pieces)
    return is_constant or any(relative_error(whole, each) <= TOLERANCE for each in joined)


class Keeper:
    """One node. It is computed and watched until `settle`, and a call of `espalier::onnxruntime` from then on."""

    def __init__(self, node: Node) -> None:
        self.title = title(node)
        outputs = list(node.outputs)
        while outputs and not outputs[-1]:
            outputs.pop()
        self.proto = onnx.NodeProto(op_type=node.operator, domain=node.domain)
        self.proto.input.extend(f"x{i}" if name else "" for i, name in enumerate(node.inputs))
        self.proto.output.extend(f"y{i}" if name else "" for i, name in enumerate(outputs))
        self.proto.attribute.extend(attribute_proto(name, value) for name, value in node.attributes.items())
        self.opset = node.opset
        self.kept: Kept | None = None
        self.dtypes: list[np.dtype] = []
        self.seen: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}
        """Shapes of what went in → shapes of what came out."""
        self.varies = False
        """Did others come out, once?"""
        self.call: str | None = None

    def __call__(self, *inputs: Tensor | None) -> list[Tensor | None]:
        given = [x for x in inputs if x is not None]
        results = iter(self._watched(given) if self.call is None else OPERATOR(given, self.call))
        return [next(results) if name else None for name in self.proto.output]

    def settle(self) -> None:
        """What was seen becomes a rule."""
        if self.kept is None:
            return  # in a branch that is not taken
        if self.varies:
            raise self._refused("how large its results are depends on the data")
        rows = [[size for shape in shapes for size in shape] for shapes in self.seen]
        outputs = list(self.seen.values())
        if any(len(row) != len(rows[0]) for row in rows):
            raise self._refused("how many axes it gets changes from call to call")
        places = [(i, axis) for i, shape in enumerate(next(iter(self.seen))) for axis in range(len(shape))]
        sizes = []
        for k, first in enumerate(outputs[0]):
            if any(len(shapes[k]) != len(first) for shapes in outputs):
                raise self._refused("how many axes its results have depends on the data")
            found = [
                self._size(np.array(rows), places, [shapes[k][axis] for shapes in outputs])
                for axis in range(len(first))
            ]
            sizes.append(tuple(found))
        self.call = str(Kept(self._model(self.kept.dtypes, self.dtypes), self.title, tuple(sizes)))

    def _watched(self, given: list[Tensor]) -> list[Tensor]:
        if self.kept is None:
            self.kept = Kept(self._model([x.dtype for x in given]), self.title)
        try:
            results = [np.asarray(result) for result in self.kept.run(given)]
        except Exception as error:  # of many kinds, none of them public
            raise self._refused(f"ONNX Runtime does not compute it: {str(error)[:300]}") from error
        if any(r.dtype.kind not in "iufb" or _torch(r.dtype) not in KINDS for r in results):
            raise self._refused(
                f"its results are {', '.join(str(r.dtype) for r in results)}, which are not trained with"
            )
        self.dtypes = [result.dtype for result in results]
        shapes = [result.shape for result in results]
        if self.seen.setdefault(tuple(tuple(x.shape) for x in given), shapes) != shapes:
            self.varies = True
        return [torch.from_numpy(np.array(result)) for result in results]

    def _size(self, rows: np.ndarray, places: list[tuple[int, int]], values: list[int]) -> Size:
        """The rule for one axis, of which `values` were seen when the sizes of the inputs were `rows`."""
        if len(set(values)) == 1:
            return values[0], ()
        for column, place in zip(rows.T.tolist(), places, strict=True):
            if column == values:
                return 0, ((1, *place),)
        columns = np.ones((len(rows), 1))
        chosen: list[tuple[int, int]] = []
        for column, place in zip(rows.T, places, strict=True):
            more = np.column_stack([columns, column])
            if np.linalg.matrix_rank(more) == more.shape[1]:
                columns, chosen = more, [*chosen, place]
        constant, *factors = (round(float(n)) for n in np.linalg.lstsq(columns, np.array(values), rcond=None)[0])
        if len(values) <= len(factors) + 1 or (columns @ [constant, *factors] != values).any():
            raise self._refused("how large its results are does not follow from the sizes of what goes in")
        return constant, tuple((factor, *place) for factor, place in zip(factors, chosen, strict=True) if factor)

    def _model(self, inputs: Iterable[torch.dtype], outputs: Iterable[np.dtype] = ()) -> bytes:
        def ports(names: Iterable[str], dtypes: Iterable[torch.dtype]) -> list[onnx.ValueInfoProto]:
            named = zip(filter(None, names), dtypes, strict=True)
            return [onnx.helper.make_tensor_value_info(name, KINDS[dtype], None) for name, dtype in named]

        results = ports(self.proto.output, map(_torch, outputs)) if outputs else None
        graph = onnx.helper.make_graph(
            [self.proto],
            "one",
            ports(self.proto.input, inputs),
            results or [onnx.ValueInfoProto(name=name) for name in self.proto.output if name],
        )
        imports = [onnx.helper.make_opsetid(self.proto.domain, self.opset)]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)
        if model.ByteSize() > MAX_BYTES:
            raise self._refused(f"its attributes take {model.ByteSize() / 2**20:.1f} MiB, and 1 MiB can be kept")
        return model.SerializeToString(deterministic=True)

    def _refused(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"The model uses operators that are not supported: {self.title}; {why}.", hint=HINT)


@operator("Kept", domain=KEPT)
def _call(call: Call, *inputs: Tensor | None) -> Any:
    """A file that names this operator itself has no keeper: its attributes are numbers and texts."""
    return call.required("keeper")(*inputs)


def _can_be_kept(node: Node, constants: Mapping[str, Known]) -> bool:
    depends = any(name and name not in constants for name in node.inputs)
    plain = not node.bodies() and node.operator not in (*RANDOM, *QUANTIZED)
    return depends and plain and is_known(node.domain, node.operator, node.opset)


def _is_trained(graph: Graph, weights: Collection[str]) -> bool:
    """Does a gradient reach a weight, on a way around what is kept?"""
    reached = set(weights)
    for node in graph.nodes:
        if find(node) is not None and not reached.isdisjoint(node.names()):
            reached.update(node.outputs)
    return any(port.name in reached for port in graph.outputs)


def _axis(port: Port, i: int) -> Any:
    """Axes of one name have one size, and so have first ones."""
    assert port.shape is not None
    return BATCH if i == 0 else port.shape[i] or (port.name, i)


def _scaled(ports: Sequence[Port], examples: Sequence[Tensor], factors: Mapping[Any, int]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = [
        [n * factors.get(_axis(p, i), 1) for i, n in enumerate(x.shape)] for p, x in zip(ports, examples, strict=True)
    ]
    return tuple(random_tensor(shape, x.dtype, generator) for shape, x in zip(shapes, examples, strict=True))


def _torch(dtype: np.dtype) -> torch.dtype:
    return DTYPES[onnx.helper.np_dtype_to_tensor_dtype(dtype)]
