"""The launcher on a toy sweep, with real Ray, real MLflow and real kills; the sweep itself is
toy_sweep.py.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sweeps.journal import SweepState, read_events
from sweeps.launch import comparing
from sweeps.tracking import masked
from trainables.record import FIELDS, read_csv

TOY = Path(__file__).with_name("toy_sweep.py")
NAME = "toy_small_seed42"


def start(storage: Path, *flags: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOY), "--storage", str(storage), *flags]
    pipe = subprocess.PIPE
    # A working directory of its own, so that a test can see what lands there.
    here = Path(storage.parent) / f"{storage.name}-cwd"
    here.mkdir(exist_ok=True)
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **env}, cwd=here)


def finish(process: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def replay(folder: Path) -> SweepState:
    return SweepState.replay(folder / "journal.jsonl")


def mlflow_runs(storage: Path, db: str = "mlflow.db") -> dict[str, str]:
    with sqlite3.connect(storage / db) as store:
        rows = store.execute("select name, status from runs").fetchall()
    assert len(rows) == len({name for name, _ in rows}), f"a run stands twice: {rows}"
    return dict(rows)


def mlflow_steps(storage: Path, run_name: str, db: str = "mlflow.db") -> list[int]:
    query = (
        "select m.step from metrics m join runs r on r.run_uuid = m.run_uuid "
        "where r.name = ? and m.key = 'val_drop' order by m.step"
    )
    with sqlite3.connect(storage / db) as store:
        return [step for (step,) in store.execute(query, (run_name,))]


def wait_for(folder: Path, epochs: int, process: subprocess.Popen[str]) -> None:
    """Until the sweep's trials have together reported so many epochs."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (folder / "journal.jsonl").is_file():
            state = replay(folder)
            if sum(len(trial.results) for trial in state.trials.values()) >= epochs:
                return
        time.sleep(0.1)
    raise AssertionError(f"no {epochs} epochs: {process.poll()} {finish(process, 10)}")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One sweep with every kind of trial, and two searched ones; its storage and what it printed."""
    storage = tmp_path_factory.mktemp("faulty")
    flags = ("--search", "optuna", "--samples", "2")
    code, out, err = finish(start(storage, *flags, TOY_TRIALS="faulty"))
    assert code == 0, err
    return storage, out


def test_a_bad_trial_does_not_disturb_the_others(faulty: tuple[Path, str]) -> None:
    storage, _ = faulty
    state = replay(storage / f"{NAME}_optuna")
    by_task = {trial.task_id: trial for trial in state.trials.values()}
    records = {task: trial.record or {} for task, trial in by_task.items()}
    assert records["T-1"]["verdict"] == "pass" and records["T-1"]["stop_reason"] == "completed"
    assert records["T-2"]["verdict"] == "fail" and records["T-2"]["stop_reason"] == "diverged"
    assert by_task["T-2"].epoch == 2
    assert records["T-3"]["verdict"] == "fail" and records["T-3"]["stop_reason"] == "failed"
    assert "RuntimeError: the toy broke" in records["T-3"]["notes"]
    assert records["P0-2"]["verdict"] == "n/a" and records["P0-2"]["exp_id"] == "P0_teacher_run1"
    assert state.ended == "finished"


def test_a_killed_worker_goes_on_from_its_own_state(faulty: tuple[Path, str]) -> None:
    storage, _ = faulty
    folder = storage / f"{NAME}_optuna"
    killed = next(trial for trial in replay(folder).trials.values() if trial.task_id == "T-4")
    assert (folder / "trials" / killed.trial_id / "went_wrong").exists()
    assert [epoch for epoch, _ in killed.results] == [1, 2, 3, 4]
    steps = (folder / "trials" / killed.trial_id / "steps.log").read_text().split()
    assert steps == ["1", "2", "3", "4"], "an epoch that was saved was trained again"


def test_files_and_screen_hold_what_was_promised(faulty: tuple[Path, str]) -> None:
    storage, out = faulty
    files = storage / f"{NAME}_optuna" / "files"
    names = {path.name for path in files.iterdir()}
    assert {"good.pth", "best.pth", "log.json", "result_table.csv", "pareto.png", "pareto.html"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    table = read_csv(files / "result_table.csv")
    assert len(table) == 7 and table[0].task_id == "P0-2"
    log = json.loads((files / "log.json").read_text())
    chosen = log["choice"]["exp_id"]
    assert chosen == "T_good_run1" and chosen in log["choice"]["why"]
    assert (files / "best.pth").read_text() == (files / "good.pth").read_text() == "weights after epoch 4"
    for word in (
        "T_good_run1",
        "diverged",
        "RuntimeError",
        "mlflow ui --backend-store-uri sqlite:",
        "Wall time",
    ):
        assert word in out
    assert "Traceback" not in out


def test_mlflow_holds_every_run_once_and_none_is_left_running(faulty: tuple[Path, str]) -> None:
    storage, _ = faulty
    runs = mlflow_runs(storage)
    assert len(runs) == 8
    assert "RUNNING" not in runs.values()
    assert runs["T_good_run1"] == "FINISHED" and runs["T_nan_run1"] == "KILLED" and runs["T_raises_run1"] == "FAILED"
    assert mlflow_steps(storage, "T_good_run1") == [1, 2, 3, 4]


def test_all_that_a_sweep_writes_lies_in_its_storage(faulty: tuple[Path, str]) -> None:
    storage, _ = faulty
    assert not list(storage.with_name(f"{storage.name}-cwd").iterdir())
    with sqlite3.connect(storage / "mlflow.db") as store:
        rows = store.execute("select name, artifact_location from experiments").fetchall()
    root = (storage / "mlartifacts").as_uri()
    assert {name for name, _ in rows} == {"Default", "slimsweep"}
    assert all(place.startswith(root) for _, place in rows), rows
    assert list((storage / "mlartifacts").rglob("pareto.html"))


def test_search_asks_beyond_the_plan(faulty: tuple[Path, str]) -> None:
    storage, _ = faulty
    events = list(read_events(storage / f"{NAME}_optuna" / "journal.jsonl"))
    searched = [event for event in events if event["event"] == "trial" and "search" in event]
    assert len(searched) == 2 and len({event["params"]["floor"] for event in searched}) == 2
    assert all(0 <= event["params"]["floor"] <= 0.2 for event in searched)


def test_nothing_is_lost_when_the_driver_dies(tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, each in mid-trial, then --resume to the end."""
    folder = tmp_path / NAME
    env = {"TOY_SLEEP": "0.5", "TOY_EPOCHS": "8"}
    first = start(tmp_path, **env)
    wait_for(folder, 3, first)
    first.send_signal(signal.SIGTERM)
    code, out, err = finish(first)
    assert code == 130, err
    assert "--resume" in out and "nothing finished is lost" in out
    assert replay(folder).ended == "interrupted"
    before = sum(len(trial.results) for trial in replay(folder).trials.values())

    second = start(tmp_path, "--resume", **env)
    wait_for(folder, before + 4, second)
    second.kill()
    finish(second)

    code, out, err = finish(start(tmp_path, "--resume", **env))
    assert code == 0, err
    state = replay(folder)
    good, bad = (next(t for t in state.trials.values() if t.task_id == task) for task in ("T-1", "T-2"))
    assert [epoch for epoch, _ in good.results] == list(range(1, 9))
    assert good.record and good.record["verdict"] == "pass" and bad.record and bad.stop
    for trial in (good, bad):
        steps = (folder / "trials" / trial.trial_id / "steps.log").read_text().split()
        # The epoch in progress when a driver dies may be trained again; no finished one may.
        assert [int(step) for step in steps] == list(range(1, len(steps) + 1))
    runs = mlflow_runs(tmp_path)
    assert len(runs) == 4 and "RUNNING" not in runs.values()
    assert mlflow_steps(tmp_path, "T_good_run1") == list(range(1, 9))


