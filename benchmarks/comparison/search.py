"""The search for hyperparameters, the same for every row: one after the other along the row's grid, by the accuracy on
training samples that were held out. Every try is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comparison.rows import Row
from benchmarks.comparison.stages import Choice
from benchmarks.comparison.task import written

SEARCHED_AT = (0.9,)
"""Reductions at which hyperparameters are searched; the nearest one serves the others."""
EXTENSIONS = 2
"""So often, a grid of strengths or rates is extended by a step when its best value lies at an end."""
OPEN_ENDED = ("strength", "rate")


def searched_at(reduction: float) -> float:
    return min(SEARCHED_AT, key=lambda r: abs(r - reduction))


def search(
    row: Row, path: Path, attempt: Callable[[Choice], float], allowed: Callable[[], bool], seeds: int = 1
) -> Choice | None:
    """The best choice along the grid of `row`; `attempt` gives the accuracy of one, the mean over so many `seeds`.
    Tries in `path` over as many are not repeated.

    None when `allowed` says that time is up.
    """
    stored = json.loads(path.read_text()) if path.exists() else {}
    tries: list[dict[str, Any]] = stored["tries"] if stored.get("seeds") == seeds else []

    def accuracy(choice: Choice) -> float | None:
        for entry in tries:
            if entry["choice"] == choice:
                return entry["accuracy"]
        if not allowed():
            return None
        tries.append({"choice": choice, "accuracy": attempt(choice)})
        with written(path) as temporary:
            temporary.write_text(json.dumps({"row": row.name, "seeds": seeds, "tries": tries}, indent=1) + "\n")
        return tries[-1]["accuracy"]

    best = {name: values[0] for name, values in row.grid.items()}
    for name, values in row.grid.items():
        found: dict[float, float] = {}
        queue = list(values)
        while queue:
            value = queue.pop(0)
            reached = accuracy(best | {name: value})
            if reached is None:
                return None
            found[value] = reached
            if not queue and name in OPEN_ENDED and len(found) < len(values) + EXTENSIONS:
                queue += beyond(found)
        best[name] = max(found, key=lambda value: found[value])
    return best


def resolve(row: Row, path: Path, attempt: Callable[[Choice], tuple[float, Choice]]) -> Choice:
    """What a row that searches nothing resolves to by itself, where samples are held out."""
    if not path.exists():
        accuracy, choice = attempt({})
        with written(path) as temporary:
            found = {"row": row.name, "seeds": 1, "tries": [{"choice": choice, "accuracy": accuracy}]}
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(path.read_text())["tries"][0]["choice"]


def beyond(found: dict[float, float]) -> list[float]:
    """The next value of a geometric grid if the best one lies at its end; values are rounded to two digits."""
    values = sorted(found)
    best = max(found, key=lambda value: found[value])
    if best == values[0]:
        return [float(f"{values[0] ** 2 / values[1]:.1e}")]
    if best == values[-1]:
        return [float(f"{values[-1] ** 2 / values[-2]:.1e}")]
    return []
