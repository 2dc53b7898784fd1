"""The default service from outside: upload, compress, download, cancel, reject, stop."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from benchmarks.cluster.audit import events_of
from tests.e2e.conftest import Example
from tests.e2e.running import (
    Client,
    RunningProcess,
    RunningService,
    clean_environment,
    default_service,
    free_port,
    is_answering,
    wait_for,
)


def uploaded(client: Client, example: Example) -> tuple[str, str]:
    model = client.upload("models", "digits.pt2", example.model)
    dataset = client.upload("datasets", "digits.npz", example.dataset)
    return model["id"], dataset["id"]


def test_upload_compress_download(client: Client, digits: Example) -> None:
    import numpy as np
    import onnxruntime

    job = client.post_job(*uploaded(client, digits), training={"sparse_epochs": 5, "finetune_epochs": 5})
    job = client.job_in(job["id"], "succeeded")
    report = client.get(f"/v1/jobs/{job['id']}/report")
    kept = report["compressed"]["parameters"] / report["baseline"]["parameters"]
    assert kept == pytest.approx(0.5, abs=0.02)

    artifacts = client.get(f"/v1/jobs/{job['id']}/artifacts")["data"]
    assert {a["name"] for a in artifacts} == {"model.pt2", "model.onnx", "report.json", "report.html"}
    small = client.http.get(f"/v1/jobs/{job['id']}/model", params={"format": "onnx"}).content
    assert hashlib.sha256(small).hexdigest() in {a["sha256"] for a in artifacts}
    session = onnxruntime.InferenceSession(small)
    data = np.load(io.BytesIO(digits.dataset))
    guess = session.run(None, {session.get_inputs()[0].name: data["x"]})[0].argmax(1)
    assert (guess == data["y"]).mean() >= 0.9


class Renormed(torch.nn.Module):
    """An operator that has no rule in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(64, 48), torch.nn.Linear(48, 32), torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.renorm(self.a(x), 2, 0, 1.0))))


