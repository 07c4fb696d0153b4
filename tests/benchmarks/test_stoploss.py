"""The replay behind benchmarks/stoploss.py: clock and counts by hand, every rule on hard curves, the recorded file."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.errors import InputError
from sweeps.journal import Journal

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import stoploss as bench
import stoploss_rules as rules


def curve(*drops: float, evals: int = 6, sweep: str = "s") -> bench.Curve:
    return bench.Curve(sweep, "dust3r", "K-1", "demo", "K_a_run1", 0.01, evals, drops)


FAILS = curve(0.5, 0.4, 0.3, 0.2, 0.1, 0.1)
PASSES = curve(0.5, 0.2, 0.1, 0.02, 0.005, 0.006)
BLOWS_UP = curve(0.5, 0.4, 0.9, math.nan, math.nan, math.nan)


class StopsAt(rules.Rule):
    """Stops every trial after a number of evaluations."""

    def __init__(self, evals: int) -> None:
        self.evals = evals
        self.began: list[int] = []

    def start(self, trial: int) -> None:
        self.began.append(trial)

    def stops(self, trial: int, history: rules.History) -> bool:
        return len(history) == self.evals


def test_what_a_curve_is_worth_to_an_oracle() -> None:
    assert [c.passes for c in (FAILS, PASSES, BLOWS_UP)] == [False, True, False]
    assert [c.length for c in (FAILS, PASSES, BLOWS_UP)] == [6, 6, 4]
    assert [c.oracle for c in (FAILS, PASSES, BLOWS_UP)] == [3, 5, 3]


def test_the_clock_of_one_slot_adds_up_and_that_of_many_is_the_longest() -> None:
    curves, pace = [FAILS, PASSES, BLOWS_UP], np.random.default_rng(7).uniform(0.8, 1.25, 3)
    times = pace * [6, 6, 4]
    for slots, clock in ((1, times.sum()), (3, times.max()), (64, times.max())):
        ran, end = bench.replay(curves, rules.Rule(), slots, seed=7)
        assert ran == [6, 6, 4] and end == pytest.approx(clock)
    stopping = StopsAt(2)
    ran, end = bench.replay(curves, stopping, 1, seed=7)
    assert ran == [2, 2, 2] and end == pytest.approx(2 * pace.sum()) and stopping.began == [0, 1, 2]


def test_false_stops_regret_and_savings_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.RULES, "at 4", lambda budget, evals: StopsAt(4))
    found = bench.worth([FAILS, PASSES, curve(*FAILS.drops, sweep="t")], "at 4", 1)
    assert found.false == [False, True, False]
    assert found.saved == [2, 0, 2]  # what a false stop saves does not count
    assert found.oracle == [3, 1, 3]
    assert found.regret == pytest.approx([0.015, 0.1])
    assert " 57.1% [" in found.row() and " 33.33% [0.8%, 90.6%]" in found.row()


@pytest.mark.parametrize("name", rules.RULES)
def test_every_rule_takes_hard_curves_and_repeats_itself(name: str) -> None:
    flat = [curve(*[level] * 30, evals=30) for level in (0.5, 0.4, 0.3)]
    curves = [*bench.generated(1, 12, seed=5), *flat, curve(*BLOWS_UP.drops, evals=30)]
    for slots in (1, 4, 64):
        make = rules.RULES[name]
        ran, clock = bench.replay(curves, make(0.01, 30), slots, seed=0)
        assert (ran, clock) == bench.replay(curves, make(0.01, 30), slots, seed=0)
        assert all(evals <= c.length for evals, c in zip(ran, curves, strict=True))
        assert min(evals for evals, c in zip(ran, curves, strict=True) if c.length > 3) >= 3
        assert sum(ran) < sum(c.length for c in curves), "it stops nobody"


def test_ashas_first_rung_keeps_the_best_third_of_those_it_has_seen() -> None:
    # In order of arrival at the rung: each is compared with the 67th percentile of the rewards so far.
    levels = (0.3, 0.2, 0.4, 0.1, 0.5)
    ran, _ = bench.replay([curve(*[drop] * 30, evals=30) for drop in levels], rules.RULES["asha"](0.01, 30), 1, seed=0)
    assert [evals == 3 for evals in ran] == [False, False, True, False, True]


def test_only_settled_curves_are_recorded_and_each_once(tmp_path: Path) -> None:
    storage, path = tmp_path / "runs", tmp_path / "curves.jsonl"
    settings = {"gate_metric": "drop", "gate_at_most": 0.01, "epochs": 7}
    header = dict(name="k", stage="K", domain="dust3r", profile="demo", config_hash="c", workload_hash="w")
    runs = {
        "whole": [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.123456789],
        "stopped": [0.5, 0.4, 0.4, 0.4, 0.4, 0.4],
        "met": [0.5, 0.4, 0.3, 0.009, 0.01, 0.01],
        "blown": [0.5, 0.4, 0.3, 0.3, 0.3, 0.3, math.nan],
        "short": [0.5, 0.009],
    }
    for name, given in (("gated", settings), ("free", {"epochs": 7})):
        with Journal.open(storage / name) as journal:
            journal.append("sweep", sweep_id=name, settings=given, **header)
            for key, drops in runs.items():
                fields = dict(exp_id=f"K_{key}_run1", task_id="K-1", role="trial", params={}, saves=None)
                journal.append("trial", trial_id=key, **fields)
                for epoch, drop in enumerate(drops, 1):
                    journal.append("result", trial_id=key, epoch=epoch, metrics={"val_drop": drop})
    assert bench.record([storage], path) == 3
    found = {c.exp_id: c for c in bench.recorded(path)}
    assert set(found) == {"K_whole_run1", "K_met_run1", "K_blown_run1"}
    whole = found["K_whole_run1"]
    assert (whole.sweep, whole.budget, whole.evals, whole.drops[-1]) == ("gated", 0.01, 7, 0.12346)
    assert math.isnan(found["K_blown_run1"].drops[-1])
    assert bench.record([storage, storage], path) == 0 and len(bench.recorded(path)) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--record", "nowhere"], "--record nowhere: no journal.jsonl below it"),
        (["--sweeps", "0"], "--sweeps 0: expected 1 or more"),
        (["--slots", "8", "-1"], "--slots -1: expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    path.write_text('{"sweep": "a"}\n')
    with pytest.raises(InputError, match="line 1 is no curve"):
        bench.recorded(path)


def test_no_recorded_curve_is_stopped_falsely() -> None:
    curves = bench.recorded()
    assert len(curves) >= 31 and {c.domain for c in curves} == {"dust3r", "alphaqubit"}
    assert {c.passes for c in curves} == {True, False}
    assert all(len(c.drops) == c.evals or c.passes for c in curves)
    for slots in (1, 64):
        assert not any(bench.worth(curves, "ours", slots).false)
