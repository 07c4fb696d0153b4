"""The audit of the stop-loss: who is chosen, what is counted, and a whole sweep with real Ray and real MLflow."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sweeps.audit import FalseStops, false_stops, fields, is_chosen
from sweeps.journal import SweepState, TrialState
from sweeps.settings import digest

TOY = Path(__file__).with_name("toy_sweep.py")


def test_the_choice_is_a_share_that_grows_and_agrees_with_itself() -> None:
    trials = [digest(number) for number in range(2000)]
    shares = {share: {trial for trial in trials if is_chosen(trial, share)} for share in (0, 0.1, 0.3, 1)}
    assert len(shares[0]) == 0 and len(shares[1]) == 2000
    assert shares[0.1] < shares[0.3]
    assert abs(len(shares[0.3]) - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5


def trial(drops: list[float], audit: int | None, over: bool = True) -> TrialState:
    state = TrialState("t", "T_t_run1", "T-1", "trial", {}, None)
    state.results = [(epoch, {"val_drop": drop}) for epoch, drop in enumerate(drops, 1)]
    state.audit = (audit, "stop_loss", "") if audit else None
    state.stop = (len(drops), "stop_loss", "") if over else None
    return state


def test_a_false_stop_is_an_audited_trial_that_met_the_budget_after_all() -> None:
    assert fields(trial([0.3, 0.2, 0.009, 0.4], audit=2), 0.01) == {"audit_epoch": 2, "audit_met": 1}
    assert fields(trial([0.3, 0.2, 0.011], audit=2), 0.01)["audit_met"] == 0
    gone = replace(trial([0.3, 0.2, 0.009, math.nan], audit=2), stop=(4, "diverged", ""))
    assert fields(gone, 0.01)["audit_met"] == 0, "a run that diverges meets no gate"
    assert fields(trial([0.3, 0.2], audit=None), 0.01) == fields(trial([0.3, 0.2], audit=2, over=False), 0.01) == {}
    trials = [trial([0.3, 0.009], 1), trial([0.3, 0.2], 1), trial([0.3], None), trial([0.3, 0.2], 1)]
    assert false_stops(trials, 0.01) == FalseStops(audited=3, false=1)
    assert false_stops(trials[2:3], 0.01) is None


def test_the_interval_is_clopper_and_pearsons() -> None:
    # Closed forms: none of n has the upper end 1 - .025^(1/n), all of n the lower end .025^(1/n).
    assert FalseStops(10, 0).interval == pytest.approx((0, 1 - 0.025**0.1))
    assert FalseStops(10, 10).interval == pytest.approx((0.025**0.1, 1))
    assert FalseStops(20, 1).interval == pytest.approx((0.00127, 0.24873), abs=1e-5)
    assert FalseStops(20, 1).sentence.endswith("5 % false stops [0, 25].")


def run(storage: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOY), "--storage", str(storage), *flags]
    env = {**os.environ, "TOY_EPOCHS": "8"}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=storage.parent, timeout=400)


def test_a_sweep_with_an_audit_says_what_it_found_everywhere(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    done = run(storage, "--audit", "1")
    assert done.returncode == 0, done.stderr
    folder = storage / "toy_small_seed42"
    state = SweepState.replay(folder / "journal.jsonl")
    bad = next(trial for trial in state.trials.values() if trial.task_id == "T-2")
    assert bad.audit is not None and 3 <= bad.audit[0] < 8 and bad.audit[1] == "stop_loss"
    assert bad.record is not None and bad.stop is not None and bad.stop[:2] == (8, "stop_loss")
    kept = {key: bad.record[key] for key in ("stop_reason", "epochs", "audit_epoch", "audit_met")}
    assert kept == {"stop_reason": "stop_loss", "epochs": 8, "audit_epoch": bad.audit[0], "audit_met": 0}
    assert (folder / "trials" / bad.trial_id / "best.pth").read_text() == "weights after epoch 8"
    assert "0 of 1 stops that were run on to the end met the gate after all: 0 % false stops [0, 98]" in done.stdout
    assert state.summary["audited_stops"] == 1 and state.summary["false_stop_rate_hi"] == pytest.approx(0.975)
    with sqlite3.connect(storage / "mlflow.db") as store:
        query = "select m.key, m.value from metrics m join runs r on r.run_uuid = m.run_uuid where r.name = ?"
        logged = dict(store.execute(query, (folder.name,)).fetchall())
    assert logged == pytest.approx(state.summary)
    log = json.loads((folder / "files" / "log.json").read_text())
    assert log["sweep"]["settings"]["audit"] == 1

    # Another share is another sweep: who was audited could not be told apart from who was not.
    other = run(storage, "--audit", "0.5", "--resume")
    assert other.returncode == 2 and "audit was 1.0, is now 0.5" in other.stderr and other.stderr.count("\n") == 1