def test_nothing_is_lost_when_the_mlflow_server_dies_nor_when_the_driver_dies_with_it(tmp_path: Path, server) -> None:
    """A real server is killed and started again in mid-sweep, then killed for good, and the driver in that outage."""
    server.start()
    storage = tmp_path / "storage"
    folder, flags = storage / NAME, ("--tracking-uri", server.uri)
    env = {"TOY_SLEEP": "0.7", "TOY_EPOCHS": "12"}
    first = start(storage, *flags, **env)
    wait_for(folder, 3, first)
    server.kill()
    wait_for(folder, 6, first)
    server.start()
    wait_for(folder, 9, first)
    server.kill()
    wait_for(folder, 12, first)
    first.kill()
    finish(first)
    reported = {trial.exp_id: len(trial.results) for trial in replay(folder).trials.values()}

    code, _, err = finish(start(storage, "--resume", *flags, **env))
    assert code == 2 and "no MLflow server answers" in err, "an address that nobody answers is refused at the start"
    server.start()
    code, out, err = finish(start(storage, "--resume", *flags, **env))
    assert code == 0 and "Not all is in MLflow" not in out, err
    for trial in replay(folder).trials.values():
        epochs = [epoch for epoch, _ in trial.results]
        assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) >= reported[trial.exp_id]
        assert mlflow_steps(server.folder, trial.exp_id, "server.db") == epochs, trial.exp_id
    runs = mlflow_runs(server.folder, "server.db")
    assert len(runs) == 4 and "RUNNING" not in runs.values()


