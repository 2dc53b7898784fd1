"""What one process of the API carries, and how soon a job starts.

    python -m benchmarks.load [polling] [dispatch] [upload] [rows] [queue] [waiting] [stores]     all by default

PostgreSQL is expected at --postgresql (a database of its own is made and dropped); Redis is started here, on a free
port. `polling`: 1,000 queued jobs, and 1,000 clients that ask for them with and without If-None-Match, side by side
with a bare FastAPI route on the same uvicorn (`benchmarks.bare`), in rounds by turns; figures are medians over rounds,
ratios are taken within a round. `dispatch`: from submit to running, on an idle worker. `upload`: 4 GB, beside plain
uvicorn writing the same stream to the same disk. `rows`: listing, claiming and reaping beside 1,000 to 50,000 jobs.
`queue`: the same, and a look at the last job, beside 10,000 of which more and more are queued.
`waiting`: 1,000 clients that wait with `Prefer: wait`, each for a job of its own. `stores`: what PostgreSQL does for a
request, a heartbeat and a claim, and Redis for a message.

Processor time, which a busy machine does not change much, is that of the server process, and, where it says so, of the
processes that PostgreSQL has for the service.
Adds what it measured to benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
from redis import Redis
from sqlalchemy import insert, text, update

from app.celery_config import RUN_JOB
from app.database import Database
from app.ids import new_id
from app.jobs import service as jobs
from app.jobs.schemas import JobRequest, show_job
from app.paging import newest_first
from app.queue import Publisher, celery_client, enqueue
from app.recovery import sweep
from app.settings import Settings
from app.tables import Dataset, Job, Model, utc_now
from benchmarks.experiment import RESULTS, machine
from demo.service import ends_on_sigterm
from worker.claims import Claim, NewEvent

ROOT = Path(__file__).parent.parent
CLIENTS = 1000
CONNECTIONS = 16
"""That keep a server busy while its capacity is measured."""
GIGABYTE = 10**9


# Processes


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def memory_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER_")}
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, cwd=ROOT, env=own | environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


@contextmanager
def server(app: str, folder: Path, ready: str, **environment: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", app, "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    command += ["--timeout-keep-alive", "75"]
    log = folder / f"{app.partition('.')[0]}-{port}.log"
    with process(command, log, **environment) as started:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}{ready}", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if started.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        else:
            raise SystemExit(f"{app} does not answer; see {log}")
        yield Server(started, port)


@contextmanager
def postgresql(server_url: str) -> Iterator[str]:
    """The URL of a new database."""
    name = f"espalier_load_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(f"{server_url}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
    try:
        yield f"{server_url.replace('postgresql://', 'postgresql+psycopg://')}/{name}"
    finally:
        with psycopg.connect(f"{server_url}/postgres", autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    port = free_port()
    with process(["redis-server", "--port", str(port), "--save", "", "--appendonly", "no"], folder / "redis.log"):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def postgresql_processor(database: Database) -> Iterator[Callable[[], float]]:
    """How many seconds PostgreSQL's processes have worked for this database. Those that end are missed for what they
    did since they were last looked at: a tenth of a second."""
    name, seen, is_over = str(database.engine.url.database), dict[int, float](), threading.Event()

    def look() -> float:
        for each in psutil.process_iter(["pid", "name", "cmdline", "cpu_times"]):
            if each.info["name"] == "postgres" and f" {name} " in " ".join(each.info["cmdline"] or ()):
                seen[each.info["pid"]] = each.info["cpu_times"].user + each.info["cpu_times"].system
        return sum(seen.values())

    def watch() -> None:
        while not is_over.wait(0.1):
            look()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield look
    finally:
        is_over.set()
        watching.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Service:
    """The service on PostgreSQL and Redis, with a model and a data set that count as checked."""

    folder: Path
    database: Database
    environment: dict[str, str]
    api: Server
    body: dict[str, Any]


@contextmanager
def service(folder: Path, postgresql_url: str) -> Iterator[Service]:
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        url = stack.enter_context(postgresql(postgresql_url))
        broker = stack.enter_context(redis(folder))
        database = Database(url)
        stack.callback(database.close)
        database.upgrade()
        environment = {
            "ESPALIER_DATABASE_URL": url,
            "ESPALIER_BROKER_URL": broker,
            "ESPALIER_DATA_DIR": str(folder / "data"),
            "ESPALIER_LOG_LEVEL": "warning",
            "ESPALIER_PROJECT_ACTIVE_JOBS": "1000000",
        }
        api = stack.enter_context(server("app.main:app", folder, "/readyz", **environment))
        yield Service(folder, database, environment, api, job_body(database))


def job_body(database: Database) -> dict[str, Any]:
    ids = {}
    for table, prefix in ((Model, "mdl"), (Dataset, "dts")):
        ids[prefix] = new_id(prefix)  # type: ignore[arg-type]
        about = {"name": "x", "filename": "x", "bytes": 1, "sha256": "0" * 64, "storage_key": f"models/{ids[prefix]}"}
        with database.writing() as session:
            session.add(table(id=ids[prefix], state="ready", **about))
    return {"model_id": ids["mdl"], "dataset_id": ids["dts"], "target": {"reduction": 0.6}}


def queue_jobs(ours: Service, count: int) -> list[str]:
    options = JobRequest.model_validate(ours.body).model_dump(mode="json", exclude={"metadata"})
    rows = [{"id": new_id("job"), **options, "job_metadata": {}} for _ in range(count)]
    with ours.database.writing() as session:
        if rows:
            session.execute(insert(Job), rows)
    return [row["id"] for row in rows]


# Requests, by hand: a client of its own costs a fifth of httpx, and shares the processor with what it measures.


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    lines = {name.lower(): value for name, _, value in (line.partition(b": ") for line in head.split(b"\r\n")[1:])}
    length = int(lines.get(b"content-length", b"0"))
    return status, await reader.readexactly(length) if length else b""


def get(path: str, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n".encode()


def post(path: str, body: dict[str, Any]) -> bytes:
    text = json.dumps(body)
    return post_head(path, "application/json", len(text)) + text.encode()


def post_head(path: str, kind: str, length: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", f"Content-Length: {length}", "", "")
    return "\r\n".join(lines).encode()


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    cpu: float = 0.0

    def figures(self) -> dict[str, float]:
        ordered = sorted(self.seconds)
        return {
            "requests": len(ordered),
            "per_second": len(ordered) / self.elapsed,
            "p50_ms": 1000 * ordered[len(ordered) // 2],
            "p99_ms": 1000 * ordered[int(len(ordered) * 0.99)],
            "cpu_ms": 1000 * self.cpu / len(ordered),
        }


def measure(
    to: Server, requests: Callable[[int], bytes], status: int, clients: int, *, seconds: float = 0, each: float = 0,
    count: int | None = None,
) -> Measured:  # fmt: skip
    """`clients` at once: as fast as they are answered, or one request every `each` seconds from each of them; for so
    many seconds, or `count` requests in all."""
    measured = Measured()
    numbers = iter(range(count if count is not None else 10**9))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", to.port)
        await asyncio.sleep(random.random() * each)
        while time.perf_counter() < end and (number := next(numbers, None)) is not None:
            began = time.perf_counter()
            answered, body = await ask(reader, writer, requests(number))
            took = time.perf_counter() - began
            assert answered == status, (answered, body[:500])
            measured.seconds.append(took)
            if each:
                await asyncio.sleep(max(0.0, each - took))
        writer.close()

    async def run() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    cpu, began = to.cpu_seconds(), time.perf_counter()
    end = began + (seconds or 1e9)
    asyncio.run(run())
    measured.elapsed, measured.cpu = time.perf_counter() - began, to.cpu_seconds() - cpu
    print({name: round(value, 2) for name, value in measured.figures().items()}, file=sys.stderr, flush=True)
    return measured


def median(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in figures), 3) for name in figures[0]}


def ratios(ours: list[dict[str, float]], bare: list[dict[str, float]]) -> dict[str, float]:
    """Ours to the bare one's of the same round."""
    return {
        name: round(statistics.median(a[name] / max(b[name], 1e-3) for a, b in zip(ours, bare, strict=True)), 2)
        for name in ("p50_ms", "p99_ms", "cpu_ms")
    }


