"""From what a trainer says to what the database keeps: gathered, and written at most twice a second."""

from __future__ import annotations

import logging
import time
from typing import Any

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from app.observability import tracing
from worker import protocol
from worker.claims import Claim, NewEvent

logger = logging.getLogger(__name__)
trainer_logger = logging.getLogger("worker.trainer")
"""What the trainer says, which has no log of its own that reaches further than the job."""

WRITE_SECONDS = 0.5
LOG_SECONDS = 2.0
LOG_BYTES = 256 * 1024
"""Between two writes; the rest is dropped, oldest first."""
CHUNK_CHARACTERS = 16 * 1024
LOG_CHUNKS = 64
"""Of an attempt's log, the newest so many chunks are kept."""
EVENTS_PER_ATTEMPT = 20_000
LARGEST_AUTO_BATCH = 256
"""The engine takes no larger one by itself."""
WARNINGS = 200
"""More are not kept: a trainer must not be able to fill the database."""


class Recorder:
    """Every phase, warning and epoch becomes an event; `job.progress` is the newest that is known."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._values: dict[str, Any] = {}
        self._events: list[NewEvent] = []
        self._events_left = EVENTS_PER_ATTEMPT
        self._warnings: list[Any] = list(claim.job.warnings)
        self._progress: dict[str, Any] = {}
        self._resolved: dict[str, Any] = claim.job.resolved or {}
        self._written = self._logged = time.monotonic()
        self._log = bytearray()
        self.phase: str | None = None
        self._phase_began = 0.0
        self._span: Any = None

    @property
    def batch_size(self) -> int:
        """Of the training, by the trainer's word; before that, as it was asked for, or the largest that may come."""
        for training in (self._resolved.get("training"), self._claim.job.training):
            if isinstance(training, dict) and isinstance(size := training.get("batch_size"), int):
                return size
        return LARGEST_AUTO_BATCH

    def take(self, message: protocol.Message) -> None:
        match message:
            case protocol.Phase():
                self.enter(message.phase)
            case protocol.Progress():
                self._take_progress(message)
            case protocol.Resolved():
                self._values["resolved"] = self._resolved = message.config
                self._event("resolved", message.config)
            case protocol.Histogram():
                self._event("histogram", message.model_dump(exclude={"event"}))
            case protocol.Warned():
                self._warn({"code": message.code, "detail": message.detail})
            case protocol.Resumed():
                self._event("resumed", {"phase": message.phase, "step": message.step, "saved_at": message.saved_at})
            case protocol.Log():
                trainer_logger.info("%s", message.message)
                self._log += message.message.encode() + b"\n"
            case _:
                pass

    def enter(self, phase: str) -> None:
        """A phase begins: shown at once."""
        if phase == self.phase:
            return
        self.leave_phase()
        self.phase = self._values["phase"] = phase
        self._phase_began, self._span = time.monotonic(), tracing.start_span(phase)
        trainer_logger.info("phase %s", phase)
        self._event("phase", {"phase": phase})
        self.flush()

    def leave_phase(self) -> None:
        """The phase is over: how long it took goes to the metrics and the trace. Not worth an error."""
        if self.phase is None or not self._phase_began:
            return
        seconds, self._phase_began = time.monotonic() - self._phase_began, 0.0
        if self._span is not None:
            self._span.end()
        try:
            self._claim.observe_phase(self.phase, seconds)
        except SQLAlchemyError as error:
            logger.warning("the duration of phase %s is lost: %r", self.phase, error)

    def take_log(self, log: bytes) -> None:
        """More of what the trainer wrote to standard error."""
        self._log += log
        del self._log[:-LOG_BYTES]

    def tick(self, log: bytes = b"") -> None:
        """Writes what has gathered, if it is time."""
        self.take_log(log)
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self.flush()
        if self._log and time.monotonic() - self._logged >= LOG_SECONDS:
            self.flush_log()

    def flush_log(self) -> None:
        """To the job's log, in chunks. Not worth an error."""
        self._logged = time.monotonic()
        text = protocol.clean(self._log.decode("utf-8", "replace"))
        self._log.clear()
        try:
            for start in range(0, len(text), CHUNK_CHARACTERS):
                self._claim.add_log(text[start : start + CHUNK_CHARACTERS], LOG_CHUNKS)
        except SQLAlchemyError as error:
            logger.warning("job %s: %d characters of its log are lost: %r", self._claim.job.id, len(text), error)

    def flush(self) -> None:
        """A database that is away for a moment loses nothing: the next flush writes it all."""
        if not self._values and not self._events:
            return
        self._written = time.monotonic()
        try:
            self._claim.record(self._values, self._events)
        except OperationalError as error:
            logger.warning("job %s: progress is not written yet: %s", self._claim.job.id, type(error.orig).__name__)
        else:
            self._values, self._events = {}, []

    def _take_progress(self, message: protocol.Progress) -> None:
        news = {**message.metrics, "phase": message.phase, "fraction": message.fraction}
        # What only some lines say (the accuracy after an epoch) stays in view until the phase ends.
        is_same_phase = self._progress.get("phase") == message.phase
        self._values["progress"] = self._progress = {**self._progress, **news} if is_same_phase else news
        if "steps" not in message.metrics:
            self._event("progress", news)

    def _warn(self, warning: dict[str, str]) -> None:
        if warning in self._warnings or len(self._warnings) >= WARNINGS:
            return
        self._warnings.append(warning)
        trainer_logger.warning("%s: %s", warning["code"], warning["detail"])
        self._values["warnings"] = list(self._warnings)
        self._event("warning", warning)

    def _event(self, type: str, data: dict[str, Any]) -> None:
        if self._events_left > 0:
            self._events_left -= 1
            self._events.append(NewEvent(type, data))
