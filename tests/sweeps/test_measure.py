"""What a record takes from a trial's curve, and the baseline's own verdict."""

import math
from typing import Any

from sweeps import measure
from sweeps.journal import TrialState
from sweeps.plan import Planned
from trainables.record import Record

NOW = "2026-03-01T12:00:00+01:00"


def curve(*drops: float, half: float = 0.01) -> TrialState:
    state = TrialState("a", "K_a_run1", "K-1", "trial", {}, None)
    for epoch, drop in enumerate(drops, 1):
        metrics = {
            "val_drop": drop,
            "val_drop_lo": drop - half,
            "val_drop_hi": drop + half,
            "val_quality": float(epoch),
        }
        state.results.append((epoch, metrics))
    return state


def test_a_late_rise_is_counted_in_half_widths_of_the_best_epochs_interval() -> None:
    state = curve(0.5, 0.1, 0.2, 0.2, 0.12, 0.13)
    state.results[4][1]["val_drop_hi"] = 9.0  # of an epoch that is not the best
    assert math.isclose(measure._late_rise(state, 6)["late_rise"], (0.13 - 0.1) / 0.01)


def test_the_last_third_is_of_the_planned_epochs() -> None:
    stopped = curve(0.5, 0.1, 0.4)
    assert measure._late_rise(stopped, 6) == {} and measure._late_rise(stopped, 3).keys() == {"late_rise"}
    assert math.isclose(measure._late_rise(curve(0.5, 0.1, 0.4, 0.3, 0.2), 6)["late_rise"], 10)


def test_no_late_rise_without_epochs_intervals_or_numbers() -> None:
    assert measure._late_rise(curve(0.5, 0.1), 2) == {}
    assert measure._late_rise(curve(0.5, 0.1, 0.1, half=0.0), 3) == {}
    assert measure._late_rise(curve(0.5, 0.1, math.nan), 3) == {}
    assert measure._late_rise(curve(), 3) == {}


def test_without_measuring_the_record_is_of_the_epoch_whose_weights_were_kept() -> None:
    """Also where every drop is against a teacher, and above 0: the probes of a fusion."""
    for drops, kept, quality in (
        ((0.0, -0.5, 0.1, -0.01, 0.3), (1, 1, 0, 1, 0), 4.0),
        ((0.6, 0.4, 0.5), (1, 1, 1), 3.0),  # the cross entropy chose, not the error rate
        ((0.0, 0.2, math.nan), (1, 0, 0), 1.0),
        ((math.nan,), (0,), 1.0),
    ):
        state = curve(*drops)
        for (_, metrics), flag in zip(state.results, kept, strict=True):
            metrics["kept"] = float(flag)
        own, extra = measure._from_best_result(state)
        assert own["quality"] == quality and "kept" not in extra


def test_a_baseline_passes_when_every_number_is_there() -> None:
    whole: dict[str, Any] = dict.fromkeys(measure.BASELINE, 0.5)
    assert measure.judge_baseline(Record(exp_id="P0_teacher_run1", datetime=NOW, **whole))[0] == "pass"
    gap = Record(exp_id="P0_teacher_run1", datetime=NOW, **whole | {"rmse": None, "flops_G": None})
    assert measure.judge_baseline(gap) == ("fail", "not measured: rmse, flops_G")


def planned(role: str = "trial", **params: Any) -> Planned:
    return Planned("a", "K_a_run1", "K-1", "a", None, params, 42, role=role)


def test_a_record_says_what_a_trial_was_trained_with_also_where_that_is_left_to_the_settings() -> None:
    settings: dict[str, Any] = {"T": 3.0, "beta": {"linear": [0.5, 0.1]}, "gamma": 0.0, "rho": 0.4, "lr": 1.0}
    whole = {"T": 3.0, "beta": "linear 0.5 to 0.1", "gamma": 0.0, "rho": 0.4}
    assert measure._inputs(planned(), settings, None) == whole
    assert measure._inputs(planned(T=5.0, lr=2.0), settings, None) == whole | {"T": 5.0}
    assert measure._inputs(planned("teacher"), settings, None) == {}


def test_a_model_that_was_only_rounded_was_trained_with_nothing() -> None:
    settings: dict[str, Any] = {"T": 3.0, "beta": 0.5, "bits_w": 8}
    for route in (None, "PTQ"):  # None: what was to be measured failed
        assert measure._inputs(planned(bits_w=4), settings, route) == {"bits_w": 4}
    assert measure._inputs(planned(bits_w=4), settings, "QAT") == {"bits_w": 4, "T": 3.0, "beta": 0.5}
