"""Reading many runs to a Pareto front beside ``mlflow.search_runs``; CPU time and memory of a process of its own each.

    python benchmarks/analysis_scale.py                       # 10,000 runs of 30 metrics in sqlite
    python benchmarks/analysis_scale.py --runs 100000         # search_runs only up to --compare-up-to (default: 10,000)
    python benchmarks/analysis_scale.py --postgresql URI      # an empty database that may be filled

The store is made by MLflow and filled with rows by SQL: sweeps of 100 trials under one campaign, each with a record, 30
metrics, parameters and tags, as the tracker writes them. front: analysis.store reads the campaign, analysis.pareto
computes points, front, shares and history; search_runs: every run as one pandas frame, from which the 30 metrics of all
trials are checked to be the same. CPU seconds of both with the imports, and in brackets without.
"""

import argparse
import json
import math
import random
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines.latency import environment
from trainables.record import Record

CAMPAIGN, TRIALS = "bench", 100
METRICS = (
    *("params_M", "flops_G", "size_MB", "chamfer", "absrel", "rmse", "delta1", "t_pair_p50_ms", "t_pair_p95_ms"),
    *("pairs_per_sec", "quality", "drop", "drop_lo", "drop_hi", "epochs", "cpu_hours", "late_rise", "test_samples"),
    *("params_down", "p50_lo", "p50_hi", "p95_lo", "p95_hi", "p50_ratio", "p50_ratio_same_runtime"),
    *("p50_ratio_same_runtime_lo", "p50_ratio_same_runtime_hi", "p50_torch_ms", "ram_GB", "load_1m"),
)
_CHILD = """
import json, resource, sys
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
{imports}
before = cpu()
{body}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{"cpu": cpu(), "imports": before, "peak_MB": peak, **said}}))
"""
OURS = _CHILD.format(
    imports="from analysis import pareto, store",
    body="""data = store.load_all(sys.argv[1], campaign=sys.argv[2], curve_keys=())
found = pareto.compute(data)
said = {"trials": data.trials.height, "front": len(found.front), "hypervolume": found.hypervolume,
        "sums": {key: float(data.trials[key].sum()) for key in sys.argv[3].split(",")}}""",
)
THEIRS = _CHILD.format(
    imports="import mlflow",
    body="""mlflow.set_tracking_uri(sys.argv[1])
frame = mlflow.search_runs(search_all_experiments=True, max_results=50_000)
frame = frame[frame["tags.role"] != "sweep"]
said = {"trials": len(frame), "sums": {key: float(frame["metrics." + key].sum()) for key in sys.argv[3].split(",")}}""",
)


def trial(rng: random.Random, sweep: int, number: int) -> Record:
    """A trial as a sweep would measure it: smaller is faster and worse, with noise."""
    size = rng.uniform(0.2, 0.9)
    ratio = 1 / (0.15 + 0.85 * size) * rng.gauss(1, 0.03)
    drop = 0.0015 / size**2 * math.exp(abs(rng.gauss(0, 0.9))) - 0.002
    p50 = 41 / ratio * rng.uniform(1, 1.5)
    stop = "completed" if drop < 0.012 else rng.choice(["stop_loss", "asha", "plateau", "completed"])
    values = {name: rng.uniform(0.1, 1.0) for name in METRICS}
    values |= {
        "t_pair_p50_ms": p50, "t_pair_p95_ms": 1.2 * p50, "p50_lo": 0.98 * p50, "p50_hi": 1.03 * p50, "drop": drop,
        "drop_lo": drop - 0.006, "drop_hi": drop + 0.006, "p50_ratio_same_runtime": ratio, "params_M": 4.1 * size,
        "p50_ratio_same_runtime_lo": 0.97 * ratio, "p50_ratio_same_runtime_hi": 1.02 * ratio, "epochs": 30,
    }  # fmt: skip
    texts = {
        "combo": "T3B05", "task_id": "K-S", "domain": "dust3r", "profile": "small", "stop_reason": stop, "T": 3.0,
        "verdict": "pass" if drop <= 0.01 else "fail", "verdict_detail": f"drop {100 * drop:.3g} %, needed <= 1 %",
        "engine": "onnxruntime", "device": "cpu", "workload_hash": "3fa9c02b77e1", "config_hash": "aa11bb22cc33",
        "git_commit": "6da7cc3", "parent": "teacher:f260630c2bc54acb", "reference": "teacher:f260630c2bc54acb",
        "beta": 0.5 if number % 3 else "0.5 for 70 %, then 0.7 for 30 %", "seed": 42, "threads": 1, "cores": 2,
        "datetime": f"2026-11-{1 + sweep % 28:02d}T10:{number % 60:02d}:00+00:00",
    }  # fmt: skip
    return Record.from_dict({"exp_id": f"K_s{sweep}n{number:03d}_run1", **texts, **values})


