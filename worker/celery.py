"""The Celery app: `celery -A worker.celery worker --pool prefork --concurrency 1 -Q jobs` (or `-Q checks`).

One task at a time per worker, in a child process that never imports torch. A worker that is asked to end gives its job
back: Celery tells only the main process, so the wish reaches the child through a byte of shared memory.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import sys
from types import FrameType
from typing import Any

from billiard.util import set_pdeathsig
from celery import Celery
from celery.signals import (
    celeryd_after_setup,
    setup_logging,
    worker_process_init,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)

from app.celery_config import JOBS_QUEUE, celery_options, jobs_queue
from app.ids import new_id
from app.observability import logs, tracing
from app.settings import get_settings
from worker.registration import Registration, offer
from worker.sandbox import strength

logger = logging.getLogger(__name__)

app = Celery("espalier", include=["worker.tasks"])
app.conf.update(celery_options(get_settings()))

_stopping = mmap.mmap(-1, 1)
_is_terminated = False
"""Did this process alone get SIGTERM, while it was busy?"""
_main_process = os.getpid()
_registration: Registration | None = None
_protections: list[strength.Protection] = []

WORKER_ID = new_id("wrk")
"""Of the main process and its child, which is forked from it."""


def is_stopping() -> bool:
    """Was this worker asked to end, or did its main process die?"""
    return _stopping[0] != 0 or _is_terminated or _is_orphan()


def _is_orphan() -> bool:
    return os.getpid() != _main_process and os.getppid() != _main_process


class Busy:
    """While a task runs. `with Busy(): …`

    Whoever ends a whole group of processes reaches the child too, which then has a job to give back first; so it has
    when its main process dies. Until then SIGTERM only says that it is to stop. Afterwards it takes its course.
    """

    def __enter__(self) -> None:
        # Here rather than once for all: billiard sets a handler of its own after `worker_process_init`.
        self._before = signal.signal(signal.SIGTERM, self._take_note)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        global _is_terminated
        _is_terminated = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if _is_orphan():
            os._exit(0)
        if _is_terminated:
            signal.raise_signal(signal.SIGTERM)


@setup_logging.connect
def _log_like_the_service(**_: Any) -> None:
    """Instead of Celery, which leaves logging alone then. `--loglevel` thus means nothing; ESPALIER_LOG_LEVEL does."""
    logs.configure(get_settings())


@celeryd_after_setup.connect
def _listen_for_its_class(instance: Any, **_: Any) -> None:
    """Whoever takes jobs for any kind of worker also takes those for its own kind."""
    queues = instance.app.amqp.queues
    if JOBS_QUEUE in queues.consume_from:
        queues.select_add(jobs_queue(offer().accelerator))


@worker_ready.connect
def _register(sender: Any, **_: Any) -> None:
    global _registration
    queues = list(sender.app.amqp.queues.consume_from)
    _registration = Registration(get_settings(), WORKER_ID, sender.hostname, queues, _protections, is_stopping)
    _registration.start()


@worker_shutdown.connect
def _unregister(**_: Any) -> None:
    if _registration is not None:
        _registration.stop()


@celeryd_after_setup.connect
def _try_the_sandbox(**_: Any) -> None:
    """Before any message is taken. Ends the worker if the settings demand more than holds here."""
    _protections.extend(strength.measure())
    is_strong = set(_protections) >= strength.STRONG
    logger.log(logging.INFO if is_strong else logging.WARNING, "sandbox: %s", strength.describe(_protections))
    try:
        strength.require(get_settings().sandbox, _protections)
    except strength.SandboxTooWeak as error:
        sys.exit(str(error))


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    _stopping[0] = 1


@worker_process_init.connect
def _outlive_the_main_process(**_: Any) -> None:
    """Celery has the kernel send the child SIGKILL when its main process dies, which would cost the job an attempt."""
    global _main_process
    _main_process = os.getppid()
    tracing.configure("espalier-worker")  # in the child: threads that send do not survive a fork
    with contextlib.suppress(OSError):  # not on Linux; `is_stopping` finds out there
        set_pdeathsig(signal.SIGTERM)  # that of celery.platforms sets SIGKILL whatever is asked
