"""What training cost and what stopping saved, in hours: per trial, stage and campaign, from the sweeps' journals.

Hours are of training and validation, as in the records: on accelerators the clock's, times the trial's workers, on a
CPU the trainable's own CPU time, since on a shared core the clock also counts others' work. Measuring after training
is not among them; the wall time of a stage has everything. Saved are the epochs that a stopped trial did not run, at
its own mean hours per epoch.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sweeps.audit import FalseStops
from sweeps.catalogue import Stage
from sweeps.journal import SweepState, TrialState

Spans = Sequence[tuple[float, float]]  # from and to, in seconds of the clock


@dataclass(frozen=True)
class TrialHours:
    """One trial. unit: GPU or CPU. planned: epochs that it would have run. saved: hours, 0 unless it was stopped."""

    stage: str
    task_id: str
    exp_id: str
    unit: str
    hours: float
    epochs: int
    planned: int
    stop_reason: str
    saved: float


@dataclass(frozen=True)
class Account:
    """Hours of a stage or of all. saved: hours by the reason for which trials were stopped. wall_h: by the clock, of
    all starts of the stage, None where no campaign timed it. estimate: from and to, None where there is none. audit:
    what --audit found, None where it ran no stop on.
    """

    name: str
    unit: str
    trials: int
    hours: float
    saved: Mapping[str, float]
    wall_h: float | None
    estimate: tuple[float, float] | None
    audit: FalseStops | None = None

    @property
    def sentence(self) -> str:
        """What the closing screen says."""
        unit = f"{self.unit}-hours"
        saved = sum(self.saved.values())
        share = f" ({100 * saved / (self.hours + saved):.0f} % of what no stopping would have cost)" if saved else ""
        by = ", ".join(f"{reason} {hours:.3g}" for reason, hours in self.saved.items())
        said = f"{self.hours:.3g} {unit} of training in {self.trials} trials; stopping saved {saved:.3g}{share}"
        said += f": {by}" if by else ""
        if self.wall_h is not None:
            said += f"; {self.wall_h:.3g} hours by the clock"
        if self.estimate is not None:
            low, high = self.estimate
            said += f"; estimated {low:.3g}" + (f" to {high:.3g}" if high > low else "")
        return f"{said}. {self.audit.sentence}" if self.audit else said


def of_epoch(metrics: Mapping[str, float]) -> float:
    """Hours that one epoch took: by the clock of as many accelerators as it had (half a card counts half), else of all
    workers' CPU; 0 where it does not say.
    """
    clock = metrics.get("epoch_s", math.nan)
    seconds = clock * metrics["gpus"] if "gpus" in metrics else metrics.get("cpu_s", clock * metrics.get("workers", 1))
    return seconds / 3600 if math.isfinite(seconds) else 0.0


def on_gpu(trial: TrialState) -> bool:
    """Whether the trial trained on accelerators; hours on a CPU, before or after a resume elsewhere, do not count."""
    return any("gpus" in metrics for _, metrics in trial.results)


def trained(trial: TrialState) -> float:
    """Hours that the trial's epochs took, of the kind that `on_gpu` says."""
    gpu = on_gpu(trial)
    return sum(of_epoch(metrics) for _, metrics in trial.results if ("gpus" in metrics) == gpu)


def of_trials(stage: str, state: SweepState) -> list[TrialHours]:
    """The hours of a sweep's trials; those that have not begun are left out."""
    found = []
    for trial in state.trials.values():
        if trial.role != "trial" or not trial.results:
            continue
        hours, done = trained(trial), trial.epoch
        reason = trial.stop[1] if trial.stop else ""
        planned = int(state.header.get("epochs") or done)
        left = max(0, planned - done) if reason not in ("", "completed") else 0
        gpu = on_gpu(trial)
        unit, counted = "GPU" if gpu else "CPU", sum(("gpus" in metrics) == gpu for _, metrics in trial.results)
        row = TrialHours(stage, trial.task_id, trial.exp_id, unit, hours, done, planned, reason, hours / counted * left)
        found.append(row)
    return found


def estimate(stage: Stage, profile: str) -> tuple[float, float] | None:
    """The catalogue's hours: of the plan at full, else what training once took on a CPU."""
    if profile == "full":
        return stage.gpu_hours if stage.gpu_hours[1] else None
    return (stage.cpu_hours[profile],) * 2 if profile in stage.cpu_hours else None


def audited(state: SweepState) -> FalseStops | None:
    """What the sweep's audit found."""
    found = state.summary
    return FalseStops(int(found["audited_stops"]), int(found["false_stops"])) if "audited_stops" in found else None


def account(
    name: str,
    rows: Sequence[TrialHours],
    walls: Spans,
    estimated: tuple[float, float] | None,
    audit: FalseStops | None = None,
) -> Account:
    """The sums of trials' hours."""
    saved: dict[str, float] = {}
    for row in rows:
        if row.saved:
            saved[row.stop_reason] = saved.get(row.stop_reason, 0.0) + row.saved
    unit = " and ".join(sorted({row.unit for row in rows})) or "CPU"
    hours = sum(row.hours for row in rows)
    return Account(name, unit, len(rows), hours, saved, _by_the_clock(walls), estimated, audit)


def _by_the_clock(spans: Spans) -> float | None:
    """Hours that lie in any of the spans: stages side by side take the time of one."""
    covered, until = 0.0, -math.inf
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered / 3600 if spans else None


def together(name: str, accounts: Sequence[Account], rows: Sequence[TrialHours], walls: Spans) -> Account:
    """The sum of stages; of the estimate only where all stages have one."""
    known = [one.estimate for one in accounts if one.estimate]
    whole = (sum(low for low, _ in known), sum(high for _, high in known))
    audits = [one.audit for one in accounts if one.audit]
    audit = FalseStops(sum(one.audited for one in audits), sum(one.false for one in audits)) if audits else None
    estimated = whole if len(known) == len(accounts) else None
    return account(name, rows, walls, estimated, audit)


def as_data(total: Account, stages: Iterable[Account], rows: Iterable[TrialHours]) -> dict[str, Any]:
    """ledger.json: the campaign, its stages, its trials."""
    return {"campaign": _data(total), "stages": [_data(s) for s in stages], "trials": [asdict(r) for r in rows]}


def _data(one: Account) -> dict[str, Any]:
    """The account with the audit's numbers beside its own; without them where there was none."""
    own = {key: value for key, value in asdict(one).items() if key != "audit"}
    return own | (one.audit.metrics if one.audit else {})


def as_csv(rows: Iterable[TrialHours]) -> str:
    """ledger.csv: one line per trial."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(TrialHours)]
    writer.writerow(names)
    for row in rows:
        writer.writerow([getattr(row, name) for name in names])
    return text.getvalue()
