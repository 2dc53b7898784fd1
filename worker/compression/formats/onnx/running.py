"""Running a graph: every node by its entry in the table. `torch.export` traces exactly this.

What is known stays Python: arithmetic on shapes never becomes a tensor, so the traced graph holds sizes where a .pt2
has them, and a free axis stays free.
"""

from __future__ import annotations

import keyword
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worker.compression.errors import CompressionError, UnsupportedModel
from worker.compression.formats.onnx import operators  # fills the table
from worker.compression.formats.onnx.graph import Graph, Known, Node, Value
from worker.compression.formats.onnx.limits import check_time
from worker.compression.formats.onnx.operators.common import plain_tensor
from worker.compression.formats.onnx.reading import as_torch
from worker.compression.formats.onnx.table import ARITHMETIC, ERROR_HINT, Call, Operator, find, is_at, known
from worker.compression.formats.program import register

MAX_STEPS = 20_000
"""Of one run, loops unrolled."""
LOOP_SECONDS = 5.0
"""Of this thread, in all rounds of loops before the network is traced."""
MAX_NAME, MAX_PARTS = 120, 32
"""Of names of weights: longer ones lose their beginning."""
MAX_EITHER = 1024
"""Known values with more numbers than this come as tensors where both would do."""
RESERVED = ("graph", "attributes", "runner", "trained", "made", "training")
"""Attributes of `Imported`, which no weight can be called."""


class Runner:
    """Runs graphs on values. `tensor_of`: how a `Known` value becomes a tensor."""

    def __init__(self, tensor_of: Callable[[Known], Tensor]) -> None:
        self.tensor_of = tensor_of
        self.steps = 0
        self._looping_since: float | None = None
        self._looped_seconds = 0.0

    def graph(self, graph: Graph, values: dict[str, Value], free: bool = True) -> list[Value]:
        """The outputs of a graph. `values`: everything that has a name; results are added and, if `free`, removed
        after their last use."""
        last_use = _last_uses(graph) if free else {}
        for i, node in enumerate(graph.nodes):
            self.node(node, values)
            for name in last_use.get(i, ()):
                values.pop(name, None)
        return [values[port.name] for port in graph.outputs]

    def node(self, node: Node, values: dict[str, Value]) -> None:
        inputs = [values[name] if name else None for name in node.inputs]
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise UnsupportedModel(f"The network's loops run its operators more than {MAX_STEPS} times.")

        def run(body: Graph, given: list[Value]) -> list[Value]:
            values.update(zip((port.name for port in body.inputs), given, strict=True))
            if node.operator == "If":
                return self.graph(body, values, free=False)
            return self._round(body, values)

        try:
            results = self.results(Call(node, run), inputs)
        except CompressionError:
            raise
        except Exception as error:
            text = str(error).strip().split("\n")[0][:300]
            raise UnsupportedModel(f"The operator {node} cannot be computed: {text}", hint=ERROR_HINT) from error
        for name, result in zip(node.outputs, results, strict=False):
            if name:
                values[name] = result

    def _round(self, body: Graph, values: dict[str, Value]) -> list[Value]:
        """Of a loop. What a thousand rounds cost cannot be seen before."""
        now = time.thread_time()
        if self._looping_since is not None:  # a loop in a loop
            spent = self._looped_seconds + now - self._looping_since
            is_outermost = False
        else:
            spent, self._looping_since, is_outermost = self._looped_seconds, now, True
        if spent > LOOP_SECONDS and not torch.compiler.is_exporting():
            raise UnsupportedModel(f"The network's loops take more than {LOOP_SECONDS:.0f} s to run once.")
        results = self.graph(body, values, free=False)
        if is_outermost:
            self._looped_seconds, self._looping_since = spent + time.thread_time() - now, None
        return results

    def results(self, call: Call, inputs: list[Value | None]) -> list[Value]:
        """The outputs of one node."""
        found = evaluate_known(call, inputs)
        if found is not None:
            return found
        entry = find(call.node)
        if entry is None:
            raise missing([call.node])
        result = entry.function(call, *self._arguments(call, entry, inputs))
        return list(result) if isinstance(result, (tuple, list)) else [result]

    def _arguments(self, call: Call, entry: Operator, inputs: list[Value | None]) -> list[Any]:
        if entry.raw:
            return inputs
        rank = max((x.ndim for x in inputs if isinstance(x, Tensor)), default=-1)
        return [self._argument(call, entry, i, x, rank) for i, x in enumerate(inputs)]

    def _argument(self, call: Call, entry: Operator, i: int, x: Value | None, rank: int) -> Any:
        if x is None:
            return None
        if is_at(entry.known, i):
            if isinstance(x, Known):
                return x.python()
            raise UnsupportedModel(
                f"Input {i} of the operator {call.node} depends on the data, and has to be known before the network "
                "runs.",
                hint="Sizes and axes that are computed from the data cannot be traced.",
            )
        if isinstance(x, Tensor):
            return x
        if not isinstance(x, Known):
            raise call.error("takes a sequence or an optional value where a tensor is expected")
        if is_at(entry.numbers, i) and x.numbers.size == 1 and x.numbers.ndim <= rank and not x.dtype.is_complex:
            return x.numbers.reshape(()).item()
        if is_at(entry.either, i) and x.numbers.size <= MAX_EITHER:
            return x
        return self.tensor_of(x)


