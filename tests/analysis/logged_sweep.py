"""A sweep as the tracker logs it, written with the MLflow client."""

import math
import random
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from trainables.record import Record

PARENT_TAG = "mlflow.parentRunId"
Trials = list[tuple[Record, list[float]]]


def record(exp_id: str, **values: Any) -> Record:
    given: dict[str, Any] = {
        "exp_id": exp_id,
        "combo": "T3B05",
        "T": 3.0,
        "beta": 0.5,
        "gamma": 0.0,
        "params_M": 1.9,
        "flops_G": 0.8,
        "size_MB": 7.6,
        "absrel": 0.131,
        "rmse": 0.4,
        "delta1": 0.83,
        "t_pair_p50_ms": 20.0,
        "t_pair_p95_ms": 22.0,
        "pairs_per_sec": 50.0,
        "seed": 42,
        "datetime": "2026-11-22T10:00:00+00:00",
        "task_id": "K-1",
        "domain": "dust3r",
        "profile": "small",
        "quality": 0.131,
        "drop": 0.008,
        "drop_lo": 0.002,
        "drop_hi": 0.014,
        "verdict": "pass",
        "verdict_detail": "drop 0.8 % [0.2 %, 1.4 %], needed <= 1 %",
        "stop_reason": "completed",
        "epochs": 30,
        "engine": "onnxruntime",
        "device": "cpu (2 threads)",
        "workload_hash": "3fa9c02b77e1",
        "config_hash": "aa11bb22cc33",
        "git_commit": "6da7cc3",
        "parent": "dust3r_teacher",
        "extra": {"p50_lo": 19.7, "p50_hi": 20.4},
    }
    given["extra"] = given["extra"] | values.pop("extra", {})
    return Record(**(given | values))


def teacher(**values: Any) -> Record:
    return record(
        "K_teacher_run1",
        **(
            {
                "combo": "teacher",
                "T": None,
                "beta": None,
                "gamma": None,
                "params_M": 3.9,
                "t_pair_p50_ms": 41.0,
                "t_pair_p95_ms": 44.0,
                "drop": 0.0,
                "drop_lo": 0.0,
                "drop_hi": 0.0,
                "verdict": "n/a",
                "epochs": None,
                "stop_reason": None,
                "task_id": "P0-2",
                "extra": {"p50_lo": 40.2, "p50_hi": 42.3},
            }
            | values
        ),
    )


def curve(end: float, epochs: int, seed: int = 0, start: float = 0.6) -> list[float]:
    rng = random.Random(seed)
    return [end + (start - end) * math.exp(-4.5 * e / 30) + rng.gauss(0, 0.0015) for e in range(1, epochs + 1)]


def three() -> Trials:
    """A teacher and the plan's three: one passes, one misses the gate, one is stopped."""
    missed = record(
        "K_T5B05_run1",
        T=5.0,
        t_pair_p50_ms=19.2,
        drop=0.021,
        drop_lo=0.012,
        drop_hi=0.031,
        verdict="fail",
        task_id="K-2",
        extra={"p50_lo": 18.9, "p50_hi": 19.8},
    )
    stopped = record(
        "K_T3B05_sched_run1",
        beta="0.5, then 0.7",
        t_pair_p50_ms=20.9,
        t_pair_p95_ms=23.0,
        drop=0.093,
        drop_lo=0.07,
        drop_hi=0.12,
        verdict="fail",
        stop_reason="stop_loss",
        epochs=9,
        task_id="K-3",
        extra={"p50_lo": 20.5, "p50_hi": 21.4},
    )
    return [
        (teacher(), []),
        (record("K_T3B05_run1"), curve(0.008, 30, 1)),
        (missed, curve(0.021, 30, 2)),
        (stopped, curve(0.09, 9, 3)),
    ]


