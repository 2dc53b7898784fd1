"""Every way in which a compression can fail, as one tree.

Each error carries what the user needs: `code` (stable, for programs), the message (what was found and what was
expected), `hint` (what to do about it), and whose fault it is.
"""

from __future__ import annotations

from typing import Literal

Category = Literal["user", "resource", "timeout", "internal"]


class CompressionError(Exception):
    """Base of everything that the engine raises on purpose."""

    code = "compression_failed"
    category: Category = "user"
    retryable = False

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code


class UnsafeModel(CompressionError):
    """The file holds something that could run code, or lies about itself. It was not opened any further."""

    code = "model_unsafe"


class UnsupportedModel(CompressionError):
    """The file is what it claims to be, but this network cannot be compressed here."""

    code = "model_unsupported"


class InvalidDataset(CompressionError):
    """The data set cannot be read, or does not fit the model."""

    code = "dataset_invalid"


class InvalidOptions(CompressionError):
    """The job asks for something that contradicts itself, the model or the data set."""

    code = "options_invalid"


class TargetUnreachable(CompressionError):
    """The network cannot be made as small as asked; the message says how small it can be made."""

    code = "target_unreachable"


class TrainingDiverged(CompressionError):
    """The loss became NaN or infinite. The message says at which step."""

    code = "training_diverged"


class VerificationFailed(CompressionError):
    """A written file does not compute what the measured network computes. It is not handed out."""

    code = "verification_failed"
    category: Category = "internal"


class OutOfMemory(CompressionError):
    """The memory of the device or the host is too small even for a single sample at a time."""

    code = "out_of_memory"
    category: Category = "resource"
