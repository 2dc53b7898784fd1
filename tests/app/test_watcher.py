"""One pair of eyes for all who wait: what it asks, whom it wakes, and when it is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from app.database import Database
from app.jobs import watcher as module
from app.jobs.watcher import Watcher
from app.tables import Job
from tests.app.helpers import on_both_databases
from tests.app.test_query_plans import insert_jobs


@pytest.fixture
def ids(database: Database) -> list[str]:
    return insert_jobs(database, [{} for _ in range(20)])


@pytest.fixture
def watcher(database: Database) -> Watcher:
    return Watcher(database)


def is_new(version: int, state: str) -> bool:
    return version != 1


async def waited(coroutine: Coroutine[Any, Any, None]) -> float:
    began = time.monotonic()
    await coroutine
    return time.monotonic() - began


@on_both_databases
def test_whose_job_has_changed_is_woken_soon_and_nobody_else(
    database: Database, watcher: Watcher, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 3)

    async def run() -> list[float]:
        waiting = [asyncio.create_task(waited(watcher.wait(id, is_new, 1.5))) for id in ids]
        await asyncio.sleep(0.4)
        with database.writing() as session:
            session.execute(update(Job).where(Job.id.in_(ids[::4])).values(version=2))
        return await asyncio.gather(*waiting)

    took = asyncio.run(run())
    assert all(seconds < 1.4 for seconds in took[::4])  # 0.25 s after it, and what a busy machine takes
    assert all(seconds >= 1.5 for n, seconds in enumerate(took) if n % 4)


def test_many_who_wait_cost_one_question_a_look(
    watcher: Watcher, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    look = watcher._look
    monkeypatch.setattr(watcher, "_look", lambda ids: (asked.append(ids), look(ids))[1])

    async def run() -> None:
        await asyncio.gather(*(watcher.wait(id, is_new, 0.6) for id in ids for _ in range(10)))

    asyncio.run(run())
    assert 1 <= len(asked) <= 3
    assert all(sorted(each) == sorted(ids) for each in asked)


def test_a_job_that_is_gone_wakes_at_once(watcher: Watcher) -> None:
    assert asyncio.run(waited(watcher.wait("job_unknown", is_new, 20.0))) < 10


def test_who_waits_is_woken_when_the_database_is_away(
    watcher: Watcher, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(ids: list[str]) -> Any:
        raise OperationalError("SELECT", {}, Exception("it is away"))

    monkeypatch.setattr(watcher, "_look", fail)
    assert asyncio.run(waited(watcher.wait(ids[0], is_new, 20.0))) < 10


def test_nothing_is_watched_when_nobody_waits(watcher: Watcher, ids: list[str]) -> None:
    async def run() -> None:
        for _ in range(2):  # and it begins anew
            await watcher.wait(ids[0], is_new, 0.05)
            assert watcher._task is not None
            await asyncio.wait_for(watcher._task, 10)
        assert watcher._waiting == {}

    asyncio.run(run())


def test_it_stops_with_the_service(watcher: Watcher, ids: list[str]) -> None:
    async def run() -> None:
        waiting = asyncio.create_task(watcher.wait(ids[0], is_new, 20.0))
        await asyncio.sleep(0.05)
        await watcher.stop()
        assert watcher._task is not None
        assert watcher._task.done()
        waiting.cancel()

    asyncio.run(run())
