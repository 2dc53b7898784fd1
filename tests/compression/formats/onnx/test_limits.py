"""Files that would take long to read are refused soon."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import onnx
from tests.compression.formats.onnx.hostile import MAKERS, network, node, save
from worker.compression import UnsupportedModel, load
from worker.compression.formats.onnx import limits
from worker.compression.formats.onnx.graph import Known
from worker.compression.formats.onnx.running import _attribute_names

pytestmark = pytest.mark.timeout(60)


def products(first: str) -> onnx.ModelProto:
    """`first`, times a large matrix again and again."""
    nodes = [node("MatMul", [f"c{i}" if i else first, "V"], [f"c{i + 1}"]) for i in range(400)]
    ends = node("ReduceSum", ["c400"], ["c"], keepdims=0), node("Add", ["x", "c"])
    starts = node("Add", ["V", "x0"], ["v"]), node("ReduceSum", ["x"], ["x0"], keepdims=0)
    return network(*starts[::-1], *nodes, *ends, V=np.full((1500, 1500), 1e-3, np.float32))


@pytest.mark.parametrize("first", ["V", "v"], ids=["of constants", "of data"])
def test_a_chain_of_large_products_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1)
    with pytest.raises(UnsupportedModel, match="Reading the network takes more than"):
        load(save(products(first), tmp_path))


def test_a_long_chain_is_refused_before_it_is_traced(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"{limits.MAX_NODES} can be read"):
        load(MAKERS["twenty_thousand_operators"](tmp_path))


def test_time_does_not_count_outside_of_reading() -> None:
    limits.check_time()


def test_constants_get_names_soon_even_if_all_their_names_are_alike() -> None:
    """Letters that no attribute can have become the same one."""
    names = [f"w{chr(0x4E00 + i)}" for i in range(20_000)]
    found = _attribute_names(dict.fromkeys(names, Known(np.zeros(1), torch.float64)))
    assert len(set(found.values())) == len(names)
