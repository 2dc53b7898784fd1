"""`com.microsoft` against ONNX Runtime, which defines it; against the formula where it runs only on other devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import onnx
from onnx import helper
from tests.compression.formats.onnx.one_node import assert_same, found, model
from worker.compression.errors import UnsupportedModel

Arrays = dict[str, np.ndarray]
N, T, D, HEADS = 2, 5, 8, 2


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def fused(
    operator: str, inputs: Arrays, constants: Arrays | None = None, *, names: list[str] | None = None, outputs: int = 1,
    domain: str = "com.microsoft", **attributes: Any,
) -> tuple[onnx.ModelProto, Arrays]:  # fmt: skip
    """A model of one node, whose inputs are `names` (an empty one is left out), or all in order."""
    constants = constants or {}
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(operator, names or [*inputs, *constants], results, domain=domain, **attributes)
    return model([node], inputs, results, constants), inputs


X = numbers(N, T, D)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
QKV = {"q": X, "k": numbers(N, T, D, seed=1), "v": numbers(N, T, D, seed=2)}
ANGLES = {"cos": np.cos(numbers(16, 2)), "sin": np.sin(numbers(16, 2))}
ATTENTION = {"w": numbers(D, 3 * D), "b": numbers(3 * D)}
GROUPED = ["q", "k", "v", "", "", "lengths", "total"]
LENGTHS = {"lengths": np.full(N, T - 1, np.int32), "total": np.array(T, np.int32)}
QUERIES = {"q": numbers(N, T, 64), "k": numbers(N, T, 32), "v": numbers(N, T, 32, seed=3)}
TURNS = {"cos": np.cos(numbers(16, 8)), "sin": np.sin(numbers(16, 8))}
IMAGE, KERNEL = numbers(1, 3, 6, 6), {"w": numbers(4, 3, 3, 3), "b": numbers(4)}
TOKENS = {"ids": np.arange(10, dtype=np.int32).reshape(N, T), "kinds": np.array([[0, 1, 0, 1, 0]] * N, np.int32)}
TABLES = {"words": numbers(12, D), "places": numbers(7, D), "types": numbers(2, D), "s": numbers(D), "t": numbers(D)}

CASES = {
    "FusedMatMul": fused("FusedMatMul", {"a": numbers(3, 4, 5), "b": numbers(3, 4, 6)}, transA=1, alpha=0.5),
    "FusedMatMul-transB": fused("FusedMatMul", {"a": numbers(3, 4, 5)}, {"b": numbers(6, 5)}, transB=1),
    "FusedMatMul-batch": fused(
        "FusedMatMul", {"a": numbers(4, 3, 5), "b": numbers(4, 3, 6)}, transBatchA=1, transBatchB=1, transA=1
    ),
    "FusedGemm": fused("FusedGemm", {"a": numbers(4, 5)}, {"b": numbers(5, 6), "c": numbers(6)}, activation="Relu"),
    "FusedGemm-LeakyRelu": fused(
        "FusedGemm", {"a": numbers(4, 5)}, {"b": numbers(6, 5)}, transB=1, activation="LeakyRelu", activation_alpha=0.2
    ),
    "FusedConv": fused("FusedConv", {"x": IMAGE}, KERNEL, activation="Relu", pads=[1, 1, 1, 1]),
    "FusedConv-Clip": fused("FusedConv", {"x": IMAGE}, KERNEL, activation="Clip", activation_params=[-0.5, 0.5]),
    "FusedConv-HardSigmoid": fused(
        "FusedConv", {"x": IMAGE}, KERNEL, activation="HardSigmoid", activation_params=[0.3, 0.4]
    ),
    "FusedConv-sum": fused(
        "FusedConv", {"x": IMAGE, "z": numbers(1, 4, 4, 4)}, KERNEL, names=["x", "w", "b", "z"], activation="Relu"
    ),
    "Gelu": fused("Gelu", {"x": X}),
    "BiasGelu": fused("BiasGelu", {"x": X}, {"b": numbers(D)}),
    "FastGelu": fused("FastGelu", {"x": X}),
    "FastGelu-bias": fused("FastGelu", {"x": X}, {"b": numbers(D)}),
    "QuickGelu": fused("QuickGelu", {"x": X}),
    "QuickGelu-alpha": fused("QuickGelu", {"x": X}, alpha=1.0),
    "SkipLayerNormalization": fused(
        "SkipLayerNormalization", {"x": X, "y": numbers(N, T, D, seed=4)}, {"s": numbers(D), "t": numbers(D)},
        names=["x", "y", "s", "t"],
    ),
    "SkipLayerNormalization-sum": fused(
        "SkipLayerNormalization", {"x": X, "y": numbers(N, T, D, seed=4)},
        {"s": numbers(D), "t": numbers(D), "b": numbers(D, seed=5)}, outputs=4, epsilon=1e-5,
    ),
    "SkipSimplifiedLayerNormalization": fused(
        "SkipSimplifiedLayerNormalization", {"x": X, "y": numbers(N, T, D, seed=4)}, {"s": numbers(D)}, epsilon=1e-5
    ),
    "SimplifiedLayerNormalization": fused(
        "SimplifiedLayerNormalization", {"x": X}, {"s": numbers(D)}, domain="", epsilon=1e-6, axis=-1
    ),
    "EmbedLayerNormalization": fused("EmbedLayerNormalization", TOKENS, TABLES, outputs=2),
    "EmbedLayerNormalization-mask": fused(
        "EmbedLayerNormalization", {"ids": TOKENS["ids"], "mask": MASK}, TABLES,
        names=["ids", "", "words", "places", "", "s", "t", "mask"], outputs=3,
    ),
    "Attention": fused("Attention", {"x": X}, ATTENTION, num_heads=HEADS),
    "Attention-mask": fused(
        "Attention", {"x": X, "mask": MASK}, ATTENTION, names=["x", "w", "b", "mask"], num_heads=HEADS
    ),
    "Attention-lengths": fused(
        "Attention", {"x": X, "n": np.array([3, 5], np.int32)}, ATTENTION, names=["x", "w", "b", "n"], num_heads=HEADS
    ),
    "Attention-causal": fused("Attention", {"x": X}, ATTENTION, num_heads=HEADS, unidirectional=1, scale=0.3),
    "Attention-bias": fused(
        "Attention", {"x": X, "r": numbers(1, HEADS, T, T)}, ATTENTION, names=["x", "w", "b", "", "", "r"],
        num_heads=HEADS,
    ),
    "Attention-past": fused(
        "Attention", {"x": X, "past": numbers(2, N, HEADS, 3, D // HEADS)}, ATTENTION,
        names=["x", "w", "b", "", "past"], num_heads=HEADS, unidirectional=1, outputs=2,
    ),
    "Attention-sizes": fused(
        "Attention", {"x": X}, {"w": numbers(D, 20), "b": numbers(20)}, num_heads=HEADS, qkv_hidden_sizes=[8, 8, 4]
    ),
    "MultiHeadAttention": fused("MultiHeadAttention", QKV, num_heads=HEADS),
    "MultiHeadAttention-bias": fused(
        "MultiHeadAttention", QKV | {"mask": MASK}, {"b": numbers(3 * D)}, names=["q", "k", "v", "b", "mask"],
        num_heads=HEADS,
    ),
    "MultiHeadAttention-cross": fused(
        "MultiHeadAttention", {"q": X, "k": numbers(N, 7, D), "v": numbers(N, 7, D, seed=1)}, num_heads=HEADS
    ),
    "MultiHeadAttention-causal": fused("MultiHeadAttention", QKV, num_heads=HEADS, unidirectional=1),
    "MultiHeadAttention-scores": fused(
        "MultiHeadAttention", QKV | {"r": numbers(1, HEADS, T, T)}, names=["q", "k", "v", "", "", "r"], num_heads=HEADS
    ),
    "MultiHeadAttention-past": fused(
        "MultiHeadAttention",
        QKV | {"a": numbers(N, HEADS, 3, D // HEADS), "b": numbers(N, HEADS, 3, D // HEADS, seed=1)},
        names=["q", "k", "v", "", "", "", "a", "b"], num_heads=HEADS, outputs=3,
    ),
    "GroupQueryAttention": fused(
        "GroupQueryAttention", QUERIES, LENGTHS, names=GROUPED, num_heads=4, kv_num_heads=2, outputs=3
    ),
    "GroupQueryAttention-packed": fused(
        "GroupQueryAttention", {"q": numbers(N, T, 128)}, LENGTHS, names=["q", "", "", *GROUPED[3:]], num_heads=4,
        kv_num_heads=2, outputs=3,
    ),
    "GroupQueryAttention-rotary": fused(
        "GroupQueryAttention", QUERIES, LENGTHS | TURNS, names=[*GROUPED, "cos", "sin"], num_heads=4, kv_num_heads=2,
        outputs=3, do_rotary=1,
    ),
    "GroupQueryAttention-interleaved": fused(
        "GroupQueryAttention", QUERIES, LENGTHS | TURNS, names=[*GROUPED, "cos", "sin"], num_heads=4, kv_num_heads=2,
        outputs=3, do_rotary=1, rotary_interleaved=1,
    ),
    "GroupQueryAttention-window": fused(
        "GroupQueryAttention", QUERIES, LENGTHS, names=GROUPED, num_heads=4, kv_num_heads=2, outputs=3,
        local_window_size=2,
    ),
    "GroupQueryAttention-softcap": fused(
        "GroupQueryAttention", QUERIES, LENGTHS, names=GROUPED, num_heads=4, kv_num_heads=2, outputs=3, softcap=1.5
    ),
    "RotaryEmbedding": fused(
        "RotaryEmbedding", {"x": X, "at": np.array([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]])}, ANGLES
    ),
    "RotaryEmbedding-offset": fused(
        "RotaryEmbedding", {"x": numbers(N, HEADS, T, 4), "at": np.array([3])}, ANGLES, interleaved=1
    ),
    "RotaryEmbedding-partial": fused(
        "RotaryEmbedding", {"x": numbers(N, T, 12), "at": np.array([0])}, ANGLES, num_heads=2, rotary_embedding_dim=4
    ),
    "Inverse": fused("Inverse", {"x": numbers(N, 4, 4)}),
    "Trilu": fused("Trilu", {"x": numbers(N, 4, 5)}, {"k": np.array(1)}, upper=0),
    "GridSample": fused("GridSample", {"x": IMAGE, "g": np.tanh(numbers(1, 4, 5, 2))}, padding_mode="border"),
    "UnfoldTensor": fused("UnfoldTensor", {"x": X}, dim=1, size=3, step=2),
    "ExpandDims": fused("ExpandDims", {"x": X}, {"a": np.array(-2, np.int32)}),
    "Pad": fused("Pad", {"x": X}, {"p": np.array([0, 1, 0, 0, 2, 3]), "v": np.float32(0.5)}),
    "Pad-reflect": fused("Pad", {"x": X}, {"p": np.array([0, 1, 0, 0, 2, 3])}, mode="reflect"),
    "CDist": fused("CDist", {"a": numbers(4, 3), "b": numbers(5, 3)}, metric="sqeuclidean"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fused_operator_computes_what_onnx_runtime_does(case: tuple[onnx.ModelProto, Arrays]) -> None:
    assert_same(*case, tolerance=2e-5)


def on_other_devices() -> dict[str, tuple[tuple[onnx.ModelProto, Arrays], torch.Tensor]]:
    x, b, planes = torch.from_numpy(X), numbers(D), numbers(N, 3, 4, D)
    left, right = (x + torch.from_numpy(b)).chunk(2, -1)
    image = torch.from_numpy(planes).movedim(-1, 1)
    kernel = numbers(6, 3, 3, D)
    s, t = numbers(D), numbers(D, seed=1)
    normed = F.group_norm(image, 2, torch.from_numpy(s), torch.from_numpy(t))
    return {
        "BiasSplitGelu": (fused("BiasSplitGelu", {"x": X}, {"b": b}), left * F.gelu(right)),
        "BiasAdd": (fused("BiasAdd", {"x": X}, {"b": b, "s": X}), x + torch.from_numpy(b) + x),
        "BiasSoftmax": (
            fused("BiasSoftmax", {"x": X, "b": X}, axis=-1, is_inner_broadcast=1),
            torch.softmax(x + x, -1),
        ),
        "NhwcConv": (
            fused("NhwcConv", {"x": planes}, {"w": kernel}),
            F.conv2d(image, torch.from_numpy(kernel).movedim(-1, 1)).movedim(1, -1),
        ),
        "GroupNorm": (
            fused("GroupNorm", {"x": planes}, {"s": s, "t": t}, groups=2, activation=1),
            F.silu(normed).movedim(1, -1),
        ),
        "GemmFastGelu": (
            fused("GemmFastGelu", {"x": X}, {"w": numbers(D, 3), "b": numbers(3)}),
            F.gelu(x @ torch.from_numpy(numbers(D, 3)) + torch.from_numpy(numbers(3)), approximate="tanh"),
        ),
    }


@pytest.mark.parametrize("name", on_other_devices())
def test_a_fused_operator_of_other_devices_computes_its_formula(name: str) -> None:
    (proto, inputs), expected = on_other_devices()[name]
    torch.testing.assert_close(found(proto, inputs)[0], expected)


@pytest.mark.parametrize("both", [0, 1])
def test_relative_positions_are_binned_as_in_t5(both: int) -> None:
    """ONNX Runtime has no kernel for the CPU, and reads the table as `[H, buckets]`."""
    table, steps, farthest = numbers(8, HEADS), 30, 20
    lengths = {"q": np.array([steps]), "k": np.array([steps])}
    proto, _ = fused("RelativePositionBias", {}, {"t": table, **lengths}, max_distance=farthest, is_bidirectional=both)

    def bucket(ahead: int) -> int:
        count = 4 if both else 8
        distance, first = (abs(ahead), count * (ahead > 0)) if both else (max(-ahead, 0), 0)
        if distance < count // 2:
            return first + distance
        share = np.log(distance / (count // 2)) / np.log(farthest / (count // 2))
        return first + min(count // 2 + int(share * (count - count // 2)), count - 1)

    buckets = [[bucket(k - q) for k in range(steps)] for q in range(steps)]
    np.testing.assert_array_equal(found(proto, {})[0].numpy(), table.reshape(HEADS, 8)[:, buckets][None])


def test_relative_positions_are_gated_by_each_query() -> None:
    """ONNX Runtime has no kernel for the CPU."""
    bias, relative, weight, shift = numbers(D), numbers(1, HEADS, T, T), numbers(D // HEADS, 6), numbers(6)
    scale = numbers(1, HEADS, 1, 1)
    constants = {"b": bias, "r": relative, "w": weight, "s": shift, "e": scale}
    proto, inputs = fused("GatedRelativePositionBias", {"q": X}, constants, num_heads=HEADS)
    queries = (X + bias).reshape(N, T, HEADS, -1).transpose(0, 2, 1, 3)
    halves = (queries @ weight + shift).reshape(N, HEADS, T, 2, 3).sum(-1)
    update, reset = np.split(1 / (1 + np.exp(-halves)), 2, -1)
    expected = (update * (reset * scale - 1) + 2) * relative
    np.testing.assert_allclose(found(proto, inputs)[0].numpy(), expected, rtol=1e-5)


def group_norm(x: np.ndarray, groups: int, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Of `[N, …, C]`, by its definition, with ε = 1e-5."""
    parts = x.reshape(len(x), -1, groups, x.shape[-1] // groups).astype(np.float64)
    mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    return ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + shift


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("skip", [(N, 3, 4, D), (N, D), (N, 1, 1, D)], ids=["every place", "[N, C]", "[N, 1, 1, C]"])
def test_skip_group_norm_is_its_definition(skip: tuple[int, ...], last: int, activation: int) -> None:
    """ONNX Runtime has no kernel for the CPU."""
    x, added, bias = numbers(N, 3, 4, D), numbers(*skip, seed=3), numbers(D, seed=4)
    total = x + added.reshape(skip if len(skip) == 4 else (N, 1, 1, D)) + bias
    expected = group_norm(total, 2, numbers(D), numbers(D, seed=1))
    if activation:
        expected = expected / (1 + np.exp(-expected))

    def placed(array: np.ndarray) -> np.ndarray:
        return array if last or array.ndim < 4 else np.ascontiguousarray(np.moveaxis(array, -1, 1))

    proto, inputs = fused(
        "SkipGroupNorm", {"x": placed(x), "skip": placed(added)},
        {"s": numbers(D), "t": numbers(D, seed=1), "b": bias}, names=["x", "s", "t", "skip", "b"], outputs=2,
        groups=2, activation=activation, channels_last=last,
    )  # fmt: skip
    normed, summed = found(proto, inputs)
    np.testing.assert_allclose(normed.numpy(), placed(expected), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(summed.numpy(), placed(total), rtol=1e-6)


@pytest.mark.parametrize("residual", [True, False])
def test_bias_dropout_keeps_everything(residual: bool) -> None:
    """ONNX Runtime has no kernel for the CPU."""
    constants = {"b": numbers(D), "ratio": np.array(0.4, np.float32), "training": np.array(False)}
    names = ["x", "b", "r" if residual else "", "ratio", "training"]
    inputs = {"x": X} | ({"r": numbers(N, T, D, seed=1)} if residual else {})
    proto, inputs = fused("BiasDropout", inputs, constants, names=names, outputs=2)
    y, mask = found(proto, inputs)
    np.testing.assert_allclose(y.numpy(), X + numbers(D) + (inputs["r"] if residual else 0), rtol=1e-6)
    assert mask.dtype == torch.bool
    assert mask.all()


def test_bias_dropout_in_training_mode_is_refused() -> None:
    constants = {"b": numbers(D), "ratio": np.array(0.4, np.float32), "training": np.array(True)}
    with pytest.raises(UnsupportedModel, match="training mode"):
        found(*fused("BiasDropout", {"x": X}, constants, names=["x", "b", "", "ratio", "training"]))


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    "attributes", [{}, {"strides": [2, 2], "pads": [1, 0, 1, 0]}, {"ceil_mode": 1, "strides": [2, 3]}], ids=str
)
def test_max_pool_of_channels_last_is_what_onnx_runtime_computes(kind: Any, attributes: dict[str, Any]) -> None:
    planes = (numbers(N, 5, 6, 3) * 50).astype(np.int64).astype(kind)
    assert_same(*fused("NhwcMaxPool", {"x": planes}, kernel_shape=[2, 3], **attributes))


def test_a_cache_that_is_continued_is_refused() -> None:
    past = numbers(N, 2, 3, 16)
    proto, inputs = fused(
        "GroupQueryAttention", QUERIES | {"a": past, "b": past}, LENGTHS, names=[*GROUPED[:3], "a", "b", *GROUPED[5:]],
        num_heads=4, kv_num_heads=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="cache"):
        found(proto, inputs)
