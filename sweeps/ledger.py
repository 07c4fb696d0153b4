"""The sweep as the driver knows it: its folder, its journal, and the journal's state in memory, always in
step.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import InputError
from sweeps.journal import CAMPAIGN, LOCK, NAME, Journal, SweepState, TrialState, check_free, read_events
from sweeps.plan import Planned


@dataclass
class Ledger:
    """Appends to the journal and keeps `state` equal to a replay of it."""

    folder: Path
    journal: Journal
    state: SweepState
    planned: dict[str, Planned] = field(default_factory=dict)
    begun: bool = False  # whether this driver has written to the journal
    made: tuple[Path, ...] = ()  # folders that were not there before, the deepest first
    _searched: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, resume: bool) -> "Ledger":
        """Take the folder; InputError when it is held, holds a sweep (without resume) or holds none (with
        it).
        """
        _refuse(folder, resume)
        made = tuple(place for place in (folder, *folder.parents) if not place.exists())
        journal = Journal.open(folder)
        try:
            refuse_links(folder)  # now that nobody else is at work in it
        except BaseException:
            journal.close()
            raise
        path = folder / NAME
        searched = [e["search"]["params"] for e in read_events(path) if "search" in e]
        return cls(folder, journal, SweepState.replay(path), made=made, _searched=searched)

    def searched(self) -> list[dict[str, Any]]:
        """The study's parameters of all searched trials so far, in the order in which they were asked."""
        return list(self._searched)

    def abandon(self) -> None:
        """Let go of the folder, and leave nothing behind of a sweep that never began."""
        if not self.state.header:  # removed while still held: a driver that waits at the door must not lose its own
            for name in (NAME, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            for place in (self.folder / "work", self.folder, *self.made):
                with contextlib.suppress(OSError):  # it holds something, or is gone
                    place.rmdir()
        self.journal.close()

    def append(self, event: str, **fields: Any) -> None:
        """One event, on disk before it counts."""
        self.append_many([(event, fields)])

    def append_many(self, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Several events with one flush to disk."""
        self.journal.append_many(events)
        for event, fields in events:
            self.state.apply({"t": time.time(), "event": event, **fields})

    def begin(self, header: Mapping[str, Any], command: str) -> None:
        """The first line of a new sweep, or the mark of a resume."""
        self.begun = True
        if self.state.header:
            self.append("resume", command=command)
        else:
            self.append("sweep", sweep_id=uuid.uuid4().hex[:12], **header)

    def check(self, header: Mapping[str, Any]) -> None:
        """InputError when the sweep here was started with other settings."""
        refuse_changed(self.folder.name, self.state.header, header)

    def add(self, planned: Sequence[Planned]) -> None:
        """Announce trials; those the journal knows already are only remembered."""
        events = []
        for trial in planned:
            if trial.trial_id in self.planned:
                raise InputError(f"trial {trial.exp_id} stands twice in the sweep")
            self.planned[trial.trial_id] = trial
            if trial.trial_id not in self.state.trials:
                fields = {
                    "trial_id": trial.trial_id,
                    "exp_id": trial.exp_id,
                    "task_id": trial.task_id,
                    "role": trial.role,
                    "params": trial.flat,
                    "saves": trial.saves,
                }
                events.append(("trial", {**fields, **trial.tags}))
                if "search" in trial.tags:
                    self._searched.append(dict(trial.tags["search"]["params"]))
        if events:
            self.append_many(events)

    def trial(self, trial_id: str) -> TrialState:
        """What the journal says of a trial."""
        return self.state.trials[trial_id]

    def state_dir(self, trial_id: str) -> Path:
        """Where the trial keeps its own state and best weights."""
        return self.folder / "trials" / trial_id

    def best_weights(self, trial_id: str) -> Path | None:
        """The trial's best checkpoint, None where it has none."""
        path = self.state_dir(trial_id) / "best.pth"
        return path if path.is_file() else None


def inspect(folder: Path, resume: bool, header: Mapping[str, Any]) -> SweepState | None:
    """The sweep that a resume would go on with; InputErrors as of `Ledger.open` and `Ledger.check`. Touches nothing."""
    _refuse(folder, resume)
    check_free(folder)
    refuse_links(folder)
    if not resume:
        return None
    state = SweepState.replay(folder / NAME)
    refuse_changed(folder.name, state.header, header)
    return state


def campaign_began(folder: Path) -> str:
    """When the campaign of a folder began, in seconds of Unix time, which tells it from others of its name; "" where
    the folder is no campaign's.
    """
    first = next(read_events(folder / CAMPAIGN), None) if (folder / CAMPAIGN).is_file() else None
    return f"{first['t']:.6f}" if first else ""


def sweeps_in(storage: Path) -> Iterator[tuple[Path, SweepState]]:
    """Folder and state of every sweep in a storage, those of campaigns included; a damaged journal is passed over."""
    for path in sorted([*storage.glob(f"*/{NAME}"), *storage.glob(f"*/*/{NAME}")]):
        with contextlib.suppress(InputError):
            yield path.parent, SweepState.replay(path)


def _refuse(folder: Path, resume: bool) -> None:
    known = (folder / NAME).is_file() and (folder / NAME).stat().st_size > 0
    if resume and not known:
        others = sorted(path.parent.name for path in folder.parent.glob(f"*/{NAME}"))
        there = f"; there are {', '.join(others)}" if others else ""
        raise InputError(
            f"--resume: no sweep {folder.name} in {folder.parent}{there}; start it without --resume, "
            "or name the --storage that holds it"
        )
    if known and not resume:
        raise InputError(f"{folder} already holds this sweep: add --resume to go on with it, or name another --storage")


def refuse_links(folder: Path, below: bool = True) -> None:
    """InputError where a link lies in a folder to go on in: a sweep makes none, and would write through others'."""
    places = [folder] if folder.is_dir() else []
    while places:
        with os.scandir(places.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise InputError(f"{entry.path}: a symbolic link, which no sweep makes; remove it")
                if below and entry.is_dir():
                    places.append(Path(entry.path))


def refuse_changed(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError that names every setting in which a resumed sweep differs from what was started."""
    if before.get("config_hash") == now["config_hash"]:
        return
    old, new = dict(before.get("settings", {})), dict(now["settings"])
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    said = ", ".join(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in keys)
    raise InputError(
        f"--resume: {name} was started with other settings ({said or 'the script changed'}); "
        "give the same ones, or start anew in another --storage"
    )
