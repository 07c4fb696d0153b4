"""The P sweep as a script: what it plans, what it refuses, what its search keeps to."""

from pathlib import Path

import pytest

from sweeps.launch import run
from sweeps.measure import judge
from sweeps.p_prune import SMALLER, P
from sweeps.plan import Planner
from sweeps.search import Search
from sweeps.settings import resolve
from sweeps.training import rule_of
from trainables.record import Record, now


def planner() -> Planner:
    return Planner(P, resolve(P.settings, "small", {}), 42)


def test_dry_run_shows_the_plan_and_starts_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    assert run(P, ["--dry-run", "--storage", str(storage), "--search", "optuna", "--samples", "4"]) == 0
    out = capsys.readouterr().out
    for word in ("P-1", "P_r010_run1", "pruned_r010.pth", "P-2", "P_r030_run1", "pruned_r030.pth", "prune_eval.json",
                 "result_table.csv, pareto.csv, pareto.png, pareto.html, curves.png, workload.yaml"):  # fmt: skip
        assert word in out, word
    assert "4 trials that Optuna chooses" in out and "10 epochs" in out
    assert not storage.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--set", "residual=4"], "rho=0.3 x residual=4 removes all there is"),
        (["--set", "steps=9"], "steps=9 need at least 18 epochs"),
        (["--set", "ratios=l1"], "--set ratios=l1: Input should be"),
        (["--set", "rho=0.2"], "every trial of this sweep sets rho itself"),
    ],
)
def test_refused_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], said: str) -> None:
    assert run(P, [*flags, "--storage", str(tmp_path / "runs")]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()


def test_the_budget_is_three_percent_and_epochs_are_the_plans() -> None:
    rule = rule_of(P, resolve(P.settings, "small", {}).values)
    assert rule.budget == 0.03 and 10 <= rule.max_evals <= 15


@pytest.mark.parametrize(
    ("drop", "down", "first", "second"),
    [(0.02, 0.29, "pass", "pass"), (0.02, 0.10, "pass", "fail"), (0.05, 0.29, "fail", "fail")],
)
def test_a_quarter_fewer_parameters_is_asked_of_rho_30_percent(
    drop: float, down: float, first: str, second: str
) -> None:
    plan = planner()
    record = Record(exp_id="P_r030_run1", datetime=now(), drop=drop, extra={"params_down": down})
    verdicts = [judge(record, P.gate, plan.plan(trial))[0] for trial in P.trials]
    assert verdicts == [first, second]


def test_searched_trials_stay_within_the_settings_and_carry_the_gate() -> None:
    asked = Search(P.space, planner(), P.search_task, 1).ask(30)
    assert all(trial.gates == (SMALLER,) and trial.task_id == "P-3" for trial in asked)
    assert {trial.params["ratios"] for trial in asked} == {"uniform", "sensitivity"}
    assert len({trial.exp_id for trial in asked}) == 30
    assert all(trial.exp_id.startswith("P_r") for trial in asked)
