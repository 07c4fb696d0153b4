"""The journal of a sweep: an append-only file of events, one JSON object per line. It is the truth.

MLflow is written from it and `--resume` replays it, so a killed driver or a dead server loses nothing. A line
counts once its newline is there. Every append is with the operating system before it returns, and on disk (fsync) a
moment later: a power cut can take the last lines, which costs no work, as a trial that goes on from its state says
again what it last found, and what has no stop or record is judged or measured again. Non-finite floats, which JSON
lacks, are written as the strings "NaN", "Infinity" and "-Infinity" and read back as floats (everywhere but in
`record`, which never holds them).
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

from engines.errors import InputError

NAME, LOCK = "journal.jsonl", "journal.lock"
CAMPAIGN = "campaign.jsonl"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# What each event must carry beside `t` and `event`.
EVENTS: dict[str, frozenset[str]] = {
    "sweep": frozenset({"sweep_id", "name", "stage", "domain", "profile", "config_hash", "workload_hash"}),
    "resume": frozenset({"command"}),
    "trial": frozenset({"trial_id", "exp_id", "task_id", "role", "params", "saves"}),
    "result": frozenset({"trial_id", "epoch", "metrics"}),
    "audit": frozenset({"trial_id", "epoch", "reason", "detail"}),  # a stop that was due, and not obeyed
    "stop": frozenset({"trial_id", "epoch", "reason", "detail"}),
    "failed": frozenset({"trial_id", "error"}),
    "record": frozenset({"trial_id", "record"}),
    "file": frozenset({"path", "trial_id"}),
    "choice": frozenset({"exp_id", "why"}),
    "summary": frozenset({"metrics"}),  # numbers of the whole sweep
    "end": frozenset({"status"}),
    # of a campaign
    "campaign": frozenset({"name", "plan", "profile", "seed", "overrides"}),
    "selected": frozenset({"stages"}),
    "start": frozenset({"stage"}),
    "exit": frozenset({"stage", "code", "wall_s"}),
}


class Journal:
    """The writer's end, one per sweep or campaign, whose folder it locks until closed. For one thread at a time."""

    def __init__(self, path: Path, fd: int, lock: int) -> None:
        self.path, self._fd, self._lock = path, fd, lock
        self._unsynced, self._closing = threading.Event(), False
        self._refused: OSError | None = None
        # Waiting for the disk would hold up every trial of the sweep: an fsync takes 1 to 15 ms.
        self._syncer = threading.Thread(target=self._sync, name="journal", daemon=True)
        self._syncer.start()

    @classmethod
    def open(cls, folder: str | Path, name: str = NAME) -> Journal:
        """Open or create the journal `name` of `folder` and drop a torn last line.

        Raises InputError when another process holds the folder (names its pid and host), when the folder
        cannot be written, or when the journal is damaged before its end.
        """
        folder = Path(folder)
        lock = _lock(folder, Path(name).with_suffix(".lock").name)
        try:
            path = folder / name
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
            try:
                good = _good_bytes(path)
                if os.fstat(fd).st_size > good:
                    os.ftruncate(fd, good)
                    os.fsync(fd)
                _sync_folder(folder)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            os.close(lock)
            raise
        return cls(path, fd, lock)

    def append(self, event: str, **fields: Any) -> None:
        """Write one event; `t` is added. See `append_many` for errors."""
        self.append_many([(event, fields)])

    def append_many(self, events: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Write several events at once.

        When the disk refuses these or earlier ones, raises OSError (its errno kept, one line of message). Events whose
        line was complete by then stay; of the one that was cut nothing is left, and the journal can be appended to
        again.
        """
        t = round(time.time(), 3)
        data = b"".join(_line(t, event, fields) for event, fields in events)
        start = os.fstat(self._fd).st_size
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
            self._unsynced.set()
            if self._refused:
                raise self._refused
        except OSError as error:
            whole = start + data.rfind(b"\n", 0, written) + 1
            os.ftruncate(self._fd, whole)
            text = f"cannot write the journal ({error.strerror}): free some space, then go on with --resume"
            raise OSError(error.errno, text, str(self.path)) from error

    def _sync(self) -> None:
        last = False
        while not last:
            self._unsynced.wait()
            self._unsynced.clear()
            last = self._closing
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._refused = error  # the next append raises it

    def close(self) -> None:
        """Put everything on disk and release the folder. Closing twice is harmless."""
        if self._fd >= 0:
            self._closing = True
            self._unsynced.set()
            self._syncer.join()
            os.close(self._fd)
            os.close(self._lock)
            self._fd = self._lock = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _lock(folder: Path, name: str) -> int:
    """The folder's lock, taken. A driver that abandons its sweep removes the file: a lock on that one holds nothing."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _unwritable(folder, error.strerror) from error
        try:
            _take(lock, folder)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            if os.path.samestat(os.fstat(lock), os.stat(folder / name)):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        raise InputError(
            f"{folder} is in use by {holder}: wait for it to end or stop it, or give another --storage"
        ) from None
    except OSError as error:
        why = f"no file locks ({error.strerror}); NFS 4 has them, Lustre with -o flock"
        raise _unwritable(folder, why) from error


def check_free(folder: Path) -> None:
    """The InputErrors of `Journal.open` for a folder that cannot be written or is held; makes and changes nothing."""
    here = next(place for place in (folder, *folder.parents) if place.exists())
    if not here.is_dir() or not os.access(here, os.W_OK | os.X_OK):
        raise _unwritable(folder, os.strerror(errno.EACCES if here.is_dir() else errno.ENOTDIR))
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)  # NFS locks what is open for writing alone
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(folder / LOCK, error.strerror) from error
    try:
        _take(lock, folder)
    finally:
        os.close(lock)


