"""How good a decoder is: logical error rate per round by the paper's fit, and how far its probabilities can be trusted.

E(n) is the logical error rate (LER) after n rounds. A round flips the observable with probability eps, so the
fidelity F(n) = 1 - 2 E(n) = F0 (1 - 2 eps)^n: log F is a line in n (Bausch et al., Nature 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.errors import InputError

RESAMPLES = 499


@dataclass(frozen=True)
class RoundFit:
    """eps: LER per round. f0: fidelity at no rounds, near 1 where the model fits. r2: share of variance explained.

    low, high: the 95 % bootstrap interval of eps, NaN where the numbers of shots were not given.
    """

    eps: float
    f0: float
    r2: float
    low: float
    high: float


def ler_per_round(
    rounds: Sequence[int], lers: Sequence[float], shots: Sequence[int] | int | None = None, seed: int = 0
) -> RoundFit:
    """Least squares of log F = log F0 + n log(1 - 2 eps) over experiments of several numbers of rounds.

    An experiment of one round is left out: its two ends are most of it. shots: behind each LER; the interval resamples
    them RESAMPLES times. InputError where fewer than two experiments remain or an LER is not below one half.
    """
    if len(rounds) != len(lers):
        raise InputError(f"{len(rounds)} numbers of rounds and {len(lers)} LERs: give one LER for each")
    for n, ler in zip(rounds, lers, strict=True):
        if n < 1:
            raise InputError(f"rounds={n} is too small, use 1 or more")
        if not 0 <= ler < 0.5:
            raise InputError(f"LER {ler:g} at {n} rounds: a fit needs every LER from 0 to below 0.5")
    used = np.array([n > 1 for n in rounds], bool)
    n, error = np.array(rounds, float)[used], np.array(lers, float)[used]
    if len(np.unique(n)) < 2:
        raise InputError(f"rounds {list(rounds)}: a fit needs two numbers of rounds or more, one round not counted")
    eps, f0, r2 = _fit(n, error)
    low = high = math.nan
    if shots is not None:
        counts = np.broadcast_to(np.asarray(shots, np.int64), len(rounds))[used]
        if (counts < 1).any():
            raise InputError(f"shots={int(counts.min())} is too small, use 1 or more")
        drawn = np.random.default_rng(seed).binomial(counts, error, (RESAMPLES, len(error))) / counts
        # A resample can reach one half; it then counts as half a shot below, and log F stays finite.
        drawn = np.minimum(drawn, 0.5 - 0.5 / counts)
        low, high = np.quantile(-np.expm1(_slope(n, np.log1p(-2 * drawn))) / 2, [0.025, 0.975]).tolist()
    return RoundFit(eps, f0, r2, low, high)


def rate_per_round(ler: float, rounds: int) -> float | None:
    """eps of one observable by its LER after `rounds` rounds alone, with F0 = 1; None where LER reaches one half."""
    return (1 - (1 - 2 * ler) ** (1 / rounds)) / 2 if ler < 0.5 else None


def expected_calibration_error(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = 15) -> float:
    """Mean over the shots of |mean probability - share of flips| of the bin that a shot falls into.

    probabilities: (N,) predicted P(flip); outcomes: (N,) 0 or 1. Bins have equal width on [0, 1].
    """
    if probabilities.shape != outcomes.shape or probabilities.ndim != 1 or not len(probabilities):
        raise InputError(
            f"probabilities of shape {probabilities.shape} and outcomes of shape {outcomes.shape}: expected (N,) both"
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise InputError("probabilities outside 0 to 1: expected P(flip), not logits")
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, probabilities - outcomes.astype(np.float64), bins)
    return float(np.abs(gap).sum() / len(probabilities))


def _slope(n: np.ndarray, log_f: np.ndarray) -> np.ndarray:
    """Least-squares slope over the last axis."""
    centred = n - n.mean()
    return np.asarray(log_f @ centred / (centred**2).sum())


def _fit(n: np.ndarray, error: np.ndarray) -> tuple[float, float, float]:
    log_f = np.log1p(-2 * error)
    slope = float(_slope(n, log_f))
    start = float(log_f.mean() - slope * n.mean())
    rest = float(((log_f - start - slope * n) ** 2).sum())
    total = float(((log_f - log_f.mean()) ** 2).sum())
    return -math.expm1(slope) / 2, math.exp(start), 1 - rest / total if total > 0 else 1.0
