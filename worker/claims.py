"""Every write that a worker makes to a job, each guarded by the lease.

A worker owns a job while the row carries the worker's token. Whoever comes to own it next (after a crash, a pause, a
clock that jumped) writes a new token first; from then on the former owner's writes touch zero rows and raise
`LeaseLost`. So a job can be worked on twice by mistake, but never ends twice.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any

from sqlalchemy import case, delete, func, or_, select, text, update
from sqlalchemy.orm import Session

from app.celery_config import RUN_JOB
from app.database import Database, database_time
from app.events import record_event
from app.ids import new_id
from app.observability.counters import PHASE_SECONDS, known_phase, observe
from app.queue import enqueue
from app.retention import expiry
from app.tables import Artifact, Checkpoint, Job, LogChunk
from worker import protocol

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
"""How soon a wish to cancel is noticed."""


class Interrupted(Exception):
    """The work in hand has to stop now. The subclasses say why."""


class LeaseLost(Interrupted):
    """Somebody else owns the job, or nobody. Nothing may be written any more."""


class CancelRequested(Interrupted):
    """The user does not want it any more."""


class WorkerStopping(Interrupted):
    """This worker was asked to end."""


class TimedOut(Interrupted):
    """The time limit is over."""


@dataclass(frozen=True)
class Offer:
    """What a worker has: jobs that need something else are not for it."""

    accelerator: str = "cpu"
    devices: int = 1


@dataclass(frozen=True)
class NewEvent:
    """An event that is yet to be written."""

    type: str
    data: dict[str, Any]


class Claim:
    """One attempt at one job."""

    def __init__(self, database: Database, job: Job, token: str, lease_seconds: float) -> None:
        self.job = job
        """The row as it was claimed."""
        self.token = token
        self.lease_seconds = lease_seconds
        self.crashes = job.crashes
        """In a row, before this attempt; 0 as soon as there is a new checkpoint."""
        self._database = database
        self._counted_until = time.monotonic()

    @classmethod
    def take(
        cls,
        database: Database,
        worker: str,
        lease_seconds: float,
        offer: Offer = Offer(),
        project_limit: int | None = None,
        token: str | None = None,
    ) -> Claim | None:
        """The job that is next for this worker, if there is one: the highest priority, then the oldest.

        `project_limit`: of each project, at most so many jobs run at once. `token`: of the lease, for whoever has to
        ask again because the answer got lost, and may own a job already.
        """
        token = token or new_id("lse")
        with database.writing() as session:
            now = database_time(session)
            mine = select(Job).where(Job.state.in_(("running", "cancelling")), Job.lease_token == token)
            if (own := session.scalar(mine)) is not None:
                return cls(database, own, token, lease_seconds)
            job_id = _next_for(session, offer, project_limit, now)
            if job_id is None:
                return None
            taken = session.execute(
                update(Job)
                .where(Job.id == job_id, Job.state == "queued")
                .values(
                    state="running",
                    phase=None,
                    progress={},
                    error=None,
                    not_before=None,
                    lease_token=token,
                    lease_expires_at=now + timedelta(seconds=lease_seconds),
                    worker=worker,
                    started_at=func.coalesce(Job.started_at, now),
                )
            )
            if not _rows(taken):
                return None
            job = session.get_one(Job, job_id)
            record_event(session, job_id, "running", {"attempt": job.attempt, "worker": worker})
        return cls(database, job, token, lease_seconds)

    def extend(self) -> str:
        """Another `lease_seconds`; returns the job's state. Not a change that anybody outside needs to see."""
        now = time.monotonic()
        with self._database.writing() as session:
            values = {
                "lease_expires_at": database_time(session) + timedelta(seconds=self.lease_seconds),
                "worked_seconds": Job.worked_seconds + (now - self._counted_until),
                "updated_at": Job.updated_at,
            }
            self._guarded(session, values)
        self._counted_until = now
        return self.state()

    def state(self) -> str:
        with self._database.reading() as session:
            state = session.scalar(select(Job.state).where(Job.id == self.job.id, Job.lease_token == self.token))
        if state not in ("running", "cancelling"):
            raise LeaseLost(self.job.id)
        return state

    def record(self, values: dict[str, Any], events: list[NewEvent]) -> None:
        """News of the running job, for whoever watches it."""
        with self._database.writing() as session:
            self._guarded(session, {**values, "version": Job.version + 1})
            for event in events:
                record_event(session, self.job.id, event.type, event.data)

    def observe_phase(self, phase: str, seconds: float) -> None:
        """For the metrics alone: it does not matter whose the job is meanwhile."""
        with self._database.writing() as session:
            observe(session, PHASE_SECONDS, seconds, known_phase(phase))

    def add_log(self, text: str, keep: int) -> None:
        """More of the trainer's log. Of an attempt, the newest `keep` chunks stay."""
        job = self.job
        with self._database.writing() as session:
            if self._is_mine(session):
                session.add(LogChunk(id=new_id("log"), job_id=job.id, attempt=job.attempt, text=text))
                session.flush()
                own = (LogChunk.job_id == job.id, LogChunk.attempt == job.attempt)
                oldest = select(LogChunk.id).where(*own).order_by(LogChunk.id.desc()).offset(keep).limit(1)
                if (last := session.scalar(oldest)) is not None:
                    session.execute(delete(LogChunk).where(*own, LogChunk.id <= last))

    def add_checkpoint(self, row: Checkpoint, kept: Callable[[list[str]], list[str]]) -> list[str]:
        """The job has come further. Returns the storage keys of checkpoints that are not among those to be `kept`. A
        job that has just ended may still get one: for a retry."""
        with self._database.writing() as session:
            progress = {"crashes": 0, "updated_at": Job.updated_at}
            if not self._update(session, progress, states=("running", "cancelling", "cancelled", "failed")):
                raise LeaseLost(self.job.id)
            session.add(row)
            session.flush()
            every = session.scalars(select(Checkpoint).where(Checkpoint.job_id == self.job.id)).all()
            names = kept([each.name for each in every])
            gone = [each for each in every if each.name not in names]
            for each in gone:
                session.delete(each)
        self.crashes = 0
        return [each.storage_key for each in gone]

    def succeed(
        self, result: dict[str, Any], artifacts: list[Artifact], retention_days: float | None = None
    ) -> list[str]:
        """Report, artifacts and state, all or nothing. A wish to cancel that came first wins: CancelRequested. Returns
        the storage keys of checkpoints, which nobody needs any more. `retention_days`: of the artifacts."""
        with self._database.writing() as session:
            if self._has_already("succeeded", session):
                return []
            ending = self._end(session, "succeeded", **result, error=None, phase=None)
            if not self._update(session, ending, states=("running",)):
                raise self._refusal(session)
            expires_at = expiry(session, retention_days)
            for artifact in artifacts:
                artifact.expires_at = expires_at
            session.add_all(artifacts)
            record_event(session, self.job.id, "succeeded")
            own = delete(Checkpoint).where(Checkpoint.job_id == self.job.id).returning(Checkpoint.storage_key)
            return list(session.scalars(own))

    def fail(self, error: protocol.Error) -> None:
        recorded = error.model_dump(exclude={"event"})
        with self._database.writing() as session:
            if self._has_already("failed", session):
                return
            self._guarded(session, self._end(session, "failed", error=recorded))
            record_event(session, self.job.id, "failed", {"error": recorded})

    def cancel(self) -> None:
        with self._database.writing() as session:
            if self._has_already("cancelled", session):
                return
            self._guarded(session, self._end(session, "cancelled"))
            record_event(session, self.job.id, "cancelled")

    def give_back(self, reason: str) -> None:
        """To the queue again, as it was: this worker is ending. Or to its end, if the user wants it cancelled."""
        self._requeue(reason, {})

    def try_again(self, reason: str, pause_seconds: float, *, is_crash: bool = True) -> None:
        """To the queue again after a failed attempt, not to be taken before the pause is over. `is_crash`: may the job
        itself be to blame?"""
        changes = {"attempt": Job.attempt + 1, "crashes": Job.crashes + int(is_crash)}
        self._requeue(reason, changes, pause_seconds)

    def _requeue(self, reason: str, changes: dict[str, Any], pause_seconds: float = 0.0) -> None:
        with self._database.writing() as session:
            time_now = database_time(session)
            is_cancelled = Job.state == "cancelling"
            values: dict[str, Any] = {
                "state": case((is_cancelled, "cancelled"), else_="queued"),
                "finished_at": case((is_cancelled, time_now), else_=None),
                "phase": None,
                "progress": {},
                "lease_token": None,
                "lease_expires_at": None,
                "worker": None,
                "published_at": time_now,
                "not_before": time_now + timedelta(seconds=pause_seconds) if pause_seconds else None,
                **self._worked(),
            }
            self._guarded(session, values | changes)
            now = select(Job).where(Job.id == self.job.id).execution_options(populate_existing=True)
            job = session.scalars(now).one()
            record_event(session, job.id, job.state, {"attempt": job.attempt, "reason": reason})
            if job.state == "queued" and job.not_before is None:  # else `app.recovery` sends it in time
                enqueue(session, RUN_JOB, job.id, accelerator=job.accelerator)

    def _end(self, session: Session, state: str, **values: Any) -> dict[str, Any]:
        """The token stays in the row: by it, this worker recognises its own ending if it has to ask."""
        ended = {"state": state, "finished_at": database_time(session), "lease_expires_at": None}
        return {**ended, **self._worked(), **values}

    def _worked(self) -> dict[str, Any]:
        return {"worked_seconds": Job.worked_seconds + (time.monotonic() - self._counted_until)}

    def _has_already(self, state: str, session: Session) -> bool:
        """Was this written before, by a transaction whose answer got lost?"""
        found = session.scalar(select(Job.state).where(Job.id == self.job.id, Job.lease_token == self.token))
        return found == state

    def _is_mine(self, session: Session) -> bool:
        return session.scalar(select(Job.id).where(Job.id == self.job.id, Job.lease_token == self.token)) is not None

    def _guarded(self, session: Session, values: dict[str, Any]) -> None:
        if not self._update(session, values, states=("running", "cancelling")):
            raise LeaseLost(self.job.id)

    def _update(self, session: Session, values: dict[str, Any], states: tuple[str, ...]) -> int:
        mine = update(Job).where(Job.id == self.job.id, Job.lease_token == self.token, Job.state.in_(states))
        return _rows(session.execute(mine.values(values).execution_options(synchronize_session=False)))

    def _refusal(self, session: Session) -> Interrupted:
        state = session.scalar(select(Job.state).where(Job.id == self.job.id, Job.lease_token == self.token))
        return CancelRequested(self.job.id) if state == "cancelling" else LeaseLost(self.job.id)


