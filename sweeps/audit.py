"""The audit of the stop-loss: a share of the trials that it would end runs on, to see which would have met the gate.

Only stops before the gate is met are audited, for no other stop can be false, and no diverged trial is. What such a
trial does after its stop is hidden from the others, so that an audited sweep stops whom it would stop anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sweeps.journal import TrialState
from sweeps.settings import digest


def is_chosen(trial_id: str, share: float) -> bool:
    """Whether the trial would be audited: by a hash of its identity, so that a resumed sweep agrees."""
    hashed = digest(["audit", trial_id])
    return int(hashed, 16) < share * float(16 ** len(hashed))


def fields(trial: TrialState, budget: float) -> dict[str, int]:
    """Extras of the record: the epoch at which the rule would have stopped the trial, and whether (1 or 0) the full run
    met the budget (fraction). Empty for a trial that was not audited, or not to its end.
    """
    if trial.audit is None or trial.stop is None:
        return {}
    met = trial.best_drop <= budget and trial.stop[1] != "diverged"
    return {"audit_epoch": trial.audit[0], "audit_met": int(met)}


@dataclass(frozen=True)
class FalseStops:
    """What an audit found. audited: trials that ran on to their end; false: those of them that met the gate after
    all.
    """

    audited: int
    false: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the rate of false stops, after Clopper and Pearson: exact, so never too narrow."""
        from scipy.stats import binomtest  # half a second that a sweep without an audit does not wait for

        found = binomtest(self.false, self.audited).proportion_ci(0.95, "exact")
        return float(found.low), float(found.high)

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers for MLflow; rates are fractions."""
        low, high = self.interval
        rates = {"false_stop_rate": self.false / self.audited, "false_stop_rate_lo": low, "false_stop_rate_hi": high}
        return {"audited_stops": self.audited, "false_stops": self.false, **rates}

    @property
    def sentence(self) -> str:
        """The numbers in words."""
        low, high = self.interval
        return (
            f"Audit: {self.false} of {self.audited} stops that were run on to the end met the gate after all: "
            f"{100 * self.false / self.audited:.0f} % false stops [{100 * low:.0f}, {100 * high:.0f}]."
        )


def false_stops(trials: Iterable[TrialState], budget: float) -> FalseStops | None:
    """Counts over the trials that were audited to their end; None where there is none."""
    met = [found["audit_met"] for found in (fields(trial, budget) for trial in trials) if found]
    return FalseStops(len(met), sum(met)) if met else None
