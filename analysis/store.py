"""MLflow runs as polars frames: one sweep, its trials and their learning curves.

A sqlite store is read by read-only SQL (20 times less CPU than ``mlflow.search_runs`` at 10,000 runs, and it
can neither create nor migrate a database); any other store through the MLflow client, with the same frames.
"""

import json
import math
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from trainables.record import EXTRAS, FIELDS, InputError

PARENT_TAG = "mlflow.parentRunId"
RUN_COLUMNS = ("run_id", "trial_id", "role", "status")
CURVE_SCHEMA = {"run_id": pl.String, "key": pl.String, "step": pl.Int64, "value": pl.Float64}
_TEXT_COLUMNS = {
    *("run_id", "trial_id", "role", "status", "exp_id", "combo", "keep_list", "notes", "datetime", "task_id"),
    *("domain", "profile", "verdict", "verdict_detail", "stop_reason", "engine", "device", "workload_hash"),
    *("config_hash", "git_commit", "parent"),
}
_NAMED = {*FIELDS, *EXTRAS}
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
LOCK_WAIT_S = 5.0


@dataclass(frozen=True)
class Run:
    """One MLflow run without its metrics; ``start_ms`` is Unix time in milliseconds."""

    run_id: str
    name: str
    status: str
    start_ms: int
    tags: Mapping[str, str]
    params: Mapping[str, str]


@dataclass(frozen=True)
class SweepData:
    """One sweep as logged.

    ``trials``: a row per trial, in the plan's order: run_id, trial_id, role ("trial" | "teacher"), status, then the
    25 record fields, the extras, and whatever the trials' own extras add; null where a trial has no value.
    ``curves``: long form (run_id, key, step = epoch, value), sorted, one value per (run_id, key, step).
    ``settings``: the parent run's parameters, as strings. ``interrupted``: whether the sweep ended before it was
    complete. ``notes``: lines a reader of the result should see.
    """

    run_id: str
    name: str
    tags: Mapping[str, str]
    settings: Mapping[str, str]
    trials: pl.DataFrame
    curves: pl.DataFrame
    notes: tuple[str, ...] = field(default=())
    interrupted: bool = False


class Store(Protocol):
    """What the two readers have in common."""

    def sweeps(self) -> list[Run]:
        """Parent runs (tag role=sweep), newest first."""
        ...

    def children(self, parent_id: str) -> list[Run]:
        """Trial runs of a parent, in any order."""
        ...

    def metrics(self, parent_id: str, keys: Sequence[str]) -> list[tuple[str, str, int, int, float]]:
        """All values of the keys for all trials of a parent: (run_id, key, step, timestamp, value)."""
        ...


def load(tracking_uri: str, sweep: str, curve_keys: Sequence[str] = ("val_drop",)) -> SweepData:
    """Read the sweep called ``sweep`` (its run name; also its run id or sweep id).

    Raises InputError, in one line, for an unknown sweep (listing the known), an empty or missing store, and a
    store that is locked, unreachable or not MLflow's.
    """
    with open_store(tracking_uri) as store:
        parents = store.sweeps()
        if not parents:
            raise InputError(
                f"--tracking-uri {tracking_uri}: no sweep is logged there yet; run one first "
                "(python sweeps/k_grid.py --profile demo)"
            )
        found = [run for run in parents if sweep in (run.name, run.run_id, run.tags.get("sweep_id"))]
        if not found:
            known = list(dict.fromkeys(run.name for run in parents))
            more = f" and {len(known) - 20} more" if len(known) > 20 else ""
            raise InputError(f"--sweep {sweep!r} is not in {tracking_uri}; known: {', '.join(known[:20])}{more}")
        parent = found[0]
        notes = []
        if len(found) > 1:
            others = ", ".join(run.run_id for run in found[1:4])
            notes.append(
                f"{len(found)} sweeps are named {sweep!r}: this is the newest (run {parent.run_id}); "
                f"--sweep also takes a run id, e.g. {others}"
            )
        children = sorted(store.children(parent.run_id), key=_place)
        if parent.status == "KILLED":
            notes.append(_interrupted(parent))
        points = store.metrics(parent.run_id, curve_keys)
    return SweepData(
        parent.run_id,
        parent.name,
        parent.tags,
        parent.params,
        trial_frame(children),
        curve_frame(points),
        tuple(notes),
        parent.status == "KILLED",
    )


def _place(run: Run) -> tuple[int, int, str, str]:
    """The trial's number in the plan; trials start and restart in any order."""
    number = run.tags.get("number", "")
    return int(number) if number.isdecimal() else 0, run.start_ms, run.name, run.run_id