class Watch:
    """Keeps the lease alive from a thread of its own, whatever else the worker is busy with, and looks out for a wish
    to cancel. `check` raises, in the worker's thread, what the watch has seen."""

    def __init__(self, claim: Claim, heartbeat_seconds: float, outage_seconds: float) -> None:
        """`outage_seconds`: so long it waits for a database that does not answer. Meanwhile the lease may end; whether
        somebody else took the job is known when the database is back, and until then nothing can be written."""
        self._claim = claim
        self._heartbeat_seconds, self._outage_seconds = heartbeat_seconds, outage_seconds
        self._seen: Interrupted | None = None
        self._ended = threading.Event()
        run = contextvars.copy_context().run  # what it logs belongs to the job, too
        self._thread = threading.Thread(target=run, args=(self._run,), name=f"lease of {claim.job.id}", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        if self._seen is not None:
            raise self._seen

    def _run(self) -> None:
        extended, is_away = time.monotonic(), False
        while not self._ended.wait(min(WATCH_SECONDS, self._heartbeat_seconds)):
            try:
                began = time.monotonic()
                is_due = began - extended >= self._heartbeat_seconds
                state = self._claim.extend() if is_due else self._claim.state()
                extended = began if is_due else extended
                is_away = False
                if state == "cancelling" and self._seen is None:
                    self._seen = CancelRequested(self._claim.job.id)
            except LeaseLost as error:
                self._seen = error
                return
            except Exception as error:
                if not is_away:
                    logger.warning("job %s: the database does not answer: %r", self._claim.job.id, error)
                is_away = True
                if time.monotonic() - extended > self._outage_seconds:
                    self._seen = LeaseLost(self._claim.job.id)
                    return


def _next_for(session: Session, offer: Offer, project_limit: int | None, now: datetime) -> str | None:
    """The id of the job that is next, locked."""
    waiting = select(Job.id).where(
        Job.state == "queued",
        Job.accelerator.in_(("any", offer.accelerator)),
        Job.devices <= offer.devices,
        or_(Job.not_before.is_(None), Job.not_before <= now),
    )
    if project_limit is not None:
        if session.get_bind().dialect.name == "postgresql":
            # One claim at a time: two at once would each see a place that is free for one of them.
            session.execute(text("SELECT pg_advisory_xact_lock(hashtext('espalier.claims'))"))
        busy = select(Job.project).where(Job.state.in_(("running", "cancelling"))).group_by(Job.project)
        full = session.scalars(busy.having(func.count() >= project_limit)).all()
        waiting = waiting.where(Job.project.not_in(full))
    in_order = waiting.order_by(Job.priority.desc(), Job.created_at, Job.id)
    return session.scalar(in_order.limit(1).with_for_update(skip_locked=True))


def end_cancelled_job_without_worker(database: Database, job_id: str) -> None:
    """A job that was cancelled before any worker had it."""
    with database.writing() as session:
        ended = session.execute(
            update(Job)
            .where(Job.id == job_id, Job.state == "cancelling", Job.lease_token.is_(None))
            .values(state="cancelled", finished_at=database_time(session))
        )
        if _rows(ended):
            record_event(session, job_id, "cancelled")


def _rows(result: Any) -> int:
    return int(result.rowcount)
