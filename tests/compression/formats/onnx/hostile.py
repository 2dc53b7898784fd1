"""Hostile ONNX files, made by script: nothing hostile is kept in the repository. Each maker writes into an empty folder
and returns the file (or folder) to read."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

Maker = Callable[[Path], Path]
MAKERS: dict[str, Maker] = {}
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def maker(function: Maker) -> Maker:
    MAKERS[function.__name__] = function
    return function


def value(name: str, shape: Sequence[Any] | None = ("n", 4), kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, None if shape is None else list(shape))


def network(*nodes: NodeProto, opset: int = 17, **constants: Any) -> ModelProto:
    """y = relu(x @ W); or x = input @ K, and from there to y by other nodes with W and `constants` at hand."""
    arrays = {"W": np.ones((4, 4), np.float32)} | constants
    body = nodes or (helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("Relu", ["h"], ["y"]))
    if nodes:
        body = (helper.make_node("MatMul", ["input", "K"], ["x"]), *nodes)
        arrays["K"] = np.eye(4, dtype=np.float32)
    graph = helper.make_graph(
        body,
        "g",
        [value("input" if nodes else "x")],
        [value("y", None)],
        [numpy_helper.from_array(np.array(a), n) for n, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, outputs, **attributes)


def save(model: ModelProto, folder: Path) -> Path:
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def file_of(name: str, make: Callable[[], ModelProto]) -> None:
    MAKERS[name] = lambda folder: save(make(), folder)


def edited(name: str, edit: Callable[[ModelProto], object]) -> None:
    """The good network after a change."""

    def make() -> ModelProto:
        model = network()
        edit(model)
        return model

    file_of(name, make)


# ------------------------------------------------------------------------------------------------------ external data


def external(**entries: str) -> ModelProto:
    model = network()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)
    return model


LOCATIONS = {
    "absolute": "/etc/passwd", "parent": "../secret", "parent_inside": "a/../../secret", "folder": "sub/w.data",
    "windows": "..\\secret", "drive": "C:secret", "nothing": "", "dot": ".", "dots": "..", "null": "w\0.data",
    "long": "w" * 300, "url": "file:///etc/passwd", "missing": "w.data",
}  # fmt: skip
for key, where in LOCATIONS.items():
    file_of(f"external_{key}", lambda where=where: external(location=where))  # type: ignore[misc]

RANGES = {
    "past_the_end": {"offset": "8"}, "negative": {"offset": "-64"}, "huge_offset": {"offset": str(2**70)},
    "no_number": {"offset": "x"}, "other_length": {"length": "12"}, "negative_length": {"length": "-1"},
}  # fmt: skip


def zipped(folder: Path, model: ModelProto, compression: int = zipfile.ZIP_STORED, **files: bytes) -> Path:
    with zipfile.ZipFile(folder / "m.zip", "w", compression) as archive:
        archive.writestr("model.onnx", model.SerializeToString())
        for name, data in files.items():
            archive.writestr(name, data)
    return folder / "m.zip"


for key, where in RANGES.items():
    MAKERS[f"range_{key}"] = lambda folder, where=where: zipped(  # type: ignore[misc]
        folder, external(location="w", **where), w=bytes(64)
    )


@maker
def symlink_in_a_zip(folder: Path) -> Path:
    """Unpacked by a careless tool, it would point out of the archive."""
    path = zipped(folder, external(location="w"))
    link = zipfile.ZipInfo("w")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    return path


@maker
def symlink_in_a_folder(folder: Path) -> Path:
    (folder / "m").mkdir()
    save(external(location="w"), folder / "m")
    (folder / "secret").write_bytes(bytes(64))
    (folder / "m" / "w").symlink_to(folder / "secret")
    return folder / "m"


@maker
def zip_bomb(folder: Path) -> Path:
    return zipped(folder, external(location="w"), zipfile.ZIP_DEFLATED, w=bytes(300_000_000))


@maker
def model_that_is_a_zip_bomb(folder: Path) -> Path:
    model = network()
    model.doc_string = " " * 300_000_000
    return zipped(folder, model, zipfile.ZIP_DEFLATED)


@maker
def two_models_in_a_zip(folder: Path) -> Path:
    return zipped(folder, network(), **{"other.onnx": network().SerializeToString()})


@maker
def climbing_names_in_a_zip(folder: Path) -> Path:
    return zipped(folder, external(location="w"), **{"../w": bytes(64)})


# --------------------------------------------------------------------------------------------------------- the message


@maker
def cut_off(folder: Path) -> Path:
    path = save(network(), folder)
    path.write_bytes(path.read_bytes()[:-20])
    return path


@maker
def nothing_but_empty_nodes(folder: Path) -> Path:
    """Two bytes each, an object of a hundred each."""
    graph = b"\x0a\x00" * 5_000_000
    (folder / "m.onnx").write_bytes(b"\x08\x08\x3a" + varint(len(graph)) + graph)
    return folder / "m.onnx"


@maker
def nested_types(folder: Path) -> Path:
    """sequence(sequence(…)) ten thousand deep."""
    data = b""
    for _ in range(10_000):
        data = b"\x22" + varint(len(data) + 2 + len(varint(len(data)))) + b"\x0a" + varint(len(data)) + data
        if len(data) > 2_000_000:
            break
    info = b"\x0a\x01x\x12" + varint(len(data)) + data
    graph = b"\x5a" + varint(len(info)) + info
    (folder / "m.onnx").write_bytes(b"\x08\x08\x3a" + varint(len(graph)) + graph)
    return folder / "m.onnx"


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@maker
def names_that_are_no_text(folder: Path) -> Path:
    path = save(network(), folder)
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"\xff\xfe\xff\xfe\xff\xfe"))
    return path


edited("long_name", lambda m: setattr(m.graph.node[0], "name", "n" * 2_000_000))
edited("no_graph", lambda m: m.ClearField("graph"))
edited("no_opset", lambda m: m.ClearField("opset_import"))
edited("huge_opset", lambda m: setattr(m.opset_import[0], "version", 2**40))
edited("negative_opset", lambda m: setattr(m.opset_import[0], "version", -17))

# ------------------------------------------------------------------------------------------------------------- tensors


def tensor(**changes: Any) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        found = model.graph.initializer[0]
        for name, content in changes.items():
            if name == "dims":
                del found.dims[:]
                found.dims.extend(content)
            elif name == "float_data":
                found.float_data.extend(content)
            else:
                setattr(found, name, content)

    return edit


edited("gigantic_weight", tensor(dims=[2**20, 2**20]))
edited("gigantic_weight_of_no_bytes", tensor(dims=[2**30, 2**30, 2**30], raw_data=b""))
edited("gigantic_weight_of_nothing", tensor(dims=[0, 2**62], raw_data=b""))
edited("negative_size", tensor(dims=[-4, -4]))
edited("overflowing_size", tensor(dims=[2**62, 4]))
edited("many_axes", tensor(dims=[1] * 5000))
edited("short_data", tensor(raw_data=bytes(60)))
edited("odd_data", tensor(raw_data=bytes(63)))
edited("long_data", tensor(raw_data=bytes(128)))
edited("unknown_type", tensor(data_type=99))
edited("no_type", tensor(data_type=0))
edited("texts", tensor(data_type=TensorProto.STRING))
edited("four_bit_weights", tensor(data_type=TensorProto.INT4))
edited("two_kinds_of_data", tensor(float_data=[1.0] * 16, raw_data=bytes(12)))
edited("not_finite", tensor(raw_data=np.full(16, np.nan, np.float32).tobytes()))
edited("segments", lambda m: setattr(m.graph.initializer[0].segment, "begin", 1))
edited("same_name_twice", lambda m: m.graph.initializer.add().CopyFrom(m.graph.initializer[0]))
edited("no_name", tensor(name=""))
edited("sparse", lambda m: m.graph.sparse_initializer.add().dims.extend([2**40, 2**40]))

# ------------------------------------------------------------------------------------------------------------ the graph

edited("cycle", lambda m: m.graph.node[0].input.__setitem__(0, "y"))
edited("missing_input", lambda m: m.graph.node[0].input.__setitem__(1, "nowhere"))
edited("missing_output", lambda m: setattr(m.graph.output[0], "name", "nowhere"))
edited("two_values_of_one_name", lambda m: m.graph.node[0].output.__setitem__(0, "y"))
edited("two_inputs_of_one_name", lambda m: m.graph.input.add().CopyFrom(m.graph.input[0]))
edited("no_inputs", lambda m: m.graph.ClearField("input"))
edited("no_outputs", lambda m: m.graph.ClearField("output"))
edited("no_nodes", lambda m: m.graph.ClearField("node"))
edited("input_of_many_axes", lambda m: m.graph.input[0].CopyFrom(value("x", [1] * 500)))
edited("gigantic_input", lambda m: m.graph.input[0].CopyFrom(value("x", ["n", 2**40, 2**20])))
edited("negative_input", lambda m: m.graph.input[0].CopyFrom(value("x", ["n", -4])))
edited("unknown_operator", lambda m: setattr(m.graph.node[1], "op_type", "Relu; import os"))
edited("unknown_domain", lambda m: setattr(m.graph.node[1], "domain", "evil"))
edited("node_without_inputs", lambda m: m.graph.node[1].ClearField("input"))
edited("node_without_outputs", lambda m: m.graph.node[1].ClearField("output"))
edited("too_many_inputs", lambda m: m.graph.node[1].input.extend(["h"] * 100_000))
file_of("constant_without_a_result", lambda: network(node("Constant", [], [], value_int=1), node("Relu", ["x"])))
file_of("constant_without_a_value", lambda: network(node("Constant", [], ["c"]), node("Add", ["x", "c"])))
file_of("identity_without_a_result", lambda: network(node("Identity", ["x"], []), node("Relu", ["x"])))
file_of("identity_of_nothing", lambda: network(node("Identity", [""], ["h"]), node("Relu", ["h"])))
file_of("if_without_a_condition", lambda: network(node("If", [], then_branch=branch(), else_branch=branch())))
file_of("if_without_branches", lambda: network(node("If", ["c"]), c=np.array(True)))
file_of("no_matrix_product", lambda: network(node("MatMul", ["x", "W"], ["y"]), W=np.ones((5, 4), np.float32)))
file_of("quantized", lambda: network(node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"]), node("Relu", ["x"])))
file_of("gather_out_of_range", lambda: network(node("Gather", ["x", "i"]), i=np.array([10**12])))
file_of("wrong_attribute", lambda: network(node("Gemm", ["x", "W"], alpha="much")))
file_of("attribute_of_another_kind", lambda: network(node("Transpose", ["x"], perm="abc")))
file_of("reshape_to_nothing", lambda: network(node("Reshape", ["x", "s"]), s=np.array([-1, -1])))
file_of("reshape_by_gigabytes", lambda: network(node("Reshape", ["x", "s"]), s=np.array([2**60, 2**60])))


def branch(*nodes: NodeProto, result: str = "x") -> GraphProto:
    out = helper.make_tensor_value_info(result, FLOAT, None)
    return helper.make_graph(nodes or [node("Relu", ["x"], ["r"])], "b", [], [out if nodes else value("r", None)])


@maker
def ifs_in_ifs(folder: Path) -> Path:
    body = branch()
    for i in range(14):  # protobuf itself writes few more
        inner = node("If", ["c"], [f"r{i}"], then_branch=body, else_branch=branch())
        body = branch(inner, result=f"r{i}")
    return save(network(node("If", ["c"], then_branch=body, else_branch=branch()), c=np.array(True)), folder)


def with_functions(*functions: onnx.FunctionProto) -> ModelProto:
    model = network(helper.make_node("f0", ["x"], ["y"], domain="f"))
    model.opset_import.add(domain="f", version=1)
    model.functions.extend(functions)
    return model


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """A function that calls others, one after the other."""
    nodes = [helper.make_node(call, [f"v{i}"], [f"v{i + 1}"], domain="f") for i, call in enumerate(calls)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["v0"], [f"v{len(calls)}"], nodes, opsets)


file_of("function_that_calls_itself", lambda: with_functions(function("f0", "f0")))
file_of("functions_in_a_circle", lambda: with_functions(function("f0", "f1"), function("f1", "f0")))
file_of("doubling_functions", lambda: with_functions(*(function(f"f{i}", f"f{i + 1}", f"f{i + 1}") for i in range(30))))
file_of("deep_functions", lambda: with_functions(*(function(f"f{i}", f"f{i + 1}") for i in range(100))))

# --------------------------------------------------------------------------------- a few numbers that ask for gigabytes

SIZES = np.array([2**20, 2**20])
file_of("expand", lambda: network(node("Expand", ["x", "s"], ["e"]), node("Relu", ["e"]), s=np.array([2**30, 1, 1])))
file_of("tile", lambda: network(node("Tile", ["x", "s"]), s=SIZES))
file_of(
    "constant_of_shape", lambda: network(node("ConstantOfShape", ["s"], ["c"]), node("MatMul", ["x", "c"]), s=SIZES)
)
file_of("pad", lambda: network(node("Pad", ["x", "s"]), s=np.array([0, 2**40, 0, 2**40])))
file_of("negative_pad", lambda: network(node("Pad", ["x", "s"]), s=np.array([0, -(2**40), 0, 0])))
file_of("range", lambda: network(
    node("Range", ["a", "b", "c"], ["r"]), node("Add", ["x", "r"]), a=0.0, b=1e13, c=1.0
))  # fmt: skip


@maker
def range_outside_the_table(folder: Path) -> Path:
    """An operator that ONNX Runtime computes when the file is read."""
    model = network(
        helper.make_node("Range", ["a", "b", "c"], ["r"], domain="com.microsoft"),
        node("Add", ["x", "r"]),
        a=np.float32(0), b=np.float32(1e13), c=np.float32(1),
    )  # fmt: skip
    model.opset_import.add(domain="com.microsoft", version=1)
    return save(model, folder)


file_of("one_hot", lambda: network(
    node("Cast", ["x"], ["i"], to=INT64), node("OneHot", ["i", "d", "v"]), d=np.array(2**40), v=np.array([0.0, 1.0])
))  # fmt: skip
file_of("outer_product", lambda: network(
    node("MatMul", ["a", "b"], ["h"]), node("Add", ["x", "h"]),
    a=np.ones((2**18, 1), np.float32), b=np.ones((1, 2**18), np.float32),
))  # fmt: skip
file_of("outer_sum", lambda: network(
    node("Add", ["a", "b"], ["h"]), node("Add", ["x", "h"]),
    a=np.ones((2**18, 1), np.float32), b=np.ones((1, 2**18), np.float32),
))  # fmt: skip
file_of("power", lambda: network(
    node("Pow", ["a", "b"], ["p"]), node("Cast", ["p"], ["f"], to=FLOAT), node("Add", ["x", "f"]),
    a=np.array(10), b=np.array(10**9),
))  # fmt: skip
file_of("random", lambda: network(node("RandomNormal", [], ["r"], shape=[2**20, 2**20]), node("Add", ["x", "r"])))
file_of("endless_loop", lambda: network(loop(10**15), m=np.array(10**15), c=np.array(True)))
file_of("wide_window", lambda: network(
    node("Unsqueeze", ["x", "a"], ["u"]), node("AveragePool", ["u"], kernel_shape=[2**40], pads=[2**39, 2**39]),
    a=np.array([1]),
))  # fmt: skip
file_of("wide_convolution", lambda: network(
    node("Unsqueeze", ["x", "a"], ["u"]), node("Conv", ["u", "W"], pads=[2**40, 2**40]),
    a=np.array([1]), W=np.ones((1, 1, 1), np.float32),
))  # fmt: skip


def loop(rounds: int) -> NodeProto:
    inputs = [value("i", [], INT64), value("go", [], TensorProto.BOOL), value("v")]
    outputs = [value("go_on", [], TensorProto.BOOL), value("w")]
    nodes = [node("Identity", ["go"], ["go_on"]), node("Relu", ["v"], ["w"])]
    return node("Loop", ["m", "c", "x"], ["y"], body=helper.make_graph(nodes, "l", inputs, outputs))


@maker
def endless_loop_behind_the_network(folder: Path) -> Path:
    """Behind an operator outside the table, so that ONNX Runtime is the one to run it."""
    found = helper.make_node("SampleOp", ["x3"], ["i"], domain="com.microsoft")
    repeat = loop(10**15)
    repeat.input[2] = "i"
    nodes = (node("Unsqueeze", ["x", "axis"], ["column"]), node("Mul", ["column", "one"], ["x3"]), found, repeat)
    model = network(*nodes, m=np.array(10**15), c=np.array(True), axis=np.array([1]), one=np.ones((4, 4), np.float32))
    model.opset_import.add(domain="com.microsoft", version=1)
    return save(model, folder)


@maker
def loops_in_loops(folder: Path) -> Path:
    """A thousand rounds of a thousand rounds each."""
    inner = loop(1000)
    inner.input[:] = ["m", "c", "v"]
    inner.output[:] = ["w"]
    outer = loop(1000)
    body = next(a.g for a in outer.attribute if a.name == "body")
    body.node[1].CopyFrom(inner)
    return save(network(outer, m=np.array(1000), c=np.array(True)), folder)


@maker
def heavy_loop(folder: Path) -> Path:
    """A thousand products of large matrices."""
    heavy = loop(1000)
    next(a.g for a in heavy.attribute if a.name == "body").node[1].CopyFrom(node("MatMul", ["v", "W"], ["w"]))
    heavy.input[2] = "s"
    nodes = [node("ReduceSum", ["x"], ["r"]), node("Mul", ["r", "W"], ["s"]), heavy]
    return save(network(*nodes, m=np.array(1000), c=np.array(True), W=np.ones((2000, 2000), np.float32)), folder)


def chain(count: int) -> ModelProto:
    nodes = [node("Relu", [f"v{i}" if i else "x"], [f"v{i + 1}"]) for i in range(count)]
    return network(*nodes, node("Relu", [f"v{count}"]))


file_of("a_hundred_thousand_operators", lambda: chain(100_000))
file_of("twenty_thousand_operators", lambda: chain(20_000))


@maker
def many_operators_outside_the_table(folder: Path) -> Path:
    """Each takes a value of its own from the network, in the order that makes looking for it long."""
    nodes, before = [], "x"
    for i in range(20_000):
        nodes += [node("Relu", [before], [f"v{i}"]), helper.make_node("Own", [f"v{i}"], [f"o{i}"], domain="own")]
        before = f"v{i}"
    nodes.append(node("Sum", [f"o{i}" for i in range(20_000)]))
    model = network(*nodes)
    model.opset_import.add(domain="own", version=1)
    return save(model, folder)


@maker
def doubling_sums(folder: Path) -> Path:
    """x + x, twenty times with an outer axis each: 2^20 as many numbers."""
    nodes, before = [], "x"
    for i in range(20):
        nodes.append(node("Concat", [before, before], [f"v{i}"], axis=1))
        before = f"v{i}"
    nodes.append(node("MatMul", ["t", before]))
    nodes.insert(-1, node("Transpose", [before], ["t"], perm=[1, 0]))
    return save(network(*nodes), folder)


NAMES = (
    "a/" * 100,
    "class/in.",
    "__import__('os').system('true')",
    "x); import os; (",
    "self",
    "a.b.__class__",
    "../../w",
    "\n",
    "%s",
    "{0}",
)
"""Such names are allowed, and must stay names."""


def strangely_named(folder: Path, name: str) -> Path:
    model = network()
    for part in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        part.name = f"{name}{part.name}"
    for n in model.graph.node:
        n.name = name
        for names in (n.input, n.output):
            names[:] = [f"{name}{old}" for old in names]
    return save(model, folder)
