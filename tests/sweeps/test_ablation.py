"""An ablation's sweep: every arm under every seed, effects in the log and on the screen, files by their suffix."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis.contrasts import Comparison, against
from sweeps.ablation import found
from sweeps.journal import NAME, SweepState
from sweeps.ledger import Ledger

TOY = Path(__file__).parent / "toy_sweep.py"


def run(storage, *flags, **env):
    command = [sys.executable, str(TOY), "--storage", str(storage), *flags]
    whole = {**os.environ, "TOY_TRIALS": "arms", "TOY_EPOCHS": "2", **env}
    return subprocess.run(command, env=whole, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    storage = tmp_path_factory.mktemp("arms")
    done = run(storage, "--seed", "5")
    assert done.returncode == 0, done.stderr[-2000:]
    return storage / "toy_small_seed5", done.stdout


def test_every_arm_runs_under_every_seed(arms):
    state = SweepState.replay(arms[0] / NAME)
    records = [trial.record for trial in state.trials.values() if trial.role == "trial"]
    assert sorted((r["combo"], r["seed"], r["exp_id"]) for r in records) == sorted(
        (arm, 5 + i, f"T_{arm}_run{i + 1}") for arm in ("kept", "out") for i in range(3)
    )


def test_effects_are_in_the_log_and_on_the_screen(arms):
    (effect,) = json.loads((arms[0] / "files" / "log.json").read_text())["effects"]
    assert effect["arm"] == "out" and effect["reference"] == "kept" and len(effect["by_seed"]) == 3
    assert effect["value"] == pytest.approx(0.2, abs=0.01) and 0 < effect["lo"] < effect["value"] < effect["hi"]
    assert effect["says"] in arms[1] and "out is worse than kept" in effect["says"]


def test_a_trial_that_broke_is_no_measure_of_its_arm(arms, tmp_path):
    folder = tmp_path / arms[0].name
    shutil.copytree(arms[0], folder)
    sweep = SimpleNamespace(all_comparisons=(Comparison("log.json", "Effects", (against("out", "kept"),)),))
    with contextlib.closing(Ledger.open(folder, resume=True).journal) as journal:
        (broken,) = [t for t in SweepState.replay(folder / NAME).trials.values() if t.exp_id == "T_out_run1"]
        record = {**broken.record, "stop_reason": "out_of_memory", "epochs": 1}
        journal.append("record", trial_id=broken.trial_id, record=record)
    ledger = Ledger.open(folder, resume=True)
    ledger.journal.close()
    (one,) = found(sweep, ledger)
    assert [len(effect.by_seed) for effect in one.effects] == [2]
    assert one.why == ("T_out_run1 ended by out_of_memory after 1 epochs: left out",)


def test_files_follow_their_suffix_and_the_engine_brings_its_manifest_and_source(arms):
    files = arms[0] / "files"
    chosen = json.loads((files / "log.json").read_text())["choice"]["exp_id"]
    assert (files / "best.pth").read_text().startswith("weights") and chosen.startswith("T_kept")
    assert (files / "best.onnx").read_text() == f"graph of {chosen}"
    for suffix in ("trt", "trt.json", "qdq.onnx"):
        assert (files / f"best.{suffix}").read_text() == f"engine of {chosen}"
    for name, run_ in (("out.onnx", 1), ("out_run2.onnx", 2), ("out_run3.onnx", 3)):
        assert (files / name).read_text() == f"graph of T_out_run{run_}", "each seed has a file of its own"
    (record,) = [t.record for t in SweepState.replay(arms[0] / NAME).trials.values() if t.exp_id == chosen]
    assert record["trt"] == "compiled, not executed" and record["trt_int8_share"] == 1


def test_without_a_compiler_the_sweep_ends_well_and_says_why(tmp_path):
    done = run(tmp_path, "--seeds", "1", TOY_REFUSES="1")
    assert done.returncode == 0, done.stderr[-2000:]
    files = tmp_path / "toy_small_seed42" / "files"
    log = json.loads((files / "log.json").read_text())
    assert not (files / "best.trt").exists() and (files / "best.onnx").exists()
    assert any((t["record"] or {}).get("trt") == "not built: RuntimeError: no compiler here" for t in log["trials"])
    assert log["effects"] == [] and "share 1 seeds" in log["why"] and "--seeds 3" in log["why"]


def test_seeds_must_be_one_or_more(tmp_path):
    done = run(tmp_path, "--seeds", "0")
    assert done.returncode == 2 and done.stderr == "error: --seeds 0: expected 1 or more\n"
    assert not list(tmp_path.iterdir())
