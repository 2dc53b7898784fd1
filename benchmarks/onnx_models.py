"""ONNX files as they are found and as they are exported: read, compared with ONNX Runtime, cut, written, run.

`python -m benchmarks.onnx_models [row …]` goes on with the rows that are not done (or does the named ones), each in a
process of its own, and writes `benchmarks/results/onnx_models.json` and `docs/onnx-models.md`. Needs
`pip install torchvision==0.28.* transformers` and `pip install --no-deps rapidocr==3.10.0 silero-vad==6.2.3
basic-pitch==0.4.0`, which nothing else does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from benchmarks.architectures import of_torchvision, of_transformers
from benchmarks.architectures.checking import BATCH, CHANGE, TOLERANCE, WANTED, choose, distance, prepare, randomise
from worker.compression import load
from worker.compression.formats.onnx_writer import write_onnx
from worker.compression.formats.verification import feed, open_session, verify_file

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "onnx_models.json", HERE.parent / "docs" / "onnx-models.md"
TIMEOUT_SECONDS = 900

VISION = (
    "resnet18 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 efficientnet_b0 squeezenet1_1 densenet121 "
    "regnet_y_400mf mnasnet0_5 googlenet convnext_tiny"
)
LANGUAGE = "Bert DistilBert Roberta Albert GPT2 Llama ViT Deit Segformer Wav2Vec2 CLIP"
OPSETS = {"TorchScript": (11, 13, 14, 17), "torch.export": (18, 20, 21, 23)}
"""By turns: an architecture gets one of each exporter."""
FUSED_ATTENTION_SINCE = 14
"""TorchScript's exporter knows it since this opset."""


@dataclass(frozen=True)
class Found:
    """A file in a package. `shapes`: of its data inputs without the batch."""

    package: str
    path: str
    shapes: Sequence[tuple[int, ...]]
    fixed: dict[str, Any] = field(default_factory=dict)


VAD = {"sr": 16000, "state": 0.0}
SEQUENCE = {"sequence": 576}
LIGHT = "bvlc_alexnet densenet121 inception_v1 inception_v2 resnet50 shufflenet squeezenet vgg19 zfnet512"
FILES = {
    "PP-OCRv6 recogniser": Found("rapidocr", "models/PP-OCRv6_rec_small.onnx", [(3, 48, 160)]),
    "PP-OCRv6 detector": Found("rapidocr", "models/PP-OCRv6_det_small.onnx", [(3, 160, 160)]),
    "PP-OCR direction": Found("rapidocr", "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", [(3, 48, 192)]),
    "basic-pitch": Found("basic_pitch", "saved_models/icassp_2022/nmp.onnx", [(43844, 1)]),
    "silero-vad": Found("silero_vad", "data/silero_vad.onnx", [(576,)], VAD | {"input_axis_1": 576}),
    "silero-vad opset 15": Found("silero_vad", "data/silero_vad_16k_op15.onnx", [(576,)], VAD | SEQUENCE),
    "silero-vad without If": Found("silero_vad", "data/silero_vad_op18_ifless.onnx", [(576,)], VAD | SEQUENCE),
    "silero-vad half": Found("silero_vad", "data/silero_vad_half.onnx", [(576,)], {"state": 0.0} | SEQUENCE),
    "silero-vad sequence": Found("silero_vad", "data/silero_vad_16k_sequence.onnx", [(576,)], {"h": 0.0, "c": 0.0}),
    "silero-vad batch 1": Found("silero_vad", "data/silero_vad_openvino_16k.onnx", [(576,)], {"state": 0.0}),
    **{f"light {n}": Found("onnx", f"backend/test/data/light/light_{n}.onnx", [(3, 224, 224)]) for n in LIGHT.split()},
}


def exports() -> dict[str, tuple[str, str, int]]:
    """Row → (architecture, exporter, opset)."""
    rows = {}
    for i, name in enumerate([*VISION.split(), *LANGUAGE.split()]):
        for exporter, opsets in OPSETS.items():
            opset = max(opsets[i % len(opsets)], FUSED_ATTENTION_SINCE if name in LANGUAGE.split() else 0)
            rows[f"{name}, {exporter}, opset {opset}"] = (name, exporter, opset)
    return rows


