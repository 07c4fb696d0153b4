"""The daily sheet: what every trial did on one day, running and stopped ones included, as Markdown and CSV.

A trial is on the sheet of a day on which it finished an epoch or was measured, or on which it started and is still
running: a run that has said nothing for two days was killed and never resumed, whatever MLflow calls it. Its hours are
those of that day's epochs, so that sheets add up.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import date as Date
from datetime import datetime as Datetime
from typing import Any

from analysis.frames import record_of
from analysis.readers import Run, logged_in, open_store
from analysis.words import words_of
from trainables.record import InputError

COLUMNS = ("日期", "任务ID", "输入/配置", "产出", "判定", "GPUh", "备注")
_ACTIVITY = ("val_drop", "epoch_s", "cpu_s", "workers", "gpus")  # every epoch logs one of the first three
_CONFIG = ("T", "beta", "gamma", "rho", "bits_w", "bits_a", "keep_list", "seed")
_TOLD = {*_CONFIG, "keep", "combo"}  # what a trial has of its own is said beside these
_SILENT_MS = 2 * 24 * 3600 * 1000
_SAID = {"RUNNING": "running", "SILENT": "silent for days", "KILLED": "interrupted", "FAILED": "failed"}


@dataclass(frozen=True)
class Entry:
    """One line of the sheet, as text in the order of COLUMNS. gpu_h says "(CPU)" where no accelerator was used."""

    date: str
    task: str
    config: str
    output: str
    verdict: str
    gpu_h: str
    notes: str


@dataclass(frozen=True)
class Sheet:
    """The lines of one day in the order in which the trials started."""

    date: Date
    entries: tuple[Entry, ...]


def parse_date(text: str) -> Date:
    """InputError for what is no day."""
    try:
        return Datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise InputError(f"--date {text!r}: no such day, expected YYYY-MM-DD, e.g. 2026-03-31") from None


def compute(tracking_uri: str, day: Date) -> Sheet:
    """The sheet of a day, in this machine's time zone.

    Raises:
        InputError: the store cannot be read, is empty, or has nothing of that day.
    """
    found: list[tuple[int, Entry]] = []
    days: set[Date] = set()
    with open_store(tracking_uri) as store:
        for parent in logged_in(store, tracking_uri):
            runs = list(store.children([parent.run_id], whole=True))
            points: dict[str, list[tuple[str, int, int, float]]] = {run.run_id: [] for run in runs}
            for run_id, key, step, time, value in store.metrics([parent.run_id], _ACTIVITY):
                points[run_id].append((key, step, time, value))
            records = {run.run_id: record_of(run) or {} for run in runs}
            for run in runs:
                active = _days(run, records[run.run_id], points[run.run_id])
                days |= active
                if day in active:
                    spent, gpu = _hours(points[run.run_id], day)
                    said = replace(run, status="SILENT") if _silent(run, points[run.run_id]) else run
                    found.append((run.start_ms, _entry(day, parent, said, records[run.run_id], spent, gpu)))
    if not found:
        near = ", ".join(str(one) for one in sorted(days)[-3:])
        raise InputError(f"--date {day}: nothing ran on that day; the last days with runs are {near or 'none'}")
    return Sheet(day, tuple(entry for _, entry in sorted(found, key=lambda pair: (pair[0], astuple(pair[1])))))


def markdown(sheet: Sheet) -> str:
    """As GitHub Markdown, ending in a newline."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for entry in sheet.entries:
        cells = (" ".join(cell.replace("|", "\\|").split()) for cell in astuple(entry))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def csv_text(sheet: Sheet) -> str:
    """As CSV; the mark at its start tells spreadsheets that it is UTF-8."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(astuple(entry) for entry in sheet.entries)
    return "\ufeff" + text.getvalue()


def _days(run: Run, record: Mapping[str, Any], points: Sequence[tuple[str, int, int, float]]) -> set[Date]:
    days = {_day(time) for _, _, time, _ in points}
    if record.get("datetime"):
        days.add(Datetime.fromisoformat(str(record["datetime"])).astimezone().date())
    if run.status == "RUNNING":
        days |= {_day(run.start_ms)} | (set() if _silent(run, points) else {Date.today()})
    return days or {_day(run.start_ms)}


def _silent(run: Run, points: Sequence[tuple[str, int, int, float]]) -> bool:
    heard = max([run.start_ms, *(time for _, _, time, _ in points)])
    return run.status == "RUNNING" and Datetime.now().timestamp() * 1000 - heard > _SILENT_MS


def _day(ms: int) -> Date:
    return Datetime.fromtimestamp(ms / 1000).date()


def _hours(points: Sequence[tuple[str, int, int, float]], day: Date) -> tuple[float, bool]:
    """As in the records: by the clock of as many accelerators as an epoch had, else of the CPU; and which it is."""
    spent: dict[str, dict[int, float]] = {key: {} for key in _ACTIVITY}
    for key, step, time, value in points:
        if _day(time) == day:
            spent[key][step] = value
    gpu = any(key == "gpus" for key, *_ in points)
    if gpu:
        return sum(spent["epoch_s"].get(step, 0.0) * cards for step, cards in spent["gpus"].items()) / 3600, gpu
    clock = sum(seconds * spent["workers"].get(step, 1) for step, seconds in spent["epoch_s"].items())
    return (sum(spent["cpu_s"].values()) if spent["cpu_s"] else clock) / 3600, gpu


def _entry(day: Date, parent: Run, run: Run, record: Mapping[str, Any], hours: float, gpu: bool) -> Entry:
    # What a record leaves empty the trial had no use for, whatever the settings say: rounding alone has no temperature.
    settings = {key: value for key, value in run.params.items() if not (record and key in _CONFIG)}
    known = {**settings, **run.tags, **{key: value for key, value in record.items() if value is not None}}
    own = [key for key, value in settings.items() if parent.params.get(key, value) != value and key not in _TOLD]
    config = ", ".join([parent.name, *(f"{key}={known[key]}" for key in (*_CONFIG, *own) if key in known)])
    chosen = " (chosen)" if parent.tags.get("chosen") == run.name else ""
    return Entry(
        date=str(day),
        task=str(known.get("task_id", "")),
        config=f"{run.name}{chosen}: {config}",
        output="; ".join(_outputs(known, record)),
        verdict=str(record.get("verdict") or _SAID.get(run.status, "not measured")),
        gpu_h=f"{hours:.3f}" if gpu else f"{hours:.3f} (CPU)",
        notes="; ".join(str(text) for key in ("stop_reason", "verdict_detail", "notes") if (text := known.get(key))),
    )


def _outputs(known: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    """The file that the trial leaves, and its main numbers."""
    words = words_of(known.get("domain"))
    if record and known.get("saves"):
        yield str(known["saves"])
    if record.get("drop") is not None:
        low, high = record.get("drop_lo"), record.get("drop_hi")
        interval = "" if low is None or high is None else f" [{100 * low:.2f}, {100 * high:.2f}]"
        yield f"drop {100 * record['drop']:.2f} %{interval}"
    if record.get("t_pair_p50_ms") is not None:
        yield f"p50 {words.per_ms * record['t_pair_p50_ms']:.3g} {words.time}"
    if record.get("size_MB") is not None:
        yield f"{record['size_MB']:.3g} MB"
