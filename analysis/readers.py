"""The two ways to MLflow's runs: read-only SQL where the store is a database, else its client; same answers.

SQL takes a twentieth of the CPU of ``mlflow.search_runs`` and can neither create nor migrate a database. sqlite and
PostgreSQL share every statement; what differs is how the connection is opened.
"""

import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from math import copysign, inf, nan
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from trainables.record import InputError

PARENT_TAG = "mlflow.parentRunId"
LOCK_WAIT_S = 5.0
OWN_TAGS = ("record", "trial_id", "role", "number")  # what is read of a trial that has a record
_AT_ONCE = 500  # ids in one statement: databases limit how many a statement may name

T = TypeVar("T")
Value = tuple[str, str, int, int, float]  # run id, key, step, timestamp in ms, value


@dataclass(frozen=True, slots=True)
class Run:
    """One MLflow run without its metrics; ``start_ms`` is Unix time in milliseconds, ``parent`` its parent's run id,
    ``artifacts`` where its files lie.
    """

    run_id: str
    name: str
    status: str
    start_ms: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    parent: str = ""
    artifacts: str = ""


class Store(Protocol):
    """What the two readers have in common."""

    def sweeps(self, role: str = "sweep") -> list[Run]:
        """Runs that are of no trial, by their tag `role`, newest first: of sweeps, or of whole campaigns."""
        ...

    def children(self, parents: Sequence[str], whole: bool = False) -> Iterator[Run]:
        """Trial runs of parents, in any order. Unless whole, of one with a record perhaps nothing but ``OWN_TAGS``."""
        ...

    def params(self, parents: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """All parameters of all trials of parents: (run_id, key, value)."""
        ...

    def metrics(self, parents: Sequence[str], keys: Sequence[str]) -> Iterator[Value]:
        """All values of the keys for all trials of parents."""
        ...


@contextmanager
def open_store(tracking_uri: str) -> Iterator[Store]:
    """The reader that fits the URI. Raises InputError when there is nothing that can be read."""
    kind = tracking_uri.partition(":")[0].partition("+")[0]
    if "://" not in tracking_uri and kind != "sqlite":
        kinds = "sqlite:///FILE, postgresql://... or the address of a server"
        raise InputError(f"--tracking-uri {tracking_uri}: expected {kinds}")
    if kind == "sqlite":
        with _sqlite(tracking_uri) as store:
            yield store
    elif kind in ("postgresql", "postgres"):
        with _postgresql(tracking_uri) as store:
            yield store
    else:
        yield _client(tracking_uri)


def logged_in(store: Store, tracking_uri: str) -> list[Run]:
    """All sweeps of a store, the newest first. Raises InputError where there is none."""
    sweeps = store.sweeps()
    if not sweeps:
        raise InputError(
            f"--tracking-uri {without_password(tracking_uri)}: no sweep is logged there yet; run one first "
            "(python sweeps/k_grid.py --profile demo)"
        )
    return sweeps


def finite_or_inf(value: float, is_nan: bool = False) -> float:
    """MLflow stores NaN as a flag and infinities as the largest double: undo both."""
    if is_nan:
        return nan
    return copysign(inf, value) if abs(value) >= sys.float_info.max else value


class SqlStore:
    """Reads MLflow's tables over a read-only connection; mark: how its driver writes a value in a statement."""

    _RUNS = (
        " join runs r on r.run_uuid = w.run_uuid and r.lifecycle_stage = 'active'"
        " join experiments e on e.experiment_id = r.experiment_id and e.lifecycle_stage = 'active'"
    )

    def __init__(self, connection: Any, mark: str = "?") -> None:
        self._db, self._mark = connection, mark

    def sweeps(self, role: str = "sweep") -> list[Run]:
        heads = self._ask(
            "select r.run_uuid, r.name, r.status, r.start_time, r.artifact_uri from tags w" + self._RUNS +
            " where w.key = {} and w.value = {}",
            ("role", role),
        )  # fmt: skip
        runs = [
            Run(run, name or "", status, start or 0, {}, {}, artifacts=place or "")
            for run, name, status, start, place in heads
        ]
        return sorted(self._whole(runs), key=lambda run: -run.start_ms)

    def children(self, parents: Sequence[str], whole: bool = False) -> Iterator[Run]:
        picked = ", ".join(f"t{i}.value" for i in range(len(OWN_TAGS)))
        joined = "".join(
            f" left join tags t{i} on t{i}.run_uuid = r.run_uuid and t{i}.key = '{key}'"
            for i, key in enumerate(OWN_TAGS)
        )
        bare: list[Run] = []
        for some in _pieces(parents, _AT_ONCE):
            rows = self._ask(
                f"select r.run_uuid, r.name, r.status, r.start_time, w.value, {picked} from tags w{self._RUNS}{joined}"
                f" where w.key = {{}} and w.value in ({self._marks(some)})",
                (PARENT_TAG, *some),
            )
            for run, name, status, start, parent, *texts in rows:
                tags = {key: text for key, text in zip(OWN_TAGS, texts, strict=True) if text is not None}
                found = Run(run, name or "", status, start or 0, tags, {}, parent)
                if "record" in tags and not whole:
                    yield found
                else:
                    bare.append(found)
        yield from self._whole(bare)

    def params(self, parents: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        for some in _pieces(parents, _AT_ONCE):
            yield from self._ask(
                "select p.run_uuid, p.key, p.value from tags w" + self._RUNS + " join params p on p.run_uuid ="
                f" w.run_uuid where w.key = {{}} and w.value in ({self._marks(some)})",
                (PARENT_TAG, *some),
            )

    def metrics(self, parents: Sequence[str], keys: Sequence[str]) -> Iterator[Value]:
        for some in _pieces(parents, _AT_ONCE) if keys else ():
            rows = self._ask(
                "select m.run_uuid, m.key, m.step, m.timestamp, m.value, m.is_nan from tags w" + self._RUNS +
                f" join metrics m on m.run_uuid = w.run_uuid and m.key in ({self._marks(keys)})"
                f" where w.key = {{}} and w.value in ({self._marks(some)})",
                (*keys, PARENT_TAG, *some),
            )  # fmt: skip
            for run, key, step, time, value, is_nan in rows:
                yield run, key, step, time, finite_or_inf(value, is_nan)

    def _whole(self, runs: Sequence[Run]) -> Iterator[Run]:
        """The runs with all of their tags and parameters."""
        for some in _pieces(runs, _AT_ONCE):
            ids = [run.run_id for run in some]
            facts: dict[str, tuple[dict[str, str], dict[str, str]]] = {run: ({}, {}) for run in ids}
            for index, table in enumerate(("tags", "params")):
                wanted = f"select run_uuid, key, value from {table} where run_uuid in ({self._marks(ids)})"
                for run_id, key, text in self._ask(wanted, ids):
                    facts[run_id][index][key] = text
            for run in some:
                tags, params = facts[run.run_id]
                yield replace(run, tags=tags, params=params)

    def _marks(self, values: Sequence[Any]) -> str:
        return ",".join(["{}"] * len(values))

    def _ask(self, statement: str, values: Sequence[Any]) -> Iterator[Any]:
        cursor = self._db.cursor()
        cursor.execute(statement.replace("{}", self._mark), tuple(values))
        while rows := cursor.fetchmany(2000):
            yield from rows


@contextmanager
def _sqlite(uri: str) -> Iterator[SqlStore]:
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


@contextmanager
def _postgresql(uri: str) -> Iterator[SqlStore]:
    import sqlalchemy  # comes with mlflow; it finds whichever driver the address or the machine has

    said = f"--tracking-uri {without_password(uri)}"
    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{said}: its driver {error.name} is not installed; pip install 'psycopg[binary]' and give the address as "
            "postgresql+psycopg://..."
        ) from error
    except sqlalchemy.exc.ArgumentError as error:
        raise InputError(f"{said}: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE") from error
    try:
        # One snapshot for all statements, in a transaction that may not write.
        with engine.connect().execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        ) as connection:
            connection.execute(sqlalchemy.text("select 1"))
            yield SqlStore(connection.connection.dbapi_connection, "%s")
    except InputError:
        raise
    except Exception as error:  # drivers raise their own families
        if isinstance(error, sqlalchemy.exc.DBAPIError) or type(error).__module__.startswith("psycopg"):
            text = first_line(error)
            if "does not exist" in text and "relation" in text or "column" in text:
                raise InputError(f"{said}: this database is not an MLflow 3 store ({text}); name the store") from error
            raise InputError(f"{said}: PostgreSQL cannot be read ({text})") from error
        raise
    finally:
        engine.dispose()


