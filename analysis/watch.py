"""A long sweep on one screen, from another terminal: what runs, what stopped and why, the best so far, what is left.

Read from MLflow alone, so that it works from any machine that reaches the server and disturbs nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from analysis.readers import Run, logged_in, open_store
from trainables.record import InputError

_KEYS = ("val_drop", "epoch_s")


@dataclass(frozen=True)
class Running:
    """A trial at work: its last epoch, lowest drop (None before the first) and the mean seconds of an epoch."""

    name: str
    epoch: int
    best: float | None
    epoch_s: float | None


@dataclass(frozen=True)
class View:
    """The sweep as MLflow knows it. status: of its own run. ended: trials by why they ended. verdicts: of the measured.
    best: name and lowest validation drop so far. hours: of epochs, by the clock. left_s: (at most) of the running ones.
    """

    name: str
    status: str
    running: tuple[Running, ...]
    ended: Mapping[str, int]
    verdicts: Mapping[str, str]
    best: tuple[str, float] | None
    hours: float
    left_s: float | None


def look(tracking_uri: str, sweep: str) -> View:
    """The sweep called `sweep` now, of equal names the newest; InputError for one that is not there."""
    with open_store(tracking_uri) as store:
        logged = logged_in(store, tracking_uri)
        parent = next((run for run in logged if sweep in (run.name, run.run_id)), None)
        if parent is None:
            known = ", ".join(dict.fromkeys(run.name for run in logged))
            raise InputError(f"--sweep {sweep!r} is not there yet; known: {known}")
        trials = [run for run in store.children([parent.run_id], whole=True) if run.tags.get("role") == "trial"]
        points: dict[str, dict[str, dict[int, float]]] = {run.run_id: {key: {} for key in _KEYS} for run in trials}
        for run_id, key, step, _, value in store.metrics([parent.run_id], _KEYS):
            if run_id in points:
                points[run_id][key][step] = value
    at_work = [run for run in trials if run.status == "RUNNING" and "stop_reason" not in run.tags]
    running = tuple(_running(run, points[run.run_id]) for run in at_work)
    drops = [(min(found), run.name) for run in trials if (found := _finite(points[run.run_id]["val_drop"]))]
    epochs = parent.params.get("epochs", "")
    left = [one.epoch_s * (int(epochs) - one.epoch) for one in running if one.epoch_s and epochs.isdigit()]
    return View(
        name=parent.name,
        status=parent.status,
        running=running,
        ended=Counter(_why(run) for run in trials if run not in at_work),
        verdicts={run.name: run.tags["verdict"] for run in trials if "verdict" in run.tags},
        best=(min(drops)[1], min(drops)[0]) if drops else None,
        hours=sum(sum(_finite(of["epoch_s"])) for of in points.values()) / 3600,
        left_s=max(left, default=None),
    )


def lines(view: View) -> list[str]:
    """The screen, line by line."""
    yet = " yet" if view.status == "RUNNING" else ""
    ended = ", ".join(f"{count} {why}" for why, count in sorted(view.ended.items())) or "none"
    passed = Counter(view.verdicts.values())
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(passed.items())) or f"none{yet}"
    left = "" if view.left_s is None else f"; those that run need at most {view.left_s / 60:.0f} min"
    said = [
        f"{view.name}: {view.status.lower()}; {len(view.running)} running, {sum(view.ended.values())} ended ({ended})",
        f"verdicts: {verdicts}; {view.hours:.2f} hours of epochs{left}",
        f"best so far: {view.best[0]}, validation drop {100 * view.best[1]:.2f} %" if view.best else f"no epoch{yet}",
    ]
    for one in sorted(view.running, key=lambda one: one.best if one.best is not None else float("inf")):
        best = "-" if one.best is None else f"{100 * one.best:.2f} %"
        pace = "" if one.epoch_s is None else f", {one.epoch_s:.1f} s an epoch"
        said.append(f"  {one.name}: epoch {one.epoch}, best drop {best}{pace}")
    return said


def follow(tracking_uri: str, sweep: str, every_s: float, command: str | None, show: Callable[[View], None]) -> None:
    """Look again and again until the sweep has ended. command: run by the shell on every new verdict and every failure,
    with SLIMSWEEP_TRIAL and SLIMSWEEP_VERDICT (pass, fail, n/a) set; one that fails is said and disturbs nothing.

    InputError where the first look finds no sweep. A store that is away later is said, and looked at again.
    """
    told: set[str] = set()
    first = True
    while True:
        try:
            view = look(tracking_uri, sweep)
        except InputError as error:
            if first:
                raise
            print(f"{time.strftime('%H:%M:%S')} {error}; looking again in {every_s:g} s", file=sys.stderr)
            time.sleep(every_s)
            continue
        show(view)
        for trial, verdict in view.verdicts.items():
            if trial not in told and command and not first:
                _tell(command, trial, verdict)
            told.add(trial)
        if view.status != "RUNNING":
            return
        first = False
        time.sleep(every_s)


def _tell(command: str, trial: str, verdict: str) -> None:
    known = {**os.environ, "SLIMSWEEP_TRIAL": trial, "SLIMSWEEP_VERDICT": verdict}
    code = subprocess.run(command, shell=True, env=known, check=False).returncode
    if code:
        print(f"the command for {trial} ended with exit code {code}")


def _running(run: Run, points: Mapping[str, Mapping[int, float]]) -> Running:
    drops, paces = _finite(points["val_drop"]), _finite(points["epoch_s"])
    last = max((step for of in points.values() for step in of), default=0)
    return Running(run.name, last, min(drops, default=None), sum(paces) / len(paces) if paces else None)


def _finite(values: Mapping[int, float]) -> Sequence[float]:
    return [value for value in values.values() if abs(value) < float("inf")]


def _why(run: Run) -> str:
    if run.status == "FAILED":
        return "failed"
    return run.tags.get("stop_reason") or run.status.lower()