# Parts


def polling(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with service(folder / "polling", asked.postgresql) as ours:
        first = httpx.post(f"{ours.api.url}/v1/jobs", json=ours.body).json()
        (folder / "job.json").write_text(json.dumps(first))
        environment = {"BARE_JOB": str(folder / "job.json"), "BARE_FOLDER": str(folder)}
        with server("benchmarks.bare:app", folder, "/v1/jobs/x", **environment) as bare:
            submit = {"ours": [], "bare": []}  # type: ignore[var-annotated]
            for _ in range(asked.rounds):
                for name, to in (("bare", bare), ("ours", ours.api)):
                    body = post("/v1/jobs", ours.body)
                    made = measure(to, lambda _, body=body: body, 202, 8, count=asked.submits)  # type: ignore[misc]
                    submit[name].append(made.figures())
            queue_jobs(ours, CLIENTS - asked.submits * asked.rounds - 1)
            with ours.database.reading() as session:
                ids = list(session.scalars(text("SELECT id FROM jobs WHERE state = 'queued' ORDER BY id")))
                queued = len(ids)
            with httpx.Client(base_url=ours.api.url, timeout=60) as http:
                etags = {id: http.get(f"/v1/jobs/{id}").headers["etag"] for id in ids[::10]}
            ids = list(etags)
            kinds: dict[str, tuple[Server, Callable[[int], bytes], int]] = {
                "bare": (bare, lambda n: get("/v1/jobs/x"), 200),
                "ours": (ours.api, lambda n: get(f"/v1/jobs/{ids[n % len(ids)]}"), 200),
                "bare, 304": (bare, lambda n: get("/v1/jobs/x", If_None_Match='"1"'), 304),
                "ours, 304": (
                    ours.api,
                    lambda n: get(f"/v1/jobs/{ids[n % len(ids)]}", If_None_Match=etags[ids[n % len(ids)]]),
                    304,
                ),
            }
            full: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
            polled: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
            for _ in range(asked.rounds):
                for name, (to, requests, status) in kinds.items():
                    full[name].append(measure(to, requests, status, CONNECTIONS, seconds=asked.seconds).figures())
            for _ in range(asked.polling_rounds):
                for name, (to, requests, status) in kinds.items():
                    made = measure(to, requests, status, CLIENTS, seconds=asked.seconds + asked.each, each=asked.each)
                    polled[name].append(made.figures())
            memory = ours.api.memory_bytes()
    return {
        "queued_jobs": queued,
        "submit": {name: median(figures) for name, figures in submit.items()}
        | {"ratio": ratios(submit["ours"], submit["bare"])},
        "capacity": {name: median(figures) for name, figures in full.items()}
        | {"ratio": ratios(full["ours"], full["bare"]), "ratio, 304": ratios(full["ours, 304"], full["bare, 304"])},
        "api_memory_bytes": memory,
        "rounds": asked.rounds,
    } | _of_many_clients(asked, polled)


def _of_many_clients(asked: argparse.Namespace, polled: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    if not asked.polling_rounds:
        return {}
    ratio = {
        "ratio": ratios(polled["ours"], polled["bare"]),
        "ratio, 304": ratios(polled["ours, 304"], polled["bare, 304"]),
    }
    figures = {name: median(each) for name, each in polled.items()} | ratio
    return {f"{CLIENTS} clients, one request each every {asked.each:g} s, {asked.polling_rounds} rounds": figures}


def dispatch(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A worker takes the job, finds that its files are not there, and is idle again."""
    with service(folder / "dispatch", asked.postgresql) as ours:
        command = [sys.executable, "-m", "celery", "-A", "worker.celery", "worker", "--pool", "prefork"]
        command += ["--concurrency", "1", "-Q", "jobs", "--without-gossip", "--without-mingle"]
        with (
            process(command, ours.folder / "worker.log", **ours.environment),
            httpx.Client(base_url=ours.api.url, timeout=60) as http,
        ):
            taken = []
            for number in range(asked.dispatches + 1):
                id = http.post("/v1/jobs", json=ours.body).json()["id"]
                while not (job := http.get(f"/v1/jobs/{id}", headers={"Prefer": "wait=10"}).json())["is_terminal"]:
                    pass
                if number:  # the first one waits for the worker to come up
                    started, created = (datetime.fromisoformat(job[name]) for name in ("started_at", "created_at"))
                    taken.append((started - created).total_seconds())
                time.sleep(0.3)
    ordered = sorted(taken)
    return {
        "jobs": len(taken),
        "below_1_s": sum(seconds < 1 for seconds in taken),
        "p50_ms": round(1000 * ordered[len(ordered) // 2], 1),
        "max_ms": round(1000 * ordered[-1], 1),
    }


def upload(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    size = int(asked.gigabytes * GIGABYTE)
    free = shutil.disk_usage(folder).free
    if free < 3 * size:
        raise SystemExit(f"{free / GIGABYTE:.0f} GB are free; an upload of {asked.gigabytes:g} GB is not for this disk")
    with service(folder / "upload", asked.postgresql) as ours:
        bare_folder = folder / "bare"
        bare_folder.mkdir()
        (folder / "job.json").write_text("{}")
        environment = {"BARE_JOB": str(folder / "job.json"), "BARE_FOLDER": str(bare_folder)}
        with server("benchmarks.bare:app", folder, "/v1/jobs/x", **environment) as bare:
            made: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
            for _ in range(asked.uploads):
                for name, to in (("bare", bare), ("ours", ours.api)):
                    made[name].append(send(to, size, is_form=name == "ours"))
                    for left in [*bare_folder.iterdir(), *(ours.folder / "data" / "storage" / "models").glob("*")]:
                        left.unlink()
    throughput = [
        a["bytes_per_second"] / b["bytes_per_second"] for a, b in zip(made["ours"], made["bare"], strict=True)
    ]
    return {
        "bytes": size,
        "uploads": asked.uploads,
        **{name: median(figures) for name, figures in made.items()},
        "throughput_ratio": round(statistics.median(throughput), 2),
        "throughput_ratios": [round(ratio, 2) for ratio in throughput],
    }


def send(to: Server, size: int, is_form: bool) -> dict[str, float]:
    block = random.randbytes(2**20)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.pt2"\r\n\r\n' if is_form else b""
    tail = b"\r\n--b--\r\n" if is_form else b""
    kind = "multipart/form-data; boundary=b" if is_form else "application/octet-stream"
    length = len(head) + size + len(tail)
    idle, peak, is_over = to.memory_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            peak[0] = max(peak[0], to.memory_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    cpu, began = to.cpu_seconds(), time.perf_counter()
    try:
        with socket.create_connection(("127.0.0.1", to.port)) as connection:
            with contextlib.suppress(ConnectionError):  # refused early: the answer says why
                connection.sendall(post_head("/v1/models", kind, length) + head)
                left = size
                while left:
                    connection.sendall(block[: min(left, len(block))])
                    left -= min(left, len(block))
                connection.sendall(tail)
            answer = connection.recv(65536)
        seconds = time.perf_counter() - began
    finally:
        is_over.set()
        watching.join()
    assert answer[9:12] == b"201", answer
    return {
        "bytes_per_second": size / seconds,
        "cpu_seconds_per_gigabyte": (to.cpu_seconds() - cpu) / (size / GIGABYTE),
        "memory_idle_bytes": idle,
        "memory_peak_bytes": peak[0],
    }


def rows(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in ("postgresql", "sqlite"):
        for number in (1_000, 10_000, 50_000):
            with ExitStack() as stack:
                if kind == "postgresql":
                    url = stack.enter_context(postgresql(asked.postgresql))
                else:
                    url = f"sqlite:///{folder / f'rows-{number}.sqlite'}"
                database = Database(url)
                stack.callback(database.close)
                database.upgrade()
                results.setdefault(kind, {})[str(number)] = timed_on(database, number)
        small, large = results[kind]["1000"], results[kind]["10000"]
        results[kind]["ratio of 10,000 to 1,000"] = {name: round(large[name] / small[name], 2) for name in small}
    return results


def queue(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    results = {}
    for queued in (500, 10_000):
        with postgresql(asked.postgresql) as url, contextlib.closing(Database(url)) as database:
            database.upgrade()
            results[f"{queued} queued"] = timed_on(database, 10_020, queued)
    return results


def timed_on(database: Database, number: int, queued: int = 500) -> dict[str, float]:
    """Milliseconds, the median of 15, beside so many jobs, of which so many are queued and 20 run."""
    body, now = job_body(database), utc_now()
    columns = {"target": {}, "regularizer": {}, "training": {}, "data": {}, "outputs": ["pt2"], "published_at": now}
    columns |= {"target": {"metric": "parameters", "reduction": 0.6}, "regularizer": {"kind": "mixture"}}
    entries = []
    for left in range(number, 0, -1):
        state = "queued" if left <= queued else "running" if left <= queued + 20 else "succeeded"
        lease = now + timedelta(hours=1) if state == "running" else None
        entries.append(
            {"id": new_id("job"), "model_id": body["model_id"], "dataset_id": body["dataset_id"], **columns}
            | {"state": state, "created_at": now - timedelta(seconds=left), "lease_expires_at": lease}
            | {"worked_seconds": 60.0, "report": {"layers": ["x" * 100] * 10} if state == "succeeded" else None}
        )
    for start in range(0, number, 5_000):
        with database.writing() as session:
            session.execute(insert(Job), entries[start : start + 5_000])
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))

    def page(**filters: Any) -> None:
        with database.reading() as session:
            query = jobs.matching(filters.get("state"), None, None, {}, is_sqlite=database.is_sqlite)
            found = newest_first(session, query, Job.id, limit=20, cursor=None, show=lambda job: job)["data"]
            for job, outlook in zip(found, jobs.outlooks(session, found), strict=True):
                show_job(job, outlook)

    def look() -> None:
        with database.reading() as session:
            jobs.look(session, entries[-1]["id"])

    actions: dict[str, Callable[[], object]] = {
        "get the last": look,
        "list": page,
        "list succeeded": lambda: page(state="succeeded"),
        "claim": lambda: Claim.take(database, "benchmark", 60.0),
        "reap": lambda: sweep(database, 3, 60.0),
    }
    return {name: round(timed(act), 3) for name, act in actions.items()}


def waiting(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each client waits for a job of its own to end. Of ten of them, which are ended one after the other, it is seen
    when they hear of it."""
    with service(folder / "waiting", asked.postgresql) as ours, postgresql_processor(ours.database) as processor:
        ids = queue_jobs(ours, CLIENTS)
        shares: dict[str, float] = {}
        heard: list[float] = []

        async def run() -> None:
            streams = [await asyncio.open_connection("127.0.0.1", ours.api.port) for _ in ids]
            ends = [
                asyncio.create_task(ask(*stream, get(f"/v1/jobs/{id}", Prefer="wait=60")))
                for stream, id in zip(streams, ids, strict=True)
            ]
            await asyncio.sleep(asked.settle)
            api, stores, began = ours.api.cpu_seconds(), processor(), time.perf_counter()
            await asyncio.sleep(10)
            seconds = time.perf_counter() - began
            shares["api"] = (ours.api.cpu_seconds() - api) / seconds
            shares["postgresql"] = (processor() - stores) / seconds
            assert not any(end.done() for end in ends)
            for end, id in list(zip(ends, ids, strict=True))[:: len(ids) // 10]:
                with ours.database.writing() as session:
                    ended = {"state": "succeeded", "version": Job.version + 1}
                    session.execute(update(Job).where(Job.id == id).values(ended))
                began = time.perf_counter()
                await end
                heard.append(time.perf_counter() - began)
            for end in ends:
                end.cancel()
            for _, writer in streams:
                writer.close()

        asyncio.run(run())
    return {
        "clients": CLIENTS,
        "processor_share": {name: round(share, 3) for name, share in shares.items()},
        "heard_after_ms": {"p50": round(1000 * statistics.median(heard)), "max": round(1000 * max(heard))},
    }


def stores(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with service(folder / "stores", asked.postgresql) as ours, postgresql_processor(ours.database) as processor:
        found: dict[str, Any] = {"postgresql_cpu_ms": {}}

        def note(name: str, count: int, act: Callable[[], object]) -> None:
            before = processor()
            act()
            found["postgresql_cpu_ms"][name] = round(1000 * (processor() - before) / count, 3)

        def requests(request: bytes, status: int) -> Callable[[], object]:
            return lambda: measure(ours.api, lambda _: request, status, 8, count=asked.requests)

        ids = queue_jobs(ours, CLIENTS)
        with ours.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE"))
        etag = httpx.get(f"{ours.api.url}/v1/jobs/{ids[-1]}").headers["etag"]
        note("GET job", asked.requests, requests(get(f"/v1/jobs/{ids[-1]}"), 200))
        note("GET job, 304", asked.requests, requests(get(f"/v1/jobs/{ids[-1]}", If_None_Match=etag), 304))
        claims: list[Claim] = []
        note("claim", 500, lambda: claims.extend(filter(None, (claim(ours.database) for _ in range(500)))))
        note("heartbeat", 1000, lambda: [each.extend() for each in claims * 2])
        note("progress", 1000, lambda: [each.record({}, [NewEvent("progress", {})]) for each in claims * 2])
        note("POST job", asked.requests, requests(post("/v1/jobs", ours.body), 202))
    return found | {"redis": messages(asked, folder)}


def claim(database: Database) -> Claim | None:
    return Claim.take(database, "benchmark", 600.0)


def messages(asked: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Written to the outbox, and then published by the service's own publisher, as fast as one of them can."""
    count = 10_000
    with ExitStack() as stack:
        url, broker = stack.enter_context(postgresql(asked.postgresql)), stack.enter_context(redis(folder))
        database = Database(url)
        stack.callback(database.close)
        database.upgrade()
        with database.writing() as session:
            for _ in range(count):
                enqueue(session, RUN_JOB, new_id("job"))
        client = Redis.from_url(broker)
        client.ping()
        publisher = Publisher(database, celery_client(Settings(broker_url=broker)))
        before, cpu, began = client.info(), time.process_time(), time.perf_counter()
        while publisher.publish():
            pass
        seconds, cpu, after = time.perf_counter() - began, time.process_time() - cpu, client.info()
        publisher.close()
        assert client.llen("jobs") == count
    used = [each["used_cpu_user"] + each["used_cpu_sys"] for each in (before, after)]
    return {
        "messages": count,
        "per_second": round(count / seconds),
        "publisher_cpu_ms": round(1000 * cpu / count, 3),
        "redis_cpu_ms": round(1000 * (used[1] - used[0]) / count, 4),
        "bytes_each": round((after["used_memory"] - before["used_memory"]) / count),
    }


def timed(act: Callable[[], object]) -> float:
    act()
    taken = []
    for _ in range(15):
        began = time.perf_counter()
        act()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)


PARTS = {
    "polling": polling,
    "dispatch": dispatch,
    "upload": upload,
    "rows": rows,
    "queue": queue,
    "waiting": waiting,
    "stores": stores,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--postgresql", default="postgresql://postgres@127.0.0.1:5432")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--polling-rounds", type=int, default=3, help="of all clients at once")
    parser.add_argument("--submits", type=int, default=200, help="over HTTP, in a round")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round, for each kind of request")
    parser.add_argument("--each", type=float, default=5.0, help="seconds between two requests of one client")
    parser.add_argument("--dispatches", type=int, default=50)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--uploads", type=int, default=3)
    parser.add_argument("--settle", type=float, default=20.0, help="seconds until all who wait are waiting")
    parser.add_argument("--requests", type=int, default=1000, help="of each kind, for PostgreSQL's processor time")
    asked = parser.parse_args()
    ends_on_sigterm()
    path = RESULTS / "load.json"
    for name in asked.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="espalier-load-") as folder:
            found = PARTS[name](asked, Path(folder)) | {"machine": machine()}
        results = json.loads(path.read_text()) if path.exists() else {}
        results[name] = found
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps({name: found}, indent=2), flush=True)


if __name__ == "__main__":
    main()
