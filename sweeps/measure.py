"""The measuring phase: quality packed, latency alone on its node, then one record and one verdict per
trial.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engines.errors import InputError
from sweeps import audit
from sweeps.cluster import Lookout, measuring_node
from sweeps.deaths import told
from sweeps.hosts import UnfitError, ask, exclude
from sweeps.hours import on_gpu, trained
from sweeps.journal import TrialState
from sweeps.ledger import Ledger
from sweeps.placement import Cluster
from sweeps.plan import Planned
from sweeps.progress import Progress
from sweeps.settings import Resolved
from sweeps.spec import Measures, Sweep
from sweeps.training import RETRIES, failure, one_line, rule_of
from trainables.gates import Gate, judge_all
from trainables.record import Record, finite, now

# How a task ends whose node went, not one whose worker did: that may be the function's own fault.
GONE = (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError)
STATE = "state.pt"  # what trainables/training.py goes on from
OWN_FIELDS = {field.name for field in fields(Record)} - {"extra"}
TRAINING = ("rho", "T", "beta", "gamma")  # fields of the record that are settings of training
BASELINE = ("chamfer", "absrel", "rmse", "delta1", "params_M", "flops_G", "size_MB",
            "t_pair_p50_ms", "t_pair_p95_ms", "pairs_per_sec")  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What measuring needs: the sweep, its settings, where things lie, and what every record repeats.

    kinds: parameters of trials that together need all that any trial will share with others; seeds: of all trials.
    """

    sweep: Sweep
    resolved: Resolved
    ledger: Ledger
    cluster: Cluster
    cache_dir: Path
    common: Mapping[str, Any]
    kinds: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]

    def job(self, trial: Planned | None) -> dict[str, Any]:
        """What a measuring function is given; None or the teacher: no weights."""
        job: dict[str, Any] = {
            "domain": self.sweep.domain,
            "settings": dict(self.resolved.values),
            "seed": trial.seed if trial else self.common["seed"],
            "workload_hash": self.resolved.workload_hash,
            "work_dir": str(self.ledger.folder / "work"),
            "cache_dir": str(self.cache_dir),
            "trials": [dict(params) for params in self.kinds],
            "seeds": list(self.seeds),
        }
        if trial:
            weights = self.ledger.best_weights(trial.trial_id) if trial.role == "trial" else None
            job |= {
                "trial_id": trial.trial_id,
                "exp_id": trial.exp_id,
                "params": dict(trial.params),
                "state_dir": str(self.ledger.state_dir(trial.trial_id)),
                "weights": str(weights) if weights else None,
            }
        return job


