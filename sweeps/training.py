"""The training phase: unfinished trials through Ray Tune, judged after each epoch; everything lands in the
journal.
"""

import errno
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from sweeps import deaths
from sweeps.audit import is_chosen
from sweeps.cluster import Lookout
from sweeps.flags import Flags
from sweeps.hosts import ask, exclude
from sweeps.ledger import Ledger
from sweeps.placement import Cluster
from sweeps.plan import Planned
from sweeps.progress import Progress
from sweeps.scheduler import Audit, StopLossScheduler
from sweeps.spec import Sweep
from sweeps.stoploss import StopLossRule

RETRIES = 3  # without a new epoch in between
SPARE = 1 << 20  # bytes: with less the storage counts as full


def rule_of(sweep: Sweep, values: Mapping[str, Any]) -> StopLossRule:
    """The stop-loss rule that the settings describe; without a gate, only divergence ends a trial early."""
    limit = sweep.gate.at_most if sweep.gate else None
    epochs = values.get("epochs", sweep.epochs)
    given = {key: values[key] for key in ("grace", "patience", "eta", "min_peers") if key in values}
    return StopLossRule(
        budget=limit if limit is not None else 0.01,
        max_evals=epochs,
        **(given if sweep.gate else {"grace": epochs}),
    )


def unfinished(ledger: Ledger, planned: Sequence[Planned]) -> list[Planned]:
    """The trials that still have to train; those that failed in an earlier run get another chance."""
    return [p for p in planned if p.role == "trial" and ledger.trial(p.trial_id).stop is None]


def train(
    sweep: Sweep,
    ledger: Ledger,
    planned: Sequence[Planned],
    values: Mapping[str, Any],
    cluster: Cluster,
    progress: Progress,
    cache_dir: Path,
    given: Flags,
) -> None:
    """Train what is unfinished. A trial that raises or hangs is retried, then recorded as failed; the others go on."""

    broken: list[OSError] = []  # Ray would take an exception of a scheduler for one of the trial

    def journal(event: str, **fields: Any) -> None:
        try:
            ledger.append(event, **fields)
        except OSError as error:
            broken.append(error)

    cards = {"gpus": cluster.gpus * cluster.workers} if cluster.gpus else {}

    def on_result(trial_id: str, epoch: int, metrics: dict[str, float]) -> None:
        journal("result", trial_id=trial_id, epoch=epoch, metrics=metrics | cards)
        progress.result(ledger.trial(trial_id))

    def on_stop(trial_id: str, epoch: int, reason: str, detail: str) -> None:
        journal("stop", trial_id=trial_id, epoch=epoch, reason=reason, detail=detail)
        progress.stopped(ledger.trial(trial_id))

    def on_audit(trial_id: str, epoch: int, reason: str, detail: str) -> None:
        journal("audit", trial_id=trial_id, epoch=epoch, reason=reason, detail=detail)

    histories = {key: trial.drops for key, trial in ledger.state.trials.items() if trial.results}
    rule = rule_of(sweep, values)
    audits = {key: trial.audit for key, trial in ledger.state.trials.items() if trial.audit}
    scheduler = _Timed(
        rule, on_result, on_stop, histories, Audit(partial(is_chosen, share=given.audit), on_audit, audits)
    )
    waiting = []
    for trial in unfinished(ledger, planned):
        # The driver may have died between the last result and its stop.
        found = scheduler.judge(trial.trial_id) if trial.trial_id in histories else None
        if found:
            on_stop(trial.trial_id, ledger.trial(trial.trial_id).epoch, *found)
        else:
            waiting.append(trial)
    if not waiting:
        return
    configs = [
        {
            "trial_id": trial.trial_id,
            "state_dir": str(ledger.state_dir(trial.trial_id)),
            "cache_dir": str(cache_dir),
            "domain": sweep.domain,
            "params": dict(trial.params),
            "settings": dict(values),
            "budget": rule.budget,
            "seed": trial.seed,
            "workers": cluster.workers,
        }
        for trial in waiting
    ]
    for config in configs:
        Path(str(config["state_dir"])).mkdir(parents=True, exist_ok=True)
    # A few trials more than slots would leave cores idle in the last wave: let them share the cores instead.
    crowded = cluster.shared_cores and cluster.slots < len(waiting) < 2 * cluster.slots
    cpus = cluster.slots / len(waiting) if crowded else cluster.cpus
    bundle = {"CPU": cpus, "GPU": cluster.gpus} if cluster.gpus else {"CPU": cpus}
    resources = tune.PlacementGroupFactory(
        [bundle] * cluster.workers, bundle_label_selector=[dict(cluster.labels)] * cluster.workers
    )
    for left in ledger.folder.glob(".ray-*"):  # of a driver that was killed
        shutil.rmtree(left, ignore_errors=True)
    deaths.contain(partial(exclude, cluster, progress))
    scratch = tempfile.mkdtemp(prefix=".ray-", dir=ledger.folder)
    try:
        tune.Tuner(
            tune.with_resources(_built_late(sweep.trainable, cluster.versions), resources),
            tune_config=tune.TuneConfig(
                search_alg=_Queue(configs),
                scheduler=scheduler,
                num_samples=len(configs),
                max_concurrent_trials=len(waiting) if crowded else cluster.slots,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                callbacks=[_Watch(ledger, progress, broken, 60 * given.hang_min, Lookout(cluster, progress.line))],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                verbose=0,
            ),
        ).fit()
    except Exception as error:
        # Ray stumbles over its own files, or over ours, in many ways; what a user can mend is said.
        if broken:
            raise broken[0] from error
        if shutil.disk_usage(ledger.folder).free < SPARE:
            text = "the storage is full: free some space, then go on with --resume"
            raise OSError(errno.ENOSPC, text, str(ledger.folder)) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for trial in waiting:
        state = ledger.trial(trial.trial_id)
        if state.stop is None and state.error is None:
            _fail(ledger, trial.trial_id, "Ray ended the trial without a word")