def rows(runs: int, experiment: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Rows of MLflow's tables: (table, values)."""
    rng, parent = random.Random(1), ""
    for index in range(runs):
        sweep, number = divmod(index, TRIALS)
        start = 1_700_000_000_000 + index
        if number == 0:
            parent = uuid.UUID(int=rng.getrandbits(128)).hex
            tags = {"role": "sweep", "sweep_id": f"id{sweep}", "campaign": CAMPAIGN, "domain": "dust3r"}
            gate = {"gate_metric": "drop", "gate_at_most": "0.01", "primary": "absrel", "test_pairs": "2048"}
            yield from run(parent, f"sweep{sweep}", start, experiment, tags, gate, {})
        record = trial(rng, sweep, number)
        tags = {
            "mlflow.parentRunId": parent, "role": "trial", "number": str(number + 1), "trial_id": f"{index:012x}",
            "exp_id": record.exp_id, "campaign": CAMPAIGN, "verdict": str(record.verdict), "stage": "K",
            "record": record.to_json(),
        }  # fmt: skip
        params = {"T": "3.0", "beta": "0.5", "lr": "0.0008", "epochs": "30", "seed": "42", "batch_size": "32"}
        metrics = {name: float(record.to_dict()[name] or 0.0) for name in METRICS}
        yield from run(uuid.UUID(int=rng.getrandbits(128)).hex, record.exp_id, start, experiment, tags, params, metrics)


def run(
    run_id: str, name: str, start: int, experiment: int, tags: dict[str, str], params: dict[str, str],
    metrics: dict[str, float],
) -> Iterator[tuple[str, tuple[Any, ...]]]:  # fmt: skip
    """The rows of one run."""
    state = ("FINISHED", start, start + 1, "active", experiment, f"mlflow-artifacts:/bench/{run_id}", "bench", "LOCAL")
    columns = "run_uuid,name,status,start_time,end_time,lifecycle_stage,experiment_id,artifact_uri,user_id,source_type"
    yield f"runs({columns})", (run_id, name, *state)
    yield from (("tags(run_uuid,key,value)", (run_id, *one)) for one in tags.items())
    yield from (("params(run_uuid,key,value)", (run_id, *one)) for one in params.items())
    for key, value in metrics.items():
        point = (run_id, key, value, start, 0, False)
        yield "metrics(run_uuid,key,value,timestamp,step,is_nan)", point
        yield "latest_metrics(run_uuid,key,value,timestamp,step,is_nan)", point


def fill(connection: Any, mark: str, runs: int, experiment: int) -> None:
    """Insert all rows in one transaction."""
    waiting: dict[str, list[tuple[Any, ...]]] = {}

    def flush() -> None:
        for table, some in waiting.items():
            marks = ",".join([mark] * len(some[0]))
            connection.cursor().executemany(f"insert into {table} values ({marks})", some)
            some.clear()

    for index, (table, values) in enumerate(rows(runs, experiment)):
        waiting.setdefault(table, []).append(values)
        if index % 100_000 == 99_999:
            flush()
            waiting.clear()
    flush()
    connection.commit()


def make(uri: str, runs: int) -> None:
    """MLflow makes the tables, SQL fills them."""
    code = "import sys; from mlflow.tracking import MlflowClient; " \
           "print(MlflowClient(sys.argv[1]).create_experiment('slimsweep', 'mlflow-artifacts:/bench'))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, uri], check=True, capture_output=True, text=True)
    experiment = int(done.stdout.split()[-1])
    if uri.startswith("sqlite:"):
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as db:
            fill(db, "?", runs, experiment)
        db.close()
    else:
        import sqlalchemy

        raw = sqlalchemy.create_engine(uri).raw_connection()
        fill(raw, "%s", runs, experiment)
        raw.close()


def timed(code: str, uri: str) -> dict[str, Any]:
    """What a process of its own says it used."""
    command = [sys.executable, "-c", code, uri, CAMPAIGN, ",".join(METRICS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def said(name: str, found: dict[str, Any]) -> str:
    """One line."""
    own = found["cpu"] - found["imports"]
    return f"{name:12} {found['cpu']:7.2f} CPU-s [{own:.2f} without imports], peak {found['peak_MB']:.0f} MB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per reader, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000, help="trials (default: %(default)s)")
    parser.add_argument("--compare-up-to", type=int, default=10_000, help="most runs that search_runs reads as well")
    parser.add_argument("--postgresql", metavar="URI", help="an empty database instead of a sqlite file")
    given = parser.parse_args(arguments)
    print(", ".join(f"{key}={value}" for key, value in environment().items() if value is not None))
    with tempfile.TemporaryDirectory() as folder:
        uri = given.postgresql or f"sqlite:///{Path(folder) / 'mlflow.db'}"
        make(uri, given.runs)
        ours = timed(OURS, uri)
        print(f"{given.runs} runs of {len(METRICS)} metrics, {ours['front']} on the front")
        print(said("front", ours))
        if given.runs <= given.compare_up_to:
            theirs = timed(THEIRS, uri)
            print(said("search_runs", theirs))
            wrong = [key for key in METRICS if not math.isclose(ours["sums"][key], theirs["sums"][key], rel_tol=1e-9)]
            if wrong or ours["trials"] != theirs["trials"]:
                sys.exit(f"the two frames differ in {', '.join(wrong) or 'their number of trials'}")
            net = [found["cpu"] - found["imports"] for found in (ours, theirs)]
            print(f"search_runs / front: {theirs['cpu'] / ours['cpu']:.1f} x CPU [{net[1] / net[0]:.1f} without "
                  f"imports], {theirs['peak_MB'] / ours['peak_MB']:.1f} x memory")  # fmt: skip


if __name__ == "__main__":
    main()