def without_password(uri: str) -> str:
    """The address as it may be shown."""
    try:
        secret = urlsplit(uri).password
    except ValueError as error:
        raise InputError(f"--tracking-uri {uri.rpartition('@')[2]}: no address ({first_line(error)})") from None
    return uri.replace(f":{secret}@", ":***@") if secret else uri


class ClientStore:
    """Reads through the MLflow client: a tracking server, or a database that it reaches."""

    def __init__(self, client: Any, problem: str) -> None:
        self._client = client
        self._problem = problem

    def sweeps(self, role: str = "sweep") -> list[Run]:
        return sorted(self._search(f"tags.role = '{role}'"), key=lambda run: -run.start_ms)

    def children(self, parents: Sequence[str], whole: bool = False) -> Iterator[Run]:
        for parent in parents:
            yield from self._search(f"tags.`{PARENT_TAG}` = '{parent}'")

    def params(self, parents: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        for run in self.children(parents):
            for key, value in run.params.items():
                yield run.run_id, key, value

    def metrics(self, parents: Sequence[str], keys: Sequence[str]) -> Iterator[Value]:
        with self._one_line():
            for run in self.children(parents) if keys else ():
                for key in keys:
                    for m in self._client.get_metric_history(run.run_id, key):
                        yield run.run_id, key, m.step, m.timestamp, finite_or_inf(m.value)

    def _search(self, filter_string: str) -> list[Run]:
        with self._one_line():
            experiments = [e.experiment_id for e in _pages(self._client.search_experiments)]
            runs = _pages(
                self._client.search_runs, experiment_ids=experiments, filter_string=filter_string, max_results=1000
            )
            return [
                Run(
                    r.info.run_id,
                    r.info.run_name or "",
                    r.info.status,
                    r.info.start_time or 0,
                    r.data.tags,
                    r.data.params,
                    r.data.tags.get(PARENT_TAG, ""),
                    r.info.artifact_uri or "",
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
            raise InputError(f"{self._problem} ({first_line(error)})") from error


def _pieces(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _pages(call: Any, **arguments: Any) -> Iterable[Any]:
    token = None
    while True:
        page = call(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _client(uri: str) -> ClientStore:
    problem = f"--tracking-uri {without_password(uri)}: this MLflow store cannot be read"
    if uri.startswith(("http://", "https://")):
        try:  # one quick question first: the client itself retries a dead server for minutes
            parts = urlsplit(uri)
            server = parts._replace(
                netloc=parts.netloc.rpartition("@")[2]
            ).geturl()  # the client takes care of the login
            urllib.request.urlopen(server.rstrip("/") + "/health", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answered; whether it lets us in is the client's business
        except (OSError, ValueError, HTTPException) as error:
            raise InputError(
                f"--tracking-uri {without_password(uri)}: no MLflow server answers there ({first_line(error)}); "
                "is it running, and the address right?"
            ) from error
    from mlflow.tracking import MlflowClient  # 3 s of import that the SQL path does not need

    try:
        return ClientStore(MlflowClient(tracking_uri=uri), problem)
    except Exception as error:
        raise InputError(f"{problem} ({first_line(error).replace(uri, without_password(uri))})") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    text = str(getattr(error, "reason", "") or error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
