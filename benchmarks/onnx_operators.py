"""Which ONNX operators are read: onnx's own node cases against the table, and against ONNX Runtime.

`python -m benchmarks.onnx_operators` writes `docs/onnx-operators.md`. It exits with 1 if a case of an operator in the
table fails. `make test` runs the same cases.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from tests.compression.formats.onnx.node_cases import Case, all_cases, difference, in_table, run, why_skipped
from tests.compression.formats.onnx.older_opsets import FIRST, by_onnx_runtime, elsewhere, history
from worker.compression.formats.onnx import operators
from worker.compression.formats.onnx.operators.recurrent import UNPACKED
from worker.compression.formats.onnx.table import KEPT, TABLE

OWN = (UNPACKED, KEPT)
"""Domains of nodes that no file has."""
TARGET = Path(__file__).parent.parent / "docs" / "onnx-operators.md"
HEAD = """# ONNX operators

What `python -m benchmarks.onnx_operators` found (onnx {onnx}, ONNX Runtime {runtime}, torch {torch}).
*Cases*: onnx's own node cases of the operator, one number per outcome, at the opset they were written for.
*Other opsets*: the same cases rewritten for every other opset from {first} on where the operator's schema changed,
judged by ONNX Runtime, which does not run all of them.

{listed} operators are in the table. Of onnx's {cases} node cases {passed} pass, {failed} fail, {absent} use an operator
that is not in the table and {skipped} are not run. At other opsets {moved} pass, {wrong} fail, and {unjudged} are not
run by ONNX Runtime.

Why cases are not run:

{reasons}

Why operators are not in the table, and how many cases that are. Where they depend on constants alone, ONNX Runtime
computes them when the file is read; where they lie behind everything that is trained, they stay in the file behind the
network. Elsewhere they stay in the network, where ONNX Runtime computes them without a gradient, and what they touch
keeps its size. For that they have to be neither quantized nor random and to have no sub-graphs, the sizes of their
results must not depend on the data, nor what is computed for a sample on others; else the file is refused.

{classes}

