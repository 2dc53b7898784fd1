"""A few bytes may ask for any amount of memory or time. While a file is read, there is so much of both, and no more."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from worker.compression.errors import CompressionError, UnsupportedModel

LEAST_BYTES, PER_BYTE = 2**30, 6
"""What any file may take, and what each of its bytes may take besides."""
SECONDS, SECONDS_PER_GIB = 60.0, 60.0
"""Of this thread. Large networks take long to run once."""
MAX_NODES = 12_000
"""Operators that are left to trace, in up to 5 ms each; the largest language models have about ten thousand."""
REFUSED = ("can't allocate memory", "Storage size calculation overflowed", "bad_alloc", "not enough memory")
_seconds: ContextVar[tuple[float, float]] = ContextVar("seconds", default=(math.inf, math.inf))
"""How many there are, and this thread's time when they are over."""


@contextlib.contextmanager
def bounded(path: Path) -> Iterator[None]:
    """Raises `UnsupportedModel` when reading the file takes too much memory (on Linux), and so does `check_time` within
    it."""
    files = [path] if path.is_file() else [entry for entry in path.iterdir() if entry.is_file()]
    size = sum(entry.stat().st_size for entry in files)
    limit = LEAST_BYTES + PER_BYTE * size
    seconds = SECONDS + SECONDS_PER_GIB * size / 2**30
    token = _seconds.set((seconds, time.thread_time() + seconds))
    try:
        with _data_segment(limit):
            yield
    except (CompressionError, MemoryError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or any(text in str(cause) for text in REFUSED):
                raise UnsupportedModel(
                    f"Computing three samples takes more than {limit / 2**30:.1f} GiB of memory.",
                    hint="Sizes in the graph may be wrong; else export the network for smaller inputs.",
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise
    finally:
        _seconds.reset(token)


def check_time() -> None:
    """Between two operators. Raises `UnsupportedModel` when reading the file has taken too long."""
    seconds, end = _seconds.get()
    if time.thread_time() > end:
        raise UnsupportedModel(
            f"Reading the network takes more than {seconds:.0f} s.",
            hint="Sizes in the graph may be wrong; else export the network for smaller inputs.",
        )


@contextlib.contextmanager
def _data_segment(more_bytes: int) -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    torch.ones(2**20).sum()  # the threads' stacks are there now
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [n for n in (before, hard, used + more_bytes) if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))