def evaluate_known(call: Call, inputs: Sequence[Value | None]) -> list[Value] | None:
    """The outputs of arithmetic on known values; None if it is not that."""
    check_time()
    function = ARITHMETIC.get(call.node.operator) if not call.node.domain else None
    if function is None or not inputs or not all(x is None or isinstance(x, Known) for x in inputs):
        return None
    if sum(x.numbers.size for x in inputs if isinstance(x, Known)) > operators.arithmetic.MAX_NUMBERS:
        return None
    result = function(call, *inputs)
    if result is NotImplemented:
        return None
    results = result if isinstance(result, tuple) else (result,)
    dtype = next(x.dtype for x in inputs if isinstance(x, Known))
    return [r if isinstance(r, Known) else known(r, dtype) for r in results]


def title(node: Node) -> str:
    """As in `com.microsoft.Gelu (opset 1)`."""
    return (
        f"{node.domain}.{node.operator} (opset {node.opset})"
        if node.domain
        else f"{node.operator} (opset {node.opset})"
    )


def missing(nodes: Sequence[Node]) -> UnsupportedModel:
    """The error that lists every operator that is not in the table."""
    found: dict[str, int] = {}
    for node in nodes:
        found[title(node)] = found.get(title(node), 0) + 1
    listed = ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in sorted(found.items())[:60])
    return UnsupportedModel(
        f"The model uses operators that are not supported: {listed}.",
        hint="Trees and support vectors have nothing that retraining by gradients could change; upload a network."
        if any(node.operator.startswith(("TreeEnsemble", "SVM")) for node in nodes)
        else "Export the network without them: what prepares data or decodes results belongs outside of it.",
    )


def _last_uses(graph: Graph) -> dict[int, list[str]]:
    """Node index → values that nobody takes after it."""
    last: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        for name in node.names():
            last[name] = i
    for port in graph.outputs:
        last.pop(port.name, None)
    result: dict[int, list[str]] = {}
    for name, i in last.items():
        result.setdefault(i, []).append(name)
    return result


class Imported(nn.Module):
    """A graph as a module: `parameters` are trained; other constants become buffers when a tensor of them is needed,
    on the first run."""

    def __init__(self, graph: Graph, parameters: Mapping[str, str]) -> None:
        """`parameters`: constant → its role."""
        super().__init__()
        self.graph = graph
        self.attributes = _attribute_names(graph.constants)
        self.runner = Runner(self._tensor)
        self.trained: dict[str, Tensor] = {}
        for name in parameters:
            constant = graph.constants[name]
            parameter = nn.Parameter(as_torch(constant.numbers, constant.dtype))
            graph.constants[name] = Known(np.empty(0), constant.dtype, name)  # its memory is not needed any more
            register(self, self.attributes[name], parameter)
            self.trained[name] = parameter
        self.made: dict[str, str] = {}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(self._result, self.values(*inputs)))

    def values(self, *inputs: Value) -> list[Value]:
        """The outputs as they come."""
        values: dict[str, Value] = dict(self.graph.constants)
        values.update({name: _fetch(self, self.attributes[name]) for name in self.trained})
        values.update(zip((port.name for port in self.graph.inputs), inputs, strict=True))
        self.runner.steps = 0
        return self.runner.graph(self.graph, values)

    def _result(self, value: Value) -> Tensor:
        if isinstance(value, Known):
            return self._tensor(value)
        if isinstance(value, Tensor):
            return value
        raise UnsupportedModel("One of the outputs is a sequence or an optional value.", hint=ERROR_HINT)

    def _tensor(self, value: Known) -> Tensor:
        if value.constant is None or value.is_symbolic:
            return plain_tensor(value)
        if value.constant not in self.made:
            if torch.compiler.is_exporting():
                return plain_tensor(value)
            register(self, self.attributes[value.constant], as_torch(value.numbers, value.dtype))
            self.made[value.constant] = self.attributes[value.constant]
        return _fetch(self, self.made[value.constant])


def _attribute_names(constants: Mapping[str, Any]) -> dict[str, str]:
    """A dotted name of identifiers for each constant; none is a prefix of another."""
    result: dict[str, str] = {}
    taken: set[str] = set()
    folders: set[str] = set()
    copies: dict[str, int] = {}
    for name in constants:
        parts = [_plain_part(part) for part in re.split(r"[./]", name[-MAX_NAME:]) if part][-MAX_PARTS:]
        parts = [part if not part[:1].isdigit() or len(parts) > 1 else f"_{part}" for part in parts] or ["constant"]
        if parts[-1][:1].isdigit():
            parts[-1] = f"_{parts[-1]}"
        parts[0] = f"weight_{parts[0]}" if hasattr(Imported, parts[0]) or parts[0] in RESERVED else parts[0]
        prefixes = {".".join(parts[:i]) for i in range(1, len(parts))}
        if prefixes & taken:
            parts, prefixes = ["_".join(parts)], set()
        plain = candidate = ".".join(parts)
        while candidate in taken or candidate in folders:
            copies[plain] = copies.get(plain, 0) + 1
            candidate = f"{plain}_{copies[plain]}"
        taken.add(candidate)
        folders |= prefixes
        result[name] = candidate
    return result


def _plain_part(text: str) -> str:
    """An identifier that means nothing to Python, but for a digit in front."""
    part = re.sub(r"\W", "_", text, flags=re.ASCII)
    return f"weight{part}" if part.startswith("__") or keyword.iskeyword(part) else part


def _fetch(module: nn.Module, name: str) -> Tensor:
    *path, leaf = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    found = module._parameters.get(leaf)
    return found if found is not None else module._buffers[leaf]  # type: ignore[return-value]
