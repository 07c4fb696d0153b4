"""What the stop-loss is worth beside other rules: complete learning curves, replayed on a simulated cluster clock.

    python benchmarks/stoploss.py                       # the generated and the recorded curves; about ten minutes
    python benchmarks/stoploss.py --sweeps 2            # fewer generated curves
    python benchmarks/stoploss.py --record runs         # add the settled curves below a --storage to the recorded ones

A curve is settled when it is known whether its whole run meets the budget: it ran to its last evaluation, or had met
the budget before it ended. Trials of a sweep start in their order as slots fall free; an epoch takes each trial its own
time. Whatever the rule, a run ends at its first NaN.

- saved: evaluations that the rule saves, false stops' own not counted, as a share of what an oracle saves that ends a
  failing run at the grace and a passing one at its best; with a 95 % bootstrap interval over curves.
- false: stopped while its best drop was above the budget, though the whole run would have met it; share of all curves.
- regret: best drop of a sweep under the rule less that of its whole runs, mean over sweeps, in percentage points.
- clock: time from the first start to the last end, as a share of the same sweep's without any stop.
- coverage: how often the forecast's central 90 % interval holds the final best drop.
"""

import argparse
import heapq
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from stoploss_rules import RULES, Rule

from engines.errors import InputError, command_line
from sweeps.curves import FAMILIES
from sweeps.forecast import forecast
from sweeps.journal import NAME, SweepState
from sweeps.stoploss import StopLossRule, best_drop

RECORDED = Path(__file__).with_name("stoploss_curves.jsonl")
BUDGET, EVALS = 0.01, 30  # of the generated curves
GRACE = StopLossRule(BUDGET, EVALS).grace
SHORTEST = 2 * GRACE  # evaluations below which a recorded run is not worth its line
AGES = (0.1, 0.17, 0.27, 0.4, 0.67)  # shares of a run at which the forecast is checked


@dataclass(frozen=True)
class Curve:
    """The drops (fractions) of one run after each evaluation, of `evals` planned ones; `sweep` names its peers."""

    sweep: str
    domain: str
    task: str
    profile: str
    exp_id: str
    budget: float
    evals: int
    drops: tuple[float, ...]

    @property
    def length(self) -> int:
        """Evaluations until the end of the record or the first NaN."""
        return next((at for at, drop in enumerate(self.drops, 1) if math.isnan(drop)), len(self.drops))

    @property
    def passes(self) -> bool:
        """Whether the whole run meets the budget."""
        return best_drop(self.drops) <= self.budget

    @property
    def oracle(self) -> int:
        """Evaluations that whoever knows the curve's end would run."""
        return self.drops.index(best_drop(self.drops)) + 1 if self.passes else min(GRACE, self.length)


def generated(sweeps: int, size: int, seed: int) -> list[Curve]:
    """Sweeps of `size` curves, each of a family drawn at random from `sweeps.curves`."""
    rng, names = np.random.default_rng(seed), list(FAMILIES)
    drawn = [(sweep, names[i]) for sweep in range(sweeps) for i in rng.integers(len(names), size=size)]
    curves = []
    for at, (sweep, name) in enumerate(drawn):
        drops = tuple(FAMILIES[name](rng, EVALS).tolist())
        curves.append(Curve(f"generated {sweep}", name, "", "", f"{name} {at}", BUDGET, EVALS, drops))
    return curves


def recorded(path: Path = RECORDED) -> list[Curve]:
    """The curves of a file that `record` wrote; InputError for a line that is none."""
    curves = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            data = json.loads(line)
            curves.append(Curve(**{**data, "drops": tuple(map(float, data["drops"]))}))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: line {number} is no curve ({error}); remove it, or record anew") from error
    return curves


