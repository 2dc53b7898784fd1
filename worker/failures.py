"""What the user reads when the worker, not the engine, has bad news: `job.error`, and `error` of a rejected upload."""

from __future__ import annotations

from app.object_store import is_full
from app.remote_files import FetchFailed
from app.tables import Dataset, Model
from worker import protocol
from worker.patience import is_outage

Upload = Model | Dataset


def rejected(upload: Upload) -> protocol.Error:
    error = upload.error or {}
    return protocol.Error(
        code=f"{_kind(upload)}_rejected",
        message=f"The {_words(upload)} {upload.id} was rejected: {error.get('message', 'no reason is recorded')}"[
            :10_000
        ],
        hint=str(error.get("hint", "")),
        category="user",
        phase="checking",
    )


def vanished(upload: Upload) -> protocol.Error:
    return protocol.Error(
        code=f"{_kind(upload)}_missing",
        message=f"The file of the {_words(upload)} {upload.id} is no longer in storage.",
        hint="Upload it again.",
        category="internal",
        phase="checking",
    )


def not_fetched(error: FetchFailed) -> protocol.Error:
    return protocol.Error(
        code=error.code,
        message=error.message[:10_000],
        hint=error.hint,
        category="resource" if error.may_pass else "user",
        phase="checking",
    )


def check_died(upload: Upload, ending: str) -> protocol.Error:
    return protocol.Error(
        code="check_failed",
        message=f"The process that opened the {_words(upload)} {ending}.",
        hint="The file may be damaged, or too large for this worker's memory.",
        category="user",
    )


def check_timed_out(upload: Upload, seconds: float) -> protocol.Error:
    return protocol.Error(
        code="check_timed_out",
        message=f"The {_words(upload)} could not be checked within {seconds:.0f} s.",
        hint="A smaller file, or a higher ESPALIER_CHECK_TIMEOUT_SECONDS.",
        category="timeout",
    )


def job_timed_out(seconds: float, phase: str | None) -> protocol.Error:
    return protocol.Error(
        code="job_timed_out",
        message=f"The job did not finish within {seconds:.0f} s.",
        hint="A retry goes on from its last checkpoint. Otherwise fewer epochs, or a higher timeout_seconds, up to "
        "the service's own limit (ESPALIER_JOB_TIMEOUT_SECONDS).",
        category="timeout",
        retryable=True,
        phase=phase,
    )


def memory_exceeded(attempt: int) -> protocol.Warned:
    """Counted by the supervisor: each halves the batch of later attempts once more."""
    return protocol.Warned(
        code="memory_exceeded",
        detail=f"Attempt {attempt} ended for lack of memory. From now on, the gradient of a batch is computed in twice "
        "as many parts.",
    )


def not_copied(destination: str, error: Exception) -> protocol.Warned:
    return protocol.Warned(
        code="destination_failed",
        detail=f"The results could not be copied to {destination}: {error}"[:10_000],
    )


def disk_exceeded(limit_bytes: int) -> protocol.Error:
    return protocol.Error(
        code="disk_exceeded",
        message=f"The process that opens uploads wrote more than {limit_bytes / 2**30:g} GiB.",
        hint="A smaller model or data set, or a higher ESPALIER_TRAINER_DISK_BYTES.",
        category="resource",
    )


def trainer_died(ending: str, phase: str | None, attempts: int) -> protocol.Error:
    return protocol.Error(
        code="trainer_died",
        message=f"The training process {ending}, {attempts} times in a row without coming any further.",
        hint="If memory is short, a smaller batch_size helps. The worker's log has its last words.",
        category="resource" if "SIGKILL" in ending else "internal",
        retryable=True,
        phase=phase,
    )


def invalid_result(error: Exception) -> protocol.Error:
    return protocol.Error(
        code="invalid_result",
        message=f"The trainer finished, but its result cannot be used: {error}"[:10_000],
        hint="This is a defect of the service.",
        category="internal",
    )


def worker_broke(error: Exception, phase: str | None) -> protocol.Error:
    if isinstance(error, OSError) and is_full(error):
        return protocol.Error(
            code="disk_full",
            message="The worker or the storage has no space left.",
            hint="Free some, then retry the job.",
            category="resource",
            retryable=True,
            phase=phase,
        )
    if is_outage(error):
        return protocol.Error(
            code="service_away",
            message="The database or the storage did not answer for too long.",
            hint="Retry the job once they do.",
            category="resource",
            retryable=True,
            phase=phase,
        )
    return protocol.Error(
        code="internal_error",
        message=f"Unexpected {type(error).__name__} in the worker.",
        hint="This is a defect of the service or of its surroundings. The worker's log has the details.",
        category="internal",
        retryable=True,
        phase=phase,
    )


def _kind(upload: Upload) -> str:
    return "model" if isinstance(upload, Model) else "dataset"


def _words(upload: Upload) -> str:
    return "model" if isinstance(upload, Model) else "data set"
