"""What is left after the storm: is every job right, ended once, and is every file there?"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlalchemy import create_engine, text

from app.storage import Storage
from benchmarks.cluster.faults import Kill

TRAINING = ("sparse_training", "finetuning")
ARTIFACTS = {("model", "pt2"), ("model", "onnx"), ("report", "json"), ("report", "html")}


def audit(
    jobs: list[dict[str, Any]], get: Callable[[str], Any], content: Callable[[str], bytes], database_url: str
) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what is wrong. `jobs` as they were shown last, `get` a resource, `content` the bytes of one."""
    wrong: list[str] = []
    by_seed: dict[int, dict[str, list[str]]] = {}
    states = Counter(job["state"] for job in jobs)
    returns: Counter[str] = Counter()
    for job in jobs:
        id = job["id"]
        events = events_of(id, get)
        returns.update(e["data"]["reason"] for e in events if e["type"] == "queued" and "reason" in e["data"])
        if job["state"] != "succeeded":
            wrong.append(f"{id} is {job['state']}: {job['error']}")
            continue
        endings = [e["type"] for e in events if e["type"] in ("succeeded", "failed", "cancelled")]
        if endings != ["succeeded"]:
            wrong.append(f"{id} ended as {endings}")
        artifacts = get(f"/v1/jobs/{id}/artifacts")["data"]
        if Counter((a["kind"], a["format"]) for a in artifacts) != Counter(ARTIFACTS):
            wrong.append(f"{id} has the artifacts {[(a['kind'], a['format']) for a in artifacts]}")
        for artifact in artifacts:
            found = content(f"/v1/artifacts/{artifact['id']}/content")
            if hashlib.sha256(found).hexdigest() != artifact["sha256"] or len(found) != artifact["bytes"]:
                wrong.append(f"{id}: {artifact['format']} differs from its digest")
            if artifact["format"] == "onnx":
                same = by_seed.setdefault(job["training"]["seed"], {})
                same.setdefault(weights_digest(found), []).append(id)
    for seed, digests in by_seed.items():
        if len(digests) > 1:
            wrong.append(f"seed {seed}: {[len(ids) for ids in digests.values()]} jobs have different weights")
    engine = create_engine(database_url)
    with engine.connect() as connection:
        leases = connection.scalar(text("SELECT count(*) FROM jobs WHERE lease_expires_at IS NOT NULL"))
        outbox = connection.scalar(text("SELECT count(*) FROM outbox"))
        attempts: Counter[int] = Counter(connection.scalars(text("SELECT attempt FROM jobs")))
    engine.dispose()
    if leases:
        wrong.append(f"{leases} leases of jobs that have ended")
    if outbox:
        wrong.append(f"{outbox} messages are left in the outbox")
    figures = {
        "jobs": len(jobs),
        "states": dict(states),
        "artifacts_checked": 4 * states["succeeded"],
        "different_results_of_a_seed": max((len(digests) for digests in by_seed.values()), default=0),
        "returned_to_the_queue": dict(returns.most_common()),
        "jobs_by_attempts": {str(number): attempts[number] for number in sorted(attempts)},
    }
    return figures, wrong


def orphans(storage: Storage, database_url: str) -> int:
    """Files that no row mentions: left by attempts that were killed while they stored something, collected later."""
    engine = create_engine(database_url)
    with engine.connect() as connection:
        tables = ("models", "datasets", "artifacts", "checkpoints")
        known = {key for table in tables for key in connection.scalars(text(f"SELECT storage_key FROM {table}"))}
    engine.dispose()
    return sum(found.key not in known for found in storage.found())


def weights_digest(onnx_file: bytes) -> str:
    """Of names and values of the weights alone."""
    import onnx

    digest = hashlib.sha256()
    for tensor in sorted(onnx.load_from_string(onnx_file).graph.initializer, key=lambda tensor: tensor.name):
        digest.update(tensor.name.encode() + tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


def events_of(id: str, get: Callable[[str], Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    path = f"/v1/jobs/{id}/events"
    while True:
        page = get(path)
        found += page["data"]
        if not page.get("has_more"):
            return found
        path = f"/v1/jobs/{id}/events?after={page['next_cursor']}"


def lost_work(kills: list[Kill], get: Callable[[str], Any], interval_seconds: float) -> dict[str, Any]:
    """Of each kill, how much of what the killed attempt did was done again, in seconds: the time from the checkpoint
    that the next one went on from to the kill, or, where that checkpoint is an earlier attempt's, from when this one
    trained.

    While a job trains, that is at most an interval, and what is done between two looks at the clock: a step, an
    evaluation, the writing itself. Before training (imports, the baseline) and after it (exporting, measuring) there
    are no checkpoints, and the stage is done again: it is counted apart, as is a kill while checkpoints had nowhere to
    go. What was killed when it had ended already, or was not owned any more, lost nothing.
    """
    training: list[float] = []
    outage: list[float] = []
    other: dict[str, list[float]] = {}
    for kill in kills:
        attempt, phase, resumed, has_next, trained_since = 0, "checking", None, False, 0.0
        for event in events_of(kill.job_id, get):
            at = datetime.fromisoformat(event["created_at"]).timestamp()
            begins = event["type"] == "resumed" or (event["type"] == "phase" and event["data"]["phase"] in TRAINING)
            if begins and not trained_since and at < kill.at:
                trained_since = at
            if event["type"] == "running":
                attempt = event["data"]["attempt"]
                has_next = has_next or attempt > kill.attempt
                trained_since = 0.0 if at < kill.at else trained_since
            elif event["type"] == "phase":
                if not has_next:
                    phase = event["data"]["phase"]
                elif event["data"]["phase"] in TRAINING:
                    break  # anew
            elif event["type"] == "resumed" and has_next:
                resumed = event["data"]["saved_at"]
                break
        if not has_next:
            continue
        lost = max(0.0, kill.at - (kill.trainer_started_at if resumed is None else max(resumed, trained_since)))
        if phase in TRAINING and resumed is not None:
            (outage if kill.in_outage else training).append(lost)
        else:
            other.setdefault(phase, []).append(lost)
    return {
        "checkpoint_seconds": interval_seconds,
        "kills_while_training": _summary(training),
        "of_them_more_than_an_interval": sum(lost > interval_seconds for lost in training),
        "kills_while_training_in_an_outage": _summary(outage),
        "kills_in_other_phases": {phase: _summary(lost) for phase, lost in sorted(other.items())},
    }


def _summary(lost: list[float]) -> dict[str, Any]:
    if not lost:
        return {"kills": 0}
    return {"kills": len(lost), "median": round(statistics.median(lost), 2), "max": round(max(lost), 2)}
