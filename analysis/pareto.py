"""Quality against latency, or another cost: which trials are worth having, computed first and drawn elsewhere.

Axes: p50 latency (ms per pair, µs per shot) unless another of ``ACROSS`` is asked for, and the drop of the primary
metric against the teacher in percent (positive is worse). Less is better on both: the front runs from the lower right
(the teacher's side) to the upper left.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from analysis.captions import (
    Limit,
    caption,
    check_one_reference,
    check_one_workload,
    clock_note,
    common_gate,
    headline,
    shares_note,
)
from analysis.frames import RUN_COLUMNS, Row, rows_of
from analysis.front import (
    Moment,
    Vertex,
    history,
    hypervolume,
    knee,
    mark_front,
    mark_shares,
    reference_of,
    vertices,
)
from analysis.points import RATIO, Clock, Other, Point, clock_of, others_of, point_of, rate_of
from analysis.readers import without_password
from analysis.store import SweepData, load
from analysis.words import ACROSS, PICTURES, Measure, Words, measure_of, words_of
from trainables.record import EXTRAS, FIELDS, InputError

_OUTCOME = ("role", "status", "verdict", "stop_reason")
_PLACING = (
    *(*_OUTCOME, "exp_id", "run_id", "datetime"),
    *("drop", "drop_lo", "drop_hi", RATIO, f"{RATIO}_lo", f"{RATIO}_hi"),
)
_ORIGIN = ("workload_hash", "domain", "profile", "reference", "parent", "engine", "device")
_RUN = ("sweep", "role", "status", "trial_id", "run_id")
_RATES = ("role", "quality", "drop", "domain", "workload_hash")


@dataclass(frozen=True)
class Pareto:
    """Everything a picture of one or more sweeps needs.

    ``across``: what x is. ``front``: points that no other beats in both, smallest x first (stopped ones take no part).
    ``hypervolume``: area in x * percent between the front and ``reference`` = (x, drop percent): the teacher's x and
    the gate's limit, where known, else a tenth beyond the worst point.
    ``knee``: where the front bends most, if anywhere. ``history``: the front as trials were measured.
    ``left_out``: (run id, exp_id, why) of trials that have no place in the plane.
    ``metric``: the primary metric that the drop is taken of, "" if unknown.
    ``words``: what samples and times are called. ``clock``: how x was found, "" where it is as measured.
    ``shares``: how the shares of draws on the front were found. ``rate``: the teacher's error rate where the picture
    shows rates, else None; ``others``: what else has one. ``chosen``: run ids of the trials that validation chose.
    """

    sweep: str
    across: Measure
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    reference: Vertex | None
    hypervolume: float | None
    knee: Point | None
    history: tuple[Moment, ...]
    gate: Limit | None
    left_out: tuple[tuple[str, str, str], ...]
    metric: str
    headline: str
    caption: tuple[str, ...]
    words: Words
    clock: str
    shares: str
    rate: float | None
    others: tuple[Other, ...]
    chosen: frozenset[str]


def run(tracking_uri: str, sweep: str, out_dir: str | Path, log: bool = True) -> list[Path]:
    """Write pareto.csv, pareto.png, pareto.html and curves.png into ``out_dir``, and return their paths.

    log: also attach them to the sweep's parent run in MLflow. Raises InputError as ``store.load`` does, and
    for runs of different workloads, and for a folder that cannot be written.
    """
    data = load(tracking_uri, sweep)
    paths = write(data, compute(data), out_dir)
    if log:
        log_files(tracking_uri, data.run_id, paths)
    return paths


def write(data: SweepData, pareto: Pareto, out_dir: str | Path) -> list[Path]:
    """The files of ``run`` for a sweep already in memory; each appears whole or not at all."""
    # matplotlib and plotly take a second to import: only for drawing
    from analysis import curves, page, picture

    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in PICTURES]
        for path in paths:
            temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
            try:
                match path.name:
                    case "pareto.csv":
                        frame(data, pareto).write_csv(temporary)
                    case "pareto.png":
                        picture.draw(pareto, temporary)
                    case "pareto.html":
                        temporary.write_text(page.render(pareto), encoding="utf-8")
                    case _:
                        curves.draw(data, pareto, temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {folder}: cannot be written ({error.strerror or error}); name another folder"
        ) from error
    return paths


def compute(data: SweepData, x: str = "p50") -> Pareto:
    """Points, front and hypervolume of one or more sweeps; x: one of ``ACROSS``.

    Raises InputError for different workloads, several sweeps against different references, no trial, another x, and
    where no trial has that x.
    """
    if x not in ACROSS:
        raise InputError(f"--x {x}: expected one of {', '.join(ACROSS)}")
    trials = data.trials
    if trials.is_empty():
        raise InputError(f"--sweep {data.name}: no trial is logged yet; wait for its first or resume the sweep")
    who = rows_of(trials, ("sweep", "exp_id", "role", "workload_hash", "reference"))
    check_one_workload(who)
    check_one_reference(who)
    gate = common_gate([sweep.params for sweep in data.sweeps])
    words = words_of(next(iter(trials["domain"].drop_nulls()), data.tags.get("domain")))
    hours = "cpu_hours" if "cpu_hours" in trials.columns and not trials["gpu_hours"].count() else "gpu_hours"
    across = measure_of(x, words, hours)
    timed = rows_of(trials, ("t_pair_p50_ms", RATIO)) if x == "p50" else []
    clock = clock_of(timed)
    placed, left_out = _place(trials, across, clock)
    if x != ACROSS[0] and not placed:
        raise InputError(f"--x {x}: no trial of {data.name} has both {across.key} and a drop; choose another of "
                         f"{', '.join(ACROSS)}")  # fmt: skip
    limit = gate.drop_pct if gate else None
    points = mark_shares(mark_front(placed))
    front = tuple(sorted((p for p in points if p.on_front), key=lambda p: (p.x.value, p.drop.value)))
    reference = reference_of(points, limit)
    compared = [name for name in trials.columns if name.startswith(("ler_over_", "us_per_shot_"))]
    rows = rows_of(trials, (*_RATES, *compared)) if words.rate else []
    rate = rate_of(rows)
    return Pareto(
        sweep=data.name,
        across=across,
        points=points,
        front=front,
        reference=reference,
        hypervolume=hypervolume(vertices(front), reference),
        knee=knee(front, limit),
        history=history(points, reference),
        gate=gate,
        left_out=left_out,
        metric=data.settings.get("primary", ""),
        headline=headline(rows_of(trials, _OUTCOME), gate)
        + ("  ·  the sweep was interrupted" if data.interrupted else ""),
        caption=caption(trials.select(c for c in _ORIGIN if c in trials.columns).unique(maintain_order=True).to_dicts(),
                        rows_of(trials, ("load_1m", "cores")) if across.lo else [], data.settings, words),
        words=words,
        clock=clock_note(clock, points, words),
        shares=shares_note(points, words),
        rate=rate,
        others=others_of(rows, rate, x == "p50") if rate else (),
        chosen=data.chosen,
    )  # fmt: skip


def _place(
    trials: pl.DataFrame, across: Measure, clock: Clock | None
) -> tuple[list[Point], tuple[tuple[str, str, str], ...]]:
    """Points, and who has no place. Sweeps that share a teacher show it once."""
    names = dict.fromkeys((*_PLACING, across.key, across.lo, across.hi, "weights"))
    rows = trials.select(name for name in names if name in trials.columns)
    points: list[Point] = []
    left_out = []
    teachers: set[Any] = set()
    for index, row in enumerate(rows.iter_rows(named=True)):
        point = point_of(row, Row(trials, index), across, clock)
        if isinstance(point, str):
            left_out.append((str(row["run_id"]), str(row["exp_id"]), point))
        elif point.kind != "teacher" or (row.get("weights") or row["exp_id"]) not in teachers:
            points.append(point)
            if point.kind == "teacher":
                teachers.add(row.get("weights") or row["exp_id"])
    return points, tuple(left_out)


def frame(data: SweepData, pareto: Pareto) -> pl.DataFrame:
    """All trials as a table: 25 fields, extras, the trials' own extras, then their place in the picture (x in its
    unit); after them the other decoders that are drawn in.
    """
    placed = {point.record["run_id"]: point for point in pareto.points}
    reasons = {run_id: why for run_id, _, why in pareto.left_out}
    own = [name for name in data.trials.columns if name not in {*RUN_COLUMNS, *FIELDS, *EXTRAS}]
    keys = data.trials["run_id"].to_list()
    points = [placed.get(key) for key in keys]
    x = pareto.across.column
    places = {x: "value", f"{x}_lo": "lo", f"{x}_hi": "hi"}
    trials = data.trials.select(*FIELDS, *EXTRAS, *own, *_RUN).with_columns(
        *(
            pl.Series(name, [getattr(p.x, end) if p else None for p in points], dtype=pl.Float64)
            for name, end in places.items()
        ),
        pl.Series("front_share", [p.share if p else None for p in points], dtype=pl.Float64),
        pl.Series("kind", [p.kind if p else None for p in points], dtype=pl.String),
        pl.Series("on_front", [p.on_front if p else None for p in points], dtype=pl.Boolean),
        pl.Series("left_out", [reasons.get(key) for key in keys], dtype=pl.String),
    )
    others = [{**other.record, x: other.x} for other in pareto.others]
    known = [{key: row[key] for key in row if key in trials.columns} for row in others]
    return pl.concat([trials, pl.DataFrame(known)], how="diagonal_relaxed") if known else trials


def log_files(tracking_uri: str, run_id: str, paths: Sequence[Path]) -> None:
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        for path in paths:
            client.log_artifact(run_id, str(path))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = without_password(tracking_uri)
        raise InputError(
            f"--tracking-uri {where}: the files are in {paths[0].parent}, but could not be attached "
            f"to run {run_id} ({first[:200]}); use --no-log to write them only"
        ) from error
