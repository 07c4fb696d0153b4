"""The thin adapter that lets Ray Tune ask `sweeps.stoploss.decide` after each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from sweeps.stoploss import StopLossRule, best_drop, decide, is_finite, is_rung

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

OnResult = Callable[[str, int, dict[str, float]], None]
OnStop = Callable[[str, int, str, str], None]
Stop = tuple[int, str, str]  # epoch, reason, detail

_RAYS_OWN = {"epoch", "pid", "timestamp", "training_iteration", "iterations_since_restore",
             "time_this_iter_s", "time_total_s", "time_since_restore"}  # fmt: skip


@dataclass
class Audit:
    """Which trials run on although they are to stop (see `sweeps.audit`).

    Attributes:
        is_chosen: whether a trial, by its id, runs on when stop-loss would end it.
        on_audit: called once per audited trial, at its stop that was due, with trial id, epoch, reason and detail.
        due: those stops by trial id, of an earlier driver too.
    """

    is_chosen: Callable[[str], bool]
    on_audit: OnStop
    due: dict[str, Stop] = field(default_factory=dict)


class StopLossScheduler(FIFOScheduler):
    """First in, first out; every reported epoch is judged, and why a trial stops is handed on.

    A trial is known by ``trial.config["trial_id"]``, not by Ray's id, so that it stays itself across
    restarts. Each result carries ``epoch`` (from 1) and ``val_drop`` (fraction, positive = worse; NaN, None
    or absent: diverged). An epoch that is reported again, because a worker died and went on from an older
    state, is not counted again.
    """

    # Ray may otherwise hand over several epochs at once, after the trial has trained past the one that
    # stops it.
    _supports_buffered_results = False

    def __init__(
        self,
        rule: StopLossRule,
        on_result: OnResult,
        on_stop: OnStop,
        histories: Mapping[str, Sequence[float | None]] | None = None,
        audit: Audit | None = None,
    ) -> None:
        """
        Args:
            rule: what every trial is judged by; ``rule.max_evals`` is also the last epoch of each.
            on_result: called once per epoch with trial id, epoch and the reported numbers (None becomes NaN).
            on_stop: called once per trial, after its last `on_result`, with trial id, epoch, reason and
                detail; the reason is one of `decide`'s, or "completed".
            histories: drops of epochs that an earlier driver has seen, by trial id. Unfinished trials go on
                from theirs; finished and stopped trials count as peers.
            audit: which trials run on although they are to stop; by default none.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.rule = rule
        self.histories: dict[str, list[float | None]] = {key: list(d) for key, d in (histories or {}).items()}
        self.reasons: dict[str, str] = {}
        self._on_result, self._on_stop = on_result, on_stop
        self.audit = audit or Audit(lambda _: False, lambda *_: None)

    def judge(self, trial_id: str) -> tuple[str, str] | None:
        """Reason and detail when the trial is to stop as its history stands, else None.

        A stop that is audited is told to the audit, and is the trial's reason once it has run on to its end. A
        launcher asks this before it resumes a trial, as the driver may have died between a result and its stop.
        """
        history = self.histories.get(trial_id, [])
        ended = len(history) >= self.rule.max_evals or (len(history) > 0 and not is_finite(history[-1]))
        if trial_id in self.audit.due:
            return self._audited(trial_id) if ended else None
        # Gathered only where they are looked at: beside thousands of trials that takes longer than the forecast.
        peers = self._peers(trial_id) if is_rung(len(history), self.rule) else []
        decision = decide(history, peers, self.rule)
        if decision.stop and decision.reason is not None:
            if not ended and best_drop(history) > self.rule.budget and self.audit.is_chosen(trial_id):
                self.audit.due[trial_id] = stop = (len(history), decision.reason, decision.detail)
                self.audit.on_audit(trial_id, *stop)
                return None
            return decision.reason, decision.detail
        if len(history) >= self.rule.max_evals:
            return "completed", decision.detail
        return None

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        trial_id, epoch = str(trial.config["trial_id"]), int(result["epoch"])
        if trial_id in self.reasons:
            return str(TrialScheduler.STOP)
        self._record(trial_id, epoch, result)
        if epoch < len(self.histories.get(trial_id, [])):
            return str(TrialScheduler.CONTINUE)  # catching up with what was judged before its worker died
        found = self.judge(trial_id)
        if found is None:
            return str(TrialScheduler.CONTINUE)
        self._stop(trial_id, *found)
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Take in the last result of a trial that ended by itself: Ray never shows it to
        `on_trial_result`."""
        trial_id = str(trial.config["trial_id"])
        if trial_id in self.reasons:
            return
        if "epoch" in result:
            self._record(trial_id, int(result["epoch"]), result)
        found = self.judge(trial_id)
        if found is None and trial_id in self.audit.due:
            found = self._audited(trial_id)
        self._stop(trial_id, *(found or ("completed", "the trainable ended by itself")))

    def debug_string(self) -> str:
        return f"Stop-loss at budget {self.rule.budget:g}: {len(self.reasons)} trials ended"

    def _peers(self, trial_id: str) -> list[Sequence[float | None]]:
        """The other histories, as they would be without an audit."""
        due, known = self.audit.due, self.histories.items()
        return [drops[: due[key][0]] if key in due else drops for key, drops in known if key != trial_id]

    def _audited(self, trial_id: str) -> tuple[str, str]:
        """Reason and detail of an audited trial at its end."""
        epoch, reason, detail = self.audit.due[trial_id]
        history = self.histories[trial_id]
        if not is_finite(history[-1]):
            return "diverged", f"audited after evaluation {epoch} ({detail}), it diverged at {len(history)}"
        met = "met" if best_drop(history) <= self.rule.budget else "not met"
        return reason, f"{detail}; audited, it ran on from evaluation {epoch} to {len(history)}: budget {met}"

    def _record(self, trial_id: str, epoch: int, result: dict[str, Any]) -> None:
        history = self.histories.setdefault(trial_id, [])
        if epoch <= len(history) or epoch > self.rule.max_evals:
            return
        # Epochs whose reports were lost with a driver keep their place, or time would shrink.
        history.extend([math.nan] * (epoch - 1 - len(history)))
        metrics = _numbers(result)
        history.append(metrics["val_drop"])
        self._on_result(trial_id, epoch, metrics)

    def _stop(self, trial_id: str, reason: str, detail: str) -> None:
        self.reasons[trial_id] = reason
        self._on_stop(trial_id, len(self.histories.get(trial_id, [])), reason, detail)


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    """The trainable's own numbers in Ray's flattened result."""
    metrics = {"val_drop": math.nan}
    for key, value in result.items():
        if key in _RAYS_OWN or key.startswith(("config/", "perf/")) or isinstance(value, bool | str):
            continue
        if value is None:
            metrics[key] = math.nan
        else:
            try:
                metrics[key] = float(value)
            except (TypeError, ValueError):  # lists and the like are not curves
                continue
    return metrics
