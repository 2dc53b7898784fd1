"""Files that jobs have made: finding one, and how it is offered."""

from __future__ import annotations

from typing import Literal

from sqlalchemy.orm import Session

from app.database import database_time
from app.downloads import Content
from app.paging import is_id
from app.problems import Gone, NotFound
from app.tables import Artifact


def get(session: Session, id: str) -> Artifact:
    """Raises NotFound."""
    artifact = session.get(Artifact, id) if is_id(id) else None
    if artifact is None:
        raise NotFound(f"There is no artifact {id}.", code="artifact_not_found")
    return artifact


def content_of(
    session: Session, artifact: Artifact, disposition: Literal["attachment", "inline"] = "attachment"
) -> Content:
    """Raises Gone when it has expired."""
    is_deleted = artifact.deleted_at is not None
    if artifact.expires_at is not None and (is_deleted or artifact.expires_at <= database_time(session)):
        when = artifact.expires_at.isoformat(timespec="seconds")
        detail = (
            f"{artifact.name} was kept until {when}. The job's report is still there; the same job, posted again, "
            "makes the file anew."
        )
        raise Gone(detail, code="content_expired")
    return Content(
        artifact.storage_key, artifact.bytes, artifact.sha256, artifact.name, artifact.media_type, disposition
    )
