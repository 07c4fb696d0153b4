"""What the arms of an ablation change: paired over seeds and samples, with an interval that covers both.

Every arm is measured on the same samples under the same seeds, so a contrast of arms (:mod:`analysis.contrasts`; the
simplest is the difference of two) is a table of seeds x samples. Its mean is the effect. Seeds and samples are both
draws from something larger, so both count as random (crossed random effects): the variance of the mean is
V_seeds + V_samples - V_residual, each estimated by the two-way analysis of variance (Owen 2007, "The pigeonhole
bootstrap", gives the same first-order variance), and the t quantile takes Satterthwaite's degrees of freedom. With
three seeds percentiles of a bootstrap are too narrow: drawn over seeds alone by far, over both where seeds differ much
(benchmarks/effects_coverage.py measures it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from analysis.contrasts import Contrast, Kind, against, each
from trainables.record import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

LEVEL, POWER = 0.95, 0.8
MOST_SEEDS = 1000  # beyond these an effect counts as out of reach


@dataclass(frozen=True)
class Effect:
    """What a contrast comes to: `arm` is its name, `reference` the arm of its unit. value: change of the primary metric
    as a fraction of the reference's mean, positive = worse, with its interval, and the value of each seed alone.
    enough_seeds: see ``_enough``.
    """

    arm: str
    reference: str
    value: float
    lo: float
    hi: float
    by_seed: tuple[float, ...]
    samples: int
    enough_seeds: int | None
    kind: Kind = "arm"
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes no effect."""
        return self.lo > 0 or self.hi < 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file, with the sentence."""
        return {**asdict(self), "weights": dict(self.weights), "resolved": self.resolved, "says": sentence(self)}


def effect(arm: str, reference: str, values: ArrayLike, reference_values: ArrayLike) -> Effect:
    """The effect of one arm against another; see :func:`contrast`."""
    return contrast(against(arm, reference), {arm: values, reference: reference_values})


def contrast(wanted: Contrast, tables: Mapping[str, ArrayLike]) -> Effect:
    """The effect of a contrast; tables: by arm, (seeds, samples) of a cost (lower = better), seeds and samples shared.

    Raises InputError for unequal shapes, fewer than 2 seeds or samples, numbers that are not finite.
    """
    arms = {arm: np.asarray(tables[arm], dtype=np.float64) for arm in wanted.weights}
    shapes = [table.shape for table in arms.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or min(shapes[0]) < 2:
        found = " and ".join(map(str, shapes))
        raise InputError(f"effect of {wanted.name}: tables {found}; expected one shape, 2 or more seeds each")
    if not all(np.isfinite(table).all() for table in arms.values()):
        raise InputError(f"effect of {wanted.name}: a value is not finite; leave the diverged arm out")
    unit = abs(float(arms[wanted.unit].mean()))
    if unit == 0:
        raise InputError(f"effect of {wanted.name}: {wanted.unit} made no error at all; measure more samples")
    change = np.zeros(shapes[0])
    for arm, weight in wanted.weights.items():
        change += weight * arms[arm]
    change /= unit
    seeds, samples = change.shape
    value, by_seed, by_sample = float(change.mean()), change.mean(1), change.mean(0)
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    of_samples = float(by_sample.var(ddof=1)) / samples
    residual = change - by_seed[:, None] - by_sample + value
    of_rest = float((residual**2).sum()) / ((seeds - 1) * (samples - 1)) / (seeds * samples)
    # The estimate may come out below its larger part, where the residual is over-estimated: then that part stands.
    variance = max(of_seeds + of_samples - of_rest, of_seeds, of_samples)
    half = 0.0
    enough: int | None = None
    if variance > 0:
        freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_samples**2 / (samples - 1))
        half = float(stats.t.ppf((1 + LEVEL) / 2, max(freedom, 1.0))) * math.sqrt(variance)
        # Part of the spread over samples is the residual's: more seeds average it out.
        enough = _enough(value, half, seeds, of_seeds * seeds, max(of_samples - of_rest, 0.0))
    return Effect(
        wanted.name, wanted.unit, value, value - half, value + half, tuple(map(float, by_seed)), samples, enough,
        wanted.kind, dict(wanted.weights),
    )  # fmt: skip


def _enough(value: float, half: float, had: int, per_seed: float, of_samples: float) -> int | None:
    """Seeds, more than it had, at which an effect of this size would be resolved with a probability of ``POWER``; None
    where it is resolved, 0 where not even ``MOST_SEEDS`` would do it.
    """
    if half < abs(value):
        return None
    seeds = np.arange(3, MOST_SEEDS + 1)
    enough = _quantiles() * np.sqrt(per_seed / seeds + of_samples) < abs(value)
    enough &= seeds > had
    return int(seeds[enough.argmax()]) if enough.any() else 0


@cache
def _quantiles() -> NDArray[np.float64]:
    """With 3, 4, ... MOST_SEEDS seeds: how many standard errors an effect must measure to be resolved that often."""
    freedom = np.arange(2, MOST_SEEDS)
    return np.asarray(stats.t.ppf((1 + LEVEL) / 2, freedom) + stats.t.ppf(POWER, freedom))


def sentence(found: Effect) -> str:
    """One sentence that claims what the interval supports and no more."""
    numbers = f"{100 * found.value:+.2f} % [{100 * found.lo:+.2f}, {100 * found.hi:+.2f}]"
    seeds = len(found.by_seed)
    basis = f"{seeds} seeds, {found.samples} samples" if found.samples else f"{seeds} seeds, the same test samples"
    up, share = found.value > 0, "" if found.kind == "arm" else f" of {found.reference}'s error"
    if found.resolved:
        said = {
            "arm": f"{found.arm} is {'worse' if up else 'better'} than {found.reference}: the error changes by",
            "main": f"{found.arm} {'raises' if up else 'lowers'} the error, averaged over its pairs of arms:",
            "interaction": f"{found.arm}: together, the error is {'higher' if up else 'lower'} than their separate "
            "effects add up to:",
        }[found.kind]
        return f"{said} {numbers}{share} ({basis})."
    said = {
        "arm": f"No difference between {found.arm} and {found.reference} is shown",
        "main": f"No effect of {found.arm}, averaged over its pairs of arms, is shown",
        "interaction": f"No interaction {found.arm} is shown",
    }[found.kind]
    said += f": {numbers}{share} ({basis})"
    if found.enough_seeds:
        more = max(found.enough_seeds - seeds, 1)
        return f"{said}; an effect of this size would take about {found.enough_seeds} seeds ({more} more)."
    if found.enough_seeds == 0:
        samples = ", or more test samples" if found.samples else ""
        return f"{said}; an effect of this size would take more than {MOST_SEEDS} seeds{samples}."
    return f"{said}."


def caution(count: int) -> str:
    """What to keep in mind when reading `count` intervals at once."""
    chance = (
        f"Each interval is for its effect alone: were all {count} effects zero, about {(1 - LEVEL) * count:.1f} "
        "intervals would exclude 0 by chance."
        if count > 1
        else f"Were the effect zero, {100 * (1 - LEVEL):.0f} % of such intervals would exclude 0 by chance."
    )
    return (
        f"{chance} Seeds that an effect would take: to resolve it in {100 * POWER:.0f} % "
        "of repeats, were its size and the spread between seeds what was measured here."
    )


def over_seeds(wanted: Contrast, tables: Mapping[str, Mapping[int, float]]) -> Effect:
    """The effect of a contrast from one error per arm and seed, where nothing is known of single samples: its interval
    (Student's t over paired seeds) says what other seeds would give, not what other test samples would.

    Raises InputError as ``paired`` does, and for an error that is not finite.
    """
    seeds = _common(wanted, tables)
    rows = {arm: np.array([tables[arm][seed] for seed in seeds]) for arm in wanted.weights}
    unit = abs(float(rows[wanted.unit].mean()))
    if not unit > 0 or not all(np.isfinite(row).all() for row in rows.values()):
        raise InputError(f"effect of {wanted.name}: an error is not finite, or {wanted.unit} made none at all")
    change = np.sum([weight * rows[arm] for arm, weight in wanted.weights.items()], axis=0) / unit
    value, per_seed = float(change.mean()), float(change.var(ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(seeds) - 1)) * math.sqrt(per_seed / len(seeds))
    return Effect(
        wanted.name, wanted.unit, value, value - half, value + half, tuple(map(float, change)), 0,
        _enough(value, half, len(seeds), per_seed, 0.0), wanted.kind, dict(wanted.weights),
    )  # fmt: skip


def effects(tables: Mapping[str, Mapping[int, Sequence[float]]], reference: str) -> list[Effect]:
    """The effect of every other arm; see :func:`paired`. Raises InputError also where there is no reference arm."""
    if reference not in tables:
        raise InputError(f"reference arm {reference!r} was not measured; there are {', '.join(tables)}")
    return [paired(one, tables) for one in each([arm for arm in tables if arm != reference], reference)]


def paired(wanted: Contrast, tables: Mapping[str, Mapping[int, Sequence[float]]]) -> Effect:
    """The effect of a contrast over the seeds that all of its arms have. tables: arm -> seed -> costs per sample.

    Raises InputError where an arm is missing or fewer than 2 seeds are shared.
    """
    seeds = _common(wanted, tables)
    return contrast(wanted, {arm: [tables[arm][seed] for seed in seeds] for arm in wanted.weights})


def _common(wanted: Contrast, tables: Mapping[str, Mapping[int, Any]]) -> list[int]:
    """The seeds that all arms of a contrast have."""
    missing = [arm for arm in wanted.weights if arm not in tables]
    if missing:
        there = ", ".join(tables) or "none"
        raise InputError(f"{wanted.name}: {', '.join(missing)} was not measured; there are {there}")
    seeds = sorted(set.intersection(*(set(tables[arm]) for arm in wanted.weights)))
    if len(seeds) < 2:
        names = " and ".join(wanted.weights)
        raise InputError(f"{names} share {len(seeds)} seeds; expected 2 or more (--seeds 3)")
    return seeds