def forty(seed: int = 1) -> Trials:
    """A search: a teacher and 40 trials with overlapping points, many of them stopped."""
    rng = random.Random(seed)
    trials: Trials = [(teacher(), [])]
    for i in range(40):
        size = rng.uniform(0.25, 0.8)
        p50 = 41 * (0.15 + 0.85 * size) * rng.gauss(1, 0.02)
        drop = 0.0015 / size**2.2 * math.exp(abs(rng.gauss(0, 0.9))) - 0.002
        half = 0.003 + 0.12 * abs(drop)
        stop = "completed"
        if drop > 0.012:
            stop = rng.choice(["stop_loss", "asha", "plateau", "completed"])
            drop *= 1 if stop == "completed" else rng.uniform(1.5, 6)
        epochs = 30 if stop == "completed" else rng.randint(4, 14)
        trials.append(
            (
                record(
                    f"K_search{i:02d}_run1",
                    T=round(rng.uniform(1, 10), 2),
                    t_pair_p50_ms=p50,
                    t_pair_p95_ms=p50 * 1.1,
                    drop=drop,
                    drop_lo=drop - half,
                    drop_hi=drop + half,
                    verdict="pass" if drop <= 0.01 else "fail",
                    stop_reason=stop,
                    epochs=epochs,
                    extra={"p50_lo": p50 * 0.985, "p50_hi": p50 * 1.02},
                ),
                curve(drop, epochs, i, rng.uniform(0.3, 0.9)),
            )
        )
    broken = record(
        "K_search40_run1",
        drop=None,
        drop_lo=None,
        drop_hi=None,
        t_pair_p50_ms=None,
        t_pair_p95_ms=None,
        verdict="fail",
        stop_reason="diverged",
        epochs=3,
        extra={"p50_lo": None, "p50_hi": None},
    )
    return [*trials, (broken, [0.5, 0.7, math.nan])]


def interrupted(uri: str, name: str, trials: Trials) -> None:
    """A sweep that was killed: its last trial never came to a record. The runs started in another order than the
    plan's."""
    client = MlflowClient(tracking_uri=uri)
    parent = log_sweep(uri, name, trials[:0:-1])
    experiment = client.get_run(parent).info.experiment_id
    last, drops = trials[0]
    tags = {PARENT_TAG: parent, "role": "trial", "exp_id": last.exp_id, "number": str(len(trials))}
    run = client.create_run(experiment, run_name=last.exp_id, tags=tags).info.run_id
    client.log_batch(run, metrics=[Metric("val_drop", d, 0, e) for e, d in enumerate(drops, 1)])
    children = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent}'")
    place = {rec.exp_id: i for i, (rec, _) in enumerate(trials)}
    for child in children:
        client.set_tag(child.info.run_id, "number", str(place[child.info.run_name] or len(trials)))
    client.set_tag(parent, "mlflow.source.name", "python sweeps/k_grid.py --profile demo")
    for run_id in (run, parent):
        client.set_terminated(run_id, "KILLED")


def log_sweep(uri: str, name: str, trials: Trials, **parent_params: str) -> str:
    """Returns the parent's run id."""
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("slimsweep")
    experiment = found.experiment_id if found else client.create_experiment("slimsweep")
    tags = {"role": "sweep", "sweep_id": f"id-{name}", "stage": "K", "domain": "dust3r", "profile": "small"}
    settings = {
        "gate_metric": "drop",
        "gate_at_most": "0.01",
        "test_pairs": "2048",
        "primary": "absrel",
        "image_size": "64x64",
    } | parent_params
    parent = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    client.log_batch(parent, params=[Param(k, v) for k, v in settings.items()])
    for i, (rec, drops) in enumerate(trials):
        role = "teacher" if "teacher" in rec.exp_id else "trial"
        status = "FINISHED" if rec.stop_reason in (None, "completed") else "KILLED"
        run = client.create_run(
            experiment,
            run_name=rec.exp_id,
            start_time=1_700_000_000_000 + i,
            tags={PARENT_TAG: parent, "sweep_id": f"id-{name}", "trial_id": f"{i:012x}", "role": role},
        ).info.run_id
        times = [1_700_000_000_000 + 1000 * e for e in range(len(drops) + 1)]
        metrics = [Metric("val_drop", d, times[e], e + 1) for e, d in enumerate(drops)]
        metrics += [Metric("train_loss", 1.0 / (e + 1), times[e], e + 1) for e in range(len(drops))]
        client.log_batch(run, metrics=metrics, params=[Param("T", str(rec.T))], tags=[RunTag("record", rec.to_json())])
        client.set_terminated(run, status)
    client.set_terminated(parent, "FINISHED")
    return parent


def copy_store(uri: str, folder: Path) -> str:
    """Creating MLflow's tables takes seconds, copying them none."""
    target = folder / "mlflow.db"
    if not target.exists():
        target.write_bytes(Path(uri.removeprefix("sqlite:///")).read_bytes())
    return f"sqlite:///{target}"
