import math

import numpy as np
import pytest

from trainables.gates import Drop, Gate, drop, paired_drop
from trainables.record import InputError, Record

WHEN = "2026-03-01T12:00:00+01:00"


def test_drop_is_positive_when_worse_whatever_the_direction():
    assert drop(0.11, 0.10, lower_is_better=True) == pytest.approx(0.1)
    assert drop(0.81, 0.90, lower_is_better=False) == pytest.approx(0.1)
    assert drop(0.09, 0.10, lower_is_better=True) == pytest.approx(-0.1)
    assert math.isnan(drop(math.nan, 0.1, True))


@pytest.mark.parametrize("reference", [0.0, -1.0, math.nan, math.inf])
def test_an_unusable_reference_is_refused(reference):
    with pytest.raises(InputError, match="reference"):
        drop(0.1, reference, True)


def slow_interval(values, reference, lower_is_better, rng, n):
    """Plain percentile bootstrap of the ratio of means, one resample at a time, with its own random
    numbers.
    """
    found = []
    for _ in range(n):
        picked = rng.integers(0, len(values), len(values))
        change = sum(values[i] for i in picked) / sum(reference[i] for i in picked) - 1
        found.append(change if lower_is_better else -change)
    return np.quantile(found, [0.025, 0.975])


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_paired_drop_agrees_with_a_slow_version(lower_is_better):
    rng = np.random.default_rng(3)
    reference = rng.gamma(4, 0.05, 400)
    values = reference * rng.normal(1.02, 0.1, 400)
    fast = paired_drop(values, reference, lower_is_better, seed=1, n=4000)
    lo, hi = slow_interval(values, reference, lower_is_better, rng, 4000)
    assert fast.value == drop(values.mean(), reference.mean(), lower_is_better)
    # At 400 pairs the widening is 0.3 %; each 2.5 % quantile of 4000 resamples has a standard error of
    # about 2.5 % of the width, so 10 % of it is passed by chance with probability under 1e-3.
    assert [fast.lo, fast.hi] == pytest.approx([lo, hi], abs=0.1 * (hi - lo))
    assert fast.lo < fast.value < fast.hi


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """20 pairs, 2000 simulated workloads, level 95 %: a method that keeps its word falls below 93.4 % by
    chance with probability under 1e-3. Plain percentiles, which reach 92.3 % here, fail.
    """
    rng = np.random.default_rng(7)
    hits = 0
    for seed in range(2000):
        reference = rng.gamma(8, 0.02, 20)
        values = reference * 1.05 + rng.normal(0, 0.01, 20)
        found = paired_drop(values, reference, True, seed=seed, n=500)
        hits += found.lo <= 0.05 <= found.hi
    assert 0.934 <= hits / 2000 <= 0.966


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    reference = rng.gamma(2, 0.1, 200)
    values = reference * 1.01
    paired = paired_drop(values, reference, True, seed=0)
    shuffled = paired_drop(rng.permutation(values), reference, True, seed=0)
    assert paired.hi - paired.lo < 1e-9 < 0.01 < shuffled.hi - shuffled.lo


def test_paired_drop_is_reproducible_and_chunks_agree(monkeypatch):
    rng = np.random.default_rng(1)
    a, b = rng.random(50) + 1, rng.random(50) + 1
    whole = paired_drop(a, b, True, seed=5)
    assert whole == paired_drop(a, b, True, seed=5) != paired_drop(a, b, True, seed=6)
    monkeypatch.setattr("trainables.gates._CHUNK_CELLS", 7 * 50)
    assert paired_drop(a, b, True, seed=5) == whole


def test_a_diverged_trial_has_no_drop_and_bad_lists_are_refused():
    nan = paired_drop([math.nan, 1.0], [1.0, 1.0], True, seed=0)
    assert all(math.isnan(x) for x in (nan.value, nan.lo, nan.hi))
    for a, b in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 1.0], [0.0, 0.0]), ([[1.0]], [[1.0]])):
        with pytest.raises(InputError):
            paired_drop(a, b, True, seed=0)
    with pytest.raises(InputError, match="level"):
        paired_drop([1.0, 2.0], [1.0, 2.0], True, seed=0, level=95)


def test_resamples_without_any_error_do_not_break_the_interval():
    errors, few = np.zeros(30), np.zeros(30)
    errors[:2], few[:1] = 1, 1
    found = paired_drop(errors, few, True, seed=0)
    assert isinstance(found, Drop) and found.value == 1.0 and not math.isnan(found.lo)


def record(**fields):
    return Record(exp_id="a", datetime=WHEN, **fields)


def test_gate_judges_the_point_value_and_says_the_numbers():
    gate = Gate("drop", at_most=0.01)
    passed = gate.judge(record(drop=0.01, drop_lo=0.002, drop_hi=0.02))
    assert passed.verdict == "pass"
    assert passed.detail == "drop 1 % [0.2 %, 2 %], needed <= 1 %; the limit lies within the interval"
    assert gate.judge(record(drop=0.0101)).verdict == "fail"
    assert gate.judge(record(drop=-0.5)).verdict == "pass"


def test_gate_on_extras_and_lower_limits():
    gate = Gate("p50_ratio", at_least=2)
    assert gate.judge(record(extra={"p50_ratio": 2.0})).verdict == "pass"
    assert gate.judge(record(extra={"p50_ratio": 1.99})).verdict == "fail"


def test_what_was_not_measured_fails_and_the_reference_is_not_judged():
    missing = Gate("drop", at_most=0.01).judge(record(stop_reason="diverged"))
    assert missing.verdict == "fail" and "diverged" in missing.detail
    assert Gate("ler", at_most=1).judge(record()).verdict == "fail"
    assert Gate("notes", at_most=1).judge(record(notes="x")).verdict == "fail"
    assert Gate("drop", at_most=0.01).judge(record(), role="teacher").verdict == "n/a"


@pytest.mark.parametrize("limits", [{}, {"at_most": 1, "at_least": 0}, {"at_most": math.nan}])
def test_a_gate_has_exactly_one_limit(limits):
    with pytest.raises(InputError, match="gate drop"):
        Gate("drop", **limits)


def test_excess_is_the_distance_beyond_the_limit():
    assert Gate("drop", at_most=0.03).excess(0.05) == pytest.approx(0.02)
    assert Gate("params_down", at_least=0.25).excess(0.29) == pytest.approx(-0.04)
    assert Gate("params_down", at_least=0.25).excess(0.1) == pytest.approx(0.15)
