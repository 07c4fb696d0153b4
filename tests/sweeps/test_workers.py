"""--workers-per-trial: a real sweep whose trial is trained by two workers, one of which is killed."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from sweeps.aq_pretrain import AQ
from sweeps.hours import on_gpu, trained
from sweeps.journal import SweepState, TrialState
from sweeps.launch import run, take_order
from trainables import checkpoint
from trainables.pretrain import Pretrain

ROOT = Path(__file__).parents[2]
FLAGS = ["--profile", "demo", "--set", "samples_per_epoch=8192", "--set", "val_shots=1000", "--workers-per-trial", "2"]


def at_work(driver: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def listening(process: psutil.Process) -> set[str]:
    return {one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}


def test_a_sweep_trains_with_two_workers_and_outlives_one(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    script = [sys.executable, str(ROOT / "sweeps/aq_pretrain.py"), "--storage", str(storage), *FLAGS]
    home = tmp_path / "home"
    home.mkdir()
    driver = subprocess.Popen(
        script,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(home)},
    )
    journal, killed = storage / "aq_pretrain_demo_seed42" / "journal.jsonl", []
    end = time.monotonic() + 200
    while not killed:  # in its second epoch
        assert time.monotonic() < end and driver.poll() is None, driver.communicate(timeout=60)
        if journal.is_file() and '"result"' in journal.read_text():
            followers = at_work(driver, "ray::Follower.train")
            leaders = at_work(driver, "ray::ResourceTrainable")
            killed = followers if leaders else []  # a process that is changing its title has none
            for process in [*killed, *leaders]:
                assert listening(process) <= {"127.0.0.1", "::ffff:127.0.0.1"}, "these ports ask for no token"
            for process in killed:
                process.kill()
        time.sleep(0.05)
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert "Traceback" not in out + err
    assert not (home / "ray_results").exists(), "Ray's own place for what a trial leaves"

    state = SweepState.replay(journal)
    (trial,) = state.trials.values()
    assert [epoch for epoch, _ in trial.results] == [1, 2, 3]
    assert trial.record and trial.record["stop_reason"] == "completed"
    reports = [metrics for _, metrics in trial.results]
    assert {report["workers"] for report in reports} == {2}
    assert trial.record["cpu_hours"] == pytest.approx(sum(report["cpu_s"] for report in reports) / 3600)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(storage) in " ".join(p.info["cmdline"] or [])]

    values = take_order(AQ, ["--storage", str(storage), *FLAGS], "").resolved.values
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path / "one"
    config = {"trial_id": "one", "domain": "alphaqubit", "params": {}, "seed": 42, "state_dir": str(folder)}
    alone = Pretrain({**config, "settings": {**values, "accumulate": 2}})
    expected = [alone.step() for _ in range(3)]
    torch.set_num_threads(before)
    assert [report["val_quality"] for report in reports] == [report["val_quality"] for report in expected]
    files = (journal.parent / "files/teacher_decoder.pth", folder / "best.pth")
    own, other = (checkpoint.load(file)["model"] for file in files)
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def test_hours_are_those_of_all_workers() -> None:
    epochs = [{"epoch_s": 1800.0, "cpu_s": 3000.0, "workers": 4.0}, {"epoch_s": 3600.0, "cpu_s": 3600.0}]
    trial = TrialState("a", "A", "T-1", "trial", {}, None, results=list(enumerate(epochs, 1)))
    assert not on_gpu(trial) and trained(trial) == pytest.approx(6600 / 3600), "what is reported is the sum already"
    cards = [one | {"gpus": gpus} for one, gpus in zip(epochs, (4.0, 0.5), strict=True)]
    trial = TrialState("a", "A", "T-1", "trial", {}, None, results=list(enumerate([*cards, epochs[1]], 1)))
    assert on_gpu(trial) and trained(trial) == 2.5, "four cards, then half a card; the last epoch was of a CPU"


@pytest.mark.parametrize("mode", [["--dry-run"], []])
def test_batches_that_do_not_cut_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mode: list[str]
) -> None:
    assert run(AQ, ["--profile", "demo", "--storage", str(tmp_path / "runs"), "--workers-per-trial", "3", *mode]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --workers-per-trial 3: batch_size=256 with accumulate=1") and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_there_is_room_for_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(AQ, ["--profile", "demo", "--storage", str(tmp_path / "runs"), "--workers-per-trial", "128"]) == 2
    assert "--workers-per-trial 128: the cluster has room for" in capsys.readouterr().err
