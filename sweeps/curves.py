"""Generated learning curves that try the stop-loss; their forms are other than the forecast's.

A curve is the drop (fraction, positive = worse) after each evaluation, with the noise of one evaluation
on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Family = Callable[[np.random.Generator, int], Array]


def _end(rng: np.random.Generator) -> float:
    """Where the noiseless curve ends: from better than a budget of 1 % to hopeless, log-uniform."""
    return float(np.exp(rng.uniform(math.log(0.003), math.log(0.2))))


def _noisy(rng: np.random.Generator, curve: Array, sigma: float) -> Array:
    return np.asarray(curve + sigma * np.maximum(1.0, curve / 0.1) * rng.standard_normal(len(curve)))


def _between(shape: NDArray[np.floating[Any]], start: float, end: float) -> Array:
    """The falling ``shape``, stretched so that it starts and ends at the given drops."""
    return np.asarray(end + (start - end) * (shape - shape[-1]) / (shape[0] - shape[-1]), dtype=np.float64)


def power_law(rng: np.random.Generator, evals: int) -> Array:
    """Falls as a power of time, at once."""
    t = np.arange(1, evals + 1)
    return _noisy(rng, _between(t ** -rng.uniform(0.5, 2.0), rng.uniform(0.3, 1.0), _end(rng)), 0.003)


def annealed(rng: np.random.Generator, evals: int) -> Array:
    """A law for cosine-decayed training: a power of the summed rate, less what annealing gives."""
    rate = 0.5 * (1 + np.cos(np.pi * (np.arange(evals) + 0.5) / evals))
    shape = (0.5 + np.cumsum(rate)) ** -rng.uniform(0.5, 1.5)
    end = _end(rng)
    rough = end * rng.uniform(0.2, 1.5)  # what the full rate adds to the drop, and its decay gives back
    return _noisy(rng, _between(shape, rng.uniform(0.3, 1.0), end) + rough * (rate - rate[-1]), 0.003)


def inherited(rng: np.random.Generator, evals: int) -> Array:
    """Starts far off (a student cut out of its teacher), heals within an evaluation or two, then crawls."""
    t = np.arange(1, evals + 1)
    slow = _between(t ** -rng.uniform(0.3, 1.0), rng.uniform(0.06, 0.15), _end(rng))
    return _noisy(rng, slow + rng.uniform(1, 4) * np.exp(-(t - 1) * rng.uniform(2.5, 5)), 0.003)


def slow_starter(rng: np.random.Generator, evals: int) -> Array:
    """Hardly moves at first, then falls: an S in time."""
    t = np.arange(1, evals + 1) / evals
    shape = 1 / (1 + np.exp((t - rng.uniform(0.1, 0.3)) * rng.uniform(12, 25)))
    return _noisy(rng, _between(shape, rng.uniform(0.2, 0.6), _end(rng)), 0.004)


def crossing(rng: np.random.Generator, evals: int) -> Array:
    """Either quick with a high floor or slow with a low one, so that ranks change on the way."""
    t = np.arange(1, evals + 1)
    if rng.random() < 0.5:
        return _noisy(rng, _between(np.exp(-t / 2.0), rng.uniform(0.2, 0.5), max(0.015, _end(rng))), 0.003)
    return _noisy(rng, _between(np.exp(-t / (evals / 5)), rng.uniform(0.3, 0.8), min(0.03, _end(rng))), 0.003)


def noisy(rng: np.random.Generator, evals: int) -> Array:
    """A power law under one percent of noise per evaluation."""
    t = np.arange(1, evals + 1)
    return _noisy(rng, _between(t ** -rng.uniform(0.5, 1.5), rng.uniform(0.3, 1.0), _end(rng) + 0.01), 0.01)


def late_divergence(rng: np.random.Generator, evals: int) -> Array:
    """A power law that blows up after half of its way and ends in NaN."""
    curve, at = power_law(rng, evals), int(rng.integers(evals // 2, evals))
    blown = curve[at:] + 0.05 * 3.0 ** np.arange(1, evals - at + 1)
    return np.concatenate([curve[:at], np.where(np.arange(len(blown)) < 4, blown, math.nan)])


def quadratic(rng: np.random.Generator, evals: int) -> Array:
    """Exact expected loss of SGD, cosine-decayed, on a noisy quadratic with a power-law spectrum: nothing
    was fitted."""
    steps, size = 40 * evals, 200
    eigen = np.arange(1, size + 1) ** -rng.uniform(1.0, 1.6)
    weight = np.arange(1, size + 1) ** -rng.uniform(0.1, 0.6)
    peak, grad_noise = rng.uniform(0.2, 0.9), np.exp(rng.uniform(math.log(1e-3), math.log(2e-2)))
    error, losses = weight.copy(), np.empty(evals)
    for step in range(steps):
        rate = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        error = (1 - rate * eigen) ** 2 * error + rate**2 * grad_noise * eigen
        if (step + 1) % 40 == 0:
            losses[step // 40] = float(eigen @ error)
    start, end = rng.uniform(0.3, 1.0), _end(rng)
    return _noisy(rng, _between(losses, start, end), 0.003)


FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        power_law, annealed, inherited, slow_starter, crossing, noisy, late_divergence, quadratic,
    )
}  # fmt: skip
