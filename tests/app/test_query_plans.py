"""With 10,000 jobs, no query of the service or of a worker reads the whole table, or that of their parts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection, event, insert, text

from app.database import Database
from app.dependencies import Service
from app.ids import new_id
from app.jobs.watching import stream_jobs
from app.recovery import sweep
from app.retention import delete_expired, delete_orphans
from app.sweeps.sweeping import look_after_all
from app.tables import Artifact, Base, Checkpoint, Dataset, Event, Job, LogChunk, Model, utc_now
from tests.app.helpers import on_both_databases
from worker.claims import Claim, NewEvent, Offer

JOBS = 10_000
MANY = 2_000
LARGE = ("jobs", "events", "log_chunks", "artifacts", "checkpoints")
LATER = utc_now() + timedelta(days=1)
Statement = tuple[str, Any]


@pytest.fixture
def ids(service: Service, body: dict[str, Any]) -> list[str]:
    """Ten thousand jobs of a hundred models, oldest first: nearly all have ended, twenty run, eighty are queued."""
    now = utc_now()
    about = {"name": "x", "filename": "x", "bytes": 1, "sha256": "0" * 64, "storage_key": "x", "state": "ready"}
    models = [body["model_id"], *(f"mdl_{number}" for number in range(99))]
    with service.database.writing() as session:
        session.execute(insert(Model), [{"id": id, **about} for id in models[1:]])
    rows = []
    for number in range(JOBS):
        left = JOBS - number
        state = "queued" if left <= 80 else "running" if left <= 100 else ("succeeded", "failed")[number % 2]
        columns = {"state": state, "created_at": now - timedelta(seconds=10 * left), "worked_seconds": 60.0}
        columns |= {"last_event": 1}
        columns |= {"lease_expires_at": now + timedelta(hours=1) if state == "running" else None}
        columns |= {"published_at": now, "model_id": models[number % 100], "dataset_id": body["dataset_id"]}
        rows.append({**columns, "job_metadata": {"n": str(number)}})
    ids = insert_jobs(service.database, rows)
    analyze(service.database)
    return ids


@pytest.fixture
def parts(service: Service, ids: list[str]) -> None:
    """What jobs come with, one of each for every job."""
    file = {"bytes": 1, "sha256": "0" * 64, "storage_key": "x"}
    shown = {"kind": "model", "format": "pt2", "name": "model.pt2", "media_type": "x", "expires_at": LATER}
    columns: dict[type[Base], dict[str, Any]] = {
        Event: {"sequence": 1, "type": "queued", "data": {}},
        LogChunk: {"attempt": 1, "text": "a line"},
        Artifact: file | shown,
        Checkpoint: file | {"attempt": 1, "name": "1"},
    }
    with service.database.writing() as session:
        for table, more in columns.items():
            rows = [
                {"id": f"{n}", "job_id": id, **more} for n, id in enumerate(ids) if n % 2 or table is not Checkpoint
            ]
            session.execute(insert(table), rows)
    analyze(service.database)


def analyze(database: Database) -> None:
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def insert_jobs(database: Database, rows: list[dict[str, Any]]) -> list[str]:
    """Rows with these columns; a model and a data set are made where none are named."""
    options = {"target": {}, "regularizer": {}, "training": {}, "data": {}, "outputs": ["pt2"]}
    with database.writing() as session:
        if "model_id" not in rows[0]:
            about = {"name": "x", "filename": "x", "bytes": 1, "sha256": "0" * 64, "storage_key": "x"}
            session.add_all([Model(id="mdl_1", **about), Dataset(id="dts_1", **about)])
            session.flush()
            options |= {"model_id": "mdl_1", "dataset_id": "dts_1"}
        rows = [{"id": new_id("job"), **options, **row} for row in rows]
        session.execute(insert(Job), rows)
    return [row["id"] for row in rows]


def is_ours() -> bool:
    """In the test's thread or that of a request: not in those in which the service looks after itself meanwhile."""
    thread = threading.current_thread()
    return thread is threading.main_thread() or thread.name.startswith("AnyIO worker")


