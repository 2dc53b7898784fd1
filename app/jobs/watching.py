"""Waiting for a job to change without holding a thread or a connection meanwhile: long polls and event streams."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator

import anyio
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy import select

from app.database import Database
from app.jobs import service as jobs
from app.jobs.schemas import show_event, show_job
from app.jobs.states import ACTIVE_STATES, TERMINAL_STATES
from app.jobs.watcher import Watcher
from app.tables import Event, Job

PING_SECONDS = 15.0
MAX_WAIT_SECONDS = 60
EVENTS_AT_ONCE = 100
WATCHED_JOBS = 200
"""Of those that have not ended, the newest so many are watched."""
JOBS_LOOK_SECONDS = 1.0


def wanted_wait_seconds(prefer: str | None) -> int | None:
    """`Prefer: wait=10` (RFC 7240), at most a minute."""
    match = re.search(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\b", prefer or "", re.ASCII)
    return min(int(match[1]), MAX_WAIT_SECONDS) if match else None


async def wait_for_change(watcher: Watcher, id: str, seen_version: int | None, seconds: float) -> None:
    """Until the job is another version than the one seen, or has ended when none was; or the time is over."""

    def wanted(version: int, state: str) -> bool:
        return state in TERMINAL_STATES if seen_version is None else version != seen_version

    await watcher.wait(id, wanted, seconds)


async def stream_events(database: Database, watcher: Watcher, id: str, after: int) -> AsyncIterator[bytes]:
    """The job's events as server-sent ones, from the one after `after` until the job has ended, with pings between."""

    def look() -> tuple[list[Event], int | None, bool]:
        """The version first: what happens in between makes another one."""
        with database.reading() as session:
            seen = session.execute(select(Job.version, Job.state).where(Job.id == id)).tuples().one_or_none()
            version, state = seen or (None, None)
            return jobs.events_after(session, id, after, EVENTS_AT_ONCE), version, state not in ACTIVE_STATES

    silent_since = time.monotonic()
    yield KEEPALIVE_COMMENT  # so that the headers leave at once
    while True:
        events, seen_version, has_ended = await run_in_threadpool(look)
        for event in events:
            after = event.sequence
            data = show_event(event).model_dump_json()
            yield format_sse_event(data_str=data, event=event.type, id=str(event.sequence))
            silent_since = time.monotonic()
        if events:
            continue  # there may be more
        if has_ended:
            return
        if (left := silent_since + PING_SECONDS - time.monotonic()) <= 0:
            yield KEEPALIVE_COMMENT
            silent_since, left = time.monotonic(), PING_SECONDS
        await watcher.wait(id, lambda version, _, seen=seen_version: version != seen, left)  # type: ignore[misc]


async def stream_jobs(database: Database) -> AsyncIterator[bytes]:
    """Each job that has not ended, and then every job that has changed, with pings between. Never ends."""
    known: dict[str, str] = {}

    def look() -> list[bytes]:
        with database.reading() as session:
            active = select(Job).where(Job.state.in_(ACTIVE_STATES)).order_by(Job.id.desc()).limit(WATCHED_JOBS)
            found = {job.id: job for job in session.scalars(active)}
            if gone := known.keys() - found.keys():
                found |= {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(gone)))}
            outlooks = dict(zip(found, jobs.outlooks(session, list(found.values())), strict=True))
            news = []
            for id in [*gone - found.keys()]:
                del known[id]
                news.append(format_sse_event(data_str=json.dumps({"id": id}), event="deleted"))
            for id, job in reversed(found.items()):
                shown = show_job(job, outlooks[id])
                seen = f"{job.version} {shown.queue_position}"
                if known.get(id) != seen:
                    known[id] = seen
                    news.append(format_sse_event(data_str=shown.model_dump_json(), event="job"))
                if shown.is_terminal:
                    del known[id]
            return news

    silent_since = time.monotonic()
    yield KEEPALIVE_COMMENT
    while True:
        news = await run_in_threadpool(look)
        for event in news:
            yield event
        if news or time.monotonic() - silent_since >= PING_SECONDS:
            silent_since = time.monotonic()
            if not news:
                yield KEEPALIVE_COMMENT
        await anyio.sleep(JOBS_LOOK_SECONDS)
