"""`/v1/artifacts`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from app.access.dependencies import allowed
from app.artifacts import service as artifacts
from app.dependencies import ReadSession, StorageDep
from app.downloads import CONTENT_RESPONSES, answer_content
from app.jobs.examples import ARTIFACT
from app.problems import responses

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], dependencies=[allowed("jobs")])


@router.head("/{id}/content", include_in_schema=False)
@router.get(
    "/{id}/content",
    response_class=Response,
    summary="Download a file that a job has made",
    responses={**responses(404, 410, 416, 503), **CONTENT_RESPONSES},
)
def get_content(
    id: Annotated[str, Path(description="The id of an artifact.", examples=[ARTIFACT["id"]])],
    request: Request,
    session: ReadSession,
    storage: StorageDep,
) -> Response:
    return answer_content(request, storage, artifacts.content_of(session, artifacts.get(session, id)))
