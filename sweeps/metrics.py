"""What Prometheus sees of a sweep, through the exporter of the Ray cluster that it runs on.

    ray_slimsweep_trials_running                    gauge
    ray_slimsweep_trials_finished{verdict}          gauge: measured trials; pass, fail, n/a
    ray_slimsweep_trials_stopped{cause}             gauge: diverged, stop_loss, plateau, asha, completed, failed
    ray_slimsweep_best_drop                         gauge: the lowest validation drop of all trials, a fraction
    ray_slimsweep_training_hours{unit}              gauge: GPU or CPU, as in `sweeps.hours`
    ray_slimsweep_epochs_total                      counter
    ray_slimsweep_report_to_decision_seconds        histogram: from a report, by its host's clock, to its decision

All have the label `sweep`. They count what earlier drivers of the sweep did as well (not the histogram), as the
journal does. Ray's core sends them to the agent of the driver's host every ten seconds
(RAY_metrics_report_interval_ms), however often they change; soon after the driver has ended the gauges vanish there.
"""

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from sweeps.hours import of_epoch
from sweeps.journal import TrialState

BOUNDARIES_S = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


class Metrics:
    """The metrics of one sweep, told what happens to its trials once the journal knows it. Exports while it is open."""

    def __init__(self, sweep: str, every_s: float) -> None:
        """sweep: its name. every_s: how often gauges are set: the agent
        forgets those that were not for twice Ray's interval. Ray must be running.
        """
        from ray.util import metrics  # the rest of this module does without Ray

        def labelled(made: Any) -> Any:
            return made.set_default_tags({"sweep": sweep})

        def gauge(name: str, says: str, *tags: str) -> Any:
            return labelled(metrics.Gauge(f"slimsweep_{name}", says, ("sweep", *tags)))

        self._every_s = every_s
        self._running, self._best, self._hours = set[str](), math.inf, defaultdict[str, float](float)
        self._causes: dict[str, str] = {}
        self._verdicts: dict[str, str] = {}
        self._trials_running = gauge("trials_running", "Trials that train now")
        self._trials_finished = gauge("trials_finished", "Measured trials by their verdict", "verdict")
        self._trials_stopped = gauge("trials_stopped", "Trials whose training is over, by why", "cause")
        self._best_drop = gauge("best_drop", "The lowest validation drop of all trials, a fraction")
        self._training_hours = gauge("training_hours", "Hours of training and validation", "unit")
        self._epochs = labelled(metrics.Counter("slimsweep_epochs", "Epochs that trials reported", ("sweep",)))
        name, says = "slimsweep_report_to_decision_seconds", "From a trial's report to its decision"
        self._waited = labelled(metrics.Histogram(name, says, BOUNDARIES_S, ("sweep",)))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_setting, name="metrics", daemon=True)

    def __enter__(self) -> "Metrics":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def watch(self, trials: Iterable[TrialState]) -> None:
        """What earlier drivers of the sweep left."""
        for trial in trials:
            for _, metrics in trial.results:
                self._add(metrics)
            self._sort(trial)

    def started(self, trial: TrialState) -> None:
        """A trial runs."""
        self._running.add(trial.trial_id)

    def result(self, trial: TrialState) -> None:
        """An epoch ended."""
        self._add(trial.results[-1][1])

    def decided(self, seconds: float) -> None:
        """A report was judged, so long after it was made; none where its host's clock is ahead of the driver's."""
        self._waited.observe(max(0.0, seconds))

    def ended(self, trial: TrialState) -> None:
        """A trial was stopped, given up or measured."""
        self._running.discard(trial.trial_id)
        self._sort(trial)

    def _sort(self, trial: TrialState) -> None:
        """A trial that failed may be trained again: what it is now replaces what it was."""
        if trial.role == "trial":
            self._causes[trial.trial_id] = "failed" if trial.error else trial.stop[1] if trial.stop else ""
            self._verdicts[trial.trial_id] = (trial.record or {}).get("verdict") or ""

    def _add(self, metrics: Mapping[str, float]) -> None:
        self._epochs.inc()
        self._hours["GPU" if "gpus" in metrics else "CPU"] += of_epoch(metrics)
        drop = metrics.get("val_drop", math.nan)
        if drop < self._best:  # false for NaN
            self._best = drop

    def _keep_setting(self) -> None:
        while not self._over.wait(self._every_s):
            self._set()
        self._set()

    def _set(self) -> None:
        self._trials_running.set(len(self._running))
        for gauge, tag, kinds in (
            (self._trials_finished, "verdict", self._verdicts),
            (self._trials_stopped, "cause", self._causes),
        ):
            for kind, count in Counter(list(kinds.values())).items():
                if kind:
                    gauge.set(count, {tag: kind})
        if math.isfinite(self._best):
            self._best_drop.set(self._best)
        for unit, hours in list(self._hours.items()):
            self._training_hours.set(hours, {"unit": unit})


def exported(sweep: str) -> Metrics | None:
    """The metrics of a sweep; None where Ray exports none: on this machine alone, without ray[default], or told so."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == here]  # type: ignore[no-untyped-call]
    every_s = ray._config.metrics_report_interval_ms() / 2000
    return Metrics(sweep, every_s) if ports and ports[0] > 0 else None