def _built_late(trainable: type[Any], versions: Mapping[str, str]) -> type[Any]:
    """What Tune runs in the place of this trainable: it builds the trial in its first step.

    While a trial is built outside of a step it is not RUNNING to Ray: one that loses its worker there is given up
    without a second try, and nobody looks whether it hangs. The seconds of an epoch are those of its training alone,
    and its moment is exact: Ray's own is cut to whole seconds. versions: that a host must have, if any.
    """

    class Late(tune.Trainable):
        _trial: Any = None
        _to_build: dict[str, Any] | None = None

        def setup(self, config: dict[str, Any]) -> None:
            self._to_build = config

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self._to_build = new_config
            return True

        def step(self) -> dict[str, Any]:
            if self._to_build is not None:
                self._build(self._to_build)
                self._to_build = None
            return {**self._trial.train(), "timestamp": time.time()}

        def _build(self, config: dict[str, Any]) -> None:
            if versions:
                ask(versions, Path(config["state_dir"]))
            if self._trial is not None:
                if self._trial.reset(config, self._storage):
                    return
                self._trial.cleanup()  # it cannot become another trial, and there may not be room for both
                self._trial = None
            self._trial = trainable(config, self._storage)

        def cleanup(self) -> None:
            if self._trial is not None:
                self._trial.cleanup()

    return Late


class _Unsaved:
    """Ray pickles what runs a sweep, to restore from it. The journal does that here, and locks do not pickle."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Timed(_Unsaved, StopLossScheduler):
    """Adds the seconds of each epoch to its numbers: they make the hours of the record."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        result.setdefault("epoch_s", result.get("time_this_iter_s"))
        return super().on_trial_result(tune_controller, trial, result)


class _Queue(Searcher):
    """Hands out the trials in the plan's order."""

    def __init__(self, configs: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self._left = list(configs)

    def suggest(self, trial_id: str) -> Any:
        return self._left.pop(0) if self._left else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing to learn here: a search asks and tells between phases."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal says what is left."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


@dataclass
class _Heard:
    """When a running trial was last heard of, its last epoch, and how often it has hung since then."""

    at: float
    epoch: int = 0
    hung: int = 0


class _Watch(_Unsaved, Callback):
    """Tells the journal of trials that Ray gave up on, and the display of trials that start; ends those that hang."""

    def __init__(
        self, ledger: Ledger, progress: Progress, broken: list[OSError], hang_s: float, lookout: Lookout
    ) -> None:
        self._ledger, self._progress, self._broken, self._hang_s = ledger, progress, broken, hang_s
        self._lookout, self._looks_at = lookout, 0.0
        self._heard: dict[str, _Heard] = {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._broken:
            raise self._broken[0]  # without its journal a sweep must not go on
        self._lookout.look()
        now = time.monotonic()
        if now < self._looks_at:  # Ray steps at every event: a look at 10,000 trials each time would outweigh all else
            return
        self._looks_at = now + self._hang_s / 60
        for trial in trials:
            heard = self._heard.get(trial.config["trial_id"])
            if heard and trial.status == Trial.RUNNING and now - heard.at > self._hang_s:
                self._end_hanging(trial, heard)

    def _end_hanging(self, trial: Any, heard: _Heard) -> None:
        heard.at, heard.hung = time.monotonic(), heard.hung + 1
        if heard.hung > 1:  # the next failure is one too many
            trial.run_metadata.num_failures = trial.max_failures
        if trial.temporary_state.ray_actor:
            ray.kill(trial.temporary_state.ray_actor)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._heard.setdefault(trial.config["trial_id"], _Heard(0)).at = time.monotonic()
        self._progress.started(self._ledger.trial(trial.config["trial_id"]))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        heard, epoch = self._heard[trial.config["trial_id"]], int(result.get("epoch", 0))
        heard.at = time.monotonic()
        self._progress.decided(time.time() - result["timestamp"])  # Ray asks the scheduler first
        if epoch > heard.epoch:  # over days many hosts may go: only a trial that gets nowhere is broken
            heard.epoch, heard.hung, trial.run_metadata.num_failures = epoch, 0, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Ray keeps several averages of every number of every trial, which the journal has: 30 kB per trial.
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        error = last_error(_last_failure(trial))
        heard = self._heard.get(trial_id)
        if heard and heard.hung > 1:
            error = f"hung after epoch {heard.epoch}: no report for {self._hang_s / 60:g} min, twice"
        _fail(self._ledger, trial_id, error)
        self._progress.failed(self._ledger.trial(trial_id))


def _fail(ledger: Ledger, trial_id: str, error: str) -> None:
    ledger.append("failed", trial_id=trial_id, error=error)


def _last_failure(trial: Any) -> str:
    path = Path(str(trial.error_file))
    return path.read_text().split("Failure #")[-1] if path.is_file() else "lost its worker"


def last_error(text: str) -> str:
    """The exception in what Ray writes of a trial's failure."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (named or lines or ["unknown error"])[-1][:300]


def failure(error: str) -> str:
    """The stop reason of a trial with this error: out_of_memory (a card, a process, a node) or failed."""
    return "out_of_memory" if re.search("OutOfMemoryError|out of memory", error) else "failed"


def one_line(error: BaseException | str) -> str:
    """What went wrong without its traceback: the last line of what was raised, at most 300 characters."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[-1] if len(lines) > 1 and "Traceback" in str(error) else lines[0]
    kind = type(error).__name__
    named = isinstance(error, str) or text.startswith(kind)
    return (text if named else f"{kind}: {text}")[:300]
