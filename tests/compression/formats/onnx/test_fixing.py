"""Inputs that are not data get their value from the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onnx
from onnx import TensorProto, helper, numpy_helper
from worker.compression import load
from worker.compression.errors import InvalidOptions
from worker.compression.formats.onnx import InputsToFix
from worker.compression.jobs import inspect_model

RNG = np.random.default_rng(0)
LOW, HIGH = RNG.standard_normal((4, 3)).astype(np.float32), RNG.standard_normal((4, 3)).astype(np.float32)


def model(state: list[Any], batch: Any = "n") -> onnx.ModelProto:
    """y = (x + state) @ (rate == 16000 ? HIGH : LOW), each branch with a weight of its own."""

    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["sum", name], [f"{name}_out"])
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out])

    nodes = [
        helper.make_node("Add", ["x", "state"], ["sum"]),
        helper.make_node("Equal", ["rate", "wanted"], ["is_high"]),
        helper.make_node("If", ["is_high"], ["y"], then_branch=branch("HIGH"), else_branch=branch("LOW")),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, state),
        helper.make_tensor_value_info("rate", TensorProto.INT64, []),
    ]
    constants = {"HIGH": HIGH, "LOW": LOW, "wanted": np.array(16000)}
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(model(["n", 4]), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(("rate", "weight"), [(16000, HIGH), (8000, LOW)])
def test_a_branch_is_chosen_by_a_fixed_input_and_the_other_one_is_gone(path: Path, rate: int, weight: Any) -> None:
    network = load(path, {"rate": rate, "state": 0.5})
    x = torch.randn(5, 4)
    torch.testing.assert_close(network(x), (x + 0.5) @ torch.from_numpy(weight))
    assert network.parameters_count == weight.size
    assert [spec.name for spec in network.program.inputs] == ["x"]


def test_a_fixed_input_along_the_batch_is_repeated_for_every_sample(path: Path) -> None:
    network = load(path, {"rate": 8000, "state": [[1.0, 2.0, 3.0, 4.0]]})
    x = torch.randn(7, 4)
    torch.testing.assert_close(network(x), (x + torch.tensor([1.0, 2.0, 3.0, 4.0])) @ torch.from_numpy(LOW))


def test_a_written_file_has_no_inputs_that_were_fixed(path: Path, tmp_path: Path) -> None:
    load(path, {"rate": 8000, "state": 0.0}).save(tmp_path / "out.onnx")
    assert [value.name for value in onnx.load(tmp_path / "out.onnx").graph.input] == ["x"]


def test_a_file_of_one_sample_with_a_state_is_freed(tmp_path: Path) -> None:
    onnx.save(model([1, 4], batch=1), tmp_path / "m.onnx")
    network = load(tmp_path / "m.onnx", {"rate": 8000, "state": 0.5})
    x = torch.randn(5, 4)
    torch.testing.assert_close(network(x), (x + 0.5) @ torch.from_numpy(LOW))


def test_without_a_value_the_file_says_what_it_needs(path: Path) -> None:
    with pytest.raises(InputsToFix, match="rate have no batch axis") as caught:
        load(path)
    assert "fixed_inputs" in caught.value.hint
    summary = inspect_model(path)
    assert "rate" in summary["needs_fixed_inputs"]
    assert [entry["name"] for entry in summary["inputs"]] == ["x", "state", "rate"]
    assert summary["parameters"] == LOW.size + HIGH.size


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"speed": 1}, "names speed; the model's inputs are x, state, rate, their free axes n"),
        ({"rate": 1, "n": 2.5}, "the size of an axis is a whole number"),
        ({"rate": 1, "state": [1.0, 2.0]}, r"has the shape \[2\]"),
        ({"rate": "fast"}, "no number"),
        ({"rate": [[1], [2, 3]]}, "no number"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(path: Path, fixed: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOptions, match=said):
        load(path, fixed)


def test_an_axis_that_only_one_size_fits_has_that_size_with_a_warning(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "places"], ["placed"]),
        helper.make_node("MatMul", ["placed", "HIGH"], ["y"]),
    ]
    places = numpy_helper.from_array(np.ones((1, 24, 4), np.float32), "places")
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "steps", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "steps", 3])],
        [places, numpy_helper.from_array(HIGH, "HIGH")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, ir_version=8), tmp_path / "m.onnx")
    program = load(tmp_path / "m.onnx").program
    assert program.inputs[0].shape[1] == 24
    assert program.origin is not None
    (change,) = program.origin.changes()
    assert change["code"] == "axes_fixed"
    assert "steps = 24" in change["detail"]