def test_what_cannot_be_removed_is_said_and_too_much_is_refused_before_training(
    client: Client, digits: Example
) -> None:
    net = Renormed().eval()
    exported = torch.export.export(net, (torch.randn(4, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = io.BytesIO()
    torch.export.save(exported, content)
    dataset = client.upload("datasets", "digits.npz", digits.dataset)
    body = {"model_id": client.upload("models", "net.pt2", content.getvalue())["id"], "dataset_id": dataset["id"]}
    early = client.http.post("/v1/jobs", json=body | {"target": {"reduction": 0.9}})
    summary = client.checked("models", body["model_id"])["summary"]
    frozen = {entry["name"]: entry for entry in summary["frozen"]}
    assert "aten.renorm.default has no rule yet" in frozen["a.weight"]["reason"]
    assert frozen["a.weight"]["parameters"] == 64 * 48
    most = summary["prunable"]["reduction"]
    assert 0.2 < most < 1 - frozen["a.weight"]["parameters"] / summary["parameters"]
    for path in ("/v1/jobs", "/v1/jobs:validate"):
        refused = client.http.post(path, json=body | {"target": {"reduction": most + 0.01}})
        assert refused.status_code == 422
        (error,) = refused.json()["errors"]
        assert error["pointer"] == "/target/reduction"
        assert f"At most {most:.4g}" in error["detail"]
    allowed = client.http.post("/v1/jobs:validate", json=body | {"target": {"reduction": most}})
    (warning,) = allowed.json()["warnings"]
    assert f"{sum(entry['parameters'] for entry in frozen.values()):,} parameters" in warning["detail"]
    if early.status_code == 202:  # it was faster than the check
        error = client.job_in(early.json()["id"], "failed")["error"]
        assert (error["code"], error["phase"]) == ("target_unreachable", "checking")
        assert f"({most:.1%} removed)" in error["message"]


def test_cancel_ends_a_running_job(service: RunningService, digits: Example) -> None:
    client = service.client
    job = client.post_job(*uploaded(client, digits), training={"sparse_epochs": 5000, "finetune_epochs": 1})
    wait_for(lambda: client.get(f"/v1/jobs/{job['id']}")["phase"] == "sparse_training", 120, "training")
    assert client.http.post(f"/v1/jobs/{job['id']}/cancel").status_code in (200, 202)
    client.job_in(job["id"], "cancelled", seconds=5)
    wait_for(lambda: not trainers(service), 10, "the end of the trainer")


def test_junk_is_rejected_with_a_reason(client: Client) -> None:
    junk = client.upload("models", "junk.pt2", b"not a model at all" * 100)
    rejected = client.checked("models", junk["id"])
    assert rejected["state"] == "rejected"
    assert rejected["error"]["code"] != "internal_error"
    assert rejected["error"]["message"]


def test_job_on_a_rejected_model_fails_with_the_reason(client: Client, digits: Example) -> None:
    junk = client.upload("models", "junk.pt2", b"not a model at all")
    dataset = client.upload("datasets", "digits.npz", digits.dataset)
    answer = client.http.post(
        "/v1/jobs", json={"model_id": junk["id"], "dataset_id": dataset["id"], "target": {"reduction": 0.5}}
    )
    if answer.status_code == 202:  # it was faster than the check
        job = client.job_in(answer.json()["id"], "failed")
        assert job["error"]["code"] == "model_rejected"
    else:
        assert answer.status_code in (409, 422)


def test_stopping_the_service_leaves_no_process(own_service: RunningService, digits: Example) -> None:
    client = own_service.client
    job = client.post_job(*uploaded(client, digits), training={"sparse_epochs": 5000, "finetune_epochs": 1})
    wait_for(lambda: client.get(f"/v1/jobs/{job['id']}")["phase"] == "sparse_training", 120, "training")
    assert trainers(own_service)
    own_service.process.stop()
    wait_for(lambda: not own_service.process.family(), 15, "the end of all processes")
    assert list((own_service.data_dir / "work").glob(f"{job['id']}-1")) == []


def test_job_goes_on_after_a_restart(tmp_path: Path, digits: Example) -> None:
    with default_service(tmp_path) as first:
        job = first.client.post_job(
            *uploaded(first.client, digits), training={"sparse_epochs": 10, "finetune_epochs": 2}
        )
        wait_for(lambda: first.client.get(f"/v1/jobs/{job['id']}")["phase"] == "sparse_training", 120, "training")
        first.process.stop()
    with default_service(tmp_path) as second:
        assert second.client.job_in(job["id"], "succeeded")["attempt"] == 1


def test_worker_whose_main_process_is_killed_gives_its_job_back(own_service: RunningService, digits: Example) -> None:
    client = own_service.client
    training = {"sparse_epochs": 5000, "finetune_epochs": 1}
    job = client.post_job(*uploaded(client, digits), training=training)
    wait_for(lambda: client.get(f"/v1/jobs/{job['id']}")["phase"] == "sparse_training", 120, "training")
    (trainer,) = trainers(own_service)
    supervisor = trainer.parent()
    assert supervisor is not None
    worker = supervisor.parent()
    assert worker is not None
    worker.kill()

    def came_back() -> list[str]:
        return [e["data"]["reason"] for e in events_of(job["id"], client.get) if "reason" in e["data"]]

    assert wait_for(came_back, 60, "the job to be queued again") == ["the worker is stopping"]
    assert client.job_in(job["id"], "running")["attempt"] == 1
    wait_for(lambda: not supervisor.is_running(), 15, "the end of the supervisor")


def trainers(service: RunningService) -> list[psutil.Process]:
    return [p for p in service.process.family() if any("worker.trainer" in part for part in p.cmdline())]


@pytest.mark.parametrize(
    ("sign", "to_group"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["SIGTERM to make", "Ctrl-C"]
)
def test_make_serve_ends_cleanly(tmp_path: Path, sign: signal.Signals, to_group: bool) -> None:
    port = free_port()
    folder = Path(sys.executable).parent
    # `-o`: the environment of the tests is the one to use, whatever make thinks of its age.
    command = ["make", "-o", f"{folder}/.installed", "serve", f"BIN={folder}", f"INSTALLED={folder}/.installed"]
    environment = clean_environment(ESPALIER_DATA_DIR=str(tmp_path / "data"))
    serving = RunningProcess.start([*command, f"PORT={port}"], environment, tmp_path / "log")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            wait_for(lambda: is_answering(http, "/readyz"), 60, "the service")
        wait_for(lambda: len(serving.family()) >= 6, 60, "its workers")
        if to_group:
            os.killpg(serving.process.pid, sign)
        else:
            serving.process.send_signal(sign)
        serving.process.wait(40)
        wait_for(lambda: not serving.family(), 15, "the end of all processes")
        assert "/v1/models" in (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        serving.kill()
