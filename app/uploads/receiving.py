"""How a file becomes a model or a data set: by a form, from a resumable upload that is complete, or by URL. Nothing is
parsed or fetched here: workers do that."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePath

from fastapi import Request
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from app.access.repetition import Once
from app.dependencies import Service
from app.ids import new_id
from app.problems import BadRequest, FieldError, Invalid, TooLarge, UnsupportedMediaType
from app.projects import quotas
from app.queue import enqueue
from app.remote_files import Refused, check_source, filename_of
from app.retention import expiry
from app.storage import Stored
from app.uploads import partial
from app.uploads.form import FORM, UploadForm, batches, safe_filename, too_large
from app.uploads.schemas import FinishedUpload, RemoteFile, UploadResource
from app.uploads.service import Kind, UploadRow

FORM_OVERHEAD_BYTES = 2**16
"""How much longer than its file a form may be."""
MAX_JSON_BYTES = 2**16
JSON = "application/json"


async def receive(kind: Kind[UploadRow], request: Request, service: Service, once: Once) -> JSONResponse:
    """Everything that can be known to be wrong is said before the first byte is read. Whatever fails, no file is left
    without a row."""
    media_type = parse_options_header(request.headers.get("content-type", ""))[0].decode("latin-1").lower()
    if media_type not in (FORM, JSON):
        expected = (
            f"{FORM} with the fields file and, if wanted, name; or {JSON} with the id of a finished upload or a URL"
        )
        raise UnsupportedMediaType(f"The body is {media_type or 'of no stated type'}; expected is {expected}.")
    if (answer := await run_in_threadpool(_replayed, service, once)) is not None:
        return answer
    if media_type == JSON:
        wanted = await _json_body(request)
        if isinstance(wanted, RemoteFile):
            return await run_in_threadpool(_note, kind, wanted, service, once)
        return await run_in_threadpool(_adopt, kind, wanted, service, once)
    return await _receive_form(kind, request, service, once)


def _replayed(service: Service, once: Once) -> JSONResponse | None:
    with service.database.reading() as session:
        return once.replayed(session)


# By a form


async def _receive_form(kind: Kind[UploadRow], request: Request, service: Service, once: Once) -> JSONResponse:
    limit, refusal = await run_in_threadpool(_file_limit, service, once.project)
    if int(request.headers.get("content-length", "0")) > limit + FORM_OVERHEAD_BYTES:
        raise refusal
    id = new_id(kind.prefix)
    key = f"{kind.collection}/{id}"
    received = service.process_metrics.upload_bytes.labels(kind.collection)
    try:
        async with contextmanager_in_threadpool(service.storage.writer(key)) as writer:
            form = UploadForm(request.headers.get("content-type", ""), writer.write, limit, refusal)
            async for batch in batches(request.stream()):
                await run_in_threadpool(form.feed, batch)
                received.inc(len(batch))
            form.finish()
    except ClientDisconnect as error:
        raise BadRequest("The connection was closed before the file had arrived.") from error
    file = File(id, writer.stored, form.filename, form.name or PurePath(form.filename).stem)
    return await run_in_threadpool(_record, kind, service, once, file)


def _file_limit(service: Service, project: str) -> tuple[int, TooLarge]:
    """The most bytes that a file may have now, and what is said of more."""
    most = service.settings.max_upload_bytes
    with service.database.reading() as session:
        left = quotas.bytes_left(session, service.settings, project)
    return (most, too_large(most)) if left is None or left >= most else (left, quotas.quota_exceeded(left))


# By JSON


async def _json_body(request: Request) -> FinishedUpload | RemoteFile:
    """The body, which is small. Its errors look like those of every other body."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_JSON_BYTES:
            raise TooLarge(f"The body is larger than {MAX_JSON_BYTES:,} bytes; a file is sent as {FORM}.")
    try:
        body = json.loads(content)
        schema = RemoteFile if isinstance(body, dict) and "url" in body else FinishedUpload
        return schema.model_validate(body)
    except ValidationError as error:
        errors = [{**e, "loc": ("body", *e["loc"])} for e in error.errors()]
        raise RequestValidationError(errors) from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not JSON: {error}") from error


# From a resumable upload


def _adopt(kind: Kind[UploadRow], wanted: FinishedUpload, service: Service, once: Once) -> JSONResponse:
    """Put the pieces together, which reads and writes the whole file once."""
    with service.database.reading() as session:
        upload = partial.get_complete(session, wanted.upload_id)
        keys = partial.keys_of(session, upload.id)
    id = new_id(kind.prefix)
    try:
        with service.storage.writer(f"{kind.collection}/{id}") as writer:
            for key in keys:
                for chunk in service.storage.read(key):
                    writer.write(chunk)
    except FileNotFoundError:
        raise partial.not_found(upload.id) from None  # it was deleted, or became something, meanwhile
    file = File(id, writer.stored, upload.filename, wanted.name or PurePath(upload.filename).stem, upload.id)
    answer = _record(kind, service, once, file)
    service.storage.discard(*keys)
    return answer


# By URL


def _note(kind: Kind[UploadRow], wanted: RemoteFile, service: Service, once: Once) -> JSONResponse:
    """Whoever checks it fetches it. What can be known to be wrong with the URL is said now."""
    try:
        check_source(wanted.url, service.settings)
    except Refused as error:
        raise Invalid([FieldError(pointer="/url", detail=str(error))], code="source_not_allowed") from None
    id, filename = new_id(kind.prefix), safe_filename(filename_of(wanted.url))
    name = wanted.name or PurePath(filename).stem
    nothing = Stored(f"{kind.collection}/{id}", 0, "")
    return _record(kind, service, once, File(id, nothing, filename, name, source=wanted))


# All of them


@dataclass(frozen=True)
class File:
    """Stored, or to be fetched, and about to be recorded."""

    id: str
    stored: Stored
    filename: str
    name: str
    upload_id: str | None = None
    """The resumable upload that goes when this comes."""
    source: RemoteFile | None = None


def _record(kind: Kind[UploadRow], service: Service, once: Once, file: File) -> JSONResponse:
    """The row and the wish to have it checked, in one transaction. Without them, the file goes again."""
    is_kept = False
    stored = file.stored

    def make(session: Session) -> tuple[UploadResource, dict[str, str]]:
        nonlocal is_kept
        if file.upload_id is not None:
            partial.remove(session, file.upload_id)
        quotas.admit_bytes(session, service.settings, once.project, stored.bytes)
        row = kind.table(
            id=file.id,
            name=file.name,
            filename=file.filename,
            bytes=stored.bytes,
            sha256=stored.sha256,
            storage_key=stored.key,
            source_url=file.source.url if file.source else None,
            source_sha256=file.source.sha256 if file.source else None,
            expires_at=expiry(session, service.settings.upload_retention_days),
        )
        session.add(row)
        session.flush()
        enqueue(session, kind.check_task, file.id)
        is_kept = True
        return kind.show(row), {"Location": f"/v1/{kind.collection}/{file.id}"}

    try:
        with service.database.writing() as session:
            answer = once.answer(session, 201, lambda: make(session))
    except BaseException:
        service.storage.discard(stored.key)
        raise
    if not is_kept:  # somebody else was first with this Idempotency-Key
        service.storage.discard(stored.key)
    return answer
