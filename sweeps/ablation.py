"""What an ablation's sweep found: the effects of its arms, for its files, its pictures and the closing screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.contrasts import Comparison
from engines.errors import InputError
from sweeps.ledger import Ledger
from sweeps.spec import Sweep
from trainables.gates import BROKEN

if TYPE_CHECKING:
    from analysis.effects import Effect

TEST_COSTS = "test_costs.npy"  # what measuring leaves in a trial's folder: (samples,), lower = better
Tables = dict[str, dict[int, Any]]  # arm -> seed -> costs


@dataclass(frozen=True)
class Found:
    """The effects of one comparison; why: one line for each that could not be computed."""

    comparison: Comparison
    effects: tuple[Effect, ...]
    why: tuple[str, ...]

    @property
    def data(self) -> dict[str, Any]:
        """Effects as plain data."""
        gaps = {"why": "; ".join(self.why)} if self.why else {}
        return {"effects": [one.to_dict() for one in self.effects], **gaps}


def found(sweep: Sweep, ledger: Ledger) -> list[Found]:
    """The effects of every comparison of the sweep, as far as its arms were measured; empty where it is no ablation."""
    wanted = sweep.all_comparisons
    tables, broken = (measured(ledger), _broken(ledger)) if wanted else ({}, [])
    return [_compare(comparison, tables, broken) for comparison in wanted]


def measured(ledger: Ledger) -> Tables:
    """The costs per test sample of all measured trials, by arm and seed. Half-trained weights of a trial that broke say
    nothing of its arm.
    """
    tables: Tables = {}
    for trial in ledger.state.trials.values():
        path = ledger.state_dir(trial.trial_id) / TEST_COSTS
        if trial.role == "trial" and trial.record and path.is_file() and trial.record.get("stop_reason") not in BROKEN:
            tables.setdefault(str(trial.record["combo"]), {})[trial.record["seed"]] = np.load(path)
    return tables


def _broken(ledger: Ledger) -> list[tuple[str, str]]:
    """The trials that broke: their arm, and a line for each."""
    records = [trial.record for trial in ledger.state.trials.values() if trial.role == "trial" and trial.record]
    return [
        (str(one["combo"]), f"{one['exp_id']} ended by {one['stop_reason']} after {one['epochs']} epochs: left out")
        for one in records
        if one.get("stop_reason") in BROKEN
    ]


def _compare(comparison: Comparison, tables: Tables, broken: Sequence[tuple[str, str]]) -> Found:
    from analysis.effects import paired  # scipy takes a while to import

    effects, why = [], [line for arm, line in broken if arm in comparison.arms]
    for contrast in comparison.contrasts:
        try:
            effects.append(paired(contrast, tables))
        except InputError as error:
            why.append(str(error))
    return Found(comparison, tuple(effects), tuple(dict.fromkeys(why)))


def sentences(found_: Sequence[Found]) -> list[str]:
    """What the closing screen says: of several comparisons, each under its title."""
    from analysis.effects import caution, sentence

    lines: list[str] = []
    for one in found_:
        lines += [f"{one.comparison.title} ({one.comparison.file}):"] if len(found_) > 1 else []
        lines += [sentence(effect) for effect in one.effects]
        lines += [f"Not compared: {why}" for why in one.why]
    return [*lines, caution(sum(len(one.effects) for one in found_))] if lines else []


def content(one: Found, ledger: Ledger) -> dict[str, Any]:
    """What the comparison's JSON file holds: what was measured on what, every arm's mean cost, and the effects."""
    from analysis.effects import caution

    header = ledger.state.header
    tables = measured(ledger)
    arms = {arm: _means(tables[arm]) for arm in one.comparison.arms if arm in tables}
    keys = ("name", "domain", "profile", "workload_hash", "config_hash", "git_commit")
    return {
        "title": one.comparison.title,
        "sweep": {key: header.get(key) for key in keys},
        "metric": metric(ledger),
        "arms": arms,
        **one.data,
        "caution": caution(len(one.effects)),
    }


def metric(ledger: Ledger) -> str:
    """Name of the primary metric."""
    return str((ledger.state.header.get("settings") or {}).get("primary", "the error"))


def draw(one: Found, ledger: Ledger, path: Path) -> None:
    """The comparison's picture."""
    from analysis import effects_picture  # so does matplotlib

    name = str(ledger.state.header["name"])
    effects_picture.draw(one.effects, one.comparison.title, name, metric(ledger), path)


def _means(rows: Mapping[int, Any]) -> dict[str, Any]:
    by_seed = {str(seed): float(costs.mean()) for seed, costs in sorted(rows.items())}
    return {"mean": sum(by_seed.values()) / len(by_seed), "by_seed": by_seed}
