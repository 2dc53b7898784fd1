"""Weights that are stored without their zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import onnx
from onnx import SparseTensorProto, TensorProto, helper
from tests.compression.formats.onnx.hostile import network, node, save
from worker.compression import UnsafeModel, UnsupportedModel, load

INDICES = {"linear": [1, 6, 15], "by axis": [[0, 1], [1, 2], [3, 3]]}
DENSE = torch.zeros(4, 4)
DENSE[[0, 1, 3], [1, 2, 3]] = torch.tensor([1.0, 2.0, 3.0])


def sparse(indices: object, shape: tuple[int, ...] = (4, 4)) -> SparseTensorProto:
    values = onnx.numpy_helper.from_array(np.array([1, 2, 3], np.float32), "W")
    return helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array(indices, np.int64)), shape)


def in_a_constant(tensor: SparseTensorProto) -> onnx.ModelProto:
    return network(node("Constant", [], ["S"], sparse_value=tensor), node("MatMul", ["x", "S"]))


@pytest.mark.parametrize("kind", INDICES)
def test_a_sparse_constant_is_read(tmp_path: Path, kind: str) -> None:
    found = load(save(in_a_constant(sparse(INDICES[kind])), tmp_path))
    assert torch.equal(dict(found.program.module.named_parameters())["S"], DENSE)


def test_sparse_weights_are_read(tmp_path: Path) -> None:
    model = network()
    model.graph.initializer.pop()
    model.graph.sparse_initializer.append(sparse(INDICES["linear"]))
    assert torch.equal(load(save(model, tmp_path))(torch.eye(4)), DENSE)


def test_sparse_weights_in_a_branch_are_read(tmp_path: Path) -> None:
    out = [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
    branch = helper.make_graph([node("MatMul", ["x", "W"], ["r"])], "b", [], out)
    branch.sparse_initializer.append(sparse(INDICES["linear"]))
    model = network(node("If", ["c"], then_branch=branch, else_branch=branch), c=np.array(True))
    assert torch.equal(load(save(model, tmp_path))(torch.eye(4)), DENSE)


def test_sparse_weights_that_would_be_huge_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="1099511627776 numbers with their zeros") as caught:
        load(save(in_a_constant(sparse(INDICES["linear"], (2**20, 2**20))), tmp_path))
    assert "dense" in caught.value.hint


@pytest.mark.parametrize("indices", [[1, 6, 16], [-1, 6, 15], [[0, 1], [1, 2], [4, 0]], [1, 6]], ids=str)
def test_sparse_weights_outside_of_their_shape_are_refused(tmp_path: Path, indices: object) -> None:
    with pytest.raises(UnsafeModel, match="sparse"):
        load(save(in_a_constant(sparse(indices)), tmp_path))
