"""What an arm of an ablation changes: paired over seeds and samples, with an interval that covers both.

Every arm is measured on the same samples under the same seeds, so the difference between two arms is a table of
seeds x samples. Its mean is the effect. Seeds and samples are both draws from something larger, so both count as
random (crossed random effects): the variance of the mean is V_seeds + V_samples - V_residual, each estimated by the
two-way analysis of variance (Owen 2007, "The pigeonhole bootstrap", gives the same first-order variance), and the
t quantile takes Satterthwaite's degrees of freedom. A bootstrap over three seeds alone would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from trainables.record import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

LEVEL = 0.95


@dataclass(frozen=True)
class Effect:
    """What `arm` changes against `reference`: change of the primary metric as a fraction of the reference's mean,
    positive = worse, with its interval, and the change of each seed alone.
    """

    arm: str
    reference: str
    value: float
    lo: float
    hi: float
    by_seed: tuple[float, ...]
    samples: int
    enough_seeds: int | None

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes no effect."""
        return self.lo > 0 or self.hi < 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file, with the sentence."""
        return {**asdict(self), "resolved": self.resolved, "says": sentence(self)}


def effect(arm: str, reference: str, values: ArrayLike, reference_values: ArrayLike) -> Effect:
    """The effect of an arm; both tables are (seeds, samples) of a cost (lower = better), the same seeds and samples.

    Raises InputError for unequal shapes, fewer than 2 seeds or samples, numbers that are not finite.
    """
    a, b = np.asarray(values, dtype=np.float64), np.asarray(reference_values, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2 or min(a.shape) < 2:
        raise InputError(f"effect of {arm}: tables {a.shape} and {b.shape}; expected one shape, 2 or more seeds each")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(f"effect of {arm}: a value is not finite; leave the diverged arm out")
    change = (a - b) / abs(b.mean())
    seeds, samples = change.shape
    value, by_seed, by_sample = float(change.mean()), change.mean(1), change.mean(0)
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    of_samples = float(by_sample.var(ddof=1)) / samples
    residual = change - by_seed[:, None] - by_sample + value
    of_rest = float((residual**2).sum()) / ((seeds - 1) * (samples - 1)) / (seeds * samples)
    # The estimate may come out below its larger part, where the residual is over-estimated: then that part stands.
    variance = max(of_seeds + of_samples - of_rest, of_seeds, of_samples)
    if variance == 0:
        return Effect(arm, reference, value, value, value, tuple(map(float, by_seed)), samples, None)
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_samples**2 / (samples - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, max(freedom, 1.0))) * math.sqrt(variance)
    return Effect(
        arm, reference, value, value - half, value + half, tuple(map(float, by_seed)), samples,
        _enough(value, half, of_seeds * seeds, of_samples),
    )  # fmt: skip


def _enough(value: float, half: float, per_seed: float, of_samples: float) -> int | None:
    """Seeds at which an effect of this size would be resolved; None where it is, or where seeds cannot do it."""
    if half < abs(value):
        return None
    for seeds in range(3, 1001):
        quantile = float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1))
        if quantile * math.sqrt(per_seed / seeds + of_samples) < abs(value):
            return seeds
    return None


def sentence(found: Effect) -> str:
    """One sentence that claims what the interval supports and no more."""
    numbers = f"{100 * found.value:+.2f} % [{100 * found.lo:+.2f}, {100 * found.hi:+.2f}]"
    basis = f"{len(found.by_seed)} seeds, {found.samples} samples"
    if found.resolved:
        word = "worse" if found.value > 0 else "better"
        return f"{found.arm} is {word} than {found.reference}: the error changes by {numbers} ({basis})."
    said = f"No difference between {found.arm} and {found.reference} is shown: {numbers} ({basis})"
    if found.enough_seeds:
        return f"{said}; an effect of this size would take about {found.enough_seeds} seeds."
    return f"{said}."


def effects(tables: Mapping[str, Mapping[int, Sequence[float]]], reference: str) -> list[Effect]:
    """The effect of every other arm. tables: arm -> seed -> costs per sample; only seeds that both arms have count.

    Raises InputError where the reference arm is missing or shares fewer than 2 seeds with an arm.
    """
    if reference not in tables:
        raise InputError(f"reference arm {reference!r} was not measured; there are {', '.join(tables)}")
    found = []
    for arm, rows in tables.items():
        if arm == reference:
            continue
        seeds = sorted(rows.keys() & tables[reference].keys())
        if len(seeds) < 2:
            raise InputError(f"{arm} and {reference} share {len(seeds)} seeds; expected 2 or more (--seeds 3)")
        own, base = ([table[seed] for seed in seeds] for table in (rows, tables[reference]))
        found.append(effect(arm, reference, own, base))
    return found