def settled(folder: Path) -> Iterator[Curve]:
    """The settled curves of every sweep below the folder; InputError where there is no sweep."""
    journals = sorted(folder.rglob(NAME))
    if not journals:
        raise InputError(f"--record {folder}: no {NAME} below it; expected the --storage of a sweep that was run")
    for path in journals:
        state = SweepState.replay(path)
        settings = state.header.get("settings", {})
        budget, evals = settings.get("gate_at_most"), settings.get("epochs")
        if settings.get("gate_metric") != "drop" or budget is None or evals is None:
            continue
        for trial in state.trials.values():
            drops = tuple(round(drop, 5) for drop in trial.drops)
            curve = Curve(
                sweep=str(state.header["sweep_id"]),
                domain=str(state.header["domain"]),
                task=trial.task_id,
                profile=str(state.header["profile"]),
                exp_id=trial.exp_id,
                budget=budget,
                evals=evals,
                drops=drops,
            )
            if len(drops) >= SHORTEST and (len(drops) == evals or curve.passes):
                yield curve


def record(folders: Sequence[Path], path: Path = RECORDED) -> int:
    """Append the settled curves that the file does not hold yet; how many. Nothing is written on an InputError."""
    known = recorded(path)
    new: list[Curve] = []
    for curve in (curve for folder in folders for curve in settled(folder)):
        if all((curve.sweep, curve.exp_id) != (other.sweep, other.exp_id) for other in (*known, *new)):
            new.append(curve)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(curve)) + "\n" for curve in new)
    return len(new)


def replay(curves: Sequence[Curve], rule: Rule, slots: int, seed: int) -> tuple[list[int], float]:
    """Run one sweep under a rule: evaluations that each trial ran, and the time from first start to last end."""
    pace = np.random.default_rng(seed).uniform(0.8, 1.25, len(curves))  # so that no two trials keep step
    ran = [0] * len(curves)
    waiting = iter(range(len(curves)))
    due: list[tuple[float, int]] = []

    def start(now: float) -> None:
        trial = next(waiting, None)
        if trial is not None:
            rule.start(trial)
            heapq.heappush(due, (now + pace[trial], trial))

    for _ in range(slots):
        start(0.0)
    now = 0.0
    while due:
        now, trial = heapq.heappop(due)
        ran[trial] += 1
        curve = curves[trial]
        history = curve.drops[: ran[trial]]
        if ran[trial] == curve.length:
            rule.end(trial, history)
            start(now)
        elif rule.stops(trial, history):
            start(now)
        else:
            heapq.heappush(due, (now + pace[trial], trial))
    return ran, now


@dataclass(frozen=True)
class Worth:
    """What a rule did to some curves, one entry per curve: saved and oracle in evaluations; regret and clock per
    sweep.
    """

    saved: list[int]
    oracle: list[int]
    false: list[bool]
    regret: list[float]
    clock: list[float]

    def row(self) -> str:
        """The numbers of the module's docstring."""
        saved, oracle = np.array(self.saved), np.array(self.oracle)
        picks = np.random.default_rng(0).integers(len(saved), size=(1000, len(saved)))
        low, high = np.percentile(saved[picks].sum(1) / np.maximum(oracle[picks].sum(1), 1), [2.5, 97.5])
        exact = binomtest(sum(self.false), len(self.false)).proportion_ci(0.95, "exact")
        return (
            f"{saved.sum() / max(oracle.sum(), 1):6.1%} [{low:.0%}, {high:.0%}]"
            f"  {np.mean(self.false):6.2%} [{exact.low:.1%}, {exact.high:.1%}]"
            f"  {100 * np.mean(self.regret):6.2f}  {np.mean(self.clock):5.0%}"
        )


def worth(curves: Sequence[Curve], name: str, slots: int) -> Worth:
    """Replay every sweep of the curves under the rule of that name."""
    found = Worth([], [], [], [], [])
    for seed, sweep in enumerate(dict.fromkeys(curve.sweep for curve in curves)):
        peers = [curve for curve in curves if curve.sweep == sweep]
        ran, clock = replay(peers, RULES[name](peers[0].budget, peers[0].evals), slots, seed)
        _, whole = replay(peers, Rule(), slots, seed)
        for curve, evals in zip(peers, ran, strict=True):
            false = curve.passes and best_drop(curve.drops[:evals]) > curve.budget
            found.false.append(false)
            found.saved.append(0 if false else curve.length - evals)
            found.oracle.append(curve.length - curve.oracle)
        reached = min(best_drop(curve.drops[:evals]) for curve, evals in zip(peers, ran, strict=True))
        found.regret.append(reached - min(best_drop(curve.drops) for curve in peers))
        found.clock.append(clock / whole)
    return found


