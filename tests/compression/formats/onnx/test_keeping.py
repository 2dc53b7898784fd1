"""Operators outside the table that depend on data, with trained weights behind them: they stay, and ONNX Runtime
computes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from worker.compression import InvalidOptions, Network, Target, UnsupportedModel, compress, inspect_model, load, run_job
from worker.compression.datasets import open_dataset
from worker.compression.formats import pt2_writer, verify_file
from worker.compression.formats.kept import OPERATOR, Kept
from worker.compression.formats.onnx import keeping
from worker.compression.formats.onnx.table import TABLE

RNG = np.random.default_rng(0)
FLOAT, INT64, HALF = TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT16
MICROSOFT, ML = "com.microsoft", "ai.onnx.ml"
X = torch.from_numpy(RNG.standard_normal((7, 8)).astype(np.float32))


def node(operator: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [output], domain=domain, **attributes)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


WEIGHTS = {
    "A": weight(8, 12), "a": weight(12), "B": weight(12, 9), "C": weight(9, 16), "D": weight(16, 4), "W": weight(8, 16),
    "E": weight(1, 16), "b": weight(16),
}  # fmt: skip
NUMBERS = {
    "square": np.array([-1, 3, 3]), "flat": np.array([-1, 9]), "squares": np.array([0, 0, 3, 3]),
    "flats": np.array([0, 0, 9]), "upper": np.array(1),
    "region": np.array([[0, 0, 0, 2, 2]], np.float32), "image": np.array([-1, 1, 3, 3]),
}  # fmt: skip
BEFORE = [node("Gemm", ["x", "A", "a"], "h"), node("Relu", ["h"], "r"), node("MatMul", ["r", "B"], "m")]
INVERSE = [
    node("Reshape", ["m", "square"], "q"),
    node("Inverse", ["q"], "i", MICROSOFT),
    node("Reshape", ["i", "flat"], "v"),
]
BEHIND = [node("MatMul", ["v", "C"], "c"), node("Relu", ["c"], "d"), node("MatMul", ["d", "D"], "y")]
MIDDLE = [*BEFORE, *INVERSE, *BEHIND]
COUNTS = node(
    "TfIdfVectorizer", ["x"], "v", max_gram_length=2, max_skip_count=1, min_gram_length=1, mode="TF",
    ngram_counts=[0, 5], ngram_indexes=list(range(9)), pool_int64s=[0, 1, 2, 3, 4, 0, 1, 1, 0, 2, 2, 3, 1],
)  # fmt: skip
"""How often each of five words and four pairs of words is there."""
TREE = node(
    "TreeEnsembleRegressor", ["x"], "t", ML, n_targets=1, nodes_featureids=[0, 0, 0], nodes_falsenodeids=[2, 0, 0],
    nodes_truenodeids=[1, 0, 0], nodes_hitrates=[1.0] * 3, nodes_missing_value_tracks_true=[0] * 3,
    nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_nodeids=[0, 1, 2], nodes_treeids=[0] * 3, nodes_values=[0.0] * 3,
    target_ids=[0, 0], target_nodeids=[1, 2], target_treeids=[0, 0], target_weights=[-1.0, 2.0],
)  # fmt: skip
assert not {(MICROSOFT, "Inverse"), (MICROSOFT, "Trilu"), ("", "TfIdfVectorizer"), (ML, TREE.op_type)} & TABLE.keys()


def saved(
    folder: Path,
    nodes: Sequence[NodeProto],
    shape: Sequence[int | str] = ("n", 8),
    kind: int = FLOAT,
    opset: int = 18,
    outputs: Sequence[str] = ("y",),
) -> Path:
    arrays = {n: a.astype(np.float16) if kind == HALF else a for n, a in WEIGHTS.items()} | NUMBERS
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid(d, v) for d, v in (("", opset), (MICROSOFT, 1), (ML, 3), ("own", 1))]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), folder / "in.onnx")
    return folder / "in.onnx"


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def assert_kept(path: Path, folder: Path, x: torch.Tensor = X) -> Network:
    """What was read computes what the file does; a smaller network what the masked one does, in its file, too; and the
    nodes outside the table are there as they were."""
    network = load(path)
    torch.testing.assert_close(network(x), run(path, x), rtol=1e-3, atol=1e-3)
    removed = [group.id for group in network.groups()][::2]
    assert removed
    small = network.without(removed)
    torch.testing.assert_close(small(x), network.masked(removed)(x), rtol=1e-4, atol=1e-4)
    small.save(folder / "out.onnx")
    verify_file(folder / "out.onnx", small.program)
    torch.testing.assert_close(run(folder / "out.onnx", x), small(x), rtol=1e-3, atol=1e-3)
    before, after = (onnx.load(p) for p in (path, folder / "out.onnx"))
    assert outside(before) == outside(after)
    versions = [{entry.domain: entry.version for entry in model.opset_import} for model in (before, after)]
    assert all(versions[0][domain] == versions[1][domain] for domain, *_ in outside(before) if domain)
    return network


def outside(model: onnx.ModelProto) -> list[tuple[str, str, list[onnx.AttributeProto]]]:
    nodes = [n for n in model.graph.node if (n.domain, n.op_type) not in TABLE]
    return [(n.domain, n.op_type, sorted(n.attribute, key=lambda a: a.name)) for n in nodes]


# ------------------------------------------------------------------------------------------------------- what is kept


def test_one_before_everything(tmp_path: Path) -> None:
    words = torch.randint(0, 6, (7, 8), generator=torch.Generator().manual_seed(0))
    assert_kept(saved(tmp_path, [COUNTS, *BEHIND], kind=INT64), tmp_path, words)


@pytest.mark.parametrize("opset", [11, 18, 21])
def test_one_in_the_middle(tmp_path: Path, opset: int) -> None:
    assert_kept(saved(tmp_path, MIDDLE, opset=opset), tmp_path)


def test_one_beside_the_network(tmp_path: Path) -> None:
    nodes = [
        TREE,
        node("MatMul", ["t", "E"], "e"),
        node("MatMul", ["x", "W"], "w"),
        node("Add", ["e", "w"], "s"),
        node("Relu", ["s"], "d"),
        node("MatMul", ["d", "D"], "y"),
    ]
    assert_kept(saved(tmp_path, nodes), tmp_path)


def test_one_whose_sizes_are_free(tmp_path: Path) -> None:
    nodes = [
        node("Reshape", ["x", "squares"], "q"),
        node("Inverse", ["q"], "i", MICROSOFT),
        node("Reshape", ["i", "flats"], "v"),
        *BEHIND,
    ]
    x = torch.randn(2, 11, 9, generator=torch.Generator().manual_seed(0))
    assert_kept(saved(tmp_path, nodes, ("n", "time", 9)), tmp_path, x)


def test_constants_that_it_takes_stay_what_they_are(tmp_path: Path) -> None:
    nodes = [*BEFORE, INVERSE[0], node("Trilu", ["q", "upper"], "i", MICROSOFT), INVERSE[2], *BEHIND]
    network = assert_kept(saved(tmp_path, nodes), tmp_path)
    assert "upper" in dict(network.program.module.named_buffers())


def test_weights_in_half_precision_and_a_fixed_batch_size(tmp_path: Path) -> None:
    load(saved(tmp_path, MIDDLE, kind=HALF)).save(tmp_path / "half.onnx")
    (node,) = [n for n in onnx.load(tmp_path / "half.onnx").graph.node if n.domain]
    assert node.op_type == "Inverse"
    assert_kept(saved(tmp_path, MIDDLE, (1, 8)), tmp_path, X[:1])


def test_one_before_weights_stays_while_one_behind_them_is_taken_off(tmp_path: Path) -> None:
    nodes = [*MIDDLE, node("Unique", ["y"], "z")]
    network = load(saved(tmp_path, nodes, outputs=["z"]))
    origin = network.program.origin
    assert origin is not None
    assert origin.kept == ("com.microsoft.Inverse (opset 1)",)
    assert origin.behind is not None
    assert origin.behind.operators == ("Unique (opset 18)",)
    network.save(tmp_path / "out.onnx")
    torch.testing.assert_close(run(tmp_path / "out.onnx", X), run(tmp_path / "in.onnx", X), rtol=1e-3, atol=1e-3)


def test_a_warning_and_the_summary_say_which(tmp_path: Path) -> None:
    path = saved(tmp_path, MIDDLE)
    origin = load(path).program.origin
    assert origin is not None
    (change,) = origin.changes()
    assert change["code"] == "operators_kept"
    assert "com.microsoft.Inverse (opset 1)" in change["detail"]
    assert inspect_model(path)["operators_kept"] == ["com.microsoft.Inverse (opset 1)"]


# ----------------------------------------------------------------------------------------------------------- training


def test_what_lies_before_it_is_neither_trained_nor_cut(tmp_path: Path) -> None:
    network = load(saved(tmp_path, MIDDLE))
    network.training_module()(X)[0].sum().backward()
    gradients = {name: p.grad is not None for name, p in network.program.module.named_parameters()}
    assert gradients == {"A": False, "a": False, "B": False, "C": True, "D": True}
    reasons = {entry.name: entry.reason for entry in network.frozen}
    assert reasons.keys() == {"A", "a", "B"}
    assert reasons["a"] == "no gradient reaches it: ONNX Runtime computes what it leads to"


def test_what_it_touches_keeps_its_size(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "W"], "u"),
        node("Add", ["u", "b"], "w"),
        node("Trilu", ["w", "upper"], "i", MICROSOFT),
        node("Add", ["w", "i"], "s"),
        node("MatMul", ["s", "D"], "y"),
    ]
    path = saved(tmp_path, nodes, ("n", 5, 8))
    (reason,) = [entry.reason for entry in load(path).frozen if entry.name == "b"]
    assert reason.startswith("the operator com.microsoft.Trilu (opset 1) is computed by ONNX Runtime")


def test_training_reduces_the_loss_of_what_lies_behind(tmp_path: Path) -> None:
    network = load(saved(tmp_path, MIDDLE))
    wanted = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(network.program.module.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network.training_module()(X)[0], wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network that counts words, and samples: is there more of the first word than of the second?"""
    folder = tmp_path_factory.mktemp("words")
    x = np.random.default_rng(1).integers(0, 5, (600, 8))
    y = np.sign((x == 0).sum(1) - (x == 1).sum(1)) + 1
    np.savez(folder / "words.npz", x=x, y=y.astype(np.int64))
    return saved(folder, [COUNTS, *BEHIND], kind=INT64), folder / "words.npz"


