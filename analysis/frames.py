"""Runs as polars frames: one row per trial, and learning curves in long form."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import polars as pl

from analysis.readers import Run, Value
from trainables.record import EXTRAS, FIELDS, InputError

RUN_COLUMNS = ("run_id", "trial_id", "role", "status", "sweep", "sweep_run")
CURVE_SCHEMA = {"run_id": pl.String, "key": pl.String, "step": pl.Int64, "value": pl.Float64}
_TEXT_COLUMNS = {
    *RUN_COLUMNS,
    *("exp_id", "combo", "keep_list", "notes", "datetime", "task_id"),
    *("domain", "profile", "verdict", "verdict_detail", "stop_reason", "engine", "device", "workload_hash"),
    *("config_hash", "git_commit", "parent"),
}
_NAMED = {*FIELDS, *EXTRAS}
_NUMBERS = ("drop", "drop_lo", "drop_hi", "t_pair_p50_ms", "t_pair_p95_ms", "size_MB", "params_M", "gpu_hours", "seed")
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_AT_ONCE = 5000  # rows held as Python objects: a frame of 100,000 would take gigabytes on the way


def trial_frame(runs: Iterable[Run], sweeps: Sequence[Run] = ()) -> pl.DataFrame:
    """One row per run from its ``record`` tag, by sweep and in the plan's order; a run without a record (still
    running): its tags and parameters.
    """
    order = {sweep.run_id: (index, sweep.name) for index, sweep in enumerate(sweeps)}
    pieces: list[tuple[int, dict[str, pl.Series]]] = []
    places: list[tuple[int, int, int, str, str]] = []
    rows: list[dict[str, Any]] = []
    for run in runs:
        index, sweep = order.get(run.parent, (len(order), ""))
        number = run.tags.get("number", "")
        places.append((index, int(number) if number.isdecimal() else 0, run.start_ms, run.name, run.run_id))
        rows.append(_row(run, sweep))
        if len(rows) == _AT_ONCE:
            pieces.append((len(rows), _columns(rows)))
            rows = []
    pieces.append((len(rows), _columns(rows)))
    names = dict.fromkeys((*RUN_COLUMNS, *FIELDS, *EXTRAS))
    # In an order of their own: stores hand runs out in different ones.
    names.update(dict.fromkeys(sorted({name for _, piece in pieces for name in piece})))
    frame = pl.DataFrame([_joined(name, pieces) for name in names])
    return frame[sorted(range(len(places)), key=places.__getitem__)] if places else frame


def curve_frame(points: Iterable[Value]) -> pl.DataFrame:
    """Long frame of learning curves; a step logged twice keeps its newest value."""
    newest: dict[tuple[str, str, int], tuple[int, float]] = {}
    for run_id, key, step, timestamp, value in points:
        known = newest.get((run_id, key, step))
        if known is None or timestamp >= known[0]:
            newest[run_id, key, step] = (timestamp, value)
    rows = [(*where, value) for where, (_, value) in newest.items()]
    return pl.DataFrame(rows, schema=CURVE_SCHEMA, orient="row").sort("run_id", "key", "step")


def with_epochs(trials: pl.DataFrame, curves: pl.DataFrame) -> pl.DataFrame:
    """The trials, those without a record with as many epochs as their curves have."""
    seen = curves.group_by("run_id").agg(pl.col("step").max().alias("_seen"))
    joined = trials.join(seen, on="run_id", how="left", maintain_order="left")
    return joined.with_columns(pl.coalesce("epochs", "_seen").alias("epochs")).drop("_seen")


def rows_of(frame: pl.DataFrame, names: Iterable[str]) -> list[dict[str, Any]]:
    """The rows as dictionaries of those of the columns that there are."""
    return frame.select([name for name in names if name in frame.columns]).to_dicts()


class Row(Mapping[str, Any]):
    """One row of a frame that is read when it is asked: dictionaries of 100,000 rows would not fit."""

    __slots__ = ("_frame", "_index")

    def __init__(self, frame: pl.DataFrame, index: int) -> None:
        self._frame, self._index = frame, index

    def __getitem__(self, key: str) -> Any:
        if key not in self._frame.columns:
            raise KeyError(key)
        return self._frame.item(self._index, key)

    def __iter__(self) -> Any:
        return iter(self._frame.columns)

    def __len__(self) -> int:
        return self._frame.width


def record_of(run: Run) -> dict[str, Any] | None:
    """The record in a run's tag, None where there is none yet; InputError for what was edited into something else."""
    text = run.tags.get("record")
    if text is None:
        return None
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        for key in _NUMBERS:
            value = record.get(key)
            if value not in (None, *_NONFINITE) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{key} is {value!r}, expected a number")
        if record.get("datetime"):
            datetime.fromisoformat(record["datetime"])
    except (ValueError, TypeError) as error:
        raise InputError(
            f"run {run.run_id} ({run.name}): its tag 'record' is not a record ({error}); "
            "was it written or edited by something else?"
        ) from None
    return record


def _row(run: Run, sweep: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run_id": run.run_id,
        "trial_id": run.tags.get("trial_id"),
        "role": run.tags.get("role", "trial"),
        "status": run.status,
        "sweep": sweep or None,
        "sweep_run": run.parent or None,
    }
    record = record_of(run)
    if record is None:
        known = {**run.params, **run.tags}
        # Its parameter `epochs` says how many it may run, the column how many were: see `with_epochs`.
        row.update({name: known[name] for name in (*FIELDS, *EXTRAS) if name in known and name != "epochs"})
        row.setdefault("exp_id", run.name)
        return row
    return {**record, **row}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, pl.Series]:
    names: dict[str, Any] = dict.fromkeys(RUN_COLUMNS)
    for row in rows:
        names |= row
    return {name: _column(name, [row.get(name) for row in rows]) for name in names}


def _column(name: str, values: list[Any]) -> pl.Series:
    """Numbers where every value is one, else text (Booleans and lists as JSON).

    Text of a named record field is read as a number where it can be: MLflow parameters are always text.
    """
    if name not in _TEXT_COLUMNS:
        kinds = set(map(type, values)) - {type(None)}
        try:
            numbers = values if kinds <= {int, float} else [_number(value, parse=name in _NAMED) for value in values]
        except (TypeError, ValueError):
            pass
        else:
            whole = kinds == {int}
            return pl.Series(name, numbers, dtype=pl.Int64 if whole else pl.Float64)
    return _texts(name, values)


def _texts(name: str, values: Iterable[Any]) -> pl.Series:
    return pl.Series(name, [v if v is None or isinstance(v, str) else json.dumps(v) for v in values], dtype=pl.String)


def _joined(name: str, pieces: Sequence[tuple[int, dict[str, pl.Series]]]) -> pl.Series:
    """One column of all pieces: text where any piece is."""
    text = name in _TEXT_COLUMNS
    found = [
        piece.get(name, pl.Series(name, [None] * rows, dtype=pl.String if text else pl.Float64))
        for rows, piece in pieces
    ]
    kinds = {series.dtype for series in found if series.null_count() < len(series)}
    if pl.String in kinds and len(kinds) > 1:
        found = [series if series.dtype == pl.String else _texts(name, series) for series in found]
    kind = pl.String if pl.String in kinds or text else pl.Float64 if len(kinds) != 1 else kinds.pop()
    return pl.concat([series.cast(kind) for series in found]).alias(name)


def _number(value: Any, parse: bool) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, str):
        if value in _NONFINITE:
            return _NONFINITE[value]
        if parse:
            return float(value)
    raise TypeError(value)
