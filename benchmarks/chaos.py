"""Nothing is lost: jobs on a whole deployment in which, at random, everything dies: `python -m benchmarks.chaos`.

Starts PostgreSQL, Redis, an object store (moto behind a valve), two API replicas and several workers, all of its own
and on free ports; posts jobs, while processes are killed and frozen, servers stopped, clocks set and disks filled
(`benchmarks.cluster.faults`); and at the end asks whether every job has succeeded once, with every artifact there and
equal to its digest, with the same weights as every other job of its seed, and how much work each kill has cost.

    python -m benchmarks.chaos --jobs 100 --seed 1
    python -m benchmarks.chaos --jobs 5 --only "trainer killed" --only "PostgreSQL stopped"

Writes `benchmarks/results/chaos.json`. Exit status 0: all is right. Needs the programs of PostgreSQL and Redis;
a C compiler for clocks that jump, and the right to mount for a disk that is full: without them, these two are left out,
and the result says so.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from app.settings import Settings
from app.storage import open_storage
from benchmarks.cluster.audit import audit, lost_work, orphans
from benchmarks.cluster.faults import Faults
from benchmarks.cluster.parts import Cluster, wait_for
from benchmarks.experiment import machine
from demo.service import ends_on_sigterm

RESULTS = Path(__file__).parent / "results" / "chaos.json"
LEASE_SECONDS, CHECKPOINT_SECONDS, MAX_ATTEMPTS = 8.0, 2.0, 3
SMALL_DISK_BYTES = 24 * 2**20
SHOWN = ("faults", "states", "returned_to_the_queue", "jobs_by_attempts", "work_lost")
SEEDS = 4
"""Jobs share so many seeds: those of one seed have to end with the same weights."""
SETTINGS = {
    "ESPALIER_LEASE_SECONDS": str(LEASE_SECONDS),
    "ESPALIER_HEARTBEAT_SECONDS": "1.5",
    "ESPALIER_CHECKPOINT_SECONDS": str(CHECKPOINT_SECONDS),
    "ESPALIER_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
    "ESPALIER_RETRY_PAUSE_SECONDS": "1",
}


class Unfinished(Exception):
    """Jobs were not done in time."""


@dataclass
class Client:
    """As a client should be: what gets no answer, or 5xx, it asks again, of another replica."""

    urls: list[str]
    retried: Counter[str] = field(default_factory=Counter)

    def request(self, method: str, path: str, seconds: float = 120.0, **what: Any) -> httpx.Response:
        deadline = time.monotonic() + seconds
        attempt = 0
        while True:
            url = self.urls[attempt % len(self.urls)]
            try:
                answer = httpx.request(method, url + path, timeout=20, follow_redirects=True, **what)
                if answer.status_code < 500:
                    answer.raise_for_status()
                    return answer
                reason = str(answer.status_code)
            except httpx.TransportError as error:
                reason = type(error).__name__
            self.retried[reason] += 1
            if time.monotonic() > deadline:
                raise Unfinished(f"{method} {path} got no answer within {seconds:.0f} s: {reason}")
            attempt += 1
            time.sleep(0.3)

    def get(self, path: str) -> Any:
        return self.request("GET", path).json()

    def content(self, path: str) -> bytes:
        return self.request("GET", path).content

    def post_job(self, number: int, body: dict[str, Any]) -> str:
        """Posted once: an answer that got lost is looked for before asking again."""
        body = body | {"metadata": {"chaos": str(number)}}
        while True:
            try:
                return str(self.request("POST", "/v1/jobs", seconds=0, json=body).json()["id"])
            except Unfinished:
                time.sleep(0.5)
                found = self.get(f"/v1/jobs?metadata.chaos={number}")["data"]
                if found:
                    return str(found[0]["id"])


def small_problem() -> tuple[bytes, bytes]:
    """A network of three layers, as a file, and two thousand samples of four classes."""
    import torch

    torch.manual_seed(0)
    random_numbers = np.random.default_rng(0)
    centers = random_numbers.normal(size=(4, 16))
    y = random_numbers.integers(0, 4, 2000)
    x = (centers[y] + random_numbers.normal(size=(2000, 16))).astype("float32")
    network = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)
    )
    program = torch.export.export(
        network.eval(), (torch.randn(4, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    model, dataset = io.BytesIO(), io.BytesIO()
    torch.export.save(program, model)
    np.savez(dataset, x=x, y=y.astype("int64"))
    return model.getvalue(), dataset.getvalue()


def post_jobs(client: Client, count: int, epochs: int, seed: int, ids: list[str]) -> None:
    """All of them, a few at a time; every tenth with files of its own, which have to be checked first."""
    model_file, dataset_file = small_problem()
    pause = random.Random(seed)
    model = dataset = ""
    for number in range(count):
        if number % 10 == 0:
            model = client.request("POST", "/v1/models", files={"file": ("net.pt2", model_file)}).json()["id"]
            dataset = client.request("POST", "/v1/datasets", files={"file": ("data.npz", dataset_file)}).json()["id"]
        body = {
            "model_id": model,
            "dataset_id": dataset,
            "target": {"metric": "parameters", "reduction": 0.5},
            "training": {
                "sparse_epochs": epochs,
                "finetune_epochs": epochs,
                "batch_size": 32,
                "seed": number % SEEDS,
                "mixup": 0.0,
            },
        }
        ids.append(client.post_job(number, body))
        time.sleep(pause.uniform(0, 1))


def run(asked: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=asked.folder))
    small_disk = 0 if asked.no_mount else SMALL_DISK_BYTES
    with Cluster(folder, workers=asked.workers, settings=SETTINGS, small_disk_bytes=small_disk) as cluster:
        client = Client(cluster.urls)
        faults = Faults(cluster, asked.seed, asked.pause, MAX_ATTEMPTS, LEASE_SECONDS)
        if asked.only:
            faults.keep_only(asked.only)
        began = time.monotonic()
        ids: list[str] = []
        posting = threading.Thread(target=post_jobs, args=(client, asked.jobs, asked.epochs, asked.seed, ids))
        posting.start()
        faults.start()
        try:
            jobs = until_all_ended(client, posting, ids, asked)
        finally:
            faults.stop()
        took = time.monotonic() - began
        wait_for(cluster.database_answers, 60, "PostgreSQL")
        time.sleep(2 * LEASE_SECONDS)  # whoever still believes to own a job learns that it does not
        figures, wrong = audit(jobs, client.get, client.content, cluster.database_url)
        lost = lost_work(faults.kills, client.get, CHECKPOINT_SECONDS)
        settings = {name.removeprefix("ESPALIER_").lower(): value for name, value in cluster.settings.items()}
        left = orphans(open_storage(Settings(**settings)), cluster.database_url)  # type: ignore[arg-type]
        starts = {part.name: part.starts for part in cluster.parts}
    result = {
        "asked": {name: value for name, value in vars(asked).items() if name not in ("folder", "keep", "results")},
        "settings": SETTINGS,
        "faults": dict(faults.counts),
        "left_out": [kind for kind in faults.kinds if not faults.counts[kind]],
        "spared_because_no_attempt_was_left": faults.spared,
        "starts": starts,
        "seconds": round(took, 1),
        **figures,
        "work_lost": lost,
        "files_without_a_row": left,
        "client_retries": dict(client.retried),
        "wrong": wrong,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "faults.log").write_text("\n".join(faults.log) + "\n")
    (folder / "kills.json").write_text(json.dumps([asdict(kill) for kill in faults.kills], indent=1))
    if wrong or asked.keep:
        print(f"what happened lies in {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return result, wrong


def until_all_ended(
    client: Client, posting: threading.Thread, ids: list[str], asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """The jobs as they are once all have ended, or time is over."""
    ended: dict[str, dict[str, Any]] = {}
    shown: dict[str, dict[str, Any]] = {}
    deadline, told = time.monotonic() + asked.seconds, 0.0
    while (posting.is_alive() or len(ended) < len(ids)) and time.monotonic() < deadline:
        for id in list(ids):
            if id not in ended:
                shown[id] = client.get(f"/v1/jobs/{id}")
                if shown[id]["is_terminal"]:
                    ended[id] = shown[id]
        if time.monotonic() - told > 15:
            told = time.monotonic()
            states = Counter(job["state"] for job in shown.values())
            print(f"{asked.seconds - deadline + told:7.0f} s  {dict(states)}", flush=True)
        time.sleep(1)
    return [ended.get(id) or client.get(f"/v1/jobs/{id}") for id in ids]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="of each of the two stages of training of a job")
    parser.add_argument("--pause", type=float, default=10.0, help="mean seconds between two faults")
    parser.add_argument("--seconds", type=float, default=3600.0, help="by when all jobs have to have ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a kind of fault, as often as wanted; all by default")
    parser.add_argument("--no-mount", action="store_true", help="leave out the full disk")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--keep", action="store_true", help="keep logs and databases also if all is right")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    ends_on_sigterm()
    result, wrong = run(asked)
    asked.results.parent.mkdir(exist_ok=True)
    asked.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in SHOWN}, indent=1))
    for each in wrong:
        print("WRONG", each)
    succeeded = result["states"].get("succeeded", 0)
    print(f"{succeeded} of {result['jobs']} jobs right, {len(wrong)} things wrong, {result['seconds']:.0f} s")
    return 0 if not wrong and succeeded == asked.jobs else 1


if __name__ == "__main__":
    sys.exit(main())
