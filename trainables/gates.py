"""Drop against a reference, its interval, and the gate that turns a record into a verdict. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from engines.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainables.record import Record

_CHUNK_CELLS = 4_000_000  # resampling weights held at once: 32 MB


@dataclass(frozen=True)
class Drop:
    """Relative degradation as a fraction (0.01 = 1 %), positive = worse, with the ends of its interval."""

    value: float
    lo: float
    hi: float


def drop(value: float, reference: float, lower_is_better: bool) -> float:
    """Relative degradation of `value` against `reference` as a fraction, positive = worse; NaN for a NaN
    value.

    Raises InputError for a reference that is not a positive finite number: relative to it nothing has a size.
    """
    if not (math.isfinite(reference) and reference > 0):
        raise InputError(f"reference={reference}: expected a positive number; measure the reference on more samples")
    change = (value - reference) / reference
    return change if lower_is_better else -change


def paired_drop(
    values: Sequence[float] | NDArray[np.floating],
    reference_values: Sequence[float] | NDArray[np.floating],
    lower_is_better: bool,
    seed: int,
    level: float = 0.95,
    n: int = 2000,
) -> Drop:
    """Drop of the mean of `values` (one per pair of the workload) against that of `reference_values`, same
    pairs.

    The interval is a percentile bootstrap over pairs (n resamples), widened as Hesterberg (2015) proposes:
    plain percentiles are too narrow by sqrt((n-1)/n) and by normal instead of t quantiles, 9 % at the plan's
    20 pairs. A NaN among the values gives a NaN drop (a diverged trial); InputError for unequal lengths,
    fewer than two pairs or an unusable reference.
    """
    a, b = np.asarray(values, dtype=np.float64), np.asarray(reference_values, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise InputError(f"paired drop: {a.shape} values, {b.shape} reference values; expected two lists of one length")
    if not 0 < level < 1 or n < 1:
        raise InputError(f"paired drop: level={level}, n={n}; expected 0 < level < 1 and n >= 1")
    value = drop(float(a.mean()), float(b.mean()), lower_is_better)
    if not np.isfinite(a).all():
        return Drop(math.nan, math.nan, math.nan)
    pairs, rng = len(a), np.random.default_rng(seed)
    sums = np.empty((n, 2))
    both, shares = np.stack([a, b], axis=1), np.full(pairs, 1 / pairs)
    # Equal pairs are drawn together: a hundred thousand right or wrong decisions are four kinds of pairs.
    kinds, counts = np.unique(both, axis=0, return_counts=True)
    if len(kinds) <= pairs / 2:
        both, shares = kinds, counts / pairs
    step = max(1, _CHUNK_CELLS // len(both))
    for start in range(0, n, step):
        rows = min(step, n - start)
        weights = rng.multinomial(pairs, shares, size=rows)
        sums[start : start + rows] = weights @ both
    with np.errstate(divide="ignore", invalid="ignore"):
        changes = sums[:, 0] / sums[:, 1] - 1
    changes[np.isnan(changes)] = 0.0  # 0/0: neither made an error in this resample
    tail = tail_of((1 - level) / 2, pairs)
    lo, hi = np.quantile(changes if lower_is_better else -changes, [tail, 1 - tail], method="nearest")
    return Drop(value, float(lo), float(hi))


def tail_of(tail: float, pairs: int) -> float:
    """The percentile to read off for an interval as wide as t quantiles and the unbiased variance make it."""
    z, v = -NormalDist().inv_cdf(tail), pairs - 1
    # Cornish-Fisher expansion of the t quantile: within 1 % of it from 4 degrees of freedom on.
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return NormalDist().cdf(-t * math.sqrt(pairs / v))


@dataclass(frozen=True)
class Verdict:
    """`verdict` is pass, fail or n/a; `detail` holds the numbers in words."""

    verdict: str
    detail: str


@dataclass(frozen=True)
class Gate:
    """A limit on one number of the record, a field or a key of `extra`; exactly one of at_most and at_least.

    Limits are in the record's units: Gate("drop", at_most=0.01) allows a loss of 1 %.
    """

    metric: str = "drop"
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        limits = [x for x in (self.at_most, self.at_least) if x is not None]
        if len(limits) != 1 or not math.isfinite(limits[0]):
            raise InputError(
                f"gate {self.metric}: at_most={self.at_most}, at_least={self.at_least}; expected one limit"
            )

    def judge(self, record: Record, role: str = "trial") -> Verdict:
        """pass or fail by the point value; n/a for a reference (role "teacher"); a missing number fails."""
        if role == "teacher":
            return Verdict("n/a", "the reference itself")
        row = record.to_dict()
        value = row.get(self.metric)
        limit, sign = (self.at_most, "<=") if self.at_most is not None else (self.at_least, ">=")
        assert limit is not None
        if isinstance(value, str) or value is None or math.isnan(value):
            why = "" if record.stop_reason in (None, "completed") else f" (stopped: {record.stop_reason})"
            return Verdict("fail", f"{self.metric} was not measured{why}, needed {sign} {self._say(limit)}")
        good = value <= limit if self.at_most is not None else value >= limit
        lo, hi = row.get(f"{self.metric}_lo"), row.get(f"{self.metric}_hi")
        detail = f"{self.metric} {self._say(value)}"
        if isinstance(lo, int | float) and isinstance(hi, int | float):
            detail += f" [{self._say(lo)}, {self._say(hi)}]"
        detail += f", needed {sign} {self._say(limit)}"
        if isinstance(lo, int | float) and isinstance(hi, int | float) and lo <= limit <= hi:
            detail += "; the limit lies within the interval"
        return Verdict("pass" if good else "fail", detail)

    def excess(self, value: float) -> float:
        """How far `value` lies beyond the limit, in the metric's unit; zero or less where the gate is met."""
        return value - self.at_most if self.at_most is not None else (self.at_least or 0.0) - value

    def _say(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.metric in ("drop", "params_down") else f"{value:.4g}"


BROKEN = {"diverged": "diverged", "failed": "failed", "out_of_memory": "ran out of memory"}  # they fail in any case


def judge_all(record: Record, gates: Sequence[Gate], role: str = "trial") -> Verdict:
    """The worst of the gates' verdicts with all their numbers; a trial that diverged or failed fails in any case."""
    if record.stop_reason in BROKEN:
        return Verdict("fail", f"the trial {BROKEN[record.stop_reason]}; its best weights until then were measured")
    if not gates:
        return Verdict("n/a", "no gate")
    verdicts = [one.judge(record, role) for one in gates]
    worst = min((verdict.verdict for verdict in verdicts), key=["fail", "n/a", "pass"].index)
    return Verdict(worst, "; ".join(dict.fromkeys(verdict.detail for verdict in verdicts)))


def judge_any(records: Iterable[Record], gates: Sequence[Gate]) -> Verdict:
    """The best verdict that any of the trials reaches with all gates; fail where there is none."""
    verdicts = [judge_all(record, gates) for record in records]
    rank = ["pass", "n/a", "fail"].index
    return min(verdicts, key=lambda found: rank(found.verdict), default=Verdict("fail", "no trial was measured"))
