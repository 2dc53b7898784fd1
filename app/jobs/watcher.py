"""One pair of eyes for all requests of this process that wait for a job to change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from fastapi.concurrency import run_in_threadpool
from sqlalchemy import select

from app.database import Database
from app.tables import Job

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
AT_ONCE = 500
"""Jobs in one question to the database."""

Wanted = Callable[[int, str], bool]
"""Is this version, in this state, what somebody waits for?"""


class Watcher:
    """While anybody waits, a task asks for version and state of all jobs that are waited for, four times a second; when
    nobody does, there is no task. It says no more than that it is time to look: at what, is up to who may see it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[str, dict[asyncio.Event, Wanted]] = {}
        self._task: asyncio.Task[None] | None = None

    async def wait(self, id: str, wanted: Wanted, seconds: float) -> None:
        """Until the job is as wanted, or gone, or the time is over; or nobody can tell, since the database is away."""
        is_time = asyncio.Event()
        self._waiting.setdefault(id, {})[is_time] = wanted
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_time.wait(), seconds)
        finally:
            del self._waiting[id][is_time]
            if not self._waiting[id]:
                del self._waiting[id]

    async def stop(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while self._waiting:
            await asyncio.sleep(LOOK_SECONDS)
            ids = list(self._waiting)
            # Who comes while the database is asked may know more than its answer.
            waiting = [(id, *each) for id in ids for each in self._waiting[id].items()]
            try:
                found = await run_in_threadpool(self._look, ids)
            except Exception as error:  # who waits looks for himself, and says what is wrong
                logger.warning("cannot look whether jobs have changed: %s: %s", type(error).__name__, error)
                found = {}
            for id, is_time, wanted in waiting:
                if id not in found or wanted(*found[id]):
                    is_time.set()

    def _look(self, ids: list[str]) -> dict[str, tuple[int, str]]:
        found = {}
        with self._database.reading() as session:
            for start in range(0, len(ids), AT_ONCE):
                some = Job.id.in_(ids[start : start + AT_ONCE])
                for id, version, state in session.execute(select(Job.id, Job.version, Job.state).where(some)):
                    found[id] = version, state
        return found
