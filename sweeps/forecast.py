"""Where will this learning curve end? A Bayesian average over a fixed bank of curve shapes, in closed form.

A curve of quality drops is modelled as

    y(t) = [a + b s_k(t)] * [1 - g_k tail_k(t)] + noise,     t = 1 .. T evaluations

``s_k`` is one of a few hundred falling shapes (power laws with and without a warm-up offset, stretched
exponentials, slow starters), ``tail_k`` an extra fall late in training such as a learning rate that decays
by a cosine causes: data from before the tail says nothing about it, so ``g_k`` keeps its prior and the
forecast stays open until the tail is seen. For each shape, and each noise level of a small grid, the
posterior of the floor ``a`` and the height ``b`` is Gaussian and exact; the shapes are weighted by their
marginal likelihood. What is returned is the distribution of the *best* evaluation of the whole run, luck of
future noise included, because a trial keeps its best checkpoint.

Everything random is drawn once from a fixed seed, so that a forecast is a pure function of its arguments.
Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engines.errors import InputError

Array = NDArray[np.float64]

SHAPES = 480  # shapes in the bank
DRAWS = 1000  # draws from the posterior: the finest probability that can be told from zero is 0.1 %
NOISE = np.geomspace(0.001, 0.03, 6)  # noise of one evaluation near the teacher's quality, absolute
NOISE_KNEE = 0.1  # a drop above this has noise in proportion to itself (SGD far from the end is rough)
TEMPER = 1.5  # evidence counts 1/TEMPER: neighbouring errors are correlated and no shape is exactly right
MISFIT = 0.15  # a shape may miss an early evaluation by this share of what has been gained since
NEAR = 0.05  # how far from the teacher the students end that come close to it
LOWEST = -0.3  # a floor below this is no fit but an extrapolation gone astray


@dataclass(frozen=True)
class Forecast:
    """The distribution of a run's best drop at its last evaluation (fractions, positive = worse).

    Attributes:
        draws: equally likely values of the final best drop, ascending.
    """

    draws: Array

    def quantile(self, q: float) -> float:
        """The value that the final best drop stays below with probability ``q``."""
        return float(self.draws[min(len(self.draws) - 1, max(0, math.ceil(q * len(self.draws)) - 1))])

    def chance(self, budget: float) -> float:
        """The probability that the final best drop is at most ``budget``."""
        return float(np.searchsorted(self.draws, budget, side="right") / len(self.draws))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def interval(self) -> tuple[float, float]:
        """The central 90 % interval."""
        return self.quantile(0.05), self.quantile(0.95)


@dataclass(frozen=True)
class _Bank:
    falling: Array  # (SHAPES, T): s_k times the tail's factor
    factor: Array  # (SHAPES, T): the tail's factor 1 - g_k tail_k
    pick: Array  # (DRAWS,): sorted positions in (0, 1) for systematic resampling
    normal: Array  # (2, DRAWS): standard normals for the floor and the height
    noise: Array  # (DRAWS, T): standard normals for future evaluations


@lru_cache(maxsize=16)
def _bank(evals: int) -> _Bank:
    """The shapes and the random numbers of a run of ``evals`` evaluations."""
    rng = np.random.default_rng(20240229)
    t = np.arange(1.0, evals + 1)
    power, stretched, hill = SHAPES * 2 // 5, SHAPES // 5, SHAPES // 5
    logistic = SHAPES - power - stretched - hill

    def log_uniform(low: float, high: float, size: int) -> Array:
        return np.asarray(np.exp(rng.uniform(math.log(low), math.log(high), size)))[:, None]

    offset = log_uniform(0.3, 6.0, power) * (rng.random((power, 1)) < 0.4)
    rate = log_uniform(0.5, max(1.0, evals), stretched)
    half = log_uniform(1.0, max(2.0, 0.7 * evals), hill)
    centre = log_uniform(1.0, max(2.0, 0.7 * evals), logistic)
    shapes = np.concatenate([
        ((t + offset) / (1 + offset)) ** -log_uniform(0.15, 3.0, power),
        np.exp(-(((t - 1) / rate) ** rng.uniform(0.5, 1.3, (stretched, 1)))),
        1 / (1 + (t / half) ** rng.uniform(1.0, 5.0, (hill, 1))),
        1 / (1 + np.exp(np.minimum((t / centre - 1) * log_uniform(1.0, 6.0, logistic), 500))),
    ])  # fmt: skip
    shapes /= shapes[:, :1]
    start = rng.uniform(0.3, 0.8, (SHAPES, 1))
    tail = np.clip((t / evals - start) / (1 - start), 0, 1) ** rng.uniform(1.0, 2.0, (SHAPES, 1))
    depth = rng.uniform(0.0, 0.7, (SHAPES, 1)) * (rng.random((SHAPES, 1)) < 0.65)
    factor = 1 - depth * tail
    order = rng.permutation(SHAPES)  # neighbours in the resampling order shall not share a family
    pick = (np.arange(DRAWS) + rng.random()) / DRAWS
    normal, noise = rng.standard_normal((2, DRAWS)), rng.standard_normal((DRAWS, evals))
    return _Bank((shapes * factor)[order], factor[order], pick, normal, noise)


def forecast(history: Sequence[float | None], max_evals: int) -> Forecast:
    """Forecast the best drop of a run of ``max_evals`` evaluations from the first ``len(history)`` of them.

    Args:
        history: drop (fraction, positive = worse) after each evaluation, in order; None, NaN and infinite
            entries
            hold their place in time and are otherwise ignored.
        max_evals: evaluations of the full run.

    Raises:
        InputError: no entry is finite, or ``max_evals`` is below 1.
    """
    if max_evals < 1:
        raise InputError(f"max_evals = {max_evals}: expected at least 1 evaluation")
    values = np.array([math.nan if v is None else v for v in history[:max_evals]], dtype=np.float64)
    seen = np.flatnonzero(np.isfinite(values))
    if len(seen) == 0:
        raise InputError(f"history of {len(history)} evaluations without a finite drop: nothing to forecast from")
    y, best = values[seen], float(values[seen].min())
    future = slice(len(values), max_evals)
    if len(values) == max_evals:
        return Forecast(np.full(1, best))
    bank = _bank(max_evals)
    weights, mean, root = _posterior(bank, y, seen)

    # Systematic resampling of (shape, noise level), then floor and height from their Gaussian.
    cumulative = np.cumsum(weights.ravel())
    chosen = np.minimum(np.searchsorted(cumulative, bank.pick * cumulative[-1]), weights.size - 1)
    shape, level = np.divmod(chosen, 2 * len(NOISE))
    z0, z1 = bank.normal
    floor = mean[shape, level, 0] + root[shape, level, 0] * z0
    height = mean[shape, level, 1] + root[shape, level, 1] * z0 + root[shape, level, 2] * z1
    curve = floor[:, None] * bank.factor[shape, future] + height[:, None] * bank.falling[shape, future]
    sigma = NOISE[level % len(NOISE), None] * np.sqrt(1 + (np.maximum(curve, 0) / NOISE_KNEE) ** 2)
    lowest = (curve + sigma * bank.noise[:, future]).min(axis=1)
    possible = (floor >= LOWEST) & (height >= 0)
    # When no draw is a falling curve the data rises: nothing better than what was seen is in sight.
    draws = lowest[possible] if possible.any() else np.full(1, best)
    return Forecast(np.sort(np.minimum(draws, best)))


def _posterior(bank: _Bank, y: Array, seen: NDArray[np.intp]) -> tuple[Array, Array, Array]:
    """Weight (K, L) of each shape and noise level, mean (K, L, 2) and Cholesky factor (K, L, 3) of floor
    and height."""
    now = max(float(np.median(y[-3:])), 0.0)
    rough = 1 + (np.maximum(y, 0) / NOISE_KNEE) ** 2
    loose = (MISFIT * np.maximum(y - now, 0)) ** 2
    variance = TEMPER * (rough[:, None] * NOISE**2 + loose[:, None])  # (n, L)
    variance = np.tile(variance, 2)  # (n, 2 L): once for each prior of the floor
    inverse = 1 / variance
    f, g = bank.factor[:, seen], bank.falling[:, seen]

    # Two priors of the floor, equally likely: close to the teacher, and anywhere below the present.
    m0 = np.repeat([0.0, 0.5 * now], len(NOISE))
    v0 = np.repeat([NEAR**2, (0.5 * now + 0.02) ** 2], len(NOISE))
    v1 = (2 * float(np.ptp(y)) + 0.5 * now + 0.02) ** 2
    # Normal equations [[p, q], [q, r]] (a, b) = (u, w), for each shape and noise level.
    p = f * f @ inverse + 1 / v0
    q = f * g @ inverse
    r = g * g @ inverse + 1 / v1
    u = f @ (inverse * y[:, None]) + m0 / v0
    w = g @ (inverse * y[:, None])
    determinant = p * r - q * q
    a, b = (r * u - q * w) / determinant, (p * w - q * u) / determinant

    misfit = y * y @ inverse + m0 * m0 / v0 - (u * a + w * b)
    evidence = -0.5 * (misfit + np.log(determinant * v0 * v1) + np.log(variance).sum(axis=0))
    weights = np.exp(evidence - evidence.max())
    first = np.sqrt(r / determinant)
    cross = -q / determinant / first
    second = np.sqrt(1 / r)
    return weights, np.stack([a, b], axis=-1), np.stack([first, cross, second], axis=-1)