def check(row: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if row in FILES:
            found = FILES[row]
            path = with_weights(packaged(found), Path(folder) / "in.onnx")
            generator = torch.Generator().manual_seed(0)
            examples = [torch.randn(BATCH, *shape, generator=generator) for shape in found.shapes]
            return {"source": found.package} | judge(path, examples, found.fixed, Path(folder))
        name, exporter, opset = exports()[row]
        source, build = (of_torchvision.ARCHITECTURES | of_transformers.ARCHITECTURES)[name]
        model, inputs = build()
        randomise(model.eval())
        path = exported(model, inputs, exporter, opset, Path(folder) / "in.onnx")
        examples = [torch.cat([x, x[:1].flip(-1)])[:BATCH] for x in inputs]
        return {"source": f"{source}, {exporter}"} | judge(path, examples, {}, Path(folder))


def packaged(found: Found) -> Path:
    spec = importlib.util.find_spec(found.package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / found.path


def with_weights(path: Path, out: Path) -> Path:
    """onnx's light models say the shapes of their weights and leave their numbers out: made up here, such that
    no class gets all of the probability."""
    model = onnx.load(path)
    shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    made = [n for n in model.graph.node if n.op_type == "ConstantOfShape" and n.input[0] in shapes]
    if not made:
        return path
    rng = np.random.default_rng(0)
    for node in made:
        shape = [int(n) for n in shapes[node.input[0]]]
        scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2
        numbers = rng.normal(0, scale, shape) if len(shape) > 1 else rng.uniform(0.5, 1.5, shape)
        model.graph.initializer.append(numpy_helper.from_array(numbers.astype(np.float32), node.output[0]))
        model.graph.node.remove(node)
    onnx.save(model, out)
    if model.graph.node[-1].op_type == "Softmax":
        _soften(model, out)
    return out


def _soften(model: onnx.ModelProto, path: Path) -> None:
    """Scales the last weight so that the scores that go into the last softmax have a standard deviation of 1."""
    weights = {t.name: t for t in model.graph.initializer if len(t.dims) > 1}
    last = next(n for node in reversed(model.graph.node) for n in node.input if n in weights)
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    seen.graph.output.append(onnx.ValueInfoProto(name=model.graph.node[-1].input[0]))
    onnx.save(seen, path)
    session = open_session(path, threads=1)
    entry = next(e for e in session.get_inputs() if e.name not in {t.name for t in model.graph.initializer})
    x = np.random.default_rng(1).normal(size=entry.shape).astype(np.float32)
    spread = float(session.run(None, {entry.name: x})[-1].std())
    weights[last].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights[last]) / spread, last))
    onnx.save(model, path)


def exported(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], exporter: str, opset: int, path: Path) -> Path:
    names = [f"input.{i}" for i in range(len(inputs))]
    options: Any = {"opset_version": opset, "input_names": names}
    with torch.no_grad():
        if exporter == "TorchScript":
            free = {name: {0: "batch"} for name in names}
            torch.onnx.export(model, inputs, path, dynamo=False, dynamic_axes=free, **options)
            return path
        batch = torch.export.Dim("batch")
        each = tuple({0: batch} for _ in inputs)
        shapes = (each,) if hasattr(model, "outputs") else each
        torch.onnx.export(
            model, inputs, path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **options
        )
    return path