def covered(curve: Curve) -> list[bool]:
    """Whether the forecast's 90 % interval holds the final best drop, at each age; nothing past a NaN."""
    ages = [round(age * curve.evals) for age in AGES]
    seen = [curve.drops[:age] for age in ages if GRACE <= age < curve.length]
    final = best_drop(curve.drops)
    intervals = [forecast(history, curve.evals).interval for history in seen]
    return [low <= final <= high for low, high in intervals]


def coverage(curves: Iterable[Curve]) -> str:
    """The share covered with a 95 % bootstrap interval over curves; the ages of one curve go together."""
    hits = [hit for hit in map(covered, curves) if hit]
    if not hits:
        return "no forecast"
    shares = [(sum(hit), len(hit)) for hit in hits]
    drawn = np.array(shares)[np.random.default_rng(0).integers(len(hits), size=(1000, len(hits)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    hit, asked = np.array(shares).sum(axis=0)
    return f"{hit / asked:.1%} [{low:.0%}, {high:.0%}] of {asked} forecasts of {len(hits)} curves"


def report(title: str, curves: Sequence[Curve], slots: Sequence[int], rules: Sequence[str]) -> None:
    """Print the comparison."""
    passing = sum(curve.passes for curve in curves)
    sweeps = len({curve.sweep for curve in curves})
    print(f"\n{title}: {len(curves)} curves in {sweeps} sweeps, {passing} pass")
    print(f"{'rule':12s} slots  saved of oracle     false stops          regret  clock")
    for name in rules:
        for count in slots:
            print(f"{name:12s} {count:5d} {worth(curves, name, count).row()}", flush=True)


@command_line
def main(arguments: list[str] | None) -> None:
    """Print both comparisons and the coverage, or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--record", nargs="+", type=Path, metavar="FOLDER", help="add the settled curves below these folders, and end")
    add("--sweeps", type=int, default=10, help="generated sweeps (default: %(default)s)")
    add("--size", type=int, default=64, help="curves of each (default: %(default)s)")
    add("--slots", type=int, nargs="+", default=[1, 8, 64], help="trials at a time (default: 1 8 64)")
    add("--rules", nargs="+", choices=RULES, default=list(RULES), help="rules to compare (default: all)")
    add("--seed", type=int, default=1001, help="seed of the generated curves (default: %(default)s)")
    given = parser.parse_args(arguments)
    for name in ("sweeps", "size"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name} {getattr(given, name)}: expected 1 or more")
    if given.seed < 0:
        raise InputError(f"--seed {given.seed}: expected 0 or more")
    if min(given.slots) < 1:
        raise InputError(f"--slots {min(given.slots)}: expected 1 or more")
    if given.record:
        print(f"{record(given.record)} curves added to {RECORDED.name}, which holds {len(recorded())}")
        return
    curves = generated(given.sweeps, given.size, given.seed)
    report(f"Generated, seed {given.seed}", curves, given.slots, given.rules)
    real = recorded()
    if real:
        report("Recorded", real, given.slots, given.rules)
    print("\nCoverage of the forecast's 90 % interval")
    for family in FAMILIES:
        print(f"{family:16s} {coverage(curve for curve in curves if curve.domain == family)}")
    print(f"{'generated':16s} {coverage(curves)}")
    if real:
        print(f"{'recorded':16s} {coverage(real)}")
    started, asked = time.process_time(), 0
    for curve in curves[:50]:
        forecast(curve.drops[:10], EVALS)
        asked += 1
    print(f"A forecast takes {1000 * (time.process_time() - started) / asked:.1f} ms of CPU time")


if __name__ == "__main__":
    raise SystemExit(main())
