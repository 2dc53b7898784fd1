"""From a parsed model to a `Graph`: functions inlined, names made unique, constants collected, mistakes refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import torch

from worker.compression.errors import UnsafeModel, UnsupportedModel
from worker.compression.formats.onnx.graph import DTYPES, Graph, Known, Node, Port
from worker.compression.formats.onnx.labels import MACHINE_LEARNING
from worker.compression.formats.onnx.reading import Source, quantized
from worker.compression.formats.onnx.schemas import check_form

MAX_NODES = 100_000
MAX_CALLS = 32
"""Functions that call functions, and graphs in graphs."""
OLDEST_OPSET = 7
WIDENED = (torch.float16, torch.bfloat16, torch.float64)
ONNX_DOMAINS = ("", "ai.onnx")

QUANTIZED = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeWithOrder", "DequantizeWithOrder",
    "QuantizeBFP", "DequantizeBFP", "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "ConvInteger",
    "MulInteger", "ReduceSumInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits", "MatMulNBitsMlp",
    "MatMulNBitsQkv", "MatMulNBitsQLoRA", "MatMulBnb4", "MatMulFpQ4", "MatMulBlockQuantizedFp4Weight",
    "MatMulBlockQuantizedFp8Weight", "GemmFloat8", "GatherBlockQuantized", "QMoE", "QAttention", "QGemm",
    "QEmbedLayerNormalization", "QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization",
    "QOrderedLongformerAttention", "QOrderedMatMul",
)  # fmt: skip
"""And everything that starts with `QLinear`."""


def normalise(source: Source) -> Graph:
    """The graph of a model. Raises `UnsafeModel` and `UnsupportedModel`."""
    return _Normaliser(source).run()


class _Normaliser:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.constants: dict[str, Known] = {}
        self.places: dict[tuple[Any, ...], str] = {}
        """Where in a file of weights, their type and shape → the constant."""
        self.taken: set[str] = set()
        self.copies: dict[str, int] = {}
        self.count = 0
        self.functions: dict[tuple[str, str, str], onnx.FunctionProto] = {}
        for function in source.model.functions:
            key = (_domain(function.domain), function.name, function.overload)
            if key in self.functions:
                raise UnsafeModel(f"Two functions are called {function.name[:100]!r}, with the same overload.")
            self.functions[key] = function

    def run(self) -> Graph:
        model = self.source.model
        opsets = _opsets(model.opset_import)
        opset = opsets.get("")
        if opset is None and not model.functions and MACHINE_LEARNING not in opsets:
            raise UnsupportedModel("The file does not say which opset it uses.", hint="Export the model again.")
        if opset is not None and not OLDEST_OPSET <= opset <= onnx.defs.onnx_opset_version():
            raise UnsupportedModel(
                f"The model uses opset {opset}; {OLDEST_OPSET} to {onnx.defs.onnx_opset_version()} can be read.",
                hint="Convert it with onnx.version_converter.convert_version, or export it with another opset.",
            )
        graph = self.graph(model.graph, opsets, {}, 0)
        graph.constants = self.constants
        return graph

    # -- graphs -----------------------------------------------------------------------------------------------------

    def graph(self, proto: onnx.GraphProto, opsets: dict[str, int], outer: dict[str, str], depth: int) -> Graph:
        """`outer`: what names of the graphs around this one stand for."""
        if depth > MAX_CALLS:
            raise UnsafeModel(f"Graphs and functions are nested more than {MAX_CALLS} deep.")
        scope = dict(outer)
        own: set[str] = set()
        for tensor in proto.initializer:
            _declare(tensor.name, own, "weights")
            scope[tensor.name] = self.constant(tensor.name, tensor)
        inputs, weights = [], frozenset(own)
        for value in proto.input:
            if value.name in weights:
                continue  # before IR 4 every initializer was also listed as an input
            _declare(value.name, own, "inputs")
            scope[value.name] = self.unique(value.name)
            inputs.append(_port(value, scope[value.name]))
        nodes = self.nodes(proto.node, opsets, scope, own, depth)
        outputs = [_port(value, _lookup(value.name, scope, "an output")) for value in proto.output]
        return Graph(nodes, inputs, outputs)

    def nodes(
        self, protos: Iterable[onnx.NodeProto], opsets: dict[str, int], scope: dict[str, str], own: set[str], depth: int
    ) -> list[Node]:
        nodes: list[Node] = []
        for proto in protos:
            self.count += 1
            if self.count > MAX_NODES:
                raise UnsafeModel(f"The model has more than {MAX_NODES} nodes.")
            inputs = [_lookup(name, scope, proto.op_type) for name in proto.input]
            check_form(proto, opsets)
            attributes = self.attributes(proto, opsets, scope, depth)
            function = self.functions.get((_domain(proto.domain), proto.op_type, proto.overload))
            if function is not None:
                results = self.call(function, inputs, attributes, nodes, depth)
                for name, result in zip(proto.output, results, strict=False):
                    if name:
                        _declare(name, own, "values")
                        scope[name] = result
                continue
            for name in proto.output:
                if name:
                    _declare(name, own, "values")
            if proto.op_type == "Constant" and _domain(proto.domain) == "":
                scope[proto.output[0]] = self.constant_node(proto, attributes)
            elif proto.op_type == "Identity" and inputs and inputs[0] in self.constants:
                scope[proto.output[0]] = inputs[0]
            else:
                outputs = [self.unique(name) if name else "" for name in proto.output]
                scope.update((name, new) for name, new in zip(proto.output, outputs, strict=True) if name)
                domain = _domain(proto.domain)
                nodes.append(
                    Node(proto.op_type, inputs, outputs, attributes, opsets.get(domain, 1), domain, proto.name)
                )
        return nodes

    def call(
        self,
        function: onnx.FunctionProto,
        inputs: list[str],
        attributes: dict[str, Any],
        nodes: list[Node],
        depth: int,
    ) -> list[str]:
        """Append the nodes of a function, with its inputs and attributes filled in, and return its results."""
        if depth >= MAX_CALLS:
            raise UnsafeModel(f"Functions call functions more than {MAX_CALLS} deep: {function.name[:100]!r}.")
        scope = dict.fromkeys(function.input, "")
        scope.update(zip(function.input, inputs, strict=False))
        given = {a.name: self.attribute(a, {}, scope, depth) for a in function.attribute_proto} | attributes
        body = [_with_attributes(node, given) for node in function.node]
        nodes.extend(self.nodes(body, _opsets(function.opset_import), scope, set(function.input), depth + 1))
        return [_lookup(name, scope, f"an output of {function.name}") for name in function.output]

    # -- attributes and constants ----------------------------------------------------------------------------------

    def attributes(
        self, proto: onnx.NodeProto, opsets: dict[str, int], scope: dict[str, str], depth: int
    ) -> dict[str, Any]:
        plain = (a for a in proto.attribute if not a.ref_attr_name and a.type != onnx.AttributeProto.TYPE_PROTO)
        return {a.name: self.attribute(a, opsets, scope, depth) for a in plain}

    def attribute(self, proto: onnx.AttributeProto, opsets: dict[str, int], scope: dict[str, str], depth: int) -> Any:
        kinds = onnx.AttributeProto
        match proto.type:
            case kinds.FLOAT:
                return float(proto.f)
            case kinds.INT:
                return int(proto.i)
            case kinds.STRING:
                return proto.s.decode("utf-8", "replace")
            case kinds.FLOATS:
                return [float(x) for x in proto.floats]
            case kinds.INTS:
                return [int(x) for x in proto.ints]
            case kinds.STRINGS:
                return [s.decode("utf-8", "replace") for s in proto.strings]
            case kinds.TENSOR:
                return Known(self.source.array(proto.t), DTYPES[proto.t.data_type])
            case kinds.GRAPH:
                return self.graph(proto.g, opsets, scope, depth + 1)
            case _:
                raise UnsupportedModel(f"An attribute {proto.name[:80]!r} is of a kind that cannot be read.")

    def constant(self, name: str, tensor: onnx.TensorProto) -> str:
        array = self.source.array(tensor)
        unique = self.unique(name)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = (entries["location"], int(entries.get("offset", "0")), tensor.data_type, array.shape)
            unique = self.places.setdefault(place, unique)
        self.constants[unique] = Known(array, DTYPES[tensor.data_type], unique)
        return unique

    def constant_node(self, proto: onnx.NodeProto, attributes: dict[str, Any]) -> str:
        name = self.unique(proto.output[0])
        if len(attributes) != 1:
            raise UnsafeModel(f"The constant {name[:100]!r} has {len(attributes)} values.")
        ((kind, value),) = attributes.items()
        if isinstance(value, Known):
            known = Known(value.numbers, value.dtype, name)
        elif kind in ("value_float", "value_floats"):
            known = Known(np.array(value, np.float32), torch.float32, name)
        elif kind in ("value_int", "value_ints"):
            known = Known(np.array(value, np.int64), torch.int64, name)
        else:
            raise UnsupportedModel(f"The constant {name[:100]!r} is neither a tensor nor a number.")
        self.constants[name] = known
        return name

    def unique(self, name: str) -> str:
        """Names of functions and branches may be taken already."""
        candidate, i = name, self.copies.get(name, 0)
        while candidate in self.taken:
            i += 1
            candidate = f"{name}_{i}"
        self.copies[name] = i
        self.taken.add(candidate)
        return candidate


def _with_attributes(node: onnx.NodeProto, given: dict[str, Any]) -> onnx.NodeProto:
    """The node of a function, with references to the function's attributes replaced by what the caller gave."""
    if not any(_refers(a) for a in node.attribute):
        return node
    result = onnx.NodeProto()
    result.CopyFrom(node)
    del result.attribute[:]
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name in given:
                result.attribute.append(attribute_proto(attribute.name, given[attribute.ref_attr_name]))
        elif attribute.type == onnx.AttributeProto.GRAPH:
            copy = onnx.AttributeProto()
            copy.CopyFrom(attribute)
            filled = [_with_attributes(inner, given) for inner in attribute.g.node]
            del copy.g.node[:]
            copy.g.node.extend(filled)
            result.attribute.append(copy)
        else:
            result.attribute.append(attribute)
    return result