@contextmanager
def seen(database: Database, *tables: str) -> Iterator[list[Statement]]:
    """What is asked of the table of jobs, or of these, in the block."""
    statements: list[Statement] = []

    def take(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        is_about = any(table in statement for table in tables or ("jobs",))
        if is_ours() and is_about and not statement.startswith(("INSERT", "EXPLAIN")):
            one = parameters[0] if isinstance(parameters, list) else parameters
            statements.append((statement, one))

    event.listen(database.engine, "before_cursor_execute", take)
    yield statements
    event.remove(database.engine, "before_cursor_execute", take)


def whole_reads(database: Database, statements: list[Statement]) -> list[str]:
    """Those that read most of a large table, by whatever plan: they are done once more, and undone."""
    found = []
    for statement, parameters in statements:
        with database.engine.connect() as connection:
            work = _steps if database.is_sqlite else _rows_read
            if work(connection, statement, parameters) > MANY:
                found.append(statement)
            connection.rollback()
    return found


def _rows_read(connection: Connection, statement: str, parameters: Any) -> float:
    """By PostgreSQL, from the large tables; also those that a filter then drops."""
    plan = connection.exec_driver_sql("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters).scalar_one()
    names = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
    scans = [node for node in nodes(plan) if node.get("Relation Name") in LARGE]
    return max((sum(node.get(name, 0) for name in names) * node["Actual Loops"] for node in scans), default=0)


def nodes(plan: Any) -> Iterator[dict[str, Any]]:
    pending = [root["Plan"] for root in plan]
    while pending:
        node = pending.pop()
        yield node
        pending += node.get("Plans", [])


def _steps(connection: Connection, statement: str, parameters: Any) -> int:
    """Of SQLite's virtual machine, in tens: it takes no fewer to read a row, to look at it, and to go on."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    sqlite: Any = connection.connection.driver_connection
    sqlite.set_progress_handler(step, 10)
    try:
        connection.exec_driver_sql(statement, parameters).close()
    finally:
        sqlite.set_progress_handler(None, 0)
    return count


def submit_like(client: TestClient, id: str) -> None:
    known = client.get(f"/v1/jobs/{id}").json()
    body = {name: known[name] for name in ("model_id", "dataset_id")} | {"target": {"reduction": 0.6}}
    assert client.post("/v1/jobs", json=body).status_code == 202


def first_of(stream: AsyncIterator[bytes]) -> None:
    async def read() -> None:
        for _ in range(2):
            await anext(stream)

    asyncio.run(read())


def work(service: Service) -> None:
    claim = Claim.take(service.database, "w", 60.0)
    assert claim is not None
    claim.extend()
    claim.record({"phase": "baseline"}, [NewEvent("progress", {})])
    claim.add_log("a line", 10)
    about = {"attempt": 1, "name": "1", "bytes": 1, "sha256": "0" * 64, "storage_key": "x"}
    claim.add_checkpoint(Checkpoint(id="ckp_1", job_id=claim.job.id, **about), lambda names: names)
    claim.succeed({}, [])


def dataset_of(service: Service, ids: list[str]) -> str:
    with service.database.reading() as session:
        return session.get_one(Job, ids[0]).dataset_id


def sweep_and_cancel(client: TestClient, service: Service, ids: list[str]) -> None:
    known = client.get(f"/v1/jobs/{ids[0]}").json()
    body = {name: known[name] for name in ("model_id", "dataset_id")} | {"targets": [{"reduction": 0.5}]}
    answer = client.post("/v1/sweeps", json=body)
    assert answer.status_code == 202, answer.text
    look_after_all(service.database, service.settings)
    client.get("/v1/sweeps")
    assert client.post(f"/v1/sweeps/{answer.json()['id']}/cancel").status_code == 200
    assert client.delete(f"/v1/sweeps/{answer.json()['id']}").status_code == 204


ACTIONS: dict[str, Callable[[TestClient, Service, list[str]], object]] = {
    "list": lambda client, service, ids: client.get("/v1/jobs"),
    "next page": lambda client, service, ids: client.get("/v1/jobs", params={"cursor": ids[5000]}),
    "list of a state": lambda client, service, ids: [
        client.get("/v1/jobs", params={"state": state}) for state in ("queued", "running", "succeeded", "cancelled")
    ],
    "list of a model": lambda client, service, ids: client.get("/v1/jobs", params={"model_id": "mdl_unknown"}),
    "get": lambda client, service, ids: [client.get(f"/v1/jobs/{ids[n]}") for n in (0, -980, -1)],
    "workers": lambda client, service, ids: client.get("/v1/workers"),
    "metrics": lambda client, service, ids: client.get("/metrics"),
    "claim": lambda client, service, ids: Claim.take(service.database, "w", 60.0),
    "claim of a class": lambda client, service, ids: Claim.take(service.database, "w", 60.0, Offer("cuda", 8)),
    "claim with a limit": lambda client, service, ids: Claim.take(service.database, "w", 60.0, project_limit=50),
    "work": lambda client, service, ids: work(service),
    "reap": lambda client, service, ids: sweep(service.database, 3, 60.0),
    "reap what is lost": lambda client, service, ids: sweep(service.database, 3, 60.0, utc_now() + timedelta(hours=2)),
    "submit": lambda client, service, ids: submit_like(client, ids[0]),
    "list of metadata": lambda client, service, ids: client.get("/v1/jobs", params={"metadata.n": "none"}),
    "list of a sweep": lambda client, service, ids: client.get("/v1/jobs", params={"sweep_id": "swp_unknown"}),
    "stream of jobs": lambda client, service, ids: first_of(stream_jobs(service.database)),
    "events": lambda client, service, ids: client.get(f"/v1/jobs/{ids[5000]}/events"),
    "logs": lambda client, service, ids: client.get(f"/v1/jobs/{ids[5000]}/logs"),
    "artifacts": lambda client, service, ids: client.get(f"/v1/jobs/{ids[5000]}/artifacts"),
    "model": lambda client, service, ids: client.get(f"/v1/jobs/{ids[5000]}/model"),
    "delete a job": lambda client, service, ids: client.delete(f"/v1/jobs/{ids[5000]}"),
    "retry": lambda client, service, ids: client.post(f"/v1/jobs/{ids[5001]}/retry"),
    "delete a model": lambda client, service, ids: client.delete("/v1/models/mdl_50"),
    "delete a data set": lambda client, service, ids: client.delete(f"/v1/datasets/{dataset_of(service, ids)}"),
    "usage of projects": lambda client, service, ids: client.get("/v1/projects"),
    "retention": lambda client, service, ids: delete_expired(service.database, service.storage, checkpoint_days=7),
    "orphans": lambda client, service, ids: delete_orphans(service.database, service.storage, timedelta(0)),
    "sweep": lambda client, service, ids: sweep_and_cancel(client, service, ids),
    "cancel": lambda client, service, ids: client.post(f"/v1/jobs/{ids[-1]}/cancel"),
}


ALLOWED = {False: {"usage of projects"}, True: {"usage of projects", "list of metadata"}}
"""What does read all of a project, on PostgreSQL and on SQLite: docs/operations.md says so."""


@on_both_databases
@pytest.mark.usefixtures("parts")
def test_no_query_reads_all_jobs(client: TestClient, service: Service, ids: list[str]) -> None:
    wrong: dict[str, list[str]] = {}
    for name, act in ACTIONS.items():
        with seen(service.database, *LARGE) as statements:
            act(client, service, ids)
        assert statements, name
        if whole := whole_reads(service.database, statements):
            wrong[name] = whole
    assert wrong.keys() == ALLOWED[service.database.is_sqlite]


@on_both_databases
def test_a_query_that_reads_all_jobs_would_be_found(service: Service, ids: list[str]) -> None:
    with seen(service.database) as statements, service.database.reading() as session:
        session.execute(text("SELECT count(*) FROM jobs WHERE name = 'x'"))
    assert len(whole_reads(service.database, statements)) == 1


def test_a_client_that_polls_costs_one_question(client: TestClient, service: Service, job: dict[str, Any]) -> None:
    """Of the table of jobs: the job together with its place in the queue."""
    path = f"/v1/jobs/{job['id']}"
    with seen(service.database) as statements:
        etag = client.get(path).headers["etag"]
    assert len(statements) == 1
    with seen(service.database) as statements:
        assert client.get(path, headers={"If-None-Match": etag}).status_code == 304
    assert len(statements) == 1
    assert not any("progress" in statement for statement, _ in statements)  # not the whole row


def test_a_list_asks_once_for_the_places_of_all(client: TestClient, service: Service, ids: list[str]) -> None:
    with seen(service.database) as statements:
        assert len(client.get("/v1/jobs", params={"limit": 100}).json()["data"]) == 100
    assert len(statements) == 2


def test_a_job_is_posted_in_one_transaction_of_few_trips(
    client: TestClient, service: Service, body: dict[str, Any], job: dict[str, Any]
) -> None:
    """BEGIN; project, active jobs, model with data set, webhooks, four rows, place, workers, counters; COMMIT."""
    trips: list[str] = []

    def take(*given: Any) -> None:
        if is_ours():
            trips.append(given[2] if len(given) > 2 else "COMMIT")

    for name in ("before_cursor_execute", "commit"):
        event.listen(service.database.engine, name, take)
    assert client.post("/v1/jobs", json=body).status_code == 202
    for name in ("before_cursor_execute", "commit"):
        event.remove(service.database.engine, name, take)
    assert (len(trips), trips.count("COMMIT"), trips[-1]) == (13, 1, "COMMIT"), trips
