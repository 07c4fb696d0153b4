"""A made-up sweep to mirror, and how to read its MLflow runs back; handed out as fixtures."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest

from sweeps.journal import Journal
from trainables.record import Record

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
SERVER_S = 240  # the machine may be loaded: generous, and reached only by a failure


class Sweep:
    """A made-up sweep: a journal in a folder of its own (opened again if it is there), fed by the test."""

    def __init__(self, storage, name="k_grid_demo_seed1"):
        self.id = name
        self.folder = storage / name
        self.journal = Journal.open(self.folder)
        if self.journal.path.stat().st_size:
            return
        self.journal.append(
            "sweep",
            **dict(sweep_id=self.id, name=name, stage="K", domain="dust3r", profile="demo", config_hash="c1"),
            **dict(
                workload_hash="w1",
                settings={"lr": 0.001, "size": "64x64"},
                git_commit="abc",
                command="k_grid",
            ),
        )

    def start(self, trial, **params):
        self.journal.append(
            "trial",
            trial_id=trial,
            exp_id=f"K_{trial}_run1",
            task_id="K-1",
            role="trial",
            saves=None,
            params=params,
        )

    def result(self, trial, epoch, **metrics):
        self.journal.append(
            "result",
            trial_id=trial,
            epoch=epoch,
            metrics={"val_drop": 1 / epoch, "train_loss": 2.0} | metrics,
        )

    def finish(self, trial, epoch, reason="completed", **fields):
        self.journal.append("stop", trial_id=trial, epoch=epoch, reason=reason, detail="")
        record = Record(
            **dict(exp_id=f"K_{trial}_run1", datetime="2026-03-01T12:00:00+01:00", T=3, seed=7, epochs=epoch),
            **dict(absrel=0.125, drop=0.02, verdict="fail", stop_reason=reason, engine="onnxruntime"),
            **fields,
        )
        self.journal.append("record", trial_id=trial, record=record.to_dict())
        return record

    def whole(self, trial, epochs=2, reason="completed"):
        self.start(trial, T=3, beta=0.5)
        for epoch in range(1, epochs + 1):
            self.result(trial, epoch)
        return self.finish(trial, epochs, reason)


def client_of(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def runs_of(uri, sweep_id="k_grid_demo_seed1"):
    """The runs of one sweep: {trial_id, None for the sweep: run}; a second run of a trial fails."""
    client = client_of(uri)
    experiment = client.get_experiment_by_name("slimsweep").experiment_id
    runs = client.search_runs([experiment], f"tags.sweep_id = '{sweep_id}'")
    keyed = {run.data.tags.get("trial_id"): run for run in runs}
    assert len(keyed) == len(runs), "a run was made twice"
    return keyed


def steps_of(uri, run, metric="val_drop"):
    return [(point.step, point.value) for point in client_of(uri).get_metric_history(run.info.run_id, metric)]


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """An MLflow database with its tables: making them takes seconds, copying them does not."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    client_of(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def storage(tmp_path, template):
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    return tmp_path


@pytest.fixture
def paper():
    """The tools of this file: paper.Sweep(storage), paper.runs_of(uri), paper.steps_of(uri, run),
    paper.client_of(uri).
    """
    return SimpleNamespace(Sweep=Sweep, runs_of=runs_of, steps_of=steps_of, client_of=client_of)


class Server:
    """`mlflow server` on a port of its own, on one sqlite file, to be killed and started again."""

    def __init__(self, folder, template):
        folder.mkdir()
        self.folder = folder
        (folder / "server.db").write_bytes(template.read_bytes())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        quiet["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven more processes that nothing here needs
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | quiet,
            )
        for _ in range(10 * SERVER_S):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.1)
        raise AssertionError("the server never answered")

    def kill(self):
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


@pytest.fixture
def server(tmp_path, template):
    server = Server(tmp_path / "server", template)
    yield server
    server.kill()
