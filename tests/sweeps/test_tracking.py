"""The mirror against real stores: a sqlite file, and an `mlflow server` that is killed and started again."""

import contextlib
import json
import math
import os
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from engines.errors import InputError
from sweeps.journal import SweepState
from sweeps.tracking import Tracker, check_reachable, default_uri
from trainables.record import Record

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 240  # the machine may be loaded: generous, and reached only by a failure


def test_the_driver_does_not_pay_for_mlflow():
    code = "import sys, sweeps.tracking; print([m for m in ('mlflow', 'numpy', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_sweep_in_sqlite_reads_as_promised(tmp_path, paper):
    """Two sweeps start on one fresh file: MLflow's tables and the experiment are made on the way, once."""
    sweep, uri = paper.Sweep(tmp_path), default_uri(tmp_path)
    check_reachable(uri)
    record = sweep.whole("a")
    sweep.whole("b", reason="stop_loss")
    sweep.start("c", T=5)
    sweep.result("c", 1, val_drop=math.nan, train_loss=math.inf)
    sweep.journal.append("failed", trial_id="c", error="worker died")
    sweep.start("waiting", T=9)
    (sweep.folder / "files").mkdir()
    (sweep.folder / "files" / "pareto.html").write_text("<p>")
    sweep.journal.append("file", path="files/pareto.html", trial_id=None)
    sweep.journal.append("end", status="finished")
    other = paper.Sweep(tmp_path, "other")
    other.whole("z")
    trackers = [Tracker(each.journal.path, uri) for each in (sweep, other)]
    for tracker in trackers:
        tracker.start()
    for tracker in trackers:
        assert tracker.flush(WAIT_S), tracker.problem
        tracker.close()

    assert paper.runs_of(uri, "other").keys() == {None, "z"}
    runs = paper.runs_of(uri, sweep.id)
    assert {key: run.info.status for key, run in runs.items()} == {
        **{None: "FINISHED", "a": "FINISHED", "b": "KILLED", "c": "FAILED"}
    }
    parent, a = runs[None], runs["a"]
    assert parent.info.run_name == "k_grid_demo_seed1" and parent.data.tags["role"] == "sweep"
    assert parent.data.params == {"lr": "0.001", "size": "64x64"}
    assert a.info.run_name == "K_a_run1"
    shared = {"lr": "0.001", "size": "64x64"}  # what the trial leaves to the settings
    assert a.data.params == {"T": "3.0", "beta": "0.5", "seed": "7"} | shared
    expected = dict(sweep_id=sweep.id, trial_id="a", exp_id="K_a_run1", task_id="K-1", role="trial", stage="K")
    expected |= dict(domain="dust3r", profile="demo", workload_hash="w1", config_hash="c1", git_commit="abc")
    expected |= {"verdict": "fail", "stop_reason": "completed", "mlflow.parentRunId": parent.info.run_id}
    assert expected.items() <= a.data.tags.items()
    assert Record.from_json(a.data.tags["record"]) == record
    assert a.data.metrics == {"val_drop": 0.5, "train_loss": 2.0, "absrel": 0.125, "drop": 0.02, "epochs": 2}
    assert runs["b"].data.tags["stop_reason"] == "stop_loss"
    assert runs["c"].data.tags["error"] == "worker died" and math.isnan(runs["c"].data.metrics["val_drop"])

    client = paper.client_of(uri)
    assert [each.name for each in client.search_experiments()].count("slimsweep") == 1
    history = client.get_metric_history(a.info.run_id, "val_drop")
    times = [round(e["t"] * 1000) for e in map(json.loads, sweep.journal.path.open()) if e["event"] == "result"]
    assert [(p.step, p.value) for p in history] == [(1, 1.0), (2, 0.5)]
    assert [p.timestamp for p in history] == pytest.approx(times[:2], abs=1)
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["pareto.html"]
    assert parent.info.artifact_uri.startswith(f"file://{tmp_path}")
    assert (sweep.folder / "tracking.log").read_text() == ""
    assert not list(tmp_path.glob("mlflow.db-*")), "the store is left as one self-contained file"


def test_the_log_of_an_outage_stays_small_and_does_not_tell_the_stores_password(storage, paper):
    sweep = paper.Sweep(storage)
    sweep.whole("a")
    (sweep.folder / "tracking.log").write_text("an outage of many days\n" * 300_000)
    tracker = Tracker(sweep.journal.path, "http://admin:s3cret@127.0.0.1:9")
    tracker.start()
    end = time.monotonic() + WAIT_S
    while tracker.problem is None and time.monotonic() < end:
        time.sleep(0.1)
    assert "admin:***@127.0.0.1:9" in tracker.problem
    tracker.close()
    told = [(sweep.folder / name).read_text() for name in ("tracked.json", "tracking.log")]
    assert all("127.0.0.1:9" in text and "s3cret" not in text for text in told)
    assert len(told[1]) < 10_000, "the log of the outage before has been put aside"


def test_the_mirror_ends_with_a_driver_that_dies_and_finishes_its_work(storage, paper):
    sweep, uri = paper.Sweep(storage), default_uri(storage)
    sweep.whole("a")
    sweep.start("b")
    sweep.result("b", 1)
    code = f"""
import time
from sweeps.tracking import Tracker
tracker = Tracker({str(sweep.journal.path)!r}, {uri!r})
tracker.start()
assert tracker.flush({WAIT_S})
print(tracker.pid, flush=True)
time.sleep(600)
"""
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with driver:
        mirror = int(driver.stdout.readline())
        sweep.result("b", 2)
        driver.kill()
    stat = Path(f"/proc/{mirror}/stat")
    for _ in range(10 * WAIT_S):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":  # no init here to collect it
                break
        except OSError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the mirror outlives its driver")
    runs = paper.runs_of(uri)
    assert {key: run.info.status for key, run in runs.items()} == {
        None: "KILLED",
        "a": "FINISHED",
        "b": "KILLED",
    }
    assert [step for step, _ in paper.steps_of(uri, runs["b"])] == [1, 2]


