"""The learning-curve forecast: calibrated on families that it was not written from, and a pure function."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.errors import InputError
from sweeps.curves import FAMILIES
from sweeps.forecast import forecast

EVALS = 30


def test_the_interval_of_ninety_percent_covers_ninety_percent() -> None:
    # 25 curves of each family at five ages, seed 20. With 200 independent curves the standard
    # error is about 2 %: a forecast that truly covers 80 % passes by luck less than one time in twenty.
    rng = np.random.default_rng(20)
    inside: dict[str, list[bool]] = {name: [] for name in FAMILIES}
    for name, family in FAMILIES.items():
        for curve in (family(rng, EVALS) for _ in range(25)):
            for age in (3, 5, 8, 12, 20):
                if np.isfinite(curve[:age]).all():
                    low, high = forecast(curve[:age].tolist(), EVALS).interval
                    inside[name].append(low <= np.nanmin(curve) <= high)
    print()
    for name, hits in inside.items():
        print(f"{name:16s} 90 % interval covers {np.mean(hits):.1%} of {len(hits)}")
    share = float(np.mean([hit for hits in inside.values() for hit in hits]))
    print(f"{'all':16s} {share:.1%}")
    assert 0.85 <= share <= 0.95


def test_the_end_of_a_clean_power_law_is_found() -> None:
    curve = 0.02 + 0.5 * np.arange(1, EVALS + 1) ** -1.5
    low, high = forecast(curve[:10].tolist(), EVALS).interval
    assert low < curve[-1] < high
    assert abs(forecast(curve[:20].tolist(), EVALS).median - curve[-1]) < 0.005


def test_a_late_fall_stays_possible_until_the_last_third_has_begun() -> None:
    slow = [0.05 + 0.25 / t**2 for t in range(1, EVALS + 1)]  # sits at 5 % from early on
    optimistic = [forecast(slow[:age], EVALS).quantile(0.01) for age in (10, 20, 28)]
    assert optimistic[0] < 0.02 < optimistic[1] < 0.03 < optimistic[2]


def test_the_best_evaluation_counts_not_the_last() -> None:
    ahead = forecast([0.1, 0.02, 0.3, 0.4, 0.5], EVALS)
    assert ahead.draws.max() <= 0.02
    assert forecast([0.1, 0.02, 0.3], 3).interval == (0.02, 0.02)


def test_a_missing_evaluation_keeps_its_place_in_time() -> None:
    curve = [0.5 / t for t in range(1, 11)]
    gap: list[float | None] = [*curve]
    gap[4], gap[6] = None, math.nan
    shorter = [v for i, v in enumerate(curve) if i not in (4, 6)]
    whole, holed, squeezed = (forecast(h, EVALS).median for h in (curve, gap, shorter))
    assert abs(holed - whole) < abs(squeezed - whole)


def test_a_forecast_is_reproducible_and_leaves_its_input_alone() -> None:
    curve = [0.4, 0.2, 0.11, 0.09]
    assert np.array_equal(forecast(curve, EVALS).draws, forecast(tuple(curve), EVALS).draws)
    assert curve == [0.4, 0.2, 0.11, 0.09]


def test_chance_and_quantile_agree() -> None:
    ahead = forecast([0.4, 0.2, 0.11, 0.09], EVALS)
    for q in (0.02, 0.3, 0.9):
        assert ahead.chance(ahead.quantile(q)) == pytest.approx(q, abs=0.002)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("length", [1, 2, 7, 29])
def test_any_scale_and_length_gives_finite_numbers(scale: float, length: int) -> None:
    for curve in (
        [scale] * length,
        [scale / (i + 1) for i in range(length)],
        [scale * i for i in range(length)],
    ):
        assert np.isfinite(forecast(curve, EVALS).draws).all()


def test_nothing_to_forecast_from_is_one_line() -> None:
    with pytest.raises(InputError, match="without a finite drop"):
        forecast([None, math.nan], EVALS)
    with pytest.raises(InputError, match="max_evals = 0"):
        forecast([0.1], 0)