def test_resume_tries_again_what_failed(tmp_path: Path) -> None:
    """A training and a measurement that failed are done again, and their old records do not survive it."""
    folder, env = tmp_path / NAME, {"TOY_TRIALS": "healing"}
    code, _, err = finish(start(tmp_path, **env))
    assert code == 0, err
    before = {trial.task_id: trial.record or {} for trial in replay(folder).trials.values()}
    assert before["T-2"]["stop_reason"] == "failed" and before["T-2"]["epochs"] == 2
    assert before["T-3"]["unmeasured"] == "latency" and before["T-3"]["t_pair_p50_ms"] is None
    assert "latency not measured: RuntimeError: the toy cannot be timed" in before["T-3"]["notes"]

    # What can still go on keeps the state to go on from.
    going_on = {
        t.task_id: bool(list((folder / "trials" / key).glob("state.pt"))) for key, t in replay(folder).trials.items()
    }
    assert going_on == {"P0-2": False, "T-1": False, "T-2": True, "T-3": True}

    (folder / "healed").touch()
    code, _, err = finish(start(tmp_path, "--resume", **env))
    assert code == 0, err
    after = {trial.task_id: trial.record or {} for trial in replay(folder).trials.values()}
    assert after["T-2"]["stop_reason"] == "completed" and after["T-2"]["epochs"] == 4
    assert after["T-2"]["verdict"] == "pass" and not after["T-2"]["notes"]
    assert after["T-3"]["t_pair_p50_ms"] == 1.0 and "unmeasured" not in after["T-3"] and not after["T-3"]["notes"]
    assert after["T-1"] == before["T-1"], "what was finished was measured again"
    assert not list(folder.glob("trials/*/state.pt"))
    assert mlflow_runs(tmp_path)["T_sick_run1"] == "FINISHED"


@pytest.mark.slow
def test_a_trial_that_hangs_is_retried_once_then_recorded(tmp_path: Path) -> None:
    """One hangs once and still gets to its end from its last epoch; the other hangs whenever it is started."""
    code, _, err = finish(start(tmp_path, "--hang-after", "0.1", TOY_TRIALS="hanging"))
    assert code == 0, err
    once, always = (next(t for t in replay(tmp_path / NAME).trials.values() if t.task_id == k) for k in ("T-1", "T-2"))
    assert [epoch for epoch, _ in once.results] == [1, 2, 3, 4] and once.record and once.record["verdict"] == "pass"
    assert always.record and always.record["stop_reason"] == "failed" and always.epoch == 1
    assert "hung after epoch 1: no report for 0.1 min, twice" in always.record["notes"]


