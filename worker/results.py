"""What a finished job leaves behind: files that are checked, stored, and put into rows."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from app.ids import new_id
from app.storage import Storage, artifact_key
from app.tables import Artifact, Job
from worker import protocol
from worker.workspace import MissingOutput, Workspace

REPORT_BYTES = 64 * 2**20
SUMMARY_BYTES = 16 * 2**20
_LARGEST_INTEGER = 2**63 - 1
_MEDIA_TYPES = {"json": "application/json", "html": "text/html; charset=utf-8", "zip": "application/zip"}


class InvalidResult(Exception):
    """The trainer says it is done, but what it left is not a result."""


@dataclass(frozen=True)
class StoredResult:
    columns: dict[str, Any]
    """Of the job: the report, and its figures one by one."""
    artifacts: list[Artifact]


def read_object(workspace: Workspace, name: str, limit: int) -> dict[str, Any]:
    try:
        return protocol.load_object(workspace.read_output(name, limit), limit)
    except (protocol.NotUnderstood, MissingOutput) as error:
        raise InvalidResult(f"{name}: {error}") from None


def result_columns(report: dict[str, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {"report": report}
    for side in ("baseline", "compressed"):
        figures = report.get(side)
        if not isinstance(figures, dict):
            raise InvalidResult(f"report.json has no {side}")
        for name in ("parameters", "flops", "bytes"):
            columns[f"{side}_{name}"] = _count(figures.get(name))
        columns[f"{side}_accuracy"] = _number(figures.get("accuracy"))
        latency = figures.get("latency")
        columns[f"{side}_latency_ms"] = _number(latency.get("p50_ms")) if isinstance(latency, dict) else None
    return columns


def store_result(workspace: Workspace, storage: Storage, job: Job, token: str) -> StoredResult:
    """The files are in storage when this returns, and none of them when it raises."""
    report = read_object(workspace, "report.json", REPORT_BYTES)
    columns, made = result_columns(report), report.get("outputs")
    # A format that cannot hold the network is not written, and the report does not list it.
    written = [output for output in job.outputs if isinstance(made, dict) and output in made]
    wanted = [("model", output, _model_name(workspace, output)) for output in written or job.outputs]
    wanted += [("report", "json", "report.json"), ("report", "html", "report.html")]
    artifacts: list[Artifact] = []
    try:
        for kind, format, name in wanted:
            artifacts.append(_store(workspace, storage, job, token, kind, format, name))
    except BaseException:
        discard(artifacts, storage)
        raise
    return StoredResult(columns, artifacts)


def discard(artifacts: list[Artifact], storage: Storage) -> None:
    """Files that no row will ever mention."""
    storage.discard(*(artifact.storage_key for artifact in artifacts))


def _store(workspace: Workspace, storage: Storage, job: Job, token: str, kind: str, format: str, name: str) -> Artifact:
    key = artifact_key(job.id, f"{job.attempt}-{token}/{name}")  # another attempt never overwrites it
    try:
        with workspace.open_output(name) as source, storage.writer(key) as file:
            shutil.copyfileobj(source, file, 2**20)
    except MissingOutput as error:
        raise InvalidResult(str(error)) from None
    return Artifact(
        id=new_id("art"),
        job_id=job.id,
        kind=kind,
        format=format,
        name=name,
        media_type=_MEDIA_TYPES.get(PurePosixPath(name).suffix.removeprefix("."), "application/octet-stream"),
        bytes=file.bytes,
        sha256=file.sha256,
        storage_key=key,
    )


def _model_name(workspace: Workspace, output: str) -> str:
    """An `.onnx` file comes in a zip if its weights do not fit into it."""
    name = f"model.{output}"
    is_packed = output == "onnx" and not workspace.has_output(name) and workspace.has_output(f"{name}.zip")
    return f"{name}.zip" if is_packed else name


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= _LARGEST_INTEGER else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or number < 0 else int(value)
