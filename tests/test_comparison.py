"""The harness of the comparison, on a tiny network: cells, searches, resuming, and what rows return."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.comparison.cells import Cell, Comparison, plan
from benchmarks.comparison.networks import Data, Setting
from benchmarks.comparison.rows import ROWS
from benchmarks.comparison.search import beyond
from benchmarks.comparison.structure import Structure
from benchmarks.comparison.tables import crossing, page, read
from demo.network import SmallResNet

PARTS = ("one_shot_distilled", "group_lasso", "ours_gl")


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def load() -> Data:
    """Three clouds."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(480) % 3
    x = torch.randn(480, 12, generator=generator) + 5 * torch.eye(3, 12)[y]
    held_out = torch.arange(360) % 10 == 0
    return Data(x[:360], y[:360], held_out, x[360:], y[360:])


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    tiny = Setting("tiny", "three clouds", load, build, dense_epochs=3, dense_rate=1e-2, epochs=6, batch=20)
    return Comparison(tmp_path / "results", tmp_path / "cache", {"tiny": tiny}, say=lambda line: None)


def test_cells_are_run_once_and_say_what_they_are(comparison: Comparison) -> None:
    cells = list(plan(["tiny"], PARTS, [0.5], [0]))
    assert comparison.run(cells) == 3
    for cell in cells:
        result = json.loads((comparison.results / cell.file).read_text())
        assert result["reduction"]["wanted"] == 0.5
        assert 0.5 <= result["reduction"]["reached"] < 0.56
        assert result["parameters"]["small"] == round(
            result["parameters"]["dense"] * (1 - result["reduction"]["reached"])
        )
        assert result["test_accuracy"] > 0.6
        assert result["versions"]["torch"] == torch.__version__
        assert (result["engine"] is None) == (cell.row != "ours_gl")
    assert comparison.run(cells) == 0


def test_seeds_are_outermost_so_that_every_row_has_one_first() -> None:
    cells = list(plan(["a", "b"], ["x", "y"], [0.8], [0, 1]))
    assert [(c.network, c.row, c.seed) for c in cells[:4]] == [
        ("a", "x", 0),
        ("a", "y", 0),
        ("a", "x", 1),
        ("a", "y", 1),
    ]


def test_a_search_that_was_interrupted_goes_on(comparison: Comparison) -> None:
    cell = Cell("tiny", "group_lasso", 0.5, 0)
    path = comparison.results / "tiny" / "search" / "group_lasso-90.json"
    times = iter([True, True, False])
    comparison._in_time = lambda: next(times)  # type: ignore[method-assign]
    comparison.run([cell])  # the cell may begin, and has time for one try
    first = json.loads(path.read_text())["tries"]
    assert len(first) == 1
    assert not (comparison.results / cell.file).exists()
    del comparison._in_time
    assert comparison.run([cell]) == 1
    tries = json.loads(path.read_text())["tries"]
    assert tries[0] == first[0]
    assert 5 <= len(tries) <= 7  # three strengths or up to two more, and two more rates at the best of them
    best = max(tries, key=lambda t: t["accuracy"])
    chosen = json.loads((comparison.results / cell.file).read_text())["hyperparameters"]
    assert next(t["accuracy"] for t in tries if t["choice"] == chosen) == best["accuracy"]


def test_a_grid_goes_on_where_its_best_value_is_at_an_end() -> None:
    assert beyond({1e-3: 0.7, 3e-4: 0.6, 3e-3: 0.8}) == [9e-3]
    assert beyond({1e-3: 0.7, 3e-4: 0.8, 3e-3: 0.6}) == [9e-5]
    assert beyond({1e-3: 0.7, 3e-4: 0.6, 3e-3: 0.6}) == []


def test_searches_never_see_test_samples(comparison: Comparison) -> None:
    poisoned = replace(load(), test_x=torch.full((120, 12), torch.nan))
    tiny = comparison.settings["tiny"]
    comparison.settings = {"tiny": replace(tiny, load=lambda: poisoned)}
    cell = Cell("tiny", "one_shot", 0.5, 0)
    assert comparison._choice(cell) is not None
    found = json.loads((comparison.results / "tiny" / "search" / "one_shot-90.json").read_text())["tries"]
    assert all(t["accuracy"] > 0.5 for t in found)


