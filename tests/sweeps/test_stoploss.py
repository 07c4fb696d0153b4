"""The stop-loss: its order of reasons, its promises as properties, its worth on generated curves."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import InputError
from sweeps.curves import FAMILIES
from sweeps.stoploss import History, StopLossRule, decide

RULE = StopLossRule(budget=0.01, max_evals=30)

drops = st.floats(-0.2, 5.0, allow_nan=False)
broken = st.sampled_from([None, math.nan, math.inf, -math.inf])
histories = st.lists(st.one_of(drops, broken), max_size=20)
many_peers = st.lists(histories, max_size=8)


def reason(history: History, peers: list[History] | None = None, rule: StopLossRule = RULE) -> str | None:
    return decide(history, peers or [], rule).reason


@pytest.mark.parametrize("last", [None, math.nan, math.inf, -math.inf])
def test_divergence_stops_at_once(last: float | None) -> None:
    assert reason([last]) == "diverged"
    assert reason([0.005, last]) == "diverged"  # its best checkpoint passes; training on is of no use
    assert reason([0.4, last, 0.3]) is None  # it has recovered


def test_a_hopeless_trial_is_stopped_and_told_in_numbers() -> None:
    decision = decide([0.3, 0.2] + [0.18] * 6, [], RULE)
    assert decision.stop and decision.reason == "stop_loss"
    assert "forecast" in decision.detail and "optimistic" in decision.detail and "budget 1 %" in decision.detail
    assert "\n" not in decision.detail


def test_a_student_that_was_cut_out_of_its_teacher_gets_its_chance() -> None:
    healing = [3.0, 0.12, 0.08, 0.068]
    assert [reason(healing[:n]) for n in range(1, 5)] == [None] * 4
    assert reason([*healing, 0.066, 0.0655, 0.065, 0.0655, 0.065, 0.0655, 0.065, 0.065]) == "stop_loss"


def test_a_trial_that_meets_its_gate_ends_as_a_plateau_only() -> None:
    assert reason([0.05, 0.009, 0.2, 0.2]) is None
    assert reason([0.05, 0.009, 0.2, 0.2, 0.2]) == "plateau"
    assert reason([0.05, 0.009, 0.009, 0.009, 0.008]) is None


def test_slow_steady_improvement_within_the_noise_is_no_plateau() -> None:
    rng = np.random.default_rng(0)
    steady = 0.03 - 0.0008 * np.arange(25) + 0.002 * rng.standard_normal(25)  # ends close to the budget
    first = next(n for n in range(1, 26) if n == 25 or reason(steady[:n].tolist()) is not None)
    assert first >= 20


def test_a_rung_needs_peers_and_keeps_ties() -> None:
    flat, good, rule = [0.5, 0.5, 0.5], [0.3, 0.1, 0.05], StopLossRule(budget=0.01, max_evals=15)
    assert reason(flat, rule=rule) is None  # the forecast alone still waits
    assert reason(flat, [good] * 3, rule) is None
    assert reason(flat, [good] * 4, rule) == "asha"
    assert reason(flat, [flat] * 9, rule) is None
    assert reason(flat, [good[:2]] * 9, rule) is None  # they have not reached the rung
    assert reason(flat, [[0.9, 0.9, math.nan]] * 9, rule) is None  # diverged peers are the worst
    assert reason([*flat, 0.5], [[*good, 0.04]] * 4, rule) != "asha"  # no rung at evaluation 4
    assert reason(flat, [good] * 4) is None  # over 30 evaluations a slow starter may yet come


def test_a_promising_trial_is_not_stopped_by_its_rank() -> None:
    assert reason([0.5, 0.2, 0.08], [[0.3, 0.05, 0.02]] * 9) is None


@pytest.mark.parametrize("evals", [1, 2, 3])
def test_a_run_no_longer_than_its_grace_is_never_cut(evals: int) -> None:
    rule = StopLossRule(budget=0.01, max_evals=evals)
    assert not any(decide([0.9] * n, [[0.001] * 3] * 9, rule).stop for n in range(evals + 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [("budget", math.nan), ("max_evals", 0), ("grace", 0), ("patience", -1), ("eta", 1), ("eta", 2.5)],
)
def test_a_bad_rule_names_its_value(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} = {value}") as caught:
        dataclasses.replace(RULE, **{field: value})
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(histories, many_peers)
def test_promises(history: History, peers: list[History]) -> None:
    decision = decide(history, peers, RULE)
    finite = [v for v in history if v is not None and math.isfinite(v)]
    assert decision.stop == (decision.reason is not None)
    assert "\n" not in decision.detail
    if history and (history[-1] is None or not math.isfinite(history[-1])):
        assert decision.reason == "diverged"
    elif len(history) < RULE.grace:
        assert not decision.stop
    elif finite and min(finite) <= RULE.budget:
        assert decision.reason in (None, "plateau")
    assert decide(history, peers, RULE) == decision
    assert decide(history, peers[::-1], RULE) == decision
    assert decide([*history, math.nan], peers, RULE).reason == "diverged"


@settings(max_examples=60, deadline=None)
@given(st.lists(drops, min_size=3, max_size=9), many_peers)
def test_a_peer_that_diverges_never_hurts(history: History, peers: list[History]) -> None:
    if not decide(history, peers, RULE).stop:
        worse = [[*peer[:-1], math.nan] if peer else peer for peer in peers]
        assert not decide(history, worse, RULE).stop


def replay(seed: int, sweeps: int, size: int, evals: int = 30, alone: bool = False) -> dict[str, np.ndarray]:
    """Run sweeps of ``size`` random curves in step; by family: curves, passing, false, saved, oracle's.

    A false stop comes while the best drop is above the budget, though the full run would have met it;
    what it saves is not counted. The oracle ends a failing run at the grace and a passing one at its best.
    """
    rng, rule = np.random.default_rng(seed), StopLossRule(budget=0.01, max_evals=evals)
    names, table = list(FAMILIES), {name: np.zeros(5, dtype=int) for name in FAMILIES}
    for _ in range(sweeps):
        families = [names[i] for i in rng.integers(len(names), size=size)]
        curves = [FAMILIES[name](rng, evals).tolist() for name in families]
        seen: list[list[float]] = [[] for _ in curves]
        running = set(range(size))
        for at in range(evals):
            for i in sorted(running):
                seen[i].append(curves[i][at])
                peers = [] if alone else seen[:i] + seen[i + 1 :]
                if decide(seen[i], peers, rule).stop:
                    running.discard(i)
        for name, curve, history in zip(families, curves, seen, strict=True):
            # A diverged run ends at its first NaN under any rule.
            length = next((i + 1 for i, v in enumerate(curve) if math.isnan(v)), evals)
            passes = np.nanmin(curve) <= rule.budget
            false = passes and np.nanmin(history) > rule.budget
            oracle = length - (int(np.nanargmin(curve)) + 1 if passes else rule.grace)
            table[name] += [1, passes, false, 0 if false else length - len(history), oracle]
    return table


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with peers"])
def test_worth_on_generated_curves(alone: bool) -> None:
    # Seed 3: 24 sweeps of 10 trials. A rule whose true rate is 1 % would fail this by luck with 9 % (other
    # seeds), one of 4 % would pass with 4 %; the seed makes the test repeatable.
    table = replay(seed=3, sweeps=24, size=10, alone=alone)
    print(f"\n{'family':16s} curves passing false saved/oracle")
    total = sum(table.values(), np.zeros(5, dtype=int))
    for name, (curves, passing, false, saved, oracle) in [*table.items(), ("all", total)]:
        print(f"{name:16s} {curves:6d} {passing:7d} {false:5d} {saved / max(1, oracle):.1%}")
    curves, _, false, saved, oracle = total
    assert false / curves <= 0.02
    assert saved / oracle >= 0.58
