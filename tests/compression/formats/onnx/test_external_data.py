"""Weights beside the model: in a zip or a folder, under plain names, larger than memory if need be."""

from __future__ import annotations

import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onnx
from onnx import TensorProto, helper
from worker.compression import UnsupportedModel, load
from worker.compression.formats.onnx.reading import open_source

A = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)


def model(location: str, offset: int = 0) -> onnx.ModelProto:
    """y = x @ A, with A in a file of its own."""
    tensor = TensorProto(name="A", data_type=TensorProto.FLOAT, dims=A.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(A.nbytes))):
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "A"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [tensor],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def check(path: Path) -> None:
    x = torch.randn(3, 6)
    torch.testing.assert_close(load(path)(x), x @ torch.from_numpy(A))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_with_plain_names_is_read(tmp_path: Path, compression: int) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w", compression) as archive:
        archive.writestr("model.onnx", model("model.data").SerializeToString())
        archive.writestr("model.data", A.tobytes())
    check(tmp_path / "m.zip")


def test_a_folder_in_a_zip_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("network/model.onnx", model("model.data").SerializeToString())
        archive.writestr("network/model.data", A.tobytes())
    check(tmp_path / "m.zip")


def test_what_onnx_saves_is_read(tmp_path: Path) -> None:
    embedded = onnx.load_from_string(model("w").SerializeToString())
    embedded.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(A, "A"))
    (tmp_path / "m").mkdir()
    onnx.save(
        embedded, tmp_path / "m" / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0
    )
    check(tmp_path / "m")


@pytest.mark.parametrize(("offset", "parameters"), [(0, {"A"}), (A.nbytes, {"A", "B"})], ids=["one", "two"])
def test_weights_in_one_place_of_a_file_are_one_parameter(tmp_path: Path, offset: int, parameters: set[str]) -> None:
    proto, other = model("w"), model("w", offset).graph.initializer[0]
    other.name = "B"
    proto.graph.initializer.append(other)
    proto.graph.node[0].output[0] = "a"
    proto.graph.node.append(helper.make_node("MatMul", ["x", "B"], ["b"]))
    proto.graph.node.append(helper.make_node("Mul", ["a", "b"], ["y"]))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "w").write_bytes(A.tobytes() * 2)
    assert dict(load(tmp_path).program.module.named_parameters()).keys() == parameters


def test_weights_beyond_two_gigabytes_are_read_without_reading_what_lies_before(tmp_path: Path) -> None:
    offset = 5 * 2**30
    (tmp_path / "model.onnx").write_bytes(model("model.data", offset).SerializeToString())
    with (tmp_path / "model.data").open("wb") as file:
        file.seek(offset)  # a hole
        file.write(A.tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_weights_in_a_zip_are_mapped_where_they_lie(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("model.onnx", model("model.data").SerializeToString())
        archive.writestr("model.data", A.tobytes())
    with open_source(tmp_path / "m.zip") as source:
        array: Any = source.array(source.model.graph.initializer[0])
        while array.base is not None and not isinstance(array, np.memmap):
            array = array.base
        assert isinstance(array, np.memmap)


def test_a_model_without_its_weights_says_which_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model("model.data").SerializeToString())
    with pytest.raises(UnsupportedModel, match=r"in the file 'model\.data', which is not here") as caught:
        load(tmp_path / "model.onnx")
    assert "into one zip" in caught.value.hint