def _refers(attribute: onnx.AttributeProto) -> bool:
    if attribute.type == onnx.AttributeProto.GRAPH:
        return any(_refers(a) for node in attribute.g.node for a in node.attribute)
    return bool(attribute.ref_attr_name)


def attribute_proto(name: str, value: Any) -> onnx.AttributeProto:
    if isinstance(value, Known):
        value = onnx.numpy_helper.from_array(value.numbers)
    if isinstance(value, Graph):
        raise UnsupportedModel("A function takes a graph as an attribute.")
    if isinstance(value, list) and not value:
        return onnx.helper.make_attribute(name, value, attr_type=onnx.AttributeProto.INTS)
    return onnx.helper.make_attribute(name, value)


def _domain(domain: str) -> str:
    return "" if domain in ONNX_DOMAINS else domain


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {_domain(entry.domain): int(entry.version) for entry in imports}


def _declare(name: str, own: set[str], what: str) -> None:
    if not name:
        raise UnsafeModel(f"One of the {what} of the graph has no name.")
    if name in own:
        raise UnsafeModel(f"Two {what} of the graph are called {name[:200]!r}.")
    own.add(name)


def _lookup(name: str, scope: dict[str, str], user: str) -> str:
    if not name:
        return ""
    if name not in scope:
        raise UnsafeModel(
            f"{user[:100]} uses {name[:200]!r} before it is computed: the graph has a cycle, is out of order, or "
            "incomplete."
        )
    return scope[name]


