"""What is away or full for a while costs a job neither its result nor one of its attempts."""

from __future__ import annotations

import errno
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from app.object_store import StorageAway
from app.tables import Artifact, Job, Model, utc_now
from tests.app.helpers import Tomorrow
from tests.worker.conftest import World, trainer
from tests.worker.test_checkpoints import REPORTING, SAVING, forget_local_checkpoints
from tests.worker.test_jobs import is_in_phase, set_job, wait_until
from worker import patience
from worker.claims import Claim
from worker.patience import insistently
from worker.trainer import describe

Start = Callable[[Callable[[], Any]], Any]


class Flaky:
    """Stands in front of something real, of which the named methods raise `error` the first so many times."""

    def __init__(self, real: Any, times: int, error: Exception, *names: str) -> None:
        self._real, self.left, self._error, self._names = real, times, error, names

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name in self._names and self.left > 0:
                self.left -= 1
                raise self._error
            return getattr(self._real, name)(*args, **kwargs)

        return call


AWAY = StorageAway(errno.EIO, "The storage does not answer")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LONGEST_PAUSE_SECONDS", 0.1)


def with_storage(world: World, storage: Any, body: str = "finish()", **settings: Any) -> Any:
    supervisor = world.supervisor(trainer(body), **settings)
    object.__setattr__(supervisor, "storage", storage)
    return supervisor


@pytest.mark.parametrize("method", ["copy_to", "writer"])
def test_storage_that_is_away_for_a_while_is_waited_for(world: World, method: str) -> None:
    job_id = world.job()
    storage = Flaky(world.storage, 4, AWAY, method)
    with_storage(world, storage).run_job(job_id)
    job = world.get(Job, job_id)
    assert (job.state, job.attempt, storage.left) == ("succeeded", 1, 0)


def test_full_storage_is_waited_for_with_the_result_in_hand(world: World) -> None:
    job_id = world.job()
    storage = Flaky(world.storage, 3, OSError(errno.ENOSPC, "no space"), "writer")
    with_storage(world, storage).run_job(job_id)
    assert (world.get(Job, job_id).state, world.get(Job, job_id).attempt) == ("succeeded", 1)


def test_checkpoint_behind_an_outage_is_not_forgotten(world: World) -> None:
    """A job that began anew because its checkpoint was out of reach would have lost its work."""
    job_id = world.job()
    world.supervisor(trainer(SAVING + "save('x')\ntime.sleep(0.5)\nsys.exit(3)")).run_job(job_id)
    forget_local_checkpoints(world, job_id)
    with_storage(world, Flaky(world.storage, 4, AWAY, "copy_to"), REPORTING).run_job(job_id)
    assert world.get(Job, job_id).report["from"] == ["x"]


def test_outage_that_lasts_costs_no_attempt(world: World) -> None:
    job_id = world.job()
    supervisor = with_storage(world, Flaky(world.storage, 10**6, AWAY, "copy_to"), outage_seconds=0.3, max_attempts=2)
    for _ in range(3):
        supervisor.run_job(job_id)
    job = world.get(Job, job_id)
    assert (job.state, job.attempt, job.crashes) == ("queued", 4, 0)


def test_cancel_is_heard_during_an_outage(world: World, in_background: Start) -> None:
    job_id = world.job()
    running = in_background(lambda: with_storage(world, Flaky(world.storage, 10**6, AWAY, "copy_to")).run_job(job_id))
    wait_until(is_in_phase(world, job_id, "checking"))
    set_job(world, job_id, state="cancelling")
    running.join(15)
    assert world.get(Job, job_id).state == "cancelled"


def test_stopping_worker_gives_the_job_back_during_an_outage(world: World, in_background: Start) -> None:
    job_id = world.job()
    running = in_background(lambda: with_storage(world, Flaky(world.storage, 10**6, AWAY, "copy_to")).run_job(job_id))
    wait_until(is_in_phase(world, job_id, "checking"))
    world.stopping.set()
    running.join(15)
    assert (world.get(Job, job_id).state, world.get(Job, job_id).attempt) == ("queued", 1)


def test_trainer_without_disk_space_is_tried_again_and_costs_no_attempt(world: World) -> None:
    job_id = world.job()
    full = "say('error', code='disk_full', message='full', category='resource', retryable=True)"
    supervisor = world.supervisor(trainer(full), max_attempts=2)
    for _ in range(3):
        supervisor.run_job(job_id)
    job = world.get(Job, job_id)
    assert (job.state, job.attempt, job.crashes) == ("queued", 4, 0)


