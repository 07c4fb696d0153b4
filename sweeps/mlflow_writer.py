"""The process that mirrors a sweep's journal into MLflow: `python -m sweeps.mlflow_writer JOURNAL`, with the address in
the environment, where other users of the machine cannot read its password.

It compares what the journal says with what it has sent, and sends the difference: one run for the sweep,
one child per trial, each found again by its (sweep_id, trial_id) tags before it would be made a second
time. Points carry the journal's time and epoch, so that sending one twice changes nothing. Standard input
is its line to the driver: "flush" means now, and its end means that the driver closed it or died.
tracked.json only saves work.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps import mlflow_content as content
from sweeps.journal import SweepState, parse
from sweeps.mlflow_sqlite import leave_plain, write_ahead
from sweeps.tracking import CURSOR, EXPERIMENT, LOG, URI, lock_of, masked, noted, sqlite_path

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"
_PAUSE_S, _BACKOFF_S = 1.0, (0.5, 1.0, 2.0, 5.0, 10.0)
_LOG_BYTES = 5_000_000
_POINTS, _PAIRS = 800, 100  # per call: MLflow takes 1000 entities, of them 100 params and 100 tags
# Errors that asking again does not cure; everything else is an outage.
_REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE"}


@dataclass
class _Run:
    """What MLflow is known to have of one run, and the points it lacks (each with its place in the
    journal).
    """

    run_id: str = ""  # empty: none yet
    uncertain: bool = False  # a create was sent and its answer never came
    doubtful: bool = False  # there may be two of it
    refused: bool = False
    status: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    points: list[tuple[int, content.Point]] = field(default_factory=list)
    start_ms: int = 0
    last_ms: int = 0

    def known_as(self, run: Any) -> None:
        """Take over what MLflow says of the run."""
        self.run_id, self.status = run.info.run_id, run.info.status
        self.tags, self.params = dict(run.data.tags), dict(run.data.params)


class Mirror:
    """The journal's state beside MLflow's. `sync` raises on an outage and may then be called again."""

    def __init__(self, journal: Path, uri: str) -> None:
        self.journal, self.uri = journal, uri
        self.state = SweepState()
        self.offset = 0  # bytes of the journal read
        self.synced = 0  # bytes dealt with in MLflow
        self.problems: dict[str | None, str] = {}
        self._runs: dict[str | None, _Run] = {None: _Run()}  # None: the sweep's own run
        self._dirty: dict[str | None, None] = {}
        self._files: dict[tuple[str, str | None], int] = {}
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._earlier = _read_json(journal.parent / CURSOR)

    @cached_property
    def _common(self) -> dict[str, Any]:
        """Once, as the settings name every trial of the plan: for each of thousands it would take most of the time."""
        return content.training(self.state.header.get("settings") or {})

    def read(self) -> None:
        """Take in the journal's new complete lines."""
        if not self.journal.exists():
            return
        with self.journal.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                event = parse(line)
                if event is None:
                    if line.endswith(b"\n"):
                        self.problems["journal"] = f"{self.journal}: damaged at byte {self.offset}"
                    return
                self.offset += len(line)
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind, key, ms = event["event"], event.get("trial_id"), int(event["t"] * 1000)
        new = self.state.apply(event)
        run = self._runs.setdefault(key, _Run())
        if kind == "trial" or not new:
            return  # a run begins with its first result: announced trials may wait for hours
        run.start_ms, run.last_ms = run.start_ms or ms, ms
        run.points += [(self.offset, point) for point in content.points(event, ms)]
        self._dirty[key] = None
        if kind == "end":
            self._dirty |= dict.fromkeys(self.state.trials)
        elif kind == "file":
            self._files[event["path"], key] = self.offset

    def sync(self, over: bool = False) -> None:
        """Send the differences. `over`: nobody drives the sweep any more, so nothing of it may stay
        RUNNING.
        """
        upto = self.offset
        if not self.state.header:
            return
        if self._client is None:
            self._client = self._connect()
        if over:
            self._dirty |= dict.fromkeys([None, *self.state.trials])
        for key in sorted(self._dirty, key=lambda key: key is not None):  # children name their parent: it is first
            self._send(self._client, key, over)
            del self._dirty[key]
        for path, key in list(self._files):
            self._send_file(self._client, path, key)
            del self._files[path, key]
        self.synced = upto

    def save(self, outage: str | None) -> None:
        """Tell the driver, and the next start, how far we are."""
        problem = outage or "; ".join(self.problems.values()) or None
        if problem:
            left = self.offset - self.synced
            problem = f"{masked(' '.join(problem.split()))[:300]} ({left} bytes of the journal are not yet in MLflow)"
        cursor = {"pid": os.getpid(), "uri": noted(self.uri), "sweep_id": self.state.header.get("sweep_id")}
        partial = self.journal.parent / f"{CURSOR}.tmp"
        with contextlib.suppress(OSError):  # a full disk must not end the mirror: the file only saves work
            partial.write_text(json.dumps(cursor | {"offset": self.synced, "problem": problem}))
            os.replace(partial, self.journal.parent / CURSOR)

    def _connect(self) -> MlflowClient:
        """Open the store, create the experiment once, and find the runs that an earlier mirror made."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        path = sqlite_path(self.uri)
        # For a file MLflow would put artifacts below whatever the working directory is.
        artifacts = (path.parent / "mlartifacts").as_uri() if path else None
        # Two sweeps that start on one fresh file would run MLflow's table migrations against each other.
        with _locked(lock_of(path)) if path else contextlib.nullcontext():
            with _artifact_root(artifacts):
                client = MlflowClient(self.uri)
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                try:
                    client.create_experiment(EXPERIMENT, artifacts)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                found = client.get_experiment_by_name(EXPERIMENT)
            self._experiment = found.experiment_id if found else ""
        earlier = self._earlier
        same = earlier.get("uri") == noted(self.uri) and earlier.get("sweep_id") == self.state.header["sweep_id"]
        sent = earlier.get("offset", 0) if same and not earlier.get("problem") else 0
        for key, known in self._search(client):
            run = self._runs.setdefault(key, _Run())
            if run.run_id:
                run.doubtful = True
                if not _written(known):
                    continue
            run.known_as(known)
            run.points = [(end, point) for end, point in run.points if end > sent]
        if self._runs[None].run_id:
            self._files = {file: end for file, end in self._files.items() if end > sent}
        return client

    def _search(self, client: MlflowClient, query: str = "") -> Iterator[tuple[str | None, Any]]:
        """The active runs of this sweep with their keys."""
        query, token = f"tags.sweep_id = '{self.state.header['sweep_id']}'{query}", None
        while True:
            page = client.search_runs([self._experiment], query, max_results=1000, page_token=token)
            yield from ((run.data.tags.get("trial_id"), run) for run in page)
            token = page.token
            if not token:
                return

    def _send(self, client: MlflowClient, key: str | None, over: bool) -> None:
        """Bring one run up to date; what MLflow refuses (a run deleted by hand, say) holds up no other
        run.
        """
        from mlflow.exceptions import MlflowException

        run = self._runs[key]
        trial = None if key is None else self.state.trials[key]
        if run.refused or (trial and not (trial.results or trial.stop or trial.error or trial.record)):
            return
        try:
            tags = content.tags(self.state, trial, self._runs[None].run_id)
            if not run.run_id:
                self._create(client, run, key, content.name(self.state, trial), tags)
            self._log(client, run, tags, content.params(self.state, trial, self._common))
            status = content.status(self.state, trial, over)
            if status == "RUNNING" != run.status:
                client.update_run(run.run_id, status)
            elif status != run.status:
                client.set_terminated(run.run_id, status, end_time=run.last_ms)
            run.status = status
            if over and run.doubtful:
                self._drop_others(client, run, key)
        except MlflowException as error:
            if error.error_code not in _REFUSED:
                raise
            run.refused = True  # the next start looks again and sends everything
            self.problems[key] = f"MLflow refuses {content.name(self.state, trial)}: {error.message}"

    def _create(self, client: MlflowClient, run: _Run, key: str | None, name: str, tags: dict[str, str]) -> None:
        if run.uncertain:
            for _, known in self._search(client, _of(key)):
                return run.known_as(known)
            run.doubtful = True  # the server may yet come round to the first
        run.uncertain = True
        made = client.create_run(self._experiment, start_time=run.start_ms, tags=tags, run_name=name)
        run.run_id, run.status, run.tags = made.info.run_id, "RUNNING", tags

    def _drop_others(self, client: MlflowClient, run: _Run, key: str | None) -> None:
        """Delete what a server that answered too late made besides: a run without a word, which would stay RUNNING."""
        for _, known in self._search(client, _of(key)):
            if known.info.run_id != run.run_id and not _written(known):
                client.delete_run(known.info.run_id)
        run.doubtful = False

    def _log(self, client: MlflowClient, run: _Run, tags: dict[str, str], params: dict[str, str]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        new_tags = [(k, v) for k, v in tags.items() if run.tags.get(k) != v]
        new_params = [(k, v) for k, v in params.items() if k not in run.params]  # params never change
        while run.points or new_tags or new_params:
            points, pairs, names = run.points[:_POINTS], new_params[:_PAIRS], new_tags[:_PAIRS]
            client.log_batch(
                run.run_id,
                [Metric(*point) for _, point in points],
                [Param(*pair) for pair in pairs],
                [RunTag(*pair) for pair in names],
            )
            run.tags, run.params = run.tags | dict(names), run.params | dict(pairs)
            del run.points[: len(points)], new_params[: len(pairs)], new_tags[: len(names)]

    def _send_file(self, client: MlflowClient, path: str, key: str | None) -> None:
        local, run = self.journal.parent / path, self._runs[key]
        if not local.resolve().is_relative_to(self.journal.parent.resolve()):
            self.problems[path] = f"{path} was not logged: it lies outside of the sweep's folder"
            return  # the journal may be of somebody else, and everybody may read what is logged
        if not run.run_id:
            run = self._runs[None]  # a file of a trial that has no run yet
        try:
            client.log_artifact(run.run_id, str(local))
        except Exception as error:  # artifact stores raise what they like
            client.get_experiment(self._experiment)  # raises, and so asks for another try, in an outage
            self.problems[path] = f"{local} was not logged: {error}"


def _of(key: str | None) -> str:
    """What a search of the sweep's runs is narrowed to for one of them."""
    return f" and tags.trial_id = '{key}'" if key else " and tags.role = 'sweep'"