def test_a_whole_job(words: tuple[Path, Path], tmp_path: Path) -> None:
    options = {
        "target": {"reduction": 0.4},
        "training": {"sparse_epochs": 6, "finetune_epochs": 20, "batch_size": 32, "distill": True},
    }
    run_job(*words, options, tmp_path, lambda kind, data: None)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["outputs"].keys() == {"onnx"}
    assert not (tmp_path / "model.pt2").exists()
    assert "operators_kept" in {warning["code"] for warning in report["warnings"]}
    assert "operator_frozen" not in {warning["code"] for warning in report["warnings"]}
    assert report["target"]["reached_reduction"] == 7 / 16
    assert report["baseline"]["accuracy"] < 0.6 < 0.85 < report["compressed"]["accuracy"]
    assert report["compressed"]["latency"]["p50_ms"] > 0
    data = np.load(words[1])
    found = run(tmp_path / "model.onnx", torch.from_numpy(data["x"])).argmax(1).numpy()
    assert (found == data["y"]).mean() > 0.85


# ---------------------------------------------------------------------------------------------------------------- .pt2


def test_a_job_for_a_pt2_alone_is_refused(words: tuple[Path, Path]) -> None:
    with pytest.raises(InvalidOptions, match=r"\.pt2 file cannot hold TfIdfVectorizer \(opset 18\)"):
        compress(load(words[0]), open_dataset(words[1]), target=Target(reduction=0.4), outputs=("pt2",))