def test_a_server_outage_loses_nothing_even_with_the_mirror_killed_in_it(server, tmp_path, paper):
    server.start()
    check_reachable(server.uri)
    sweep = paper.Sweep(tmp_path)
    sweep.start("a", T=3)
    sweep.result("a", 1)
    tracker = Tracker(sweep.journal.path, server.uri)
    tracker.start()
    assert tracker.flush(WAIT_S), tracker.problem
    server.kill()
    with pytest.raises(InputError, match="no MLflow server answers"):
        check_reachable(server.uri)
    sweep.result("a", 2)
    sweep.whole("b")
    (sweep.folder / "log.json").write_text("{}")
    sweep.journal.append("file", path="log.json", trial_id="a")
    assert not tracker.flush(1.5)
    assert "not yet in MLflow" in tracker.problem and "\n" not in tracker.problem
    server.start()
    assert tracker.flush(WAIT_S), tracker.problem  # the same mirror, over the outage
    assert tracker.problem is None
    artifacts = paper.client_of(server.uri).list_artifacts(paper.runs_of(server.uri)["a"].info.run_id)
    assert [file.path for file in artifacts] == ["log.json"]

    server.kill()
    sweep.result("a", 3)
    assert not tracker.flush(1)
    os.kill(tracker.pid, signal.SIGKILL)
    tracker.close()
    sweep.result("a", 4)
    sweep.finish("a", 4, "plateau")
    sweep.journal.append("end", status="finished")
    # The server's own file stands in for a third start of it: the same runs by another address.
    store = f"sqlite:///{server.folder}/server.db"
    tracker = Tracker(sweep.journal.path, store)
    tracker.start()
    assert not tracker.flush(WAIT_S)  # only the artifact, which goes by the server alone, finds no way
    assert tracker.problem.count("not logged") == 1 and "log.json" in tracker.problem
    tracker.close()
    runs = paper.runs_of(store)
    assert {key: run.info.status for key, run in runs.items()} == {None: "FINISHED", "a": "KILLED", "b": "FINISHED"}
    assert paper.steps_of(store, runs["a"]) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert [step for step, _ in paper.steps_of(store, runs["b"])] == [1, 2]
    wanted = SweepState.replay(sweep.journal.path).trials["a"].record
    assert json.loads(runs["a"].data.tags["record"]) == wanted


@contextlib.contextmanager
def speaks(answer):
    """The port of a server that gives everyone the same answer, whatever was asked, and hangs up."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\n\r\n<html>Hello</html>",
        b"HTTP/1.0 200 OK\r\n\r\n7",
        b"HTTP/1.0 404 Not Found\r\n\r\nwhat?",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_a_port_in_other_use_is_not_taken_for_mlflow(answer):
    with speaks(answer) as port, pytest.raises(InputError, match="something answers, but it is no MLflow") as error:
        check_reachable(f"http://127.0.0.1:{port}")
    assert "\n" not in str(error.value) and f"127.0.0.1:{port}" in str(error.value)


@pytest.mark.parametrize(
    ("revision", "said"),
    [("451aebb31d03", "made by an older version of MLflow than .*mlflow db upgrade sqlite:///"),
     ("ffffffffffff", "made by another version of MLflow than .*revision ffffffffffff")],
)  # fmt: skip
def test_a_store_of_another_mlflow_version_is_refused(storage, revision, said):
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    check_reachable(uri)  # as this version made it
    with sqlite3.connect(storage / "mlflow.db") as database:
        database.execute("update alembic_version set version_num = ?", (revision,))
    with pytest.raises(InputError, match=said) as caught:
        check_reachable(uri)
    assert "\n" not in str(caught.value)


def test_a_locked_store_and_one_of_something_else_are_refused(storage, tmp_path):
    with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as holder:
        holder.execute("begin exclusive")
        with pytest.raises(InputError, match="has locked the database for over 0.1 s"):
            check_reachable(f"sqlite:///{storage / 'mlflow.db'}", timeout_s=0.1)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("create table mine (x)")
    with pytest.raises(InputError, match="not a database of MLflow"):
        check_reachable(f"sqlite:///{tmp_path / 'other.db'}")
    (tmp_path / "empty.db").touch()
    check_reachable(f"sqlite:///{tmp_path / 'empty.db'}")


def test_unusable_addresses_end_in_one_line(tmp_path):
    (tmp_path / "text.db").write_text("certainly no database")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        for uri, words in {
            f"http://127.0.0.1:{port}": "no MLflow server answers",
            "http://127.0.0.1:port": "expected http://HOST:PORT",
            "http:///x": "expected http://HOST:PORT",
            f"postgresql://me:secret@127.0.0.1:{port}/x": "no database answers",
            f"sqlite:///{tmp_path}/text.db": "not a sqlite database",
            f"sqlite:///{tmp_path}/text.db/x.db": "text.db",
            "sqlite:///:memory:": "expected sqlite:///FILE",
            "file:///x": "expected sqlite:///FILE",
            "mlruns": "expected sqlite:///FILE",
        }.items():
            with pytest.raises(InputError, match=words) as error:
                check_reachable(uri)
            assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert (tmp_path / "text.db").read_text() == "certainly no database"
