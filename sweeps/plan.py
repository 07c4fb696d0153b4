"""From a sweep and its settings to the trials that will run: identities, names, parameters, checked
beforehand.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import InputError
from sweeps.settings import Resolved, digest, flat_params
from sweeps.spec import Sweep, Trial
from trainables.gates import Gate
from trainables.record import exp_id


@dataclass(frozen=True)
class Planned:
    """One trial with its identity. trial_id: hash of everything its result depends on. params: plain data.

    role: "trial", or "teacher" for the reference that is only measured. tags: what a search needs to
    rebuild itself.
    """

    trial_id: str
    exp_id: str
    task_id: str
    combo: str | None
    saves: str | None
    params: Mapping[str, Any]
    seed: int
    role: str = "trial"
    gates: tuple[Gate, ...] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flat(self) -> dict[str, float | int | str]:
        """The parameters as numbers where they are numbers (see `flat_params`)."""
        return flat_params(self.params)


@dataclass
class Planner:
    """Gives trials their identity; one per sweep, because run numbers count equal names."""

    sweep: Sweep
    resolved: Resolved
    seed: int
    _names: Counter[str] = field(default_factory=Counter)

    def plan(self, trial: Trial, tags: Mapping[str, Any] | None = None, seed: int | None = None) -> Planned:
        """Check a trial's parameters against the settings and name it; InputError lists what does not fit."""
        seed = self.seed if seed is None else seed
        self.resolved.with_params(trial.params, trial.task_id)
        combo, keyparams = label(trial.params)  # after the check: it reads schedules
        combo = trial.combo if trial.combo is not None else combo
        keyparams = trial.keyparams if trial.keyparams is not None else keyparams
        if not combo:
            combo, keyparams = keyparams or trial.task_id, ""
        stem = exp_id(self.sweep.stage, combo, keyparams, 1)
        self._names[stem] += 1
        run = self._names[stem]
        identity = [
            self.sweep.domain,
            self.sweep.trainable.__name__,
            dict(trial.params),
            self.resolved.identity,
            seed,
            self.resolved.workload_hash,
            run,
        ]
        return Planned(
            trial_id=digest(identity),
            exp_id=exp_id(self.sweep.stage, combo, keyparams, run),
            task_id=trial.task_id,
            combo=combo or None,
            saves=_of_run(trial.saves, run) if trial.saves and seed != self.seed else trial.saves,
            params=trial.params,
            seed=seed,
            gates=trial.gates,
            tags=tags or {},
        )

    def teacher(self) -> Planned:
        """The reference every trial is compared with: measured like a trial, never trained here."""
        identity = [self.sweep.domain, "teacher", self.resolved.identity, self.resolved.workload_hash]
        return Planned(
            trial_id=digest(identity),
            exp_id=exp_id("P0", "teacher", "", 1),
            task_id="P0-2",
            combo="teacher",
            saves=None,
            params={},
            seed=self.seed,
            role="teacher",
        )


def _of_run(name: str, run: int) -> str:
    """The file of a further seed: student.pth -> student_run2.pth, as its run is called; the first keeps the name."""
    return f"{Path(name).stem}_run{run}{Path(name).suffix}"


def refuse_hidden(sweep: Sweep, overrides: Mapping[str, Any]) -> None:
    """InputError for a --set that no trial would ever see, because each sets that key itself."""
    for key in overrides:
        if sweep.trials and all(key in trial.params for trial in sweep.trials):
            raise InputError(f"--set {key}: every trial of this sweep sets {key} itself; change it in the script")


def label(params: Mapping[str, Any]) -> tuple[str, str]:
    """(combo, keyparams) of an exp_id: T=3, beta=0.5 -> ("T3B05", ""); a beta schedule -> ("T3B05", "sched").

    Parameters beyond those two are added to keyparams where they are not zero: gamma=0.1 -> "gamma0p1". In
    rho the plan writes hundredths: rho=0.1 -> "r010".
    """
    flat = flat_params(params)
    combo = ""
    if isinstance(flat.get("T"), int | float):
        combo += f"T{_digits(float(flat['T']))}"
    if isinstance(flat.get("beta"), int | float):
        combo += "B" + f"{flat['beta']:.3g}".replace(".", "")
    if isinstance(flat.get("rho"), int | float):
        combo += f"r{round(float(flat['rho']) * 100):03d}"
    words = ["sched"] if flat.get("beta_schedule", "constant") != "constant" else []
    for key, value in flat.items():
        if key in ("T", "beta", "rho") or key.startswith("beta_") or value in (0, ""):
            continue
        words.append(f"{key}{_digits(value) if isinstance(value, int | float) else Path(value).name}")
    return combo, "_".join(words)


def _digits(value: float) -> str:
    return f"{value:.3g}".replace(".", "p").replace("-", "m").replace("+", "")
