"""How `benchmarks/chaos.py` counts what a kill has cost."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from benchmarks.cluster.audit import lost_work
from benchmarks.cluster.faults import Kill


def event(at: float, type: str, **data: Any) -> dict[str, Any]:
    return {"type": type, "data": data, "created_at": datetime.fromtimestamp(at, UTC).isoformat()}


FIRST = [
    event(10, "running", attempt=1),
    event(12, "phase", phase="sparse_training"),
    event(20, "phase", phase="finetuning"),
]


@pytest.mark.parametrize(
    ("events", "kill", "lost"),
    [
        (
            [*FIRST, event(35, "running", attempt=2), event(36, "resumed", phase="finetuning", saved_at=19.0)],
            Kill("trainer killed", 22.0, "job", 1, 9.0),
            3.0,
        ),
        (
            [
                *FIRST,
                event(30, "running", attempt=2),
                event(33, "resumed", phase="finetuning", saved_at=21.0),
                event(50, "running", attempt=3),
                event(52, "resumed", phase="finetuning", saved_at=21.0),
            ],
            Kill("trainer killed", 34.0, "job", 2, 30.0),
            1.0,
        ),
    ],
    ids=["since the last checkpoint", "since it trained, when it had stored none yet"],
)
def test_a_kill_costs_the_work(events: list[dict[str, Any]], kill: Kill, lost: float) -> None:
    counted = lost_work([kill], lambda path: {"data": events, "has_more": False}, 2.0)["kills_while_training"]
    assert (counted["kills"], counted["max"]) == (1, lost)