def _interrupted(parent: Run) -> str:
    command = parent.tags.get("mlflow.source.name", "")
    again = command if "--resume" in command.split() else f"{command} --resume"
    return f"{parent.name} was interrupted before it was complete" + (f"; go on with: {again}" if command else "")


def trial_frame(runs: Iterable[Run]) -> pl.DataFrame:
    """One row per run from its ``record`` tag; a run without one (still running): its tags and parameters."""
    rows = [_row(run) for run in runs]
    names = dict.fromkeys((*RUN_COLUMNS, *FIELDS, *EXTRAS))
    for row in rows:
        names.update(dict.fromkeys(row))
    return pl.DataFrame([_column(name, [row.get(name) for row in rows]) for name in names])


def curve_frame(points: Iterable[tuple[str, str, int, int, float]]) -> pl.DataFrame:
    """Long frame of learning curves; a step logged twice keeps its newest value."""
    newest: dict[tuple[str, str, int], tuple[int, float]] = {}
    for run_id, key, step, timestamp, value in points:
        known = newest.get((run_id, key, step))
        if known is None or timestamp >= known[0]:
            newest[run_id, key, step] = (timestamp, value)
    rows = [(*where, value) for where, (_, value) in newest.items()]
    return pl.DataFrame(rows, schema=CURVE_SCHEMA, orient="row").sort("run_id", "key", "step")


def _row(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run_id": run.run_id,
        "trial_id": run.tags.get("trial_id"),
        "role": run.tags.get("role", "trial"),
        "status": run.status,
    }
    text = run.tags.get("record")
    if text is None:
        known = {**run.params, **run.tags}
        row.update({name: known[name] for name in (*FIELDS, *EXTRAS) if name in known})
        row.setdefault("exp_id", run.name)
        return row
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise InputError(
            f"run {run.run_id} ({run.name}): its tag 'record' is not a record ({error}); "
            "was it written or edited by something else?"
        ) from None
    return {**record, **row}


def _column(name: str, values: list[Any]) -> pl.Series:
    """Numbers where every value is one, else text (Booleans and lists as JSON).

    Text of a named record field is read as a number where it can be: MLflow parameters are always text.
    """
    if name not in _TEXT_COLUMNS:
        try:
            numbers = [_number(value, parse=name in _NAMED) for value in values]
        except (TypeError, ValueError):
            pass
        else:
            return pl.Series(name, numbers, dtype=_number_type(numbers))
    texts = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pl.Series(name, texts, dtype=pl.String)


def _number_type(numbers: list[float | int | None]) -> type[pl.DataType]:
    present = [number for number in numbers if number is not None]
    return pl.Int64 if present and all(isinstance(number, int) for number in present) else pl.Float64


def _number(value: Any, parse: bool) -> float | int | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, str):
        if value in _NONFINITE:
            return _NONFINITE[value]
        if parse:
            return float(value)
    raise TypeError(value)


def finite_or_inf(value: float, is_nan: bool = False) -> float:
    """MLflow stores NaN as a flag and infinities as the largest double: undo both."""
    if is_nan:
        return math.nan
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


@contextmanager
def open_store(tracking_uri: str) -> Iterator[Store]:
    """The reader that fits the URI. Raises InputError when there is nothing that can be read."""
    if tracking_uri.startswith("sqlite:"):
        with _sql(tracking_uri) as store:
            yield store
    else:
        yield _client(tracking_uri)


