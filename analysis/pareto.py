"""Quality against latency: which trials are worth having, computed first and drawn elsewhere.

Axes: p50 latency (ms per pair, µs per shot), and the drop of the primary metric against the teacher in percent
(positive is worse). Less is better on both: the front runs from the lower right (the teacher's side) to the upper left.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import polars as pl

from analysis.points import Clock, Other, Point, clock_of, is_open, is_stop, number, others_of, point_of, rate_of
from analysis.store import RUN_COLUMNS, SweepData, load
from analysis.words import PICTURES, Words, words_of
from trainables.record import EXTRAS, FIELDS, InputError

Vertex = tuple[float, float]


@dataclass(frozen=True)
class Limit:
    """The sweep's gate; ``drop_pct`` is the line to draw, None when the gate is about another metric."""

    text: str
    drop_pct: float | None


@dataclass(frozen=True)
class Pareto:
    """Everything a picture of one sweep needs.

    ``front``: points that no other beats in both, fastest first (stopped ones take no part).
    ``hypervolume``: area in x * percent between the front and ``reference`` = (x, drop percent): the teacher's x and
    the gate's limit, where known, else a tenth beyond the worst point.
    ``left_out``: (exp_id, why) of trials that have no place in the plane.
    ``metric``: the primary metric that the drop is taken of, "" if unknown.
    ``words``: what samples and times are called. ``clock``: how x was found, "" where it is p50 as measured.
    ``rate``: the teacher's error rate where the picture shows rates, else None; ``others``: what else has one.
    ``chosen``: exp_id of the trial that validation chose, "" if none.
    """

    sweep: str
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    reference: Vertex | None
    hypervolume: float | None
    gate: Limit | None
    left_out: tuple[tuple[str, str], ...]
    metric: str
    headline: str
    caption: tuple[str, ...]
    words: Words
    clock: str
    rate: float | None
    others: tuple[Other, ...]
    chosen: str


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


def compute(data: SweepData) -> Pareto:
    """Points, front and hypervolume of a sweep. Raises InputError for different workloads, or no trial."""
    rows = data.trials.to_dicts()
    if not rows:
        raise InputError(f"--sweep {data.name}: no trial is logged yet; wait for its first or resume the sweep")
    check_one_workload(rows)
    gate = gate_of(data.settings)
    words = words_of(next((row["domain"] for row in rows if row.get("domain")), data.tags.get("domain")))
    clock, rate = clock_of(rows), rate_of(rows) if words.rate else None
    candidates: list[Point] = []
    left_out: list[tuple[str, str]] = []
    for row in rows:
        point = point_of(row, clock, words)
        if isinstance(point, Point):
            candidates.append(point)
        else:
            left_out.append((str(row["exp_id"]), point))
    points = mark_front(candidates)
    front = tuple(sorted((p for p in points if p.on_front), key=lambda p: (p.x.value, p.drop.value)))
    reference = _reference(points, gate)
    return Pareto(
        sweep=data.name,
        points=points,
        front=front,
        reference=reference,
        hypervolume=_hypervolume(front, reference),
        gate=gate,
        left_out=tuple(left_out),
        metric=data.settings.get("primary", ""),
        headline=headline(rows, gate) + ("  ·  the sweep was interrupted" if data.interrupted else ""),
        caption=caption(rows, data.settings, words),
        words=words,
        clock=clock_note(clock, candidates, words),
        rate=rate,
        others=others_of(rows, rate) if rate else (),
        chosen=data.tags.get("chosen", ""),
    )


def clock_note(clock: Clock | None, points: Sequence[Point], words: Words) -> str:
    """One line on how x was found: by paired ratios, and where not."""
    if clock is None or not any(point.ratio for point in points):
        return ""
    unpaired = sum(point.ratio is None for point in points)
    return (
        f"x: the teacher's p50, {words.per_ms * clock.p50_ms:.4g} {words.time} (median of {clock.timings} timings), "
        "divided by each trial's ratio to it, taken in the same alternating rounds"
        + (f"; {unpaired} without a ratio: p50 as measured" if unpaired else "")
    )


