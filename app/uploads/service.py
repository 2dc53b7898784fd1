"""What sets models and data sets apart, and what they have in common: finding and deleting them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from sqlalchemy import or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.jobs.states import ACTIVE_STATES
from app.paging import is_id
from app.problems import Conflict, NotFound
from app.tables import Dataset, Job, Model, utc_now
from app.uploads.schemas import UploadResource

UploadRow = TypeVar("UploadRow", Model, Dataset)


@dataclass(frozen=True)
class Kind(Generic[UploadRow]):
    """What sets models and data sets apart."""

    table: type[UploadRow]
    prefix: Literal["mdl", "dts"]
    collection: str
    noun: str
    check_task: str
    used_by: tuple[InstrumentedAttribute[str] | InstrumentedAttribute[str | None], ...]
    """The columns of a job that refer to it."""
    show: Callable[[UploadRow], UploadResource]


def get(session: Session, kind: Kind[UploadRow], id: str, *, for_update: bool = False) -> UploadRow:
    """Raises NotFound, also when it has been deleted."""
    row = session.get(kind.table, id, with_for_update=for_update) if is_id(id) else None
    if row is None or row.deleted_at is not None:
        is_expired = row is not None and row.expires_at is not None and row.expires_at <= utc_now()
        detail = f"There is no {kind.noun} {id}{' any more: it has expired' if is_expired else ''}."
        raise NotFound(detail, code=f"{kind.noun.replace(' ', '')}_not_found")
    return row


def delete(session: Session, kind: Kind[UploadRow], id: str) -> str:
    """Mark as deleted, and return the storage key of what to delete once this is committed.

    The row stays for the jobs that used it. A job posted meanwhile waits for the row's lock (see `app.jobs.service`).
    """
    row = get(session, kind, id, for_update=True)
    uses = or_(*(column == id for column in kind.used_by))
    job_id = session.scalar(select(Job.id).where(uses, Job.state.in_(ACTIVE_STATES)).limit(1))
    if job_id is not None:
        raise Conflict(
            f"Job {job_id} still uses this {kind.noun}; wait until it has finished, or cancel it.", code="in_use"
        )
    row.deleted_at = utc_now()
    return row.storage_key