def _written(run: Any) -> bool:
    """Whether anything was logged since the run was made."""
    return bool(run.data.params or run.data.metrics)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


@contextlib.contextmanager
def _artifact_root(uri: str | None) -> Iterator[None]:
    """Where a new database's own experiment, Default, has its artifacts; MLflow takes it from the environment."""
    if uri is not None:
        os.environ[_ROOT] = uri
    try:
        yield
    finally:
        os.environ.pop(_ROOT, None)  # in the environment it also marks this process as a server


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Driver:
    """Standard input: asks for a flush, or ends when the driver closes it or dies."""

    flush = gone = False

    def wait(self, seconds: float) -> None:
        """Sleep, at most until the driver says something."""
        if self.gone or not select.select([0], [], [], max(0.0, seconds))[0]:
            return
        said = os.read(0, 4096)
        self.gone, self.flush = not said, self.flush or bool(said)


def _run(mirror: Mirror, driver: _Driver, log: logging.Handler) -> bool:
    """Mirror until the driver is gone and one last attempt was made; True when nothing is left to do."""
    failures, next_sync = 0, 0.0
    while True:
        mirror.read()
        now = time.monotonic()
        last = driver.gone
        if last or driver.flush or (mirror.synced < mirror.offset and now >= next_sync):
            outage = None
            try:
                mirror.sync(over=last)
                failures, driver.flush = 0, False
            except Exception as error:  # whatever a store or a network can raise: the sweep goes on, so do we
                outage = masked(f"{mirror.uri}: {type(error).__name__}: {error}")  # both may hold a password
                log.emit(logging.makeLogRecord({"msg": outage}))
                failures += 1
            mirror.save(outage)
            if last:
                return outage is None
            took = time.monotonic() - now
            pause = _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] if failures else max(_PAUSE_S, took)
            next_sync = time.monotonic() + pause
            if failures:
                driver.wait(min(pause, 0.5) if driver.flush else pause)
        else:
            driver.wait(0.2)


def main(arguments: list[str]) -> int:
    """Entry point; the exit status is 0 when the whole journal is in MLflow."""
    journal, uri = Path(arguments[0]), os.environ.pop(URI)
    driver, path = _Driver(), sqlite_path(uri)
    with (journal.parent / "tracking.lock").open("a") as lock:
        while True:  # the mirror of a driver that was killed may still be writing
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                driver.wait(0.2)
                if driver.gone:
                    return 1
        # An outage may last for days.
        log = RotatingFileHandler(journal.parent / LOG, maxBytes=_LOG_BYTES, backupCount=1)
        log.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%F %T"))
        # MLflow does without these two, as in its skinny edition; importing them costs 0.7 s of CPU.
        sys.modules["pandas"] = sys.modules["polars"] = None  # type: ignore[assignment]
        opened = write_ahead() if path else []
        complete = _run(Mirror(journal, uri), driver, log)
        if path:
            leave_plain(path, opened)
    return 0 if complete else 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # everything is on disk; tearing down what MLflow imported would cost the driver a second
