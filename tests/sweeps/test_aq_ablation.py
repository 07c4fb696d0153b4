"""AQ-5 as a user runs it, at a tiny size; and its design: contrasts compare arms that differ in one thing alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sweeps.aq_ablation import AQ
from sweeps.journal import NAME, SweepState
from sweeps.launch import run
from trainables import checkpoint
from trainables.alphaqubit.model import build

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "sweeps" / "aq_ablation.py"
TINY = (
    "rounds=2",
    "epochs=1",
    "samples_per_epoch=256",
    "train_samples=256",
    "val_shots=64",
    "test_shots=200",
    "p=0.02",
)
ARMS = {trial.combo: dict(trial.params) for trial in AQ.trials}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(3)
    model = build(dim=8, key_dim=4, conv_channels=16, bias_dim=8, readout_dim=16, distance=3, basis="Z")
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    checkpoint.save(path, {"model": model.state_dict(), "config": model.config})
    return path


@pytest.fixture(scope="module")
def ablation(teacher, tmp_path_factory):
    """Two seeds of all arms through the real script; its folder and its screen."""
    storage = tmp_path_factory.mktemp("runs")
    sets = [word for item in (*TINY, f"teacher={teacher}") for word in ("--set", item)]
    command = [sys.executable, str(SCRIPT), "--profile", "demo", "--seeds", "2", "--storage", str(storage), *sets]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return storage / "aq_ablation_demo_seed42", done.stdout


def test_both_files_hold_every_effect_with_its_interval_and_sentence(ablation):
    folder, screen = ablation
    for comparison in AQ.comparisons:
        content = json.loads((folder / "files" / comparison.file).read_text())
        assert [one["arm"] for one in content["effects"]] == [one.name for one in comparison.contrasts]
        assert "why" not in content and content["metric"] == "ler" and content["arms"].keys() == set(comparison.arms)
        for one in content["effects"]:
            assert one["lo"] <= one["value"] <= one["hi"] and len(one["by_seed"]) == 2 and one["samples"] == 200
            assert one["says"] in screen and one["resolved"] == (one["lo"] > 0 or one["hi"] < 0)
        assert content["caution"].startswith("Each interval is for its effect alone")
    assert "ablation_stages.json" in screen and (folder / "files" / "ablation_signals.png").stat().st_size > 20000


def test_pictures_and_files_are_logged_and_nothing_was_timed(ablation):
    folder, _ = ablation
    state = SweepState.replay(folder / NAME)
    events = [json.loads(line) for line in (folder / NAME).read_text().splitlines()]
    told = {event["path"] for event in events if event["event"] == "file"}
    assert {f"files/{name}" for name in AQ.effect_files} <= told
    records = [trial.record for trial in state.trials.values() if trial.role == "trial"]
    assert len(records) == 20 and {record["seed"] for record in records} == {42, 43}
    assert all(record["t_pair_p50_ms"] is None and record["ler"] is not None for record in records)


def test_one_cache_per_seed_and_one_set_of_probes_serve_all_arms(ablation):
    cache = ablation[0].parent / "cache"
    assert len(list(cache.glob("*/layout.json"))) == 2 and len(list(cache.glob("probes_*.pth"))) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--set", "fusion=none"], "give fusion=cached"), (["--set", "fusion=gone.pth"], "gone.pth: no such file")],
)
def test_fused_arms_without_probes_are_refused_in_one_line(capsys, tmp_path, teacher, flags, said):
    flags = [*flags, "--set", f"teacher={teacher}", "--storage", str(tmp_path / "runs")]
    assert run(AQ, [*flags, "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1 and not (tmp_path / "runs").exists()


SIGNAL_OF = {"transformer": {"transformer"}, "rnn": {"rnn"}, "readout": {"readout"}}


@pytest.mark.parametrize("name", SIGNAL_OF)
def test_main_effects_of_signals_compare_arms_that_differ_in_that_signal_alone(name):
    (found,) = [one for one in AQ.comparisons[0].contrasts if one.kind == "main" and one.name == name]
    with_it = [arm for arm, weight in found.weights.items() if weight > 0]
    without = [arm for arm, weight in found.weights.items() if weight < 0]
    bare = [{key: value for key, value in ARMS[arm].items() if key != name} for arm in with_it]
    assert all(name in ARMS[arm] for arm in with_it) and sorted(map(str, bare)) == sorted(str(ARMS[a]) for a in without)


def test_stages_share_steps_and_interactions_are_crossed():
    assert all("epochs" not in params and "lr" not in params for params in ARMS.values())
    first = {key: value for key, value in ARMS["stage1-fused"].items() if key not in ("beta", "fused")}
    assert first == ARMS["stage1-final"] and ARMS["stage1-fused"]["fused"]["shares"] == first["rnn"]["shares"]
    assert {key: value["step"][0] for key, value in first.items()} == ARMS["all"], "Stage 1 is all signals, halved"
    for comparison in AQ.comparisons:
        kinds = {one.kind for one in comparison.contrasts}
        assert kinds == {"arm", "main", "interaction"}
