"""A transformer as ONNX Runtime's optimizer writes it: imported, trained parameters found, cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import onnx
from onnx import helper
from worker.compression import Network, load

WORDS, STEPS, WIDTH, HEADS, INNER = 20, 6, 16, 2, 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    shapes = {
        "words": (WORDS, WIDTH), "places": (STEPS, WIDTH), "e_s": (WIDTH,), "e_b": (WIDTH,),
        "qkv": (WIDTH, 3 * WIDTH), "qkv_b": (3 * WIDTH,), "out": (WIDTH, WIDTH), "out_b": (WIDTH,), "n1_s": (WIDTH,),
        "n1_b": (WIDTH,), "up": (WIDTH, INNER), "up_b": (INNER,), "down": (INNER, WIDTH), "down_b": (WIDTH,),
        "n2_s": (WIDTH,), "n2_b": (WIDTH,), "head": (WIDTH, 3),
    }  # fmt: skip
    weights = [
        onnx.numpy_helper.from_array(rng.normal(size=shape, scale=0.4).astype(np.float32), name)
        for name, shape in shapes.items()
    ]

    def fused(operator: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
        names = ["" if name == "-" else name for name in inputs.split()]
        return helper.make_node(operator, names, [output], domain="com.microsoft", **attributes)

    nodes = [
        fused("EmbedLayerNormalization", "ids - words places - e_s e_b", "x", epsilon=1e-12),
        fused("Attention", "x qkv qkv_b", "a", num_heads=HEADS),
        helper.make_node("MatMul", ["a", "out"], ["o"]),
        fused("SkipLayerNormalization", "o x n1_s n1_b out_b", "y", epsilon=1e-12),
        helper.make_node("MatMul", ["y", "up"], ["u"]),
        fused("BiasGelu", "u up_b", "g"),
        helper.make_node("MatMul", ["g", "down"], ["d"]),
        fused("SkipLayerNormalization", "d y n2_s n2_b down_b", "z", epsilon=1e-12),
        helper.make_node("ReduceMean", ["z"], ["m"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["m", "head"], ["scores"]),
    ]
    nodes[0].output.append("counts")
    graph = helper.make_graph(
        nodes,
        "bert",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT32, ["n", STEPS])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 3])],
        weights,
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path_factory.mktemp("fused") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def network(path: Path) -> Network:
    return load(path)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, WORDS, (5, STEPS), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


def test_a_fused_transformer_computes_the_same(network: Network, path: Path, ids: torch.Tensor) -> None:
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"ids": ids.numpy()})
    torch.testing.assert_close(network(ids), torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_every_weight_of_a_fused_transformer_is_trained(network: Network, path: Path) -> None:
    total = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)
    assert network.parameters_count == total


def test_a_fused_transformer_is_cut_exactly(network: Network, ids: torch.Tensor) -> None:
    removed = [group.id for group in network.groups()][::3]
    small, masked = network.without(removed), network.masked(removed)
    assert small.parameters_count < 0.8 * network.parameters_count
    torch.testing.assert_close(small(ids), masked(ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masked(ids), network(ids), atol=1e-2)


def saved(folder: Path, nodes: list[onnx.NodeProto], shape: list[int | str], weights: dict[str, np.ndarray]) -> Path:
    """From x to y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), folder / "model.onnx")
    return folder / "model.onnx"


def test_an_inverse_is_written_as_onnx_runtimes_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 4)).astype(np.float32)}
    nodes = [
        helper.make_node("Inverse", ["x"], ["i"], domain="com.microsoft"),
        helper.make_node("MatMul", ["i", "w"], ["y"]),
    ]
    load(saved(tmp_path, nodes, ["n", 4, 4], weights)).save(tmp_path / "written.onnx")
    x = rng.normal(size=(3, 4, 4)).astype(np.float32)
    files = (tmp_path / "model.onnx", tmp_path / "written.onnx")
    before, after = (onnxruntime.InferenceSession(file).run(None, {"x": x})[0] for file in files)
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


def test_an_attention_with_a_trained_bias_of_positions_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in ("q", "k", "v", "out")}
    constants = {"table": rng.normal(size=(8, HEADS)).astype(np.float32), "one": np.array([1])}
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "one"], ["steps"]),
        helper.make_node(
            "RelativePositionBias", ["table", "steps", "steps"], ["bias"], domain="com.microsoft", max_distance=20
        ),
        *[helper.make_node("MatMul", ["x", name], [f"x{name}"]) for name in "qkv"],
        helper.make_node(
            "MultiHeadAttention", ["xq", "xk", "xv", "", "", "bias"], ["a"], domain="com.microsoft", num_heads=HEADS
        ),
        helper.make_node("MatMul", ["a", "out"], ["y"]),
    ]
    network = load(saved(tmp_path, nodes, ["n", "steps", 8], weights | constants))
    assert network.parameters_count == 4 * 64 + 8 * HEADS
    network.save(tmp_path / "written.onnx")
    x = torch.randn(2, 11, 8)
    (found,) = onnxruntime.InferenceSession(tmp_path / "written.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(network(x), torch.as_tensor(found), rtol=1e-4, atol=1e-5)