def _port(value: onnx.ValueInfoProto, name: str) -> Port:
    """Of a sequence or an optional value, neither type nor shape is kept."""
    tensor = value.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        if len(tensor.shape.dim) > 32:
            raise UnsafeModel(f"{value.name[:100]!r} has {len(tensor.shape.dim)} axes.")
        shape = tuple(_size(axis) for axis in tensor.shape.dim)
    return Port(name, DTYPES.get(tensor.elem_type), shape)


def _size(axis: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if axis.HasField("dim_value"):
        return int(axis.dim_value) if axis.dim_value > 0 else None
    return axis.dim_param or None


def refuse_quantized(graph: Graph) -> None:
    """Raises `UnsupportedModel` for a network whose weights are whole numbers already."""
    found = sorted(
        {n.operator for n in graph.all_nodes() if n.operator in QUANTIZED or n.operator.startswith("QLinear")}
    )
    if found:
        raise quantized(", ".join(found[:8]))


def widen(graph: Graph) -> dict[str, torch.dtype]:
    """Half and double precision become float32, in place, where training needs it.

    Returns what constants were before, by name.
    """
    found: dict[str, torch.dtype] = {}

    def known(value: Known) -> Known:
        if value.dtype not in WIDENED:
            return value
        return Known(value.numbers.astype(np.float32), torch.float32, value.constant)

    def port(value: Port) -> Port:
        return Port(value.name, torch.float32, value.shape) if value.dtype in WIDENED else value

    for name, constant in graph.constants.items():
        if constant.dtype in WIDENED:
            found[name] = constant.dtype
            graph.constants[name] = known(constant)
    graph.inputs, graph.outputs = [port(p) for p in graph.inputs], [port(p) for p in graph.outputs]
    for node in graph.all_nodes():
        for name, value in node.attributes.items():
            if isinstance(value, Known):
                node.attributes[name] = known(value)
            elif name in ("to", "dtype") and isinstance(value, int) and DTYPES.get(value) in WIDENED:
                node.attributes[name] = int(onnx.TensorProto.FLOAT)
    return found
