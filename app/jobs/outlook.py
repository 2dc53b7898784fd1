"""When a job's turn will come, and when it will be done: its place in the queue, and an estimate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, and_, case, func, literal, or_, select, true, tuple_
from sqlalchemy.orm import Session

from app.access.projects import EVERYBODYS
from app.tables import Job, Worker, utc_now

SEEN_JOBS = 20
"""An ordinary job takes as long as the mean of so many that succeeded last."""
LEAST_FRACTION = 0.02
"""Of a running job has to be done before its pace says anything."""
ALIVE = timedelta(minutes=2)


@dataclass(frozen=True)
class Outlook:
    queue_position: int | None = None
    """1: the next one for a worker of its class. None once it has left the queue."""
    estimated_finish_at: datetime | None = None


_QUEUED = literal("queued", literal_execute=True)
"""Not a parameter: databases use the index of queued jobs only where they see that it is about those."""
_other = Job.__table__.alias("other_job")
"""Of whatever project: the queue is everybody's, and `app.access.projects` narrows only what is mapped."""


def _place() -> ColumnElement[int | None]:
    is_older = tuple_(_other.c.created_at, _other.c.id) < tuple_(Job.created_at, Job.id)
    is_earlier = or_(_other.c.priority > Job.priority, and_(_other.c.priority == Job.priority, is_older))
    competes = or_(Job.accelerator == "any", _other.c.accelerator == "any", _other.c.accelerator == Job.accelerator)
    earlier = select(func.count() + 1).select_from(_other).where(_other.c.state == _QUEUED, is_earlier, competes)
    return case((Job.state == _QUEUED, earlier.correlate(Job).scalar_subquery()))


PLACE = _place()
"""Of a queued `Job` in a query: 1, and one more for every job that will be taken before it by a worker that could take
it. NULL once it has left the queue. (Made once: to make it costs as much as to ask.)"""


def places(session: Session, jobs: Iterable[Job]) -> dict[str, int]:
    """Of those that are queued, by id: as `PLACE` says, but the queue is gone through once, however many they are."""
    queued = {job.id: job.accelerator for job in jobs if job.state == "queued"}
    if not queued:
        return {}
    classes = sorted(set(queued.values()))
    numbered = select(_other.c.id, *map(_number, classes)).where(_other.c.state == _QUEUED).subquery()
    found = session.execute(select(Job.id, numbered).join(numbered, numbered.c.id == Job.id).where(Job.id.in_(queued)))
    return {row.id: getattr(row, queued[row.id]) for row in found}


def _number(accelerator: str) -> ColumnElement[int]:
    """Of a job of this class: how many up to it in the queue compete with it, itself among them."""
    order = (_other.c.priority.desc(), _other.c.created_at, _other.c.id)
    competes = true() if accelerator == "any" else _other.c.accelerator.in_(("any", accelerator))
    return func.count().filter(competes).over(order_by=order, rows=(None, 0)).label(accelerator)


class Outlooks:
    """Of the jobs in one answer; what they have in common is asked for once. The queue is everybody's: other projects'
    jobs count, though nothing of them is shown.

    A running job goes on at its pace so far. A queued one waits until the workers of its class have done what runs and
    what is before it, and then takes as long as jobs took lately. Without workers or history there is no estimate.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._now = utc_now()

    def of(self, job: Job, place: int | None) -> Outlook:
        """`place`: in the queue, if it is there."""
        if job.state == "running":
            left = _seconds_left(job.progress, job.worked_seconds)
            return Outlook(None, None if left is None else self._now + timedelta(seconds=left))
        if job.state != "queued" or place is None:
            return Outlook()
        workers = sum(count for kind, count in self._workers.items() if job.accelerator in ("any", kind))
        if not workers or self._ordinary_seconds is None:
            return Outlook(place)
        waiting = (self._running_seconds + (place - 1) * self._ordinary_seconds) / workers
        return Outlook(place, self._now + timedelta(seconds=waiting + self._ordinary_seconds))

    @cached_property
    def _workers(self) -> dict[str, int]:
        """Living ones that take jobs, by class."""
        alive = select(Worker.accelerator, Worker.queues).where(
            Worker.heartbeat_at > self._now - ALIVE, Worker.is_stopping.is_(False)
        )
        counts: dict[str, int] = {}
        for accelerator, queues in self._session.execute(alive):
            if "jobs" in queues:
                counts[accelerator] = counts.get(accelerator, 0) + 1
        return counts

    @cached_property
    def _running_seconds(self) -> float:
        running = select(Job.progress, Job.worked_seconds).where(Job.state == "running")
        ordinary = self._ordinary_seconds or 0.0
        lefts = [_seconds_left(*row) for row in self._session.execute(running, execution_options=EVERYBODYS)]
        return sum(ordinary if left is None else left for left in lefts)

    @cached_property
    def _ordinary_seconds(self) -> float | None:
        lately = select(Job.worked_seconds).where(Job.state == "succeeded").order_by(Job.id.desc()).limit(SEEN_JOBS)
        seconds = self._session.scalars(lately, execution_options=EVERYBODYS).all()
        return sum(seconds) / len(seconds) if seconds else None


def _seconds_left(progress: dict[str, Any], worked_seconds: float) -> float | None:
    fraction = float(progress.get("fraction") or 0.0)
    if fraction < LEAST_FRACTION or not worked_seconds:
        return None
    return worked_seconds * (1 - min(fraction, 1.0)) / fraction
