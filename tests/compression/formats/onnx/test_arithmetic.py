"""Arithmetic on numbers that are known before the network runs takes little time, whatever the numbers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnx import helper
from tests.compression.formats.onnx.hostile import MAKERS, network, node, save
from tests.compression.formats.onnx.one_node import assert_same, model
from worker.compression import load
from worker.compression.errors import UnsupportedModel
from worker.compression.formats.onnx.graph import Known, Node, Value
from worker.compression.formats.onnx.operators.arithmetic import MAX_NUMBERS
from worker.compression.formats.onnx.running import evaluate_known
from worker.compression.formats.onnx.table import Call

pytestmark = pytest.mark.timeout(60)


def test_a_power_beyond_64_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="10 to the power of 1000000000 does not fit into 64 bits"):
        load(MAKERS["power"](tmp_path))


def computed(operator: str, *constants: Any) -> None:
    """The operator on constants, added to an input."""
    names = [f"c{i}" for i in range(len(constants))]
    nodes = [
        helper.make_node(operator, names, ["c"]),
        helper.make_node("Cast", ["c"], ["f"], to=1),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    x = np.ones((2, 3), np.float32)
    assert_same(model(nodes, {"x": x}, ["y"], dict(zip(names, constants, strict=True))), {"x": x})


@pytest.mark.parametrize(
    ("a", "b"),
    [(3, 4), (-1, 10**9), (2, 62), (np.float32(10), np.float32(60))],
    ids=["usual", "minus one", "almost too large", "infinite"],
)
def test_a_power_is_that_of_onnx_runtime(a: Any, b: Any) -> None:
    computed("Pow", np.array(a), np.array(b))


def test_a_power_that_is_not_real_is_no_number() -> None:
    (result,) = known("Pow", np.array(-8, np.float32), np.array(1 / 3, np.float32)) or []
    assert isinstance(result, Known)
    assert np.isnan(result.numbers)


def test_a_product_of_many_numbers_is_left_to_torch() -> None:
    assert known("ReduceProd", np.full(MAX_NUMBERS, 3)) is None


def known(operator: str, *constants: np.ndarray) -> list[Value] | None:
    inputs = [Known(array, torch.from_numpy(array).dtype) for array in constants]
    return evaluate_known(Call(Node(operator, ["a", "b"], ["y"], {}, 20)), inputs)


@pytest.mark.parametrize("operator", ["Add", "Div", "Less", "Where"])
def test_what_broadcasting_makes_large_is_not_computed_in_python(operator: str) -> None:
    column, row = np.ones((300, 1), np.int64), np.ones((1, 300), np.int64)
    assert known(operator, *([np.array(True)] if operator == "Where" else []), column, row) is None


def test_a_split_into_more_parts_than_results_is_refused(tmp_path: Path) -> None:
    nodes = node("Split", ["c"], ["p", "q"], num_outputs=10**9), node("Add", ["x", "p"])
    with pytest.raises(UnsupportedModel, match="has 2 results for 1000000000 parts"):
        load(save(network(*nodes, opset=18, c=np.ones(8, np.float32)), tmp_path))


def test_numbers_that_are_repeated_no_times_are_not_repeated_before() -> None:
    assert known("Tile", np.ones(1, np.int64), np.array([2**30, 0])) is None
