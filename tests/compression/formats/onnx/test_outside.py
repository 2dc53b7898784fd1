"""Operators that are not in the table: computed where only constants go in, else refused, all of them named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from tests.compression.formats.onnx.one_node import expected
from worker.compression import UnsupportedModel, load
from worker.compression.formats.onnx.table import TABLE

RNG = np.random.default_rng(0)
WEIGHT, MATRIX = RNG.standard_normal((4, 4)).astype(np.float32), RNG.standard_normal((4, 4)).astype(np.float32)
X = RNG.standard_normal((3, 4)).astype(np.float32)


def saved(folder: Path, nodes: list[NodeProto], domains: tuple[str, ...] = ("com.microsoft",), **arrays: Any) -> Path:
    """A network from `x [n, 4]` to `y` with `W`, `M`, `backwards` and `arrays` as constants."""
    arrays = {"W": WEIGHT, "M": MATRIX, "backwards": np.array([[3], [2], [1], [0]])} | arrays
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(array), name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), folder / "m.onnx")
    return folder / "m.onnx"


def node(operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [output], domain=domain, **attributes)


def turned(name: str) -> NodeProto:
    """Its rows, backwards, by an operator outside the table."""
    return node("GatherND", [name, "backwards"], "I", "com.microsoft")


assert ("com.microsoft", "GatherND") not in TABLE


def assert_as_onnx_runtime(path: Path) -> None:
    network = load(path)
    (wanted,) = expected(onnx.load(path), {"x": X})
    torch.testing.assert_close(network(torch.from_numpy(X)), torch.from_numpy(wanted), rtol=1e-4, atol=1e-4)


def test_what_it_computes_from_constants_is_a_weight_where_it_is_used_as_one(tmp_path: Path) -> None:
    path = saved(tmp_path, [turned("M"), node("MatMul", ["x", "I"], "y")])
    assert_as_onnx_runtime(path)
    ((name, weight),) = load(path).program.module.named_parameters()
    assert name == "I"
    np.testing.assert_allclose(weight.detach().numpy(), MATRIX[::-1])


def test_operators_before_it_are_computed_too_and_stay_what_they_are_elsewhere(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", ["M"], "T"),
        turned("T"),
        node("MatMul", ["x", "I"], "h"),
        node("MatMul", ["h", "T"], "y"),
    ]
    assert_as_onnx_runtime(saved(tmp_path, nodes))


def test_what_it_is_computed_from_is_not_trained(tmp_path: Path) -> None:
    nodes = [
        turned("W"),
        node("MatMul", ["x", "W"], "h"),
        node("MatMul", ["h", "I"], "y"),
    ]
    assert [name for name, _ in load(saved(tmp_path, nodes)).program.module.named_parameters()] == ["I"]


def test_a_warning_says_what_was_computed_and_the_written_file_holds_the_result(tmp_path: Path) -> None:
    network = load(saved(tmp_path, [turned("M"), node("MatMul", ["x", "I"], "y")]))
    assert network.program.origin is not None
    (change,) = network.program.origin.changes()
    assert change["code"] == "operators_computed"
    assert "com.microsoft.GatherND (opset 1)" in change["detail"]
    network.save(tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    assert {n.op_type for n in written.graph.node} <= {"MatMul", "Gemm", "Transpose"}


def test_it_does_not_matter_where_nobody_needs_it(tmp_path: Path) -> None:
    branches = {
        "then_branch": helper.make_graph([node("MatMul", ["x", "W"], "a")], "t", [], [onnx.ValueInfoProto(name="a")]),
        "else_branch": helper.make_graph([node("Own", ["x"], "b", "own")], "e", [], [onnx.ValueInfoProto(name="b")]),
    }
    nodes = [node("Own", ["x"], "unused", "own"), node("If", ["yes"], "y", **branches)]
    network = load(saved(tmp_path, nodes, ("own",), yes=True))
    torch.testing.assert_close(network(torch.from_numpy(X)), torch.from_numpy(X @ WEIGHT), rtol=1e-5, atol=1e-5)


def test_all_that_depend_on_data_are_named_at_once(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "W"], "h"),
        node("Own", ["h"], "a", "own"),
        node("Own", ["a"], "b", "own"),
        node("RandomNormalLike", ["b"], "c"),
        node("Add", ["b", "c"], "d"),
        node("MatMul", ["d", "M"], "y"),  # weights behind them: they cannot be taken off
    ]
    with pytest.raises(UnsupportedModel) as caught:
        load(saved(tmp_path, nodes, ("own",)))
    assert "RandomNormalLike (opset 17), own.Own (opset 1) ×2" in caught.value.message


def test_one_that_onnx_runtime_does_not_know_is_named_though_its_inputs_are_constants(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"own\.Own \(opset 1\)"):
        load(saved(tmp_path, [node("Own", ["M"], "I", "own"), node("MatMul", ["x", "I"], "y")], ("own",)))