def test_it_cannot_be_written_into_a_pt2(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"\.pt2 file cannot hold com\.microsoft\.Inverse \(opset 1\)"):
        load(saved(tmp_path, MIDDLE)).save(tmp_path / "out.pt2")


def test_a_pt2_that_names_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt2_writer, "kept_in", lambda node: None)
    load(saved(tmp_path, MIDDLE)).save(tmp_path / "out.pt2")
    with pytest.raises(UnsupportedModel, match=r"espalier\.onnxruntime"):
        load(tmp_path / "out.pt2")


# ------------------------------------------------------------------------------------------------------------ refusals


def assert_refused(path: Path, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        load(path)


def test_one_whose_results_have_sizes_that_depend_on_data_is_refused(tmp_path: Path) -> None:
    nodes = [*BEFORE, helper.make_node("Unique", ["m"], ["v"], axis=0), *BEHIND]
    assert_refused(saved(tmp_path, nodes), r"Unique \(opset 18\); how large its results are depends on the data")


def test_one_that_mixes_samples_is_refused(tmp_path: Path) -> None:
    nodes = [
        *BEFORE,
        node("Reshape", ["m", "image"], "q"),
        node("MaxRoiPool", ["q", "region"], "p", pooled_shape=[3, 3]),
        node("Reshape", ["p", "flat"], "v"),
        *BEHIND,
    ]
    assert_refused(saved(tmp_path, nodes), r"MaxRoiPool \(opset 18\).*other samples of the batch")


def test_all_that_cannot_stay_are_named(tmp_path: Path) -> None:
    """Random ones, and those that ONNX Runtime does not have; but not those that could."""
    nodes = [
        *BEFORE,
        node("Own", ["m"], "o", "own"),
        node("RandomNormalLike", ["o"], "z"),
        node("Add", ["z", "m"], "n"),
        node("Reshape", ["n", "square"], "q"),
        *INVERSE[1:],
        *BEHIND,
    ]
    assert_refused(saved(tmp_path, nodes), r"supported: RandomNormalLike \(opset 18\), own\.Own \(opset 1\)\.")


def test_quantized_ones_are_refused(tmp_path: Path) -> None:
    nodes = [
        *BEFORE,
        helper.make_node("DynamicQuantizeLinear", ["m"], ["q", "scale", "zero"]),
        node("DequantizeLinear", ["q", "scale", "zero"], "v"),
        *BEHIND,
    ]
    assert_refused(saved(tmp_path, nodes), "quantized already")


def test_one_that_onnx_runtime_does_not_compute_is_refused(tmp_path: Path) -> None:
    nodes = [*BEFORE, node("Inverse", ["m"], "v", MICROSOFT, odd=1), *BEHIND]
    assert_refused(saved(tmp_path, nodes), r"Inverse \(opset 1\); ONNX Runtime does not compute it")


def test_one_with_large_attributes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "MAX_BYTES", 100)
    assert_refused(saved(tmp_path, [COUNTS, *BEHIND], kind=INT64), "TfIdfVectorizer.*its attributes take")


def test_those_without_anything_trained_around_them_are_refused(tmp_path: Path) -> None:
    assert_refused(saved(tmp_path, [TREE], outputs=["t"]), r"TreeEnsembleRegressor \(opset 3\)")


def test_a_file_cannot_name_the_domain_of_those_that_are_kept(tmp_path: Path) -> None:
    path = saved(tmp_path, [*BEFORE, node("Kept", ["m"], "v", "espalier.kept", keeper=1), *BEHIND])
    proto = onnx.load(path)
    proto.opset_import.add(domain="espalier.kept", version=1)
    onnx.save(proto, path)
    assert_refused(path, "cannot be computed")


def test_a_result_of_another_size_than_was_found_is_an_error(tmp_path: Path) -> None:
    model = onnx.load(saved(tmp_path, [helper.make_node("Unique", ["x"], ["y"])]))
    del model.graph.initializer[:]
    unique = str(Kept(model.SerializeToString(), "Unique", (((8, ()),),)))
    assert [r.shape for r in OPERATOR([X[:1]], unique)] == [(8,)]
    with pytest.raises(UnsupportedModel, match=r"Unique.* the shape \[1\]; \[8\] was expected"):
        OPERATOR([torch.zeros(1, 8)], unique)