def _unwritable(folder: Path, reason: str | None) -> InputError:
    return InputError(f"{folder}: {reason}; expected a folder that can be written, name another --storage")


def _sync_folder(folder: Path) -> None:
    # A new file survives a power cut only once its folder entry is on disk too.
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _line(t: float, event: str, fields: Mapping[str, Any]) -> bytes:
    missing = EVENTS[event] - fields.keys()
    if missing:
        raise TypeError(f"event {event!r} lacks {', '.join(sorted(missing))}")
    text = json.dumps(_plain({"t": t, "event": event, **fields}), separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    """JSON data with the non-finite floats as strings; numpy scalars become Python numbers."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot go into the journal: {value!r}")


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: item if key == "record" else _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value


def parse(line: bytes) -> dict[str, Any] | None:
    """The event of one line with its newline; None for a cut line, InputError for an event of another version."""
    if not line.endswith(b"\n"):
        return None
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or "event" not in data:
        return None
    if not EVENTS.get(str(data["event"]), {"?"}) <= data.keys():
        raise InputError(f"journal: event {str(data['event'])[:40]!r} is unknown or incomplete: of another version?")
    return {key: item if key == "record" else _restored(item) for key, item in data.items()}


def _scan(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The events, each with the bytes up to its end; stops at a torn tail, InputError for a torn middle."""
    end, torn = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # torn, or still being written
                return
            event = parse(line)
            if event is None:
                torn = torn or number
            elif torn:
                # Dropping everything from here on would throw away good work: a person must look.
                raise InputError(f"{path}: line {torn} is damaged, but good lines follow; "
                                 "repair it by hand, or start anew in another --storage")  # fmt: skip
            else:
                end += len(line)
                yield event, end


def _good_bytes(path: Path) -> int:
    return max((end for _, end in _scan(path)), default=0)


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """The events in order, without a torn last line; InputError without a journal or with a damaged one."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such journal; expected the folder of a sweep that was started before")
    return (event for event, _ in _scan(Path(path)))


_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._+-]{0,199}")


@dataclass
class TrialState:
    """What the journal says of one trial. `number`: its place in the plan, from 0. `results`: (epoch from 1,
    metrics), epochs strictly increasing. `stop`: epoch, reason and detail of its end; `audit`: of the stop that was due
    when the trial ran on all the same.
    """

    trial_id: str
    exp_id: str
    task_id: str
    role: str
    params: dict[str, Any]
    saves: str | None
    number: int = 0
    results: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    audit: tuple[int, str, str] | None = None
    stop: tuple[int, str, str] | None = None
    error: str | None = None
    record: dict[str, Any] | None = None

    @property
    def drops(self) -> list[float]:
        """Validation drop after each evaluation; NaN where a result has none."""
        return [metrics.get("val_drop", math.nan) for _, metrics in self.results]

    @property
    def best_drop(self) -> float:
        """The lowest finite validation drop, infinite where there is none."""
        return min((drop for drop in self.drops if math.isfinite(drop)), default=math.inf)

    @property
    def epoch(self) -> int:
        """Last epoch with a result, 0 before the first."""
        return self.results[-1][0] if self.results else 0


@dataclass
class SweepState:
    """What the journal says of the sweep. `header` is empty only for a journal cut within its first line; `chosen` is
    the exp_id of the best trial, once there is one.
    """

    header: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, TrialState] = field(default_factory=dict)
    files: dict[str, str | None] = field(default_factory=dict)
    chosen: str | None = None
    summary: dict[str, float] = field(default_factory=dict)
    ended: str | None = None

    @classmethod
    def replay(cls, path: str | Path) -> SweepState:
        """Read the journal from its start; errors as in `read_events`."""
        state = cls()
        for event in read_events(path):
            state.apply(event)
        return state

    def apply(self, event: Mapping[str, Any]) -> bool:
        """Take in one event; False when it says nothing new (an epoch or a trial that is known already)."""
        kind = event["event"]
        if kind == "sweep":
            self.header = self.header or dict(event)
        elif kind == "resume":
            self.ended = None
        elif kind == "choice":
            self.chosen = event["exp_id"]
        elif kind == "summary":
            self.summary |= event["metrics"]
        elif kind == "end":
            self.ended = event["status"]
        elif kind == "trial":
            if event["trial_id"] in self.trials:
                return False
            for name in (event["trial_id"], event["saves"]):
                if name is not None and not _PLAIN_NAME.fullmatch(str(name)):  # they become paths
                    raise InputError(f"journal: trial {event['exp_id']}: {name!r} is no plain name; it is not ours")
            names = ("trial_id", "exp_id", "task_id", "role", "params", "saves")
            self.trials[event["trial_id"]] = TrialState(
                **{name: event[name] for name in names}, number=len(self.trials)
            )
        elif kind == "file":
            self.files[event["path"]] = event["trial_id"]  # a second event: written again, perhaps of another trial
        else:
            return self._apply_to_trial(kind, event)
        return True

    def _apply_to_trial(self, kind: str, event: Mapping[str, Any]) -> bool:
        trial = self.trials.get(event["trial_id"])
        if trial is None:
            raise InputError(f"journal: {kind} of trial {event['trial_id']}, which was never announced")
        if kind == "result":
            if event["epoch"] <= trial.epoch:
                return False
            trial.results.append((event["epoch"], event["metrics"]))
        elif kind == "audit":
            trial.audit = (event["epoch"], event["reason"], event["detail"])
        elif kind == "stop":
            trial.stop = (event["epoch"], event["reason"], event["detail"])
        # A trial that failed may be trained again by --resume: then its error, and the record of what it had been
        # until then, are of the past.
        trial.error = event["error"] if kind == "failed" else trial.error if kind == "record" else None
        trial.record = event["record"] if kind == "record" else None
        return True
