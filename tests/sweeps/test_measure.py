"""What a record takes from a trial's curve, and the baseline's own verdict."""

import math
from typing import Any

from sweeps import measure
from sweeps.journal import TrialState
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