def prepare(bench: Bench, measures: Measures, progress: Progress) -> None:
    """Build what all trials share, alone on one node. InputError of the builder is passed on."""
    job = bench.job(None)
    folder = Path(job["work_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    # Across nodes, the storage is what the task and the driver share.
    report = folder / f".progress.{os.getpid()}"

    def look() -> None:
        with contextlib.suppress(OSError):  # nothing to count yet
            what, done, total = json.loads(report.read_text())
            progress.item(what, done, total)

    try:
        with progress.phase("preparing what all trials share"):
            found = _alone(bench, progress, measures.prepare, {**job, "report": str(report)}, look)
    finally:
        report.unlink(missing_ok=True)
    _raise(found)


def measure(bench: Bench, planned: Sequence[Planned], progress: Progress) -> None:
    """Measure every trial that has no record or one with a gap, and write its record as soon as it is complete."""
    todo = [p for p in planned if _unmeasured(bench.ledger.trial(p.trial_id).record)]
    measures = bench.sweep.measure
    able = [p for p in todo if p.role == "teacher" or bench.ledger.best_weights(p.trial_id)] if measures else []
    found: dict[str, dict[str, Any]] = {trial.trial_id: {} for trial in todo}

    def write(trial: Planned) -> None:
        record = build_record(bench, trial, found[trial.trial_id])
        bench.ledger.append("record", trial_id=trial.trial_id, record=record.to_dict())
        state = bench.ledger.trial(trial.trial_id)
        progress.measured(state)
        if state.stop and not _unmeasured(record.to_dict()):
            # Of a trial that is over its best weights are enough; its state is several times as large.
            (bench.ledger.state_dir(trial.trial_id) / STATE).unlink(missing_ok=True)

    for trial in todo:
        if trial not in able:
            write(trial)
    if measures and able:
        Path(bench.job(None)["work_dir"]).mkdir(parents=True, exist_ok=True)
        timed = bench.sweep.latency
        with progress.phase("measuring", total=(1 + timed) * len(able)):
            needs: dict[str, Any] = {"num_gpus": bench.cluster.gpus, "label_selector": dict(bench.cluster.labels)}
            task = ray.remote(num_cpus=1, max_retries=2, **needs)(_call)
            jobs = [(measures.measure_quality, bench.job(trial), bench.cluster.versions) for trial in able]
            refs = [task.remote(*job) for job in jobs]
            lookout = Lookout(replace(bench.cluster, cpus=1.0), progress.line)
            for done, trial in enumerate(able):
                progress.item(f"quality of {trial.exp_id}", done)
                while isinstance(result := _result(refs[done], lookout.look), UnfitError):
                    exclude(bench.cluster, progress, result)
                    refs[done] = task.remote(*jobs[done])
                _merge(found[trial.trial_id], result, "quality")
            for done, trial in enumerate(able):
                if timed:
                    progress.item(f"latency of {trial.exp_id}, alone on its device", len(able) + done)
                    result = _alone(bench, progress, measures.measure_latency, bench.job(trial))
                    _merge(found[trial.trial_id], result, "latency")
                write(trial)


def compile_best(bench: Bench, trial: TrialState | None, progress: Progress) -> None:
    """Build the TensorRT engine of the chosen trial where the sweep leaves one; what is known of it joins the record.

    Without TensorRT nothing is built, and the record's notes say so.
    """
    wanted = any(name.endswith(".trt") for name in bench.sweep.best_files)
    measures = bench.sweep.measure
    if not wanted or not measures or not trial or not trial.record or "trt" in trial.record:
        return
    with progress.phase("compiling the TensorRT engine"):
        planned = bench.ledger.planned[trial.trial_id]
        result = _alone(bench, progress, measures.compile_engine, bench.job(planned))
    found = {"trt": f"not built: {one_line(result)}"} if isinstance(result, Exception) else result
    bench.ledger.append("record", trial_id=trial.trial_id, record={**trial.record, **found})


def _unmeasured(record: Mapping[str, Any] | None) -> bool:
    """Whether there is something left to measure: a measurement that failed is tried again by --resume."""
    return record is None or bool(record.get("unmeasured"))


def build_record(bench: Bench, trial: Planned, found: Mapping[str, Any]) -> Record:
    """The trial's record: its parameters, what was measured, how its training ended, and the verdict."""
    state = bench.ledger.trial(trial.trial_id)
    measured = {key: value for key, value in found.items() if key in OWN_FIELDS}
    extra = {key: value for key, value in found.items() if key not in OWN_FIELDS | {"extra", "_errors"}}
    extra |= found.get("extra") or {}
    if bench.sweep.measure is None and state.results:
        own, more = _from_best_result(state)
        measured, extra = own | measured, more | extra
    hours = trained(state)
    gpu = on_gpu(state) if state.results else bool(bench.cluster.gpus)
    values: dict[str, Any] = {
        **bench.common,
        "exp_id": trial.exp_id,
        "task_id": trial.task_id,
        "combo": trial.combo,
        "seed": trial.seed,
        "datetime": now(),
        "parent": "teacher" if trial.role == "trial" and bench.sweep.measure else None,
        **_inputs(trial, bench.resolved.values, extra.get("route")),
        **measured,
        "stop_reason": state.stop[1] if state.stop else failure(state.error) if state.error else None,
        "epochs": state.epoch if trial.role == "trial" else None,
        "gpu_hours": hours if gpu and trial.role == "trial" else None,
        "notes": _notes(state, found),
    }
    if trial.role == "trial":
        # A trial that was stopped is judged by the last third of what it ran.
        extra = {
            "cpu_hours": None if gpu else hours,
            **_late_rise(state, state.epoch),
            **audit.fields(state, rule_of(bench.sweep, bench.resolved.values).budget),
            **extra,
        }
    if found.get("_errors"):
        extra["unmeasured"] = ", ".join(found["_errors"])
    row = {**values, **extra}
    row = {key: finite(value) if isinstance(value, float) else value for key, value in row.items()}
    record = Record.from_dict(row)
    if bench.sweep.baseline and trial.role == "teacher":
        verdict, detail = judge_baseline(record)
    else:
        verdict, detail = judge(record, bench.sweep.gate, trial)
    return Record.from_dict({**record.to_dict(), "verdict": verdict, "verdict_detail": detail})


def judge(record: Record, gate: Gate | None, trial: Planned) -> tuple[str, str]:
    """Verdict and its numbers in words: every gate must pass, the sweep's and the trial's own."""
    found = judge_all(record, [*([gate] if gate else []), *trial.gates], trial.role)
    return found.verdict, found.detail


def judge_baseline(record: Record) -> tuple[str, str]:
    """The reference's own verdict: it passes when every number that others are compared with was measured."""
    missing = [name for name in BASELINE if getattr(record, name) is None]  # a record holds no other non-finite number
    if missing:
        return "fail", f"not measured: {', '.join(missing)}"
    return "pass", f"{', '.join(BASELINE)} are all measured"


def _inputs(trial: Planned, settings: Mapping[str, Any], route: str | None) -> dict[str, Any]:
    """The fields of the record that a trial is given: its own parameters, and of training what it left to the settings.

    route: how a quantized model's weights came about; what is only rounded was not trained. A schedule is in words.
    """
    given = dict(trial.params)
    if trial.role == "trial" and ("bits_w" not in settings or route not in (None, "PTQ")):
        given = {key: settings[key] for key in TRAINING if key in settings} | given
    own = {}
    for key, value in given.items():
        if key in OWN_FIELDS:
            own[key] = value if isinstance(value, int | float | str) or value is None else _words(value)
    return own


def _words(schedule: Mapping[str, Any]) -> str:
    if "linear" in schedule:
        return "linear " + " to ".join(f"{value:g}" for value in schedule["linear"])
    parts = zip(schedule["step"], schedule["shares"], strict=True)
    return ", then ".join(f"{value:g} for {100 * share:g} %" for value, share in parts)


def _from_best_result(state: TrialState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where nothing is measured after training, the validation of the saved weights is the result.

    That is of the last epoch that says it was `kept`; of a trainable that does not say so, the last with a drop below
    zero, as without a teacher val_drop is the drop against the trial's own best until then.
    """
    rows = [metrics for _, metrics in state.results]
    valid = [row for row in rows if math.isfinite(row.get("val_drop", math.nan))] or rows[-1:]
    kept = (row for row in reversed(valid) if row.get("kept", row.get("val_drop", 0.0) < 0))
    metrics = next(kept, valid[0])
    own = {"drop": metrics.get("val_drop"), "quality": metrics.get("val_quality")}
    own |= {key: value for key, value in metrics.items() if key in OWN_FIELDS}
    skip = {"val_drop", "val_quality", "epoch_s", "gpus", "kept"}
    return own, {key: value for key, value in metrics.items() if key not in OWN_FIELDS and key not in skip}


def _late_rise(state: TrialState, epochs: int) -> dict[str, float]:
    """How far validation rose above its best in the last third of `epochs`, in half widths of the best epoch's
    validation interval. Empty for fewer than 3 epochs and a training that ended before the last third.
    """
    best = min(
        (metrics for _, metrics in state.results), key=lambda metrics: _or_inf(metrics.get("val_drop")), default={}
    )
    width = best.get("val_drop_hi", math.nan) - best.get("val_drop_lo", math.nan)
    late = [drop for (epoch, _), drop in zip(state.results, state.drops, strict=True) if epoch > epochs - epochs // 3]
    if not late or not width > 0 or not all(map(math.isfinite, late)):
        return {}
    return {"late_rise": (max(late) - state.best_drop) / (width / 2)}


def _or_inf(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def _notes(state: TrialState, found: Mapping[str, Any]) -> str | None:
    words = [state.error] if state.error and not state.stop else []
    words += [state.stop[2]] if state.stop and state.stop[1] != "completed" else []
    words += [str(found["notes"])] if found.get("notes") else []
    words += [f"{what} not measured: {error}" for what, error in found.get("_errors", {}).items()]
    return "; ".join(words) or None


def _call(function: Any, job: dict[str, Any], versions: Mapping[str, str]) -> Any:
    if versions:
        ask(versions, Path(job["work_dir"]))
    return function(job)


def _alone(
    bench: Bench, progress: Progress, function: Any, job: dict[str, Any], meanwhile: Callable[[], None] | None = None
) -> Any:
    """What the function returns, or its exception: a task that holds a whole node of the kind to measure on.

    A node that goes meanwhile is no fault of the function, nor is one that joined and does not fit: the next one of its
    kind starts anew. `meanwhile` is called every second.
    """
    for _ in range(1 + RETRIES):
        node = measuring_node(bench.cluster, progress.line)
        options: dict[str, Any] = {
            "num_cpus": max(1, int(node.offers("CPU"))),
            "num_gpus": min(math.ceil(bench.cluster.gpus), node.offers("GPU")),
            "max_retries": 2,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node.node_id, soft=False),
        }
        task = ray.remote(**options)(_call)
        result = _result(task.remote(function, job, bench.cluster.versions), meanwhile)
        if isinstance(result, UnfitError):
            exclude(bench.cluster, progress, result)
        elif not isinstance(result, GONE):
            break
    return result


def _result(ref: Any, meanwhile: Callable[[], None] | None) -> Any:
    """What a task returned, or its exception; `meanwhile` is called every second."""
    while not ray.wait([ref], timeout=1.0)[0]:
        if meanwhile:
            meanwhile()
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        return getattr(error, "cause", None) or error


def _raise(result: Any) -> None:
    what = "while it prepared what all trials share"
    if isinstance(result, (InputError, UnfitError)):
        raise InputError(str(result))
    if isinstance(result, ray.exceptions.OutOfMemoryError):
        raise InputError(f"{told(str(result))} {what}; a larger host can")
    if isinstance(result, ray.exceptions.RayError):  # killed, again and again, or its nodes were lost
        raise InputError(f"{one_line(result)} {what}; start the sweep again")
    if isinstance(result, Exception):
        raise result


def _merge(into: dict[str, Any], result: Any, what: str) -> None:
    """Take in what was measured; an error becomes a note, for the other trials must not wait for it."""
    if isinstance(result, Exception):
        into.setdefault("_errors", {})[what] = one_line(result)
        return
    extra = {**into.get("extra", {}), **(result.get("extra") or {})}
    notes = "; ".join(str(d["notes"]) for d in (into, result) if d.get("notes"))
    into.update(result)
    into["extra"] = extra
    if notes:
        into["notes"] = notes
