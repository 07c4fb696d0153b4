"""The rules that benchmarks/stoploss.py compares: ours, and those of Ray Tune and Optuna as their libraries ship them.

A rule sees what a scheduler sees: trials that start, their drops as they come, and runs that end by themselves. The
others' rules do not know of a budget; their grace, patience and reduction factor are those of ours.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.pruners import BasePruner
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from sweeps.stoploss import StopLossRule, best_drop, decide, is_finite

History = Sequence[float]

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Rule:
    """The interface, and the rule that stops nobody."""

    def start(self, trial: int) -> None:
        """A trial starts."""

    def stops(self, trial: int, history: History) -> bool:
        """Whether to stop the trial after the last evaluation of its history."""
        return False

    def end(self, trial: int, history: History) -> None:
        """A trial ended by itself: its history is whole, or diverged."""


class Ours(Rule):
    """sweeps/stoploss.py."""

    def __init__(self, budget: float, evals: int) -> None:
        self.rule, self.histories = StopLossRule(budget, evals), dict[int, History]()

    def stops(self, trial: int, history: History) -> bool:
        """By `decide`, with all trials so far as peers."""
        self.histories[trial] = history
        return decide(history, [drops for key, drops in self.histories.items() if key != trial], self.rule).stop

    def end(self, trial: int, history: History) -> None:
        """It stays a peer."""
        self.histories[trial] = history


@dataclass(eq=False)
class _RayTrial:
    trial_id: str


class _NobodyWaits:
    """What the schedulers ask of Ray's controller: whether to pause a trial for others that wait. No."""

    def get_live_trials(self) -> list[Any]:
        return []


class RayRule(Rule):
    """A scheduler of Ray Tune, told of trials and results as its controller would."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.trials, self.controller = scheduler, dict[int, _RayTrial](), _NobodyWaits()

    def start(self, trial: int) -> None:
        """Make it known."""
        self.trials[trial] = _RayTrial(str(trial))
        self.scheduler.on_trial_add(self.controller, self.trials[trial])

    def stops(self, trial: int, history: History) -> bool:
        """By the scheduler's answer to the result."""
        result = {"epoch": len(history), "drop": history[-1]}
        said = self.scheduler.on_trial_result(self.controller, self.trials[trial], result)
        return bool(said == TrialScheduler.STOP)

    def end(self, trial: int, history: History) -> None:
        """Ray shows the last result of a run that completes in this call alone."""
        result = {"epoch": len(history), "drop": history[-1]}
        self.scheduler.on_trial_complete(self.controller, self.trials[trial], result)


class OptunaRule(Rule):
    """A pruner of Optuna in a real study, by ask, report, should_prune and tell."""

    def __init__(self, pruner: BasePruner) -> None:
        # The name decides Hyperband's brackets: fixed, so that a replay repeats.
        self.study = optuna.create_study(study_name="replay", direction="minimize", pruner=pruner)
        self.trials: dict[int, optuna.Trial] = {}

    def start(self, trial: int) -> None:
        """Ask for a trial."""
        self.trials[trial] = self.study.ask()

    def stops(self, trial: int, history: History) -> bool:
        """Report, and do as the pruner says."""
        self.trials[trial].report(history[-1], step=len(history))
        stop = self.trials[trial].should_prune()
        if stop:
            self.study.tell(self.trials[trial], state=optuna.trial.TrialState.PRUNED)
        return bool(stop)

    def end(self, trial: int, history: History) -> None:
        """A diverged run failed; another's value is its best."""
        if is_finite(history[-1]):
            self.trials[trial].report(history[-1], step=len(history))
            self.study.tell(self.trials[trial], best_drop(history))
        else:
            self.study.tell(self.trials[trial], state=optuna.trial.TrialState.FAIL)


def _asha(budget: float, evals: int) -> Rule:
    rule = StopLossRule(budget, evals)
    return RayRule(
        AsyncHyperBandScheduler(
            time_attr="epoch",
            metric="drop",
            mode="min",
            max_t=evals,
            grace_period=min(rule.grace, evals),
            reduction_factor=rule.eta,
        )
    )


def _median(budget: float, evals: int) -> Rule:
    rule = StopLossRule(budget, evals)
    return RayRule(
        MedianStoppingRule(
            time_attr="epoch",
            metric="drop",
            mode="min",
            grace_period=rule.grace,
            min_samples_required=rule.min_peers,
        )
    )


def _hyperband(budget: float, evals: int) -> Rule:
    rule = StopLossRule(budget, evals)
    return OptunaRule(optuna.pruners.HyperbandPruner(rule.grace, evals, rule.eta))


def _patient(budget: float, evals: int) -> Rule:
    return OptunaRule(optuna.pruners.PatientPruner(None, StopLossRule(budget, evals).patience))


def _wilcoxon(budget: float, evals: int) -> Rule:
    return OptunaRule(optuna.pruners.WilcoxonPruner(n_startup_steps=StopLossRule(budget, evals).grace))


def _percentile(budget: float, evals: int) -> Rule:
    rule = StopLossRule(budget, evals)
    return OptunaRule(optuna.pruners.PercentilePruner(25.0, rule.min_peers, rule.grace))


RULES: dict[str, Callable[[float, int], Rule]] = {
    "ours": Ours,
    "asha": _asha,
    "median": _median,
    "hyperband": _hyperband,
    "patient": _patient,
    "wilcoxon": _wilcoxon,
    "percentile": _percentile,
}
