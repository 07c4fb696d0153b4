"""MLflow from the driver's side: check the address, start the process that mirrors the journal, wait for it.

The writing itself is in `sweeps/mlflow_writer.py`, a process of its own that tails the journal: MLflow
takes seconds to import and tens of milliseconds of CPU per run, which the driver would lose to its
scheduling. The journal is the truth, so whatever that process did not get done is done when it is next
started. Importing this module is cheap.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import http.client
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from engines.errors import InputError

EXPERIMENT = "slimsweep"
CURSOR, LOG = "tracked.json", "tracking.log"
URI = "SLIMSWEEP_TRACKING_URI"
_KINDS = "sqlite:///FILE, http://HOST:PORT, postgresql://... or mysql://..."
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

# Of a URL's query, of libpq (`password='...' sslpassword=...`), of ODBC (`PWD={...};`, the same encoded within a URL).
_SECRET = re.compile(
    r"""(?ix) ((?:password|passwd|pwd|token|secret))
    (?: (=) (?: '(?:\\.|[^'\\\n])*' | "[^"\n]*" | \{(?:\}\}|[^}\n])*\} | (?:(?!;\s*[\w\ ]+=|['"](?:\W|$))[^\s&])+ )
      | (%3D) (?: %7B.*?%7D(?!%7D) | (?:(?!%3B|['"](?:\W|$))[^\s&])+ ) )"""
)

# What keeps MLflow quiet, at home, and from hiding an outage: the writer itself retries, and looks first, and a
# campaign is done all the same.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "OPENBLAS_NUM_THREADS": "1",
}


def default_uri(storage: str | Path) -> str:
    """The tracking address used when none is given: a sqlite file in the storage folder."""
    return f"sqlite:///{Path(storage).resolve() / 'mlflow.db'}"


def masked(text: str) -> str:
    """The text with the passwords of its addresses hidden, for screens, files and MLflow."""
    text = re.sub(r"(://[^\s/:@]*:)\S+@", r"\1***@", text)
    text = re.sub(r"(://[^\s/:@\[]*:)(?!\d+(?:[^\w@]|$))[^\n@]*@", r"\1***@", text)  # with a space, but no port
    text = re.sub(r"(https?://)[^\s/:@]+@", r"\1***@", text)
    return _SECRET.sub(r"\1\2\3***", text)


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a sqlite address, None for any other address."""
    if not uri.startswith("sqlite:"):
        return None
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not uri.startswith("sqlite:///") or not path or path == ":memory:":
        raise InputError(f"--tracking-uri {uri!r}: expected sqlite:///FILE")
    return Path(path).resolve()


def noted(uri: str) -> str:
    """The address as the mirror notes it beside the journal: the whole path of a sqlite file, no password."""
    path = sqlite_path(uri)
    return f"sqlite:///{path}" if path else masked(uri)


def lock_of(database: Path) -> Path:
    """The file that a mirror locks while MLflow makes or changes the tables of a sqlite file."""
    return database.with_name(f"{database.name}.lock")


def check_reachable(uri: str, timeout_s: float = 5.0) -> None:
    """Raise InputError (one line) when no MLflow store answers at `uri`; takes at most about `timeout_s`.

    Only what can be seen without importing MLflow: a sqlite file that can be written, is not locked and has the tables
    of this MLflow's version, an MLflow server that lets us read, a database that listens.
    """
    path = sqlite_path(uri)
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise InputError(f"--tracking-uri {uri.rpartition('@')[2]}: no address ({error})") from None
    kind = parts.scheme.partition("+")[0]
    if path:
        _check_file(path)
        _check_tables(path, timeout_s)
    elif kind in ("http", "https"):
        try:
            whole = bool(parts.hostname) and parts.port != 0
        except ValueError:
            whole = False
        if not whole:
            raise InputError(f"--tracking-uri {uri!r}: expected http://HOST:PORT")
        _check_server(uri, timeout_s)
    elif kind in _PORTS:
        try:
            address = (parts.hostname or "localhost", parts.port or _PORTS[kind])
            socket.create_connection(address, timeout_s).close()
        except (OSError, ValueError) as error:
            where = f"{kind}://{parts.hostname}"  # the whole address may hold a password
            raise InputError(f"{where}: no database answers ({error}); start it, or give --tracking-uri") from None
    else:
        raise InputError(f"--tracking-uri {uri!r}: expected {_KINDS}")


def _check_file(path: Path) -> None:
    try:
        here = next(folder for folder in path.parents if folder.exists())
        if path.exists():
            with path.open("r+b") as file:
                start = file.read(16)
            if start and start != b"SQLite format 3\0":
                raise InputError(f"{path}: not a sqlite database; give another --tracking-uri")
        elif not here.is_dir() or not os.access(here, os.W_OK):
            raise InputError(f"{here}: cannot be written, expected a folder for the MLflow database (see --storage)")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a writable file for the MLflow database") from None


def _check_tables(path: Path, timeout_s: float) -> None:
    """MLflow refuses a store of another version, which the sweep would only see as an outage that never ends."""
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with contextlib.suppress(FileNotFoundError), lock_of(path).open() as migrating:
            fcntl.flock(migrating, fcntl.LOCK_SH)  # another sweep may be making the tables just now
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=timeout_s)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            found = database.execute("select version_num from alembic_version").fetchone() if tables else None
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise InputError(
                f"{path}: another program has locked the database for over {timeout_s:g} s; end it, or give another "
                "--tracking-uri"
            ) from None
        raise InputError(f"{path}: not a database of MLflow ({error}); give another --tracking-uri") from None
    known, newest = _revisions()
    if found and newest and found[0] not in newest:
        version, uri = importlib.metadata.version("mlflow"), f"sqlite:///{path}"
        how = f"back it up, then `mlflow db upgrade {uri}`" if found[0] in known else "install the MLflow that made it"
        age = "an older" if found[0] in known else "another"
        raise InputError(
            f"{path}: made by {age} version of MLflow than {version} (its tables are of revision {found[0]}); {how}, "
            "or give another --tracking-uri"
        )


def _revisions() -> tuple[set[str], set[str]]:
    """All revisions of its tables that the installed MLflow knows, and the newest; empty where it lies otherwise.

    Asking MLflow itself would import it, which takes seconds.
    """
    spec = importlib.util.find_spec("mlflow")
    places = (spec.submodule_search_locations if spec else None) or []
    files = [file for place in places for file in Path(place).glob("store/db_migrations/versions/*.py")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    known = {found[1] for text in texts if (found := re.search(r'^revision = "(\w+)"', text, re.MULTILINE))}
    below = {found[1] for text in texts if (found := re.search(r'^down_revision = "(\w+)"', text, re.MULTILINE))}
    return known, known - below


def _check_server(uri: str, timeout_s: float) -> None:
    parts = urlsplit(uri)
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    url = f"{server.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT}"
    request = urllib.request.Request(url)
    user, token = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_TOKEN")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if parts.username:
        user, password = unquote(parts.username), unquote(parts.password or "")
    if user:
        pair = f"{user}:{password}"
        request.add_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    elif token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            known = "experiment" in json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise InputError(
                f"{uri}: the MLflow server refuses the login ({error.code}); "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from None
        known = b"RESOURCE_DOES_NOT_EXIST" in error.read(10_000)
    except (ValueError, TypeError, http.client.HTTPException):
        known = False  # no JSON, no HTTP
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"{uri}: no MLflow server answers ({reason}); start one, or leave out --tracking-uri"
        ) from None
    if not known:
        raise InputError(
            f"{uri}: something answers, but it is no MLflow server; give its address, or leave out --tracking-uri"
        )


class Tracker:
    """The mirror process of one sweep. Nothing it meets disturbs the sweep; `problem` says what it met last.

    It ends by itself, having written what it can, when the driver closes it or dies. Its own output goes to
    tracking.log in the sweep folder.
    """

    def __init__(self, journal_path: str | Path, tracking_uri: str) -> None:
        """`journal_path`: the journal.jsonl to mirror. `tracking_uri`: where MLflow keeps its runs."""
        self.journal = Path(journal_path).resolve()
        path = sqlite_path(tracking_uri)
        self.uri = f"sqlite:///{path}" if path else tracking_uri
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; returns at once. The journal need not have any line yet."""
        folder = self.journal.parent
        database = sqlite_path(self.uri)
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = ENVIRONMENT | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths), URI: self.uri}
        with (folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sweeps.mlflow_writer", str(self.journal)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the driver, which then closes us in order
            )

    @property
    def pid(self) -> int | None:
        """Process id of the mirror while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def problem(self) -> str | None:
        """One line on what is not in MLflow and why, None when nothing is known to be amiss."""
        return self._cursor().get("problem")

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything now in the journal is in MLflow; False (see `problem`) when it is not by
        then.

        A mirror that died is started again. What is missing stays in the journal and is written by the next
        start.
        """
        size, deadline = self.journal.stat().st_size, time.monotonic() + timeout_s
        if self.pid is None:
            self.start()
        self._send(b"flush\n")
        while True:
            cursor = self._cursor()
            if cursor.get("offset", 0) >= size:
                return cursor.get("problem") is None
            if time.monotonic() >= deadline or self.pid is None:
                return False
            time.sleep(0.02)

    def close(self, timeout_s: float = 20.0) -> None:
        """Let the mirror finish and wait for its end; one that takes longer than `timeout_s` is killed.
        Idempotent.
        """
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin:
                process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _send(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # it just died: the caller sees that by its pid
            if self._process and self._process.stdin:
                self._process.stdin.write(text)
                self._process.stdin.flush()

    def _cursor(self) -> dict[str, Any]:
        """What this very process last reported: a file left by an earlier one says nothing of our events."""
        try:
            cursor = json.loads((self.journal.parent / CURSOR).read_bytes())
        except (OSError, ValueError):
            return {}
        ours = isinstance(cursor, dict) and self._process and cursor.get("pid") == self._process.pid
        return cursor if ours else {}