def test_only_stale_cells_of_ours_are_run_again(comparison: Comparison) -> None:
    cells = list(plan(["tiny"], ["one_shot", "ours_gl"], [0.5], [0]))
    comparison.run(cells)
    for cell in cells:
        path = comparison.results / cell.file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"engine": "another state"}))
    assert comparison.run(cells) == 0
    comparison.stale = True
    assert comparison.run(cells) == 1


def test_cut_modules_compute_what_the_masked_network_computes() -> None:
    torch.manual_seed(0)
    net = SmallResNet(4).eval()
    x = torch.randn(4, 1, 28, 28)
    structure = Structure(net, x)
    keep = structure.largest(np.random.default_rng(0).random(len(structure.table)), structure.widths(0.6))
    small = structure.cut(net, keep)
    assert 1 - sum(p.numel() for p in small.parameters()) / structure.parameters == structure.reduction(keep) >= 0.6
    masked = structure.network.masked(np.flatnonzero(~keep))
    # The structure was read from the same weights.
    assert torch.allclose(small(x), masked(x), atol=1e-5)


@pytest.mark.parametrize("row", ["group_norm", "growing_reg", "pat"])
def test_rows_of_other_libraries_reach_the_reduction(comparison: Comparison, row: str) -> None:
    pytest.importorskip("torchao" if row == "pat" else "torch_pruning")
    task = comparison._task("tiny", 0, False)
    choice = {name: values[0] for name, values in ROWS[row].grid.items()}
    small = ROWS[row].run(task, 0.5, choice)
    assert 0.5 <= small.reduction < 0.6
    assert task.judge(small.net) > 0.5


def test_the_same_accuracy_is_found_between_measured_sizes() -> None:
    curve = [(100.0, 70.0), (400.0, 74.0), (800.0, 75.0)]
    assert crossing(curve, 72.0) == (pytest.approx(200.0), False)  # half way, on a logarithmic scale
    assert crossing(curve, 69.0) == (100.0, True)
    assert crossing(curve, 76.0) == (None, False)


def test_the_page_has_means_and_the_number_of_seeds(tmp_path: Path) -> None:
    (tmp_path / "phones").mkdir()
    for seed, accuracy in enumerate((0.70, 0.72)):
        result = {
            "network": "phones",
            "row": "one_shot",
            "seed": seed,
            "engine": None,
            "test_accuracy": accuracy,
            "made": "",
        }
        result |= {"reduction": {"wanted": 0.8, "reached": 0.801}, "parameters": {"dense": 1000, "small": 199}}
        result |= {"dense": {"test_accuracy": 0.74}, "seconds": {"cpu": 1}, "versions": {"torch": "2"}}
        result |= {"machine": {"processor": "a processor", "threads": 1}}
        (tmp_path / "phones" / f"{seed}.json").write_text(json.dumps(result))
    text = page(read(tmp_path), tmp_path)
    assert "| one-shot L2 | **71.00 ± 1.41 (2)** |" in text
    assert "at most: the others 0.10 points" in text


def test_cells_follow_a_search_that_has_found_something_better_since(comparison: Comparison) -> None:
    cell = Cell("tiny", "one_shot", 0.5, 0)
    comparison.run([cell])
    path = comparison.results / "tiny" / "search" / "one_shot-90.json"
    stored = json.loads(path.read_text())
    best = max(stored["tries"], key=lambda t: t["accuracy"])
    other = next(t for t in stored["tries"] if t["choice"] != best["choice"])
    best["accuracy"], other["accuracy"] = 0.0, 1.0
    path.write_text(json.dumps(stored))
    assert comparison.run([cell]) == 1
    assert json.loads((comparison.results / cell.file).read_text())["hyperparameters"] == other["choice"]