def judge(path: Path, examples: list[torch.Tensor], fixed: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The file's row, as far as it gets."""
    row: dict[str, Any] = {"opset": opset_of(path)}
    network = load(path, fixed)
    origin = network.program.origin
    assert origin is not None
    examples = [x.to(spec.dtype) for x, spec in zip(examples, network.program.inputs, strict=True)]
    with torch.no_grad():
        found = network(*examples)
    row["read_error"] = distance(run(path, examples, fixed, origin.static_batch), found)
    row["parameters"] = before = network.parameters_count
    row["groups"] = len(network.table)
    row["frozen"] = round(sum(f.parameters for f in network.frozen) / before, 4)
    row["unknown"] = network.grouping.trace.unknown
    keep = choose(network, WANTED)
    small = network.keeping(keep)
    row["removed"] = round(1 - small.parameters_count / before, 4)
    with torch.no_grad():
        reference = network.masked(np.flatnonzero(~keep))(*examples)
        row["error"], row["change"] = distance(reference, small(*examples)), distance(found, reference)
    row["written_opset"] = write_onnx(small.program, folder / "small.onnx")
    row["file_error"] = verify_file(folder / "small.onnx", small.program, examples)
    half = origin.weights.itemsize < 4
    good = row["read_error"] <= (1e-2 if half else TOLERANCE) and row["error"] <= TOLERANCE and row["change"] > CHANGE
    row["result"] = "wrong" if not good else "exact" if row["removed"] >= WANTED else "exact, less removed"
    return row


def opset_of(path: Path) -> int:
    model = onnx.load(path, load_external_data=False)
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def run(
    path: Path, examples: list[torch.Tensor], fixed: dict[str, Any], static: int | None
) -> tuple[torch.Tensor, ...]:
    """What ONNX Runtime computes from the file, in pieces of its batch size if that is fixed."""
    session = open_session(path, threads=1)
    step, pieces = static or len(examples[0]), []
    for start in range(0, len(examples[0]), step):
        parts = iter(x[start : start + step] for x in examples)
        given = []
        for entry in session.get_inputs():
            if entry.name in fixed:
                kind = torch.int64 if "int64" in entry.type else torch.float32
                shape = [n if isinstance(n, int) and n > 0 else step for n in entry.shape]
                given.append(torch.full(shape, fixed[entry.name], dtype=kind))
            else:
                given.append(next(parts))
        pieces.append(session.run(None, feed(session, given)))
    results = []
    for i in range(len(pieces[0])):
        parts = [torch.from_numpy(np.array(p[i])).float() for p in pieces]
        axis = next((a for a, n in enumerate(parts[0].shape) if n == step), 0) if static else 0
        results.append(torch.cat(parts, axis))
    return tuple(results)


# -------------------------------------------------------------------------------------------------------------- results

HEAD = f"""# ONNX files

What `python -m benchmarks.onnx_models` found: files as packages bring them, and architectures exported by PyTorch's two
exporters in several opsets. Each is read and at least {WANTED:.0%} of its parameters are removed, groups chosen at
random.

- *Read*: the largest difference between what was read and what ONNX Runtime computes from the file, relative to the
  output; {TOLERANCE:.0e} is allowed (1e-2 for a file in half precision).
- *Cut*: the same between the small network and the full one in which every reducing operation sees only what stays.
- *Written*: between the small network and its file in ONNX Runtime, at two other batch sizes.
- *Opset*: of the file, and of what is written if that is another.

"""
COLUMNS = (
    "| file | parameters | groups | removed | read | cut | written | opset | result |\n"
    "|---|--:|--:|--:|--:|--:|--:|---|---|"
)


def write(rows: dict[str, dict[str, Any]]) -> None:
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    done = sum(row["result"] == "exact" for row in rows.values())
    text = [f"{HEAD}{done} of {len(rows)} are exact with as much removed.", ""]
    for source in dict.fromkeys(row["source"] for row in rows.values()):
        own = {name: row for name, row in rows.items() if row["source"] == source}
        text += [f"## {source}", "", COLUMNS, *(_line(name, row) for name, row in own.items()), ""]
    reasons = {name: row["reason"] for name, row in rows.items() if "reason" in row}
    if reasons:
        text += ["## Not done", "", *(f"- {name}: {reason}" for name, reason in reasons.items()), ""]
    PAGE.write_text("\n".join(text))


def _line(name: str, row: dict[str, Any]) -> str:
    name = name.split(",")[0]
    if "file_error" not in row:
        return f"| {name} | | | | | | | {row.get('opset', '')} | {row['result']} |"
    opset = str(row["opset"]) + (f" → {row['written_opset']}" if row["written_opset"] != row["opset"] else "")
    return (
        f"| {name} | {row['parameters']:,} | {row['groups']:,} | {row['removed']:.1%} | {row['read_error']:.0e} "
        f"| {row['error']:.0e} | {row['file_error']:.0e} | {opset} | {row['result']} |"
    )


def apart(row: str) -> dict[str, Any]:
    """One row, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.onnx_models", "--here", row]
    if row in FILES:
        failed: dict[str, Any] = {"source": FILES[row].package, "result": "refused"}
    else:
        name, exporter, opset = exports()[row]
        source = "torchvision" if name in VISION.split() else "transformers"
        failed = {"source": f"{source}, {exporter}", "opset": opset, "result": "refused"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return failed | {"result": "failed", "reason": f"took more than {TIMEOUT_SECONDS // 60} minutes"}
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    last = next(
        (s for s in reversed(done.stderr.splitlines()) if s and not s[0].isspace()), f"ended: {done.returncode}"
    )
    return failed | {"reason": last.removeprefix("worker.compression.errors.")[:300]}


def main() -> None:
    known = [*FILES, *exports()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="which; without any, all that are not exact yet")
    parser.add_argument("--here", action="store_true", help="one in this process: prints its row")
    asked = parser.parse_args()
    if asked.here:
        _library = prepare()
        print(json.dumps(check(asked.rows[0])))
        return
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = asked.rows or [name for name in known if not rows.get(name, {}).get("result", "").startswith("exact")]
    for name in wanted:
        rows[name] = apart(name)
        print(name, {k: v for k, v in rows[name].items() if k != "source"}, flush=True)
        write({other: rows[other] for other in known if other in rows})


if __name__ == "__main__":
    main()