def mark_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The same points with ``on_front`` set: not beaten in both p50 and drop by another that is not stopped.

    Points with equal values are on the front together.
    """
    allowed = [i for i, point in enumerate(points) if point.kind != "stopped"]
    if not allowed:
        return tuple(points)
    plane = np.array([(points[i].x.value, points[i].drop.value) for i in allowed])
    best = moocore.is_nondominated(plane, keep_weakly=True)
    chosen = {i for i, keep in zip(allowed, best, strict=True) if keep}
    return tuple(replace(point, on_front=i in chosen) for i, point in enumerate(points))


def steps(front: Sequence[Point], top: float, right: float) -> list[Vertex]:
    """Corners (ms, percent) of the front's step line, from the upper edge ``top`` to ``right``."""
    line: list[Vertex] = []
    for point in front:
        x, y = point.x.value, point.drop.value
        line.append((x, line[-1][1] if line else max(top, y)))
        line.append((x, y))
    if line:
        line.append((max(right, line[-1][0]), line[-1][1]))
    return line


def split_at(line: Sequence[Vertex], limit: float | None) -> tuple[list[Vertex], list[Vertex]]:
    """A step line in two: above ``limit`` percent, and at or below it (all of it without a limit)."""
    if limit is None:
        return [], list(line)
    above: list[Vertex] = []
    for i, (x, y) in enumerate(line):
        if y <= limit:
            crossing = [(x, limit)] if above else []
            return above + crossing, crossing + list(line[i:])
        above.append((x, y))
    return above, []


def gate_of(settings: Mapping[str, str]) -> Limit | None:
    """The gate in the parent run's settings (gate_metric, gate_at_most or gate_at_least), if there is one."""
    metric = settings.get("gate_metric")
    if not metric or metric == "None":
        return None
    for key, sign in (("gate_at_most", "≤"), ("gate_at_least", "≥")):
        try:
            value = float(settings.get(key, ""))
        except ValueError:
            continue
        if metric == "drop":
            return Limit(f"drop {sign} {100 * value:g} %", 100 * value)
        return Limit(f"{metric} {sign} {value:g}", None)
    return None