class SqlStore:
    """Reads MLflow's tables over a read-only connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def sweeps(self) -> list[Run]:
        return sorted(self._runs("role", "sweep"), key=lambda run: -run.start_ms)

    def children(self, parent_id: str) -> list[Run]:
        return self._runs(PARENT_TAG, parent_id)

    def metrics(self, parent_id: str, keys: Sequence[str]) -> list[tuple[str, str, int, int, float]]:
        marks = ",".join("?" * len(keys))
        rows = self._db.execute(
            "select m.run_uuid, m.key, m.step, m.timestamp, m.value, m.is_nan from tags t"
            " join runs r on r.run_uuid = t.run_uuid and r.lifecycle_stage = 'active'"
            f" join metrics m on m.run_uuid = t.run_uuid and m.key in ({marks})"
            " where t.key = ? and t.value = ?",
            (*keys, PARENT_TAG, parent_id),
        )
        return [(run, key, step, time, finite_or_inf(value, nan)) for run, key, step, time, value, nan in rows]

    def _runs(self, key: str, value: str) -> list[Run]:
        where = (
            " from tags w join runs r on r.run_uuid = w.run_uuid and r.lifecycle_stage = 'active'"
            " join experiments e on e.experiment_id = r.experiment_id and e.lifecycle_stage = 'active' {}"
            " where w.key = ? and w.value = ?"
        )
        facts: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        heads = self._db.execute(
            "select r.run_uuid, r.name, r.status, r.start_time" + where.format(""), (key, value)
        ).fetchall()
        for run_id, *_ in heads:
            facts[run_id] = ({}, {})
        for index, table in enumerate(("tags", "params")):
            join = f"join {table} x on x.run_uuid = r.run_uuid"
            for run_id, name, text in self._db.execute(
                "select r.run_uuid, x.key, x.value" + where.format(join), (key, value)
            ):
                facts[run_id][index][name] = text
        return [Run(run_id, name or "", status, start or 0, *facts[run_id]) for run_id, name, status, start in heads]


@contextmanager
def _sql(uri: str) -> Iterator[SqlStore]:
    path = Path(uri.removeprefix("sqlite:").removeprefix("///").split("?", 1)[0])
    if path in (Path("."), Path("/")) or not path.is_file():
        raise InputError(
            f"--tracking-uri {uri}: there is no database file {path}; "
            "sqlite:///relative.db or sqlite:////absolute.db names an existing one"
        )
    try:
        # A read-only connection cannot create, migrate or lock out a writer for longer than it reads.
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=LOCK_WAIT_S)
        try:
            connection.execute("begin")
            yield SqlStore(connection)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise InputError(f"--tracking-uri {uri}: {_sql_problem(error)}") from error


def _sql_problem(error: sqlite3.Error) -> str:
    text = str(error)
    if "locked" in text or "busy" in text:
        return f"another program has locked the database for over {LOCK_WAIT_S:g} s; try again when it is done"
    if "no such table" in text or "no such column" in text:
        return f"this database is not an MLflow 3 store ({text}); name the store of the sweep"
    if "not a database" in text or "malformed" in text:
        return f"this file cannot be read as a sqlite database ({text}); is it the right file, and whole?"
    return f"sqlite cannot read it ({text})"


class ClientStore:
    """Reads through the MLflow client: a tracking server, or a database that it reaches."""

    def __init__(self, client: Any, problem: str) -> None:
        self._client = client
        self._problem = problem

    def sweeps(self) -> list[Run]:
        return sorted(self._search("tags.role = 'sweep'"), key=lambda run: -run.start_ms)

    def children(self, parent_id: str) -> list[Run]:
        return self._search(f"tags.`{PARENT_TAG}` = '{parent_id}'")

    def metrics(self, parent_id: str, keys: Sequence[str]) -> list[tuple[str, str, int, int, float]]:
        rows = []
        with self._one_line():
            for run in self.children(parent_id):
                for key in keys:
                    for m in self._client.get_metric_history(run.run_id, key):
                        rows.append((run.run_id, key, m.step, m.timestamp, finite_or_inf(m.value)))
        return rows

    def _search(self, filter_string: str) -> list[Run]:
        with self._one_line():
            experiments = [e.experiment_id for e in _pages(self._client.search_experiments)]
            runs = _pages(self._client.search_runs, experiment_ids=experiments, filter_string=filter_string)
            return [
                Run(
                    r.info.run_id,
                    r.info.run_name or "",
                    r.info.status,
                    r.info.start_time or 0,
                    r.data.tags,
                    r.data.params,
                )
                for r in runs
            ]

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # the client's backends raise their own families (requests, sqlalchemy, grpc)
            raise InputError(f"{self._problem} ({_first_line(error)})") from error


def _pages(call: Any, **arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = call(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _client(uri: str) -> ClientStore:
    problem = f"--tracking-uri {uri}: this MLflow store cannot be read"
    if uri.startswith(("http://", "https://")):
        try:  # one quick question first: the client itself retries a dead server for minutes
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answered; whether it lets us in is the client's business
        except (OSError, ValueError) as error:
            raise InputError(
                f"--tracking-uri {uri}: no MLflow server answers there ({_first_line(error)}); "
                "is it running, and the address right?"
            ) from error
    from mlflow.tracking import MlflowClient  # 3 s of import that the SQL path does not need

    try:
        return ClientStore(MlflowClient(tracking_uri=uri), problem)
    except Exception as error:
        raise InputError(f"{problem} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    text = str(getattr(error, "reason", "") or error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
