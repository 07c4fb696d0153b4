"""What Prometheus sees of a sweep, through the exporter of the Ray cluster that it runs on.

    ray_slimsweep_trials_running                    gauge
    ray_slimsweep_trials_finished{verdict}          gauge: measured trials; pass, fail, n/a
    ray_slimsweep_trials_stopped{cause}             gauge: diverged, stop_loss, plateau, asha, completed, failed
    ray_slimsweep_epochs_total                      counter
    ray_slimsweep_best_drop                         gauge: the lowest validation drop of all trials, a fraction
    ray_slimsweep_training_hours{unit}              gauge: GPU or CPU, as in `sweeps.hours`
    ray_slimsweep_report_to_decision_seconds        histogram: from a report, by its host's clock, to its decision

All have the label `sweep`. They count what earlier drivers of the sweep did as well (not the histogram), as the
journal does. Ray's core sends them to the agent of the driver's host every ten seconds
(RAY_metrics_report_interval_ms), however often they change; a while after the driver has ended the gauges vanish there.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sweeps.hours import of_epoch, trained
from sweeps.journal import TrialState

BOUNDARIES_S = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


@dataclass
class _Kinds:
    """How many trials there are of each kind. gauge: Ray's, with the tag `tag` for the kind."""

    gauge: Any
    tag: str
    kind: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def put(self, trial_id: str, kind: str | None) -> None:
        """The trial is of this kind now, whatever it was before: a failed one may be trained again."""
        before = self.kind.pop(trial_id, None)
        if kind is not None:
            self.kind[trial_id] = kind
        self.counts.update({kind: 1} if kind else {})
        self.counts.subtract({before: 1} if before else {})
        for changed in {kind, before} - {None}:
            self.gauge.set(self.counts[str(changed)], {self.tag: str(changed)})


class Metrics:
    """The metrics of one sweep, told what happens to its trials once the journal knows it."""

    def __init__(self, sweep: str, on_gpu: bool) -> None:
        """sweep: its name. on_gpu: whether its hours are an accelerator's. Ray must be running."""
        from ray.util import metrics as ray_metrics  # the rest of this module is for those without Ray, too

        def labelled(made: Any) -> Any:
            return made.set_default_tags({"sweep": sweep})

        def gauge(name: str, says: str, *tags: str) -> Any:
            return labelled(ray_metrics.Gauge(f"slimsweep_{name}", says, ("sweep", *tags)))

        self._on_gpu, self._running = on_gpu, set[str]()
        self._best, self._hours = math.inf, 0.0
        self._trials_running = gauge("trials_running", "Trials that train now")
        self._finished = _Kinds(gauge("trials_finished", "Measured trials by their verdict", "verdict"), "verdict")
        self._stopped = _Kinds(gauge("trials_stopped", "Trials whose training is over, by why", "cause"), "cause")
        self._best_drop = gauge("best_drop", "The lowest validation drop of all trials, a fraction")
        self._training_hours = gauge("training_hours", "Hours of training and validation", "unit")
        self._epochs = labelled(ray_metrics.Counter("slimsweep_epochs", "Epochs that trials reported", ("sweep",)))
        says = "From a trial's report to its judgement"
        name = "slimsweep_report_to_decision_seconds"
        self._waited = labelled(ray_metrics.Histogram(name, says, BOUNDARIES_S, ("sweep",)))

    def watch(self, trials: Iterable[TrialState]) -> None:
        """What earlier drivers of the sweep left."""
        self._trials_running.set(0)
        for trial in trials:
            if trial.results:
                self._add(len(trial.results), trained(trial, self._on_gpu), trial.best_drop)
            self._sort(trial)

    def started(self, trial: TrialState) -> None:
        """A trial runs."""
        self._running.add(trial.trial_id)
        self._trials_running.set(len(self._running))

    def result(self, trial: TrialState) -> None:
        """An epoch ended."""
        metrics = trial.results[-1][1]
        self._add(1, of_epoch(metrics, self._on_gpu), metrics.get("val_drop", math.nan))

    def decided(self, seconds: float) -> None:
        """A report was judged, so long after it was made; none for a host whose clock is ahead of the driver's."""
        self._waited.observe(max(0.0, seconds))

    def ended(self, trial: TrialState) -> None:
        """A trial was stopped, given up or measured."""
        self._running.discard(trial.trial_id)
        self._trials_running.set(len(self._running))
        self._sort(trial)

    def _sort(self, trial: TrialState) -> None:
        if trial.role == "trial":
            self._stopped.put(trial.trial_id, "failed" if trial.error else trial.stop[1] if trial.stop else None)
            self._finished.put(trial.trial_id, (trial.record or {}).get("verdict"))

    def _add(self, epochs: int, hours: float, drop: float) -> None:
        self._epochs.inc(epochs)
        self._hours += hours
        self._training_hours.set(self._hours, {"unit": "GPU" if self._on_gpu else "CPU"})
        if drop < self._best:  # false for NaN
            self._best = drop
            self._best_drop.set(drop)


def exported(sweep: str, on_gpu: bool) -> Metrics | None:
    """The metrics of a sweep; None where Ray exports none: on this machine alone, without ray[default], or told so."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == here]  # type: ignore[no-untyped-call]
    return Metrics(sweep, on_gpu) if ports and ports[0] > 0 else None