def test_a_trial_that_is_killed_or_hangs_while_another_trials_worker_builds_it_is_tried_again(tmp_path: Path) -> None:
    flags = ("--max-concurrent", "1", "--hang-after", "0.1")
    code, out, err = finish(start(tmp_path, *flags, TOY_TRIALS="building"))
    assert code == 0 and "failed" not in out, out + err
    trials = [trial for trial in replay(tmp_path / NAME).trials.values() if trial.results]
    assert len(trials) == 3
    for trial in trials:
        assert (tmp_path / NAME / "trials" / trial.trial_id / "went_wrong").exists() == (trial.task_id != "T-1")
        assert [epoch for epoch, _ in trial.results] == [1, 2, 3, 4] and trial.error is None
        assert all(metrics["epoch_s"] < 1 for _, metrics in trial.results), "building is no part of an epoch"


@pytest.mark.parametrize("toys, count", [("leaving", 8), ("noticed", 1)])
def test_deaths_that_are_not_a_trials_own_fault_do_not_end_it(tmp_path: Path, toys: str, count: int) -> None:
    """Workers die just after a trial's last report, mostly while they are made ready for the next one; a trial has
    failed as often as it may when its node is taken away.
    """
    code, out, err = finish(start(tmp_path, "--max-concurrent", "2", TOY_TRIALS=toys))
    trials = [trial for trial in replay(tmp_path / NAME).trials.values() if trial.role == "trial"]
    assert code == 0 and [trial.error for trial in trials] == [None] * count, out + err
    assert {trial.stop[1] if trial.stop else None for trial in trials} == {"completed"}


def test_a_trainable_that_cannot_become_another_trial_is_made_anew(tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path, "--max-concurrent", "1", TOY_ANEW="1"))
    assert code == 0 and "failed" not in out, out + err
    trials = [trial for trial in replay(tmp_path / NAME).trials.values() if trial.role == "trial"]
    assert [trial.stop[1] if trial.stop else None for trial in trials] == ["completed", "stop_loss"]
    for trial in trials:
        log = tmp_path / NAME / "trials" / trial.trial_id / "steps.log"
        assert log.read_text().split() == [str(epoch) for epoch, _ in trial.results]


def test_ctrl_c_during_the_imports_is_one_line(tmp_path: Path) -> None:
    """While Ray is loaded, and while torch is, which comes later."""
    command = [sys.executable, "sweeps/k_grid.py", "--storage", str(tmp_path / "runs")]
    root, pipe = TOY.parents[2], subprocess.PIPE
    for library in ("_raylet.so", "libtorch_cpu"):
        env = {**os.environ, "PYTHONPATH": str(root)}
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=root, env=env)
        end = time.monotonic() + 120
        while library not in Path(f"/proc/{process.pid}/maps").read_text():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert finish(process) == (130, "", "Interrupted.\n"), library
    assert not list(tmp_path.iterdir())


def test_a_whole_baseline_passes(tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path, TOY_TRIALS="baseline", TOY_WHOLE="1"))
    assert code == 0 and not err, err
    record = json.loads((tmp_path / NAME / "files" / "teacher.json").read_text())
    assert list(record)[:25] == list(FIELDS)
    assert record["verdict"] == "pass" and record["verdict_detail"].endswith("are all measured")
    assert not list((tmp_path / NAME / "files").glob("*.pth"))


@pytest.mark.parametrize("trials", ["hopeless", "baseline"])
def test_a_sweep_that_ends_with_nothing_to_use_says_so(tmp_path: Path, trials: str) -> None:
    """No weights at all; and a baseline of which the toy measures half."""
    code, out, err = finish(start(tmp_path, TOY_TRIALS=trials))
    assert code == 1 and not err, err
    assert "Wall time" in out and replay(tmp_path / NAME).ended == "finished"
    if trials == "baseline":
        record = json.loads((tmp_path / NAME / "files" / "teacher.json").read_text())
        assert record["verdict"] == "fail"
        assert record["verdict_detail"] == (
            "not measured: chamfer, rmse, delta1, params_M, flops_G, size_MB, pairs_per_sec"
        )