"""
ABSENT = {
    "quantized: refused with words, because whole numbers cannot be trained": (
        "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
        "QuantizeLinear",
    ),
    "how large the result is depends on the data, which no graph that is exported for training can hold; behind "
    "everything that is trained they are left as they are": (
        "NonMaxSuppression", "Unique",
    ),
    "mostly texts, or bytes of pictures: they belong before the network": (
        "ImageDecoder", "LabelEncoder", "RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit",
        "TfIdfVectorizer",
    ),
    "random numbers: what is written could not be compared with what was read": (
        "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    ),
    "trees: nothing that gradients could change": ("TreeEnsemble",),
    "optimizers, of the preview of training": ("Adagrad", "Adam", "Momentum"),
    "new in a preview domain; no exporter writes it": ("FlexAttention",),
    "older than what is read (opset 7, `Scan` of opset 9)": ("Not", "Scan"),
    "seen in no trained network; ONNX Runtime computes them": ("Det", "MaxRoiPool"),
}  # fmt: skip
"""Why → operators. Every operator of onnx that is not in the table has its place here."""


class Tally:
    """Outcomes by operator."""

    def __init__(self) -> None:
        self.own: dict[str, Counter[str]] = {}
        self.other: dict[str, Counter[str]] = {}
        self.skipped: Counter[str] = Counter()
        self.absent: Counter[str] = Counter()
        self.failures: list[str] = []

    def add(self, case: Case) -> None:
        why = why_skipped(case)
        name = _operator(case)
        counts = self.own.setdefault(name, Counter())
        if why is not None:
            self.skipped[why] += 1
            counts["skipped"] += 1
            return
        if not in_table(case):
            counts["absent"] += 1
            self.absent[_why_absent(case.model)] += 1
            return
        counts[
            "passed" if self._judge(case, str(case), [expected for _, expected in case.data_sets]) else "failed"
        ] += 1
        for opset, moved in elsewhere(case):
            expected = by_onnx_runtime(moved)
            good = expected is None or self._judge(moved, f"{case} at opset {opset}", [expected])
            outcome = "unjudged" if expected is None else "passed" if good else "failed"
            self.other.setdefault(name, Counter())[outcome] += 1

    def _judge(self, case: Case, title: str, expected: list[Any]) -> bool:
        torch.manual_seed(0)
        try:
            differences = [
                difference(found, wanted, case.rtol, case.atol)
                for data, outputs in zip(case.data_sets, expected, strict=True)
                for found, wanted in zip(run(case, data), outputs, strict=True)
            ]
        except Exception as error:
            differences = [str(error)]
        if any(differences):
            self.failures.append(f"{title}: {next(filter(None, differences))}")
        return not any(differences)


def _operator(case: Case) -> str:
    """The one that the case is about: of an expanded one, whose name the case has."""
    nodes = case.model.graph.node
    domain = f"{nodes[0].domain}." if nodes[0].domain not in ("", "ai.onnx") else ""
    return f"{domain}{nodes[0].op_type}" if len(nodes) == 1 else "(several)"


def _why_absent(model: onnx.ModelProto) -> str:
    names = {node.op_type for node in model.graph.node}
    found = [why for why, operators in ABSENT.items() if names & set(operators)]
    if not found:
        raise ValueError(f"say in ABSENT why {', '.join(sorted(names))} is not in the table")
    return found[0]


def _total(tallies: Iterable[Counter[str]], outcome: str) -> int:
    return sum(tally[outcome] for tally in tallies)


def _write(tally: Tally) -> None:
    onnx_names = {name for domain, name in TABLE if domain == ""}
    lines = [
        HEAD.format(
            onnx=onnx.__version__,
            runtime=onnxruntime.__version__,
            torch=torch.__version__.split("+")[0],
            first=FIRST,
            listed=len([key for key in TABLE if key[0] not in OWN]),
            cases=len(all_cases()),
            passed=_total(tally.own.values(), "passed"),
            failed=_total(tally.own.values(), "failed"),
            absent=_total(tally.own.values(), "absent"),
            skipped=sum(tally.skipped.values()),
            reasons="\n".join(f"- {n}: {why}" for why, n in tally.skipped.most_common()),
            classes="\n".join(f"- {tally.absent[why]}: {why} ({', '.join(names)})" for why, names in ABSENT.items()),
            moved=_total(tally.other.values(), "passed"),
            wrong=_total(tally.other.values(), "failed"),
            unjudged=_total(tally.other.values(), "unjudged"),
        ),
        "| operator | cases: passed | failed | not run | other opsets: passed | failed | not judged |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in sorted(onnx_names):
        own, other = tally.own.get(name, Counter()), tally.other.get(name, Counter())
        cells = [own["passed"], own["failed"], own["skipped"], other["passed"], other["failed"], other["unjudged"]]
        lines.append(f"| {name} | " + " | ".join(str(n or "") for n in cells) + " |")
    for domain in sorted({domain for domain, _ in TABLE} - {"", *OWN}):
        names = sorted(name for d, name in TABLE if d == domain)
        lines += ["", f"## {domain}", "", ", ".join(names) + "."]
    absent = sorted(
        name
        for (domain, name), versions in history().items()
        if domain == "" and name not in {*onnx_names, "Constant"} and not versions[max(versions)].deprecated
    )
    unexplained = set(absent) - {name for names in ABSENT.values() for name in names}
    if unexplained:
        raise ValueError(f"say in ABSENT why {', '.join(sorted(unexplained))} is not in the table")
    TARGET.write_text("\n".join(lines) + "\n")


def main() -> int:
    assert operators  # importing it fills the table
    tally = Tally()
    for case in all_cases():
        tally.add(case)
    _write(tally)
    for failure in tally.failures:
        print(failure, file=sys.stderr)
    print(f"wrote {TARGET}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
