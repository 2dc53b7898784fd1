"""ONNX files from strangers. That the hostile ones are refused: `tests/worker/test_hostile_uploads.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.compression.formats.onnx.hostile import MAKERS, NAMES, strangely_named
from worker.compression import UnsafeModel, load


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_names(tmp_path: Path, name: str) -> None:
    network = load(strangely_named(tmp_path, name))
    assert network.program.onnx_inputs == [f"{name}x"]
    assert all(spec.name.isidentifier() for spec in (*network.program.inputs, *network.program.outputs))
    assert torch.equal(network(torch.ones(2, 4)), torch.full((2, 4), 4.0))


def test_a_weight_of_no_numbers_has_a_shape_that_can_be(tmp_path: Path) -> None:
    with pytest.raises(UnsafeModel, match=r"'W' have the shape \[0, 4611686018427387904\]"):
        load(MAKERS["gigantic_weight_of_nothing"](tmp_path))
