"""The words of a sweep script: Sweep, Trial, and what a search space is made of.

A script under sweeps/ builds one `Sweep` from them and hands it to `sweeps.launch.main`; nothing here
starts anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from analysis.contrasts import Comparison, against, each, interaction, main_effect
from engines.errors import InputError
from trainables.gates import Gate
from trainables.schedules import Schedule, constant, linear, step

__all__ = [
    "Comparison",
    "Gate",
    "Measures",
    "OneOf",
    "Range",
    "SettingsFile",
    "Sweep",
    "Trial",
    "against",
    "constant",
    "each",
    "interaction",
    "linear",
    "loguniform",
    "main_effect",
    "one_of",
    "step",
    "uniform",
]

Job = dict[str, Any]


class Measures(Protocol):
    """What a sweep does beside training; the module `trainables.evaluate` is one. Every function but
    `identify` runs as a Ray task.

    A job is {"domain", "settings", "seed", "trials" (parameters of trials that together need all that is shared)}; for
    all but `identify` also {"work_dir", "cache_dir", "seeds" (of all trials)}; for `prepare` also {"report"
    (a file in which it may say how far it is: JSON [what, done, total])}; for the two measurements also {"trial_id",
    "weights" (a path; None for the teacher), "params", "state_dir"}.
    """

    def identify(self, job: Job) -> tuple[dict[str, str], dict[str, Any]]:
        """What the settings stand for: content hashes of the files they name, by setting, and what workload.yaml
        shall list beside the protocol, the pairs that follow from it.

        Runs in the driver, also for --dry-run: it writes nothing. InputError for a file that cannot serve, and for what
        the trials cannot do with it.
        """

    def prepare(self, job: Job) -> None:
        """Build what all trials share (the teacher's cached outputs) before the first one starts."""

    def measure_quality(self, job: Job) -> dict[str, Any]:
        """Record fields of quality; several run at once."""

    def measure_latency(self, job: Job) -> dict[str, Any]:
        """Record fields of latency and footprint; runs alone on its node."""

    def compile_engine(self, job: Job) -> dict[str, Any]:
        """Leave the TensorRT engine of a trial in its folder; extras of the record: 'trt' says how it came out."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn evenly or (log) evenly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        if not finite or self.low >= self.high or (self.log and self.low <= 0):
            kind = "loguniform" if self.log else "uniform"
            wanted = "0 < low < high" if self.log else "low < high"
            raise InputError(f"{kind}({self.low}, {self.high}): expected {wanted}")


@dataclass(frozen=True)
class OneOf:
    """One of several options: plain values, or the schedules `constant`, `step`, `linear` with free
    weights.
    """

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.options:
            raise InputError("one_of(): expected at least one option")


def uniform(low: float, high: float) -> Range:
    """Any number from low to high."""
    return Range(low, high)


def loguniform(low: float, high: float) -> Range:
    """Any number from low to high, as many per decade in each decade."""
    return Range(low, high, log=True)


def one_of(*options: Any) -> OneOf:
    """One of the options."""
    return OneOf(options)


@dataclass(frozen=True)
class SettingsFile:
    """A file of sweeps/settings/ (or an absolute path) and the model that owns its keys' types and limits."""

    name: str
    model: type[BaseModel]

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return Path(__file__).parent / "settings" / self.name


@dataclass(frozen=True, init=False)
class Trial:
    """One trial of a sweep: a row of the plan with what sets it apart from the settings.

    task_id: the plan's row ("K-1"). saves: name of the file that its best weights become. combo,
    keyparams: parts of its exp_id where the parameters alone do not say them ("QAT", "keepLN"). gates:
    what it must meet beside the sweep's gate. Everything else is a parameter; schedules are turned into data.
    """

    task_id: str
    saves: str | None
    combo: str | None
    keyparams: str | None
    gates: tuple[Gate, ...]
    params: Mapping[str, Any]

    def __init__(
        self,
        task_id: str,
        *,
        saves: str | None = None,
        combo: str | None = None,
        keyparams: str | None = None,
        gates: Sequence[Gate] = (),
        **params: Any,
    ) -> None:
        plain = {key: value.to_data() if isinstance(value, Schedule) else value for key, value in params.items()}
        values = {
            "task_id": task_id,
            "saves": saves,
            "combo": combo,
            "keyparams": keyparams,
            "gates": tuple(gates),
            "params": plain,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Sweep:
    """What to run: trials (and a space beyond them), how they are trained, measured and judged, and what
    they leave.

    trainable: a Ray class trainable whose step() is one epoch. settings: the files that explain its
    parameters. measure: None for work that its last result describes completely. search_task: the task_id
    of searched trials; search_gates: what they must meet beside the sweep's gate, on numbers that are known
    without the test split: the search keeps to them. best, log, baseline: names of the files of the best trial
    (weights, or what its suffix says), of the file with all curves and records, and of the file with the teacher's
    record. seeds: how many seeds every trial is run with. reference: the combo of the arm that an ablation compares
    all others with, in its log; comparisons: result files with contrasts of their own, of arms by their combos.
    latency: False where all trials are one architecture, so that timing each says nothing. changes: in what the script
    differs from its settings' files, by profile. starts_from: the stage and file of the model to start from, unless the
    setting `model` names one. sample_cpu_s: CPU-seconds that one training sample once took (demo and small), for the
    estimate of --dry-run. name: part of the sweep's name, by default the script's.
    """

    stage: str
    domain: str
    trainable: type[Any]
    trials: Sequence[Trial] = ()
    gate: Gate | None = None
    space: Mapping[str, Range | OneOf] = field(default_factory=dict)
    settings: Sequence[SettingsFile] = ()
    measure: Measures | None = None
    search_task: str = ""
    search_gates: Sequence[Gate] = ()
    epochs: int = 1
    seeds: int = 1
    reference: str | None = None
    comparisons: Sequence[Comparison] = ()
    latency: bool = True
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    starts_from: tuple[str, str] | None = None
    best: str | Sequence[str] | None = None
    log: str | None = None
    baseline: str | None = None
    sample_cpu_s: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.trials and not self.space and not self.measure:
            raise InputError(f"sweep {self.stage}: expected trials, a search space or a measurement, found none")
        own = [t.saves for t in self.trials]
        saved = [name for name in (*own, *self.best_files, self.log, self.baseline, *self.effect_files) if name]
        for name in saved:
            if saved.count(name) > 1 or Path(name).name != name:
                raise InputError(f"file {name!r} of sweep {self.stage}: expected a plain name, used once")
        for comparison in self.comparisons:
            unknown = [arm for arm in comparison.arms if arm not in self.arms]
            if unknown:
                there = ", ".join(self.arms)
                raise InputError(f"{comparison.file} compares {', '.join(unknown)}; the arms are {there}")

    @property
    def best_files(self) -> tuple[str, ...]:
        """Names of the files of the best trial."""
        return (self.best,) if isinstance(self.best, str) else tuple(self.best or ())

    @property
    def arms(self) -> tuple[str, ...]:
        """The combos of the trials that have one."""
        return tuple(dict.fromkeys(trial.combo for trial in self.trials if trial.combo))

    @property
    def all_comparisons(self) -> tuple[Comparison, ...]:
        """What the closing screen says and a picture shows: the declared ones, and all arms against the reference."""
        if not self.reference or not self.log:
            return tuple(self.comparisons)
        others = each([arm for arm in self.arms if arm != self.reference], self.reference)
        return (Comparison(self.log, f"Effects against {self.reference}", others), *self.comparisons)

    @property
    def effect_files(self) -> tuple[str, ...]:
        """Names of the files of the comparisons, beside the log."""
        pictures = [comparison.picture for comparison in self.all_comparisons]
        return (*(comparison.file for comparison in self.comparisons), *pictures)


def schedule_options(option: OneOf) -> dict[str, Callable[..., Schedule]]:
    """The schedule functions among the options by name; empty where the options are plain values."""
    return {f.__name__: f for f in option.options if f in (constant, step, linear)}
