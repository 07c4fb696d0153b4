"""How often the intervals of an ablation's effect hold the truth: Student's t over both spreads beside bootstraps.

    python benchmarks/effects_coverage.py                 # 95 % intervals, 1,000 made-up ablations of each kind

An effect is measured as a table of seeds x samples: truth + what a seed does to it + what a sample does to it + the
rest, all three normal here. analytic: `analysis.effects`. both: percentiles over draws of seeds and of samples, with
replacement, each draw shared by the whole table (Owen's pigeonhole bootstrap). seeds, samples: only the one is drawn.
Coverage is the share of ablations whose interval holds the truth; width is the median one, analytic = 1.
"""

import argparse
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from analysis.effects import LEVEL, effect

Table = NDArray[np.float64]
SPREADS = {"seeds differ": (0.05, 0.05, 0.3), "samples differ": (0.001, 0.3, 0.3), "both alike": (0.02, 0.3, 0.3)}
SAMPLES, DRAWS = 256, 400


class Bootstrap:
    """Percentile intervals of a table's mean over draws that are the same for every table."""

    def __init__(self, rng: np.random.Generator, seeds: int, over_seeds: bool, over_samples: bool) -> None:
        self._seeds = self._weights(rng, seeds, over_seeds)
        self._samples = self._weights(rng, SAMPLES, over_samples)

    def __call__(self, table: Table) -> tuple[float, float]:
        means = ((self._seeds @ table) * self._samples).sum(1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    @staticmethod
    def _weights(rng: np.random.Generator, count: int, drawn: bool) -> Table:
        even = np.full(count, 1 / count)
        return rng.multinomial(count, even, DRAWS) / count if drawn else np.tile(even, (DRAWS, 1))


def coverage(rng: np.random.Generator, seeds: int, spreads: tuple[float, float, float], ablations: int,
             truth: float = 0.02) -> Mapping[str, tuple[float, float]]:  # fmt: skip
    """By interval: the share that holds the truth, and the median width in widths of the analytic one."""
    bootstraps = {
        "both": Bootstrap(rng, seeds, True, True), "seeds": Bootstrap(rng, seeds, True, False),
        "samples": Bootstrap(rng, seeds, False, True),
    }  # fmt: skip
    held: dict[str, list[bool]] = {name: [] for name in ("analytic", *bootstraps)}
    widths: dict[str, list[float]] = {name: [] for name in held}
    by_seed, by_sample, rest = spreads
    for _ in range(ablations):
        table = truth + by_seed * rng.standard_normal((seeds, 1)) + by_sample * rng.standard_normal((1, SAMPLES))
        table = table + rest * rng.standard_normal((seeds, SAMPLES))
        found = effect("arm", "reference", 1 + table, np.ones_like(table))
        intervals = {"analytic": (found.lo, found.hi)} | {name: one(table) for name, one in bootstraps.items()}
        for name, (low, high) in intervals.items():
            held[name].append(low <= truth <= high)
            widths[name].append(high - low)
    unit = float(np.median(widths["analytic"]))
    return {name: (float(np.mean(held[name])), float(np.median(widths[name])) / unit) for name in held}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablations", type=int, default=1000, metavar="N", help="made-up ablations of each kind")
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    error = 100 * np.sqrt(LEVEL * (1 - LEVEL) / given.ablations)
    print(f"coverage in % (aim {100 * LEVEL:.0f}, standard error {error:.1f}), width in brackets")
    print("| spread | seeds | analytic | both | seeds alone | samples alone |\n|---|---|---|---|---|---|")
    for name, spreads in SPREADS.items():
        for seeds in (3, 5, 10):
            found = coverage(rng, seeds, spreads, given.ablations)
            cells = " | ".join(f"{100 * share:.1f} ({width:.2f})" for share, width in found.values())
            print(f"| {name} | {seeds} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
