import math

import numpy as np
import pytest

from engines.errors import InputError
from trainables.alphaqubit.metrics import expected_calibration_error, ler_per_round

ROUNDS = [1, 3, 5, 9, 15, 25]


def lers(eps, f0=1.0):
    return [(1 - f0 * (1 - 2 * eps) ** n) / 2 for n in ROUNDS]


@pytest.mark.parametrize(("eps", "f0"), [(0.03, 1.0), (0.028, 0.97), (1e-5, 1.0), (0.0, 1.0)])
def test_an_exact_decay_is_found(eps, f0):
    fit = ler_per_round(ROUNDS, lers(eps, f0))
    assert fit.eps == pytest.approx(eps, abs=1e-12) and fit.f0 == pytest.approx(f0) and fit.r2 == pytest.approx(1)
    assert math.isnan(fit.low) and math.isnan(fit.high)


def test_one_round_is_left_out():
    values = lers(0.02)
    assert ler_per_round(ROUNDS, [0.4, *values[1:]]) == ler_per_round(ROUNDS, values)


def test_the_fit_is_the_least_squares_line():
    values = np.array(lers(0.02)) + [0, 0.01, -0.004, 0.006, 0.0, -0.01]
    fit = ler_per_round(ROUNDS, values)
    slope, start = np.polyfit(ROUNDS[1:], np.log(1 - 2 * values[1:]), 1)
    assert fit.eps == pytest.approx((1 - math.exp(slope)) / 2) and fit.f0 == pytest.approx(math.exp(start))
    assert fit.r2 == pytest.approx(np.corrcoef(ROUNDS[1:], np.log(1 - 2 * values[1:]))[0, 1] ** 2)


def test_the_interval_covers_and_shrinks():
    """95 % intervals of 400 experiments: fewer than 366 would cover by chance twice in a thousand."""
    draw, truth, shots = np.random.default_rng(1), np.array(lers(0.02)), 20000
    fits = [ler_per_round(ROUNDS, draw.binomial(shots, truth) / shots, shots, seed) for seed in range(400)]
    assert sum(fit.low <= 0.02 <= fit.high for fit in fits) >= 366
    assert ler_per_round(ROUNDS, truth, 2000) == ler_per_round(ROUNDS, truth, [2000] * 6)
    wide, narrow = (ler_per_round(ROUNDS, truth, count) for count in (500, 50000))
    assert narrow.low < narrow.eps < narrow.high and wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_an_interval_near_one_half_stays_finite():
    fit = ler_per_round([3, 25], [0.2, 0.49], [100, 100])
    assert math.isfinite(fit.low) and math.isfinite(fit.high)


def test_calibration_error():
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([0, 1])) == 0
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([1, 0])) == 1
    probabilities = np.array([0.01, 0.02, 0.95, 0.99])
    gaps = abs(0.03 - 1) + abs(1.94 - 2)
    assert expected_calibration_error(probabilities, np.array([1, 0, 1, 1]), 10) == pytest.approx(gaps / 4)
    draw = np.random.default_rng(2)
    p = draw.random(200_000)
    assert expected_calibration_error(p, draw.random(len(p)) < p) < 0.005
    assert expected_calibration_error(p, draw.random(len(p)) < p**2) > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ler_per_round([3, 5], [0.1]), "2 numbers of rounds and 1 LERs"),
        (lambda: ler_per_round([1, 5], [0.1, 0.2]), "needs two numbers of rounds or more, one round not counted"),
        (lambda: ler_per_round([5, 5], [0.1, 0.2]), "needs two numbers of rounds"),
        (lambda: ler_per_round([0, 5], [0.1, 0.2]), "rounds=0 is too small"),
        (lambda: ler_per_round([3, 5], [0.1, 0.5]), "LER 0.5 at 5 rounds"),
        (lambda: ler_per_round([3, 5], [0.1, float("nan")]), "LER nan at 5 rounds"),
        (lambda: ler_per_round([3, 5], [0.1, 0.2], 0), "shots=0 is too small"),
        (lambda: expected_calibration_error(np.array([0.5, -1.2]), np.array([0, 1])), "not logits"),
        (lambda: expected_calibration_error(np.zeros(2), np.zeros(3)), r"shape \(2,\) and outcomes of shape \(3,\)"),
        (lambda: expected_calibration_error(np.zeros(0), np.zeros(0)), "expected"),
    ],
)
def test_bad_values_end_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
