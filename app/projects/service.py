"""Making, finding and deleting projects."""

from __future__ import annotations

from sqlalchemy import delete as sql_delete
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.ids import new_id
from app.jobs.states import ACTIVE_STATES
from app.paging import is_id
from app.problems import Conflict, NotFound
from app.tables import (
    DEFAULT_PROJECT,
    Artifact,
    AuditEntry,
    Base,
    Checkpoint,
    Dataset,
    Job,
    Key,
    Model,
    PartialUpload,
    Project,
    UploadPart,
    utc_now,
)


def create(session: Session, name: str, **limits: int | None) -> Project:
    project = Project(id=new_id("prj"), name=name, **limits)
    session.add(project)
    session.flush()
    return project


def get(session: Session, id: str, *, for_update: bool = False) -> Project:
    """Raises NotFound."""
    project = session.get(Project, id, with_for_update=for_update) if is_id(id) else None
    if project is None:
        raise NotFound(f"There is no project {id}.", code="project_not_found")
    return project


def delete(session: Session, id: str, caller_project: str | None = None) -> list[str]:
    """Everything that it owns goes, its keys are revoked; the audit trail stays. Returns the storage keys of what to
    delete once this is committed. Raises Conflict while a job of it has not ended.

    Whoever is about to add something to it waits for the lock on its row, and then finds none (`app.projects.quotas`).
    """
    project = get(session, id, for_update=True)
    if id == DEFAULT_PROJECT:
        detail = "What is made without a key belongs to this project; it cannot be deleted."
        raise Conflict(detail, code="default_project")
    if id == caller_project:
        detail = "This key belongs to the project itself; delete it with an admin's key of another one."
        raise Conflict(detail, code="own_project")
    job_id = session.scalar(select(Job.id).where(Job.project == id, Job.state.in_(ACTIVE_STATES)).limit(1))
    if job_id is not None:
        detail = f"Job {job_id} of this project has not ended; cancel it and wait before deleting the project."
        raise Conflict(detail, code="project_in_use")
    files: list[str] = []
    for part in (Artifact, Checkpoint):
        files += session.scalars(select(part.storage_key).join(Job, Job.id == part.job_id).where(Job.project == id))
    pieces = select(UploadPart.storage_key).join(PartialUpload, PartialUpload.id == UploadPart.upload_id)
    files += session.scalars(pieces.where(PartialUpload.project == id))
    for upload in (Model, Dataset):
        files += session.scalars(select(upload.storage_key).where(upload.project == id, upload.deleted_at.is_(None)))
    for table in reversed(Base.metadata.sorted_tables):  # what refers to others first; parts of jobs go with them
        if "project" in table.c and table not in (Key.__table__, AuditEntry.__table__):
            session.execute(sql_delete(table).where(table.c.project == id))
    session.execute(update(Key).where(Key.project == id, Key.revoked_at.is_(None)).values(revoked_at=utc_now()))
    session.delete(project)
    return files