def check_one_workload(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError, listing the workloads, when there is more than one: they are not comparable."""
    by_hash: dict[str, list[str]] = {}
    for row in rows:
        if row.get("workload_hash"):
            by_hash.setdefault(str(row["workload_hash"]), []).append(str(row["exp_id"]))
    if len(by_hash) > 1:
        groups = "; ".join(
            f"{key[:12]}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for key, names in by_hash.items()
        )
        raise InputError(
            f"{len(by_hash)} different workloads cannot be compared ({groups}); measure all on one workload"
        )


def headline(rows: Sequence[Mapping[str, Any]], gate: Limit | None) -> str:
    """One line of what came out, counted over all trials."""
    trials = [row for row in rows if row["role"] != "teacher"]
    passed = sum(row.get("verdict") == "pass" for row in trials)
    stopped = sum(is_stop(row.get("stop_reason")) for row in trials)
    what = f"{passed} of {len(trials)} trials meet the gate ({gate.text})" if gate else f"{len(trials)} trials"
    unfinished = sum(is_open(row) for row in trials)
    what += f"  ·  {stopped} stopped early" if stopped else ""
    return what + (f"  ·  {unfinished} not finished" if unfinished else "")


def load_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """A warning where latency was measured with more runnable processes than cores, else an empty string."""
    pairs = [(number(row.get("load_1m")), number(row.get("cores"))) for row in rows]
    high = [(load, cores) for load, cores in pairs if load is not None and cores is not None and load > cores]
    if not high:
        return ""
    load, cores = max(high)
    return f"load {load:.1f} on {cores:g} cores when latency was measured: trust the ratios, not the times"


def caption(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, str], words: Words) -> tuple[str, ...]:
    """Where the numbers come from, as far as is known: workload, domain, engine, device, size of the test."""
    parts = []
    for name, key in (
        ("workload", "workload_hash"),
        ("domain", "domain"),
        ("profile", "profile"),
        ("against", "parent"),
        ("engine", "engine"),
        ("device", "device"),
    ):
        found = [row.get("reference") or row.get(key) if name == "against" else row.get(key) for row in rows]
        values = list(dict.fromkeys(str(value) for value in found if value))
        if values:
            shown = [value[:12] for value in values] if key == "workload_hash" else values
            parts.append(f"{name} {' / '.join(shown)}")
    for name, key in (("images", "image_size"), (f"test {words.samples}", f"test_{words.samples}")):
        if settings.get(key):
            parts.append(f"{name} {settings[key]}")
    warning = load_note(rows)
    return (*parts, warning) if warning else tuple(parts)


def frame(data: SweepData, pareto: Pareto) -> pl.DataFrame:
    """All trials as a table: 25 fields, extras, the trials' own extras, then their place in the picture (x in its
    unit); after them the other decoders that are drawn in.
    """
    placed = {id_of(point.record): point for point in pareto.points}
    reasons = dict(pareto.left_out)
    own = [name for name in data.trials.columns if name not in {*RUN_COLUMNS, *FIELDS, *EXTRAS}]
    keys = [id_of(row) for row in data.trials.to_dicts()]
    points = [placed.get(key) for key in keys]
    x = f"x_{pareto.words.column}"
    places = {x: "value", f"{x}_lo": "lo", f"{x}_hi": "hi"}
    trials = data.trials.select(*FIELDS, *EXTRAS, *own, "role", "status", "trial_id", "run_id").with_columns(
        *(
            pl.Series(name, [getattr(p.x, end) if p else None for p in points], dtype=pl.Float64)
            for name, end in places.items()
        ),
        pl.Series("kind", [p.kind if p else None for p in points], dtype=pl.String),
        pl.Series("on_front", [p.on_front if p else None for p in points], dtype=pl.Boolean),
        pl.Series(
            "left_out",
            [None if p else reasons[e] for p, e in zip(points, data.trials["exp_id"], strict=True)],
            dtype=pl.String,
        ),
    )
    others = [{**other.record, x: other.x} for other in pareto.others]
    known = [{key: row[key] for key in row if key in trials.columns} for row in others]
    return pl.concat([trials, pl.DataFrame(known)], how="diagonal_relaxed") if known else trials


def id_of(row: Mapping[str, Any]) -> str:
    """What tells trials of one sweep apart: the MLflow run."""
    return str(row["run_id"])


def _reference(points: Sequence[Point], gate: Limit | None) -> Vertex | None:
    if not points:
        return None
    teachers = [p.x.value for p in points if p.kind == "teacher"]
    slowest = max(p.x.value for p in points)
    worst = max(p.drop.value for p in points)
    limit = gate.drop_pct if gate else None
    return (
        max(teachers) if teachers else 1.1 * slowest,
        limit if limit is not None else worst + 0.1 * (abs(worst) or 1.0),
    )


def _hypervolume(front: Sequence[Point], reference: Vertex | None) -> float | None:
    if reference is None:
        return None
    inside = [(p.x.value, p.drop.value) for p in front]
    inside = [(x, y) for x, y in inside if x < reference[0] and y < reference[1]]
    return float(moocore.hypervolume(np.array(inside), ref=np.array(reference))) if inside else 0.0


def log_files(tracking_uri: str, run_id: str, paths: Sequence[Path]) -> None:
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        for path in paths:
            client.log_artifact(run_id, str(path))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--tracking-uri {tracking_uri}: the files are in {paths[0].parent}, but could not be attached "
            f"to run {run_id} ({first[:200]}); use --no-log to write them only"
        ) from error
