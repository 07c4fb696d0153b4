"""Optuna over a sweep's space: two objectives, asked and told in batches between the phases of measuring.

Ray's own Optuna search cannot take two objectives of which one (p50) is only known after training, so the
driver asks for a batch, trains and measures it, and tells. The journal keeps what was asked; a resumed
sweep rebuilds the study.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from sweeps.journal import TrialState
from sweeps.plan import Planned, Planner
from sweeps.settings import Resolved
from sweeps.spec import OneOf, Range, Trial, schedule_options
from trainables.gates import Gate
from trainables.schedules import Schedule

OBJECTIVES = ("best validation drop", "t_pair_p50_ms")
STARTUP = 10  # trials drawn at random before the sampler has something to go by


class Search:
    """A multi-objective TPE study whose trials are planned like the script's own."""

    def __init__(self, space: Mapping[str, Range | OneOf], planner: Planner, task_id: str, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._planner, self._task_id, self._seed = space, planner, task_id, seed
        self._gates, self._budget = planner.sweep.search_gates, planner.sweep.gate
        self._study = optuna.create_study(directions=["minimize"] * len(OBJECTIVES), sampler=self._sampler(0))
        self._asked: dict[str, optuna.trial.Trial] = {}
        self._count = 0

    def batch(self, slots: int, left: int) -> int:
        """How many trials to ask for: all random ones at once, then as many as run side by side."""
        return min(left, max(slots, STARTUP - self._count))

    def ask(self, count: int) -> list[Planned]:
        """New trials. A sampler seeded by the trials so far makes a resumed search ask what it would have
        asked.
        """
        self._study.sampler = self._sampler(self._count)
        return [self._next() for _ in range(count)]

    def again(self, params: Mapping[str, Any]) -> Planned:
        """A trial that the journal says was asked, with the study's own parameters."""
        self._study.enqueue_trial(dict(params))
        return self._next()

    def learn(self, planned: Sequence[Planned], trials: Mapping[str, TrialState], settings: Mapping[str, Any]) -> None:
        """Start from the plan's own measured trials where they lie within the space."""
        for trial in planned:
            values = _values(trials[trial.trial_id])
            point = _point(self._space, {**settings, **trial.params})
            if trial.role != "trial" or point is None or values is None:
                continue
            self._study.enqueue_trial(point)
            asked = self._study.ask()
            for name, words in self._space.items():
                _suggest(asked, name, words)
            self._tell(asked, trials[trial.trial_id], values)

    def tell(self, trials: Sequence[TrialState]) -> None:
        """Both objectives of measured trials; one that lacks either counts as failed."""
        for trial in trials:
            asked = self._asked.pop(trial.trial_id, None)
            if asked is None:
                continue
            values = _values(trial)
            if values is None:
                self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                self._tell(asked, trial, values)

    def _tell(self, asked: optuna.trial.Trial, trial: TrialState, values: list[float]) -> None:
        if self._gates and self._budget:
            asked.set_constraint("best validation drop", self._budget.excess(trial.best_drop))
        for gate in self._gates:
            asked.set_constraint(gate.metric, _excess(gate, trial))
        self._study.tell(asked, values)

    def _sampler(self, count: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(seed=self._seed + count, n_startup_trials=STARTUP)

    def _next(self) -> Planned:
        trial = self._study.ask()
        params = {name: _suggest(trial, name, words) for name, words in self._space.items()}
        planned = self._planner.plan(
            Trial(self._task_id, gates=self._gates, **params),
            tags={"search": {"number": self._count, "params": dict(trial.params)}},
        )
        self._count += 1
        self._asked[planned.trial_id] = trial
        return planned


def check_space(space: Mapping[str, Range | OneOf], resolved: Resolved, task_id: str) -> None:
    """InputError for a parameter that no settings file has, and for an end of a range or an option that is refused."""
    furthest = far_end(space)
    for name, words in space.items():
        ends = (words.low, words.high) if isinstance(words, Range) else () if schedule_options(words) else words.options
        for value in ends or (furthest[name],):
            resolved.with_params({**furthest, name: value}, task_id)


def far_end(space: Mapping[str, Range | OneOf]) -> dict[str, Any]:
    """Parameters of a trial at the upper end of every range, where all that the space may turn on is on."""
    point: dict[str, Any] = {}
    for name, words in space.items():
        if isinstance(words, Range):
            point[name] = words.high
        else:
            point[name] = 1.0 if schedule_options(words) else words.options[-1]
    return point


def _values(trial: TrialState) -> list[float] | None:
    """The objectives, None where one is missing. Validation steers the search: the test split only reports."""
    p50 = (trial.record or {}).get("t_pair_p50_ms")
    return [trial.best_drop, float(p50)] if p50 is not None and math.isfinite(trial.best_drop) else None


def _excess(gate: Gate, trial: TrialState) -> float:
    value = (trial.record or {}).get(gate.metric)
    return gate.excess(value) if isinstance(value, int | float) else math.inf


def _suggest(trial: optuna.trial.Trial, name: str, words: Range | OneOf) -> Any:
    if isinstance(words, Range):
        return _short(trial.suggest_float(name, words.low, words.high, log=words.log))
    schedules = schedule_options(words)
    if not schedules:
        return trial.suggest_categorical(name, list(words.options))
    kind = trial.suggest_categorical(name, list(schedules))
    first = _short(trial.suggest_float(f"{name}_start", 0, 1))
    arguments = [first]
    if kind != "constant":
        arguments.append(_short(trial.suggest_float(f"{name}_end", 0, 1)))
    if kind == "step":
        arguments.append(_short(trial.suggest_float(f"{name}_at", 0.1, 0.9)))
    schedule: Schedule = schedules[kind](*arguments)
    return schedule


def _point(space: Mapping[str, Range | OneOf], params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The study's parameters of a planned trial; None for one outside the space."""
    point: dict[str, Any] = {}
    for name, words in space.items():
        value = params.get(name)
        if isinstance(words, Range):
            if not isinstance(value, int | float) or not words.low <= value <= words.high:
                return None
            point[name] = float(value)
        elif kinds := schedule_options(words):
            schedule = Schedule.from_data(value)
            ends = schedule.values
            if schedule.kind not in kinds or len(ends) > 2 or not all(0 <= weight <= 1 for weight in ends):
                return None
            point |= {name: schedule.kind, f"{name}_start": ends[0], f"{name}_end": ends[-1]}
            if schedule.shares:
                point[f"{name}_at"] = schedule.shares[0]
        elif value not in words.options:
            return None
        else:
            point[name] = value
    return point


def _short(value: float) -> float:
    """Three digits: more say nothing, and names of trials stay readable."""
    return float(f"{value:.3g}")