def test_passwords_stay_off_the_screen() -> None:
    assert comparing("http://host:5000") == "open http://host:5000"
    # The program itself is named as this shell would find it: bare, or by its path in the environment.
    assert comparing("sqlite:////a b/mlflow.db").endswith("mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'")
    shown = comparing("postgresql://me:s3cr:et@host/db")
    assert shown.endswith("mlflow ui --backend-store-uri 'postgresql://me:***@host/db'")
    assert masked("k_grid --tracking-uri mysql+pymysql://a:b@h/d --seed 1") == (
        "k_grid --tracking-uri mysql+pymysql://a:***@h/d --seed 1"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://h/d?user=u&password=s3cret&x=1", "postgresql://h/d?user=u&password=***&x=1"),
        ("http://t0ken@h:5000", "http://***@h:5000"),
        ("x postgresql://u:p@ss/w@h/d y", "x postgresql://u:***@h/d y"),
        ("http://host:5000", "http://host:5000"),
        ("http://host:5000, or http://h:1: tell a@b", "http://host:5000, or http://h:1: tell a@b"),
        ("postgresql://u:my secret@h/d", "postgresql://u:***@h/d"),
        ("postgresql://h/d?sslkey=k&sslpassword=s3cret", "postgresql://h/d?sslkey=k&sslpassword=***"),
        ("host=h password=s3cret sslpassword='my s3cret' dbname=d", "host=h password=*** sslpassword=*** dbname=d"),
        ("?odbc_connect=UID%3Du%3BPWD%3Ds3cret%3BServer%3Dh", "?odbc_connect=UID%3Du%3BPWD%3D***%3BServer%3Dh"),
        ("?odbc_connect=PWD%3D%7Bs3%3Bcr et%7D%3BServer%3Dh", "?odbc_connect=PWD%3D***%3BServer%3Dh"),
        ("UID=u;PWD={my; s3}}cret};Server=h", "UID=u;PWD=***;Server=h"),
        ("UID=u;Pwd=s3cret;Trust Server=h", "UID=u;Pwd=***;Trust Server=h"),
        ("mssql://h/d?driver=ODBC+Driver&pwd=s3%3B%26;'cret&x=1", "mssql://h/d?driver=ODBC+Driver&pwd=***&x=1"),
        (r"password='my \'s3cret' x", "password=*** x"),
        ("'postgresql://h/d?password=s3cret' --seed 1", "'postgresql://h/d?password=***' --seed 1"),
        ("http://[::1]:5000: tell a@b", "http://[::1]:5000: tell a@b"),
        ("password authentication failed for user u", "password authentication failed for user u"),
    ],
)
def test_secrets_of_addresses_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_sweep_that_exists_needs_resume_and_the_same_settings(faulty: tuple[Path, str]) -> None:
    storage, _ = faulty
    path = storage / f"{NAME}_optuna" / "journal.jsonl"
    before = path.read_bytes()
    flags = ("--search", "optuna", "--samples", "2")
    for more, said in {"": "add --resume to go on with it", "--resume": "trial T_bad_run1"}.items():
        for dry in ((), ("--dry-run",)):
            code, out, err = finish(start(storage, *flags, *more.split(), *dry))
            assert code == 2 and said in err and "--storage" in err and err.count("\n") == 1 and not out
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_machine_whose_ray_died_is_not_waited_for(tmp_path: Path) -> None:
    process = start(tmp_path, TOY_SLEEP="5")
    path = tmp_path / NAME / "journal.jsonl"
    end = time.monotonic() + 200
    while not (path.is_file() and '"result"' in path.read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.2)
    (raylet,) = (p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "raylet")
    raylet.kill()
    code, _, err = finish(process)
    assert code != 0 and replay(tmp_path / NAME).ended != "finished"
    assert "error: " in err and "--resume" in err, err