def test_upload_is_not_rejected_for_a_full_disk(world: World) -> None:
    model_id = world.model()
    full = "say('error', code='disk_full', message='full', category='resource', retryable=True)"
    with pytest.raises(OSError, match="full"):
        world.supervisor(trainer("finish()", check=full)).check(Model, model_id)
    assert world.get(Model, model_id).state == "checking"


def test_upload_is_not_rejected_because_its_check_was_killed_once(world: World) -> None:
    model_id = world.model()
    killed: list[int] = []
    supervisor = world.supervisor(trainer("finish()"))
    original = type(supervisor)._run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not killed:
            killed.append(1)
            return "was ended by SIGKILL, most likely for lack of memory"
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(supervisor), "_run", run)
        supervisor.check(Model, model_id)
    assert world.get(Model, model_id).state == "ready"


@pytest.fixture
def gate(world: World) -> Iterator[Callable[[bool], None]]:
    """`gate(False)`: every statement fails, as when the database's server is stopped."""
    is_open = threading.Event()
    is_open.set()

    def refuse(*_: Any) -> None:
        if not is_open.is_set():
            raise OperationalError("SELECT 1", {}, ConnectionError("unable to open: the server is stopped"))

    event.listen(world.database.engine, "before_cursor_execute", refuse)
    yield lambda opened: is_open.set() if opened else is_open.clear()
    event.remove(world.database.engine, "before_cursor_execute", refuse)


def test_insistence_ends(world: World) -> None:
    calls: list[float] = []

    def fail() -> None:
        calls.append(time.monotonic())
        raise AWAY

    with pytest.raises(StorageAway):
        insistently(fail, 0.5)
    assert len(calls) > 2


def test_what_is_no_outage_is_not_tried_again() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        insistently(fail, 5)
    assert calls == [1]


def test_claim_whose_answer_got_lost_is_found_again(world: World) -> None:
    first, second = world.job(), world.job()
    taken = Claim.take(world.database, "test", 60.0, token="lse_mine")
    again = Claim.take(world.database, "test", 60.0, token="lse_mine")
    assert taken is not None
    assert again is not None
    assert taken.job.id == again.job.id == first
    assert world.get(Job, second).state == "queued"


@contextmanager
def claimed_a_day_ahead(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Claim]:
    """A job's claim by a worker whose clock is wrong inside the block."""
    if world.database.is_sqlite:
        pytest.skip("SQLite's clock is the machine's")
    world.job()
    with monkeypatch.context() as patched:
        patched.setattr("app.tables.datetime", Tomorrow)
        patched.setattr("app.database.datetime", Tomorrow)
        claim = Claim.take(world.database, "test", 60.0)
        assert claim is not None
        yield claim


def test_lease_is_measured_by_the_database_and_not_by_the_workers_clock(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claimed_a_day_ahead(world, monkeypatch) as claim:
        claim.extend()
        expires = world.get(Job, claim.job.id).lease_expires_at
    assert abs((expires - utc_now()).total_seconds() - 60) < 30


def test_artifacts_expire_by_the_databases_clock_and_not_by_the_workers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"kind": "model", "format": "pt2", "name": "model.pt2", "media_type": "x", "bytes": 1, "sha256": "0" * 64}
    with claimed_a_day_ahead(world, monkeypatch) as claim:
        claim.succeed({}, [Artifact(id="art_1", job_id=claim.job.id, storage_key="x", **about)], retention_days=7)
        expires = world.get(Artifact, "art_1").expires_at
    assert abs(expires - utc_now() - timedelta(days=7)) < timedelta(seconds=30)


def test_worker_outlasts_a_database_that_is_away_for_longer_than_its_lease(
    world: World, gate: Callable[[bool], None], in_background: Start
) -> None:
    job_id = world.job()
    body = """
    say('phase', phase='sparse_training')
    while not (folder / 'input' / 'go').exists(): time.sleep(0.05)
    finish()
    """
    running = in_background(lambda: world.supervisor(trainer(body), lease_seconds=0.5).run_job(job_id))
    wait_until(is_in_phase(world, job_id, "sparse_training"))
    gate(False)
    time.sleep(1.5)
    [inputs] = world.work.glob(f"{job_id}-1/input")
    (inputs / "go").touch()
    time.sleep(1.0)
    gate(True)
    running.join(20)
    job = world.get(Job, job_id)
    assert (job.state, job.attempt) == ("succeeded", 1)


def test_a_disk_without_room_for_a_temporary_file_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(FileNotFoundError) as raised:
        tempfile.gettempdir()
    assert describe(raised.value, "checking").code == "disk_full"
