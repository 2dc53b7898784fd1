"""The operator that ONNX Runtime computes: nothing is known of what it does with its axes."""

from __future__ import annotations

from typing import Any

from torch import fx

from worker.compression.formats.kept import OPERATOR
from worker.compression.graph.rules.common import Args, Rule
from worker.compression.graph.tracing import Tracer, fixed_like, operator_name


def kept(t: Tracer, node: fx.Node, args: Args) -> Any:
    why = "is computed by ONNX Runtime: what it touches keeps its size, and no gradient passes through it"
    t.freeze(t.value(args["inputs"]), f"the operator {operator_name(node)} {why}")
    return fixed_like(t.fakes[node])


RULES: dict[object, Rule] = {OPERATOR: kept}
