"""Is a folder of deliverables whole, unchanged, and what MLflow says? Nothing in the folder is trusted.

Names must be plain, links are not followed, and which store to ask is said by the caller, not by the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.manifest import CAMPAIGN_ROLE, MANIFEST_TAG, NAME, REPORT, TABLE, Manifest, Row, may_list
from analysis.readers import Run, Store, open_store
from trainables.gates import Verdict, judge_any
from trainables.record import FIELDS, INPUTS, InputError, Record, Value, read_csv

WORKLOAD = "workload.yaml"
BESIDE = frozenset({"stage", "run_id"})  # columns that the table has beside the record
SHORT = "demo"  # the profile that is not meant to meet the hard lines


@dataclass(frozen=True)
class Found:
    """problems: one line each, empty for a folder that is as it should be. notes: what is worth knowing besides."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    summary: str


def default_uri(folder: Path) -> str:
    """The store of the storage in which a campaign wrote the folder; InputError where it lies elsewhere now."""
    path = folder.resolve().parent.parent / "mlflow.db"
    if not path.is_file():
        raise InputError(f"{folder}: there is no {path} to compare it with; name the store with --tracking-uri URI")
    return f"sqlite:///{path}"


def check(folder: Path, tracking_uri: str | None = None) -> Found:
    """Check a folder of deliverables. tracking_uri: default as of `default_uri`.

    Raises:
        InputError: no folder, no manifest that can be read, or no store to compare with.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the deliverables of a campaign")
    if not _regular(folder / NAME):
        raise InputError(f"{folder / NAME}: no such file; expected the deliverables of a campaign")
    manifest, digest = Manifest.read(folder / NAME), _sha256(folder / NAME)
    uri = tracking_uri or default_uri(folder)
    problems = [*_files(folder, manifest), *_complete(manifest)]
    notes: list[str] = []
    records: dict[str, Record] = {}
    if not any(TABLE in problem for problem in problems):  # what is not the written table is not read
        try:
            records = _by_run(_table(folder / TABLE), problems)
            problems += _workload(folder, manifest, records)
            with open_store(uri) as store:
                problems += _same_as_mlflow(store, manifest, records)
                said = _logged_manifests(store, manifest)
        except _Unusable as error:
            problems.append(str(error))
        else:
            lines = list(_lines(manifest, records))
            problems += [text for text, serious in lines if serious]
            if not said:
                notes.append(f"{NAME} is not in MLflow, where a campaign's end puts it: its lines are believed")
            elif digest not in said:
                later = "one whose stages have run since logs it at its end, or by --resume"
                problems.append(f"{NAME}: not the one that the campaign logged to MLflow (sha256 differs; {later})")
            notes += [text for text, serious in lines if not serious]
    hard = sum(bool(row.lines) for row in manifest.tasks)
    counts = ", ".join(_count(n, what) for n, what in ((len(manifest.files), "file"), (len(records), "record")))
    counts += f", {_count(hard, 'task')} with hard lines"
    return Found(tuple(problems), tuple(notes), f"{manifest.campaign}: {counts}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


class _Unusable(Exception):
    """The table cannot be read."""


def _regular(path: Path) -> bool:
    """Whether a file itself lies there: no link, folder or device."""
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def _files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """What is not there, not as it was, or not on the list."""
    listed = [file.file for file in manifest.files]
    for name in sorted({name for name in listed if listed.count(name) > 1}):
        yield f"{name!r}: stands twice in {NAME}"
    inside = folder / REPORT
    entered = stat.S_ISDIR(_mode(inside)) and any(name.startswith(f"{REPORT}/") for name in listed)
    for file in manifest.files:
        path = folder / file.file
        if not may_list(file.file) or file.file == NAME:
            yield f"{file.file!r}: refused, {NAME} may list plain names of files beside it and in {REPORT}/ alone"
        elif not _regular(path) or (path.parent == inside and not entered):
            yield f"{file.file}: {'refused, it is a link or no file' if os.path.lexists(path) else 'missing'}"
        elif path.stat().st_size != file.bytes:
            yield f"{file.file}: {path.stat().st_size} bytes, {NAME} says {file.bytes}"
        elif _sha256(path) != file.sha256:
            yield f"{file.file}: its content is not that of {NAME} (sha256 differs)"
    for path in sorted([*folder.iterdir(), *(inside.iterdir() if entered else ())]):
        name = path.relative_to(folder).as_posix()
        if name not in (*listed, NAME) and not (entered and path == inside):
            kind = "link" if path.is_symlink() else "file" if _regular(path) else "folder or device"
            yield f"{name!r}: a {kind} that {NAME} does not list"
    if TABLE not in listed:
        yield f"{TABLE}: {NAME} does not list it"


def _sha256(path: Path) -> str:
    # Between the look at it and here the file could have become a link.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _complete(manifest: Manifest) -> Iterator[str]:
    """What the plan wants and the campaign did not make."""
    there = {file.file for file in manifest.files}
    left_out = [row.task for row in manifest.tasks if not row.finished and not row.selected]
    if left_out:
        yield f"{len(left_out)} of the plan's {len(manifest.tasks)} tasks left out by choice: {', '.join(left_out)}"
    for row in manifest.tasks:
        if not row.finished:
            if row.selected:
                yield f"{row.task}: not done ({row.detail}); the plan wants {', '.join(row.files)}"
        else:
            reasons = {entry.partition(" (")[0]: entry.partition(" (")[2].removesuffix(")") for entry in row.missing}
            for name in row.files:
                if name not in there:
                    why = f" ({reasons[name]})" if reasons.get(name) else ""
                    yield f"{row.task}: {name} is missing{why}"


def _table(path: Path) -> list[Record]:
    try:
        with path.open(encoding="utf-8") as stream:
            header = stream.readline().strip().split(",")
        if tuple(header[: len(FIELDS)]) != FIELDS:
            raise _Unusable(f"{TABLE}: its first {len(FIELDS)} columns are not those of the record")
        return read_csv(path)
    except (InputError, ValueError, OSError) as error:
        raise _Unusable(f"{TABLE}: {error}") from error


def _by_run(records: Sequence[Record], problems: list[str]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for number, record in enumerate(records, 2):
        run_id = record.extra.get("run_id")
        if not isinstance(run_id, str):
            problems.append(f"{TABLE} row {number} ({record.exp_id}): no run_id, it was not in MLflow when written")
        elif run_id in found:
            problems.append(f"{TABLE} row {number} ({record.exp_id}): run {run_id} stands there twice")
        else:
            found[run_id] = record
    return found


def _workload(folder: Path, manifest: Manifest, records: Mapping[str, Record]) -> Iterator[str]:
    """Everything of the workload's own domain was measured on it."""
    of = next((file for file in manifest.files if file.file == WORKLOAD), None)
    if of is None:
        return
    try:
        text = (folder / WORKLOAD).read_text()
    except (OSError, ValueError):
        text = ""
    # The one line that is wanted: to parse what others wrote as YAML could take all memory.
    found = re.search(r"^workload_hash: ['\"]?(\w+)['\"]?$", text, re.MULTILINE)
    if not found:
        yield f"{WORKLOAD}: no YAML with a workload_hash"
        return
    named = found[1]
    domains = {record.domain for record in records.values() if record.extra.get("stage") == of.stage}
    for record in records.values():
        if record.domain in domains and record.workload_hash != named:
            yield f"{record.exp_id}: measured on workload {record.workload_hash}, {WORKLOAD} is {named}"


def _same_as_mlflow(store: Store, manifest: Manifest, records: Mapping[str, Record]) -> Iterator[str]:
    """Each row of the table is the run's record and metrics, and each record of the campaign is in the table."""
    named = [run for run in store.sweeps() if run.tags.get("campaign") == manifest.campaign]
    began = manifest.began
    parents = [run for run in named if not began or run.tags.get("campaign_began", began) == began]
    if not parents:
        raise InputError(
            f"campaign {manifest.campaign!r} is not in this MLflow store; name the one it was logged to with "
            "--tracking-uri URI"
        )
    seen = set()
    listed = {row.task for row in manifest.tasks}
    for parent in parents:
        runs = {run.run_id: run for run in store.children([parent.run_id], whole=True) if "record" in run.tags}
        keys = sorted({key for run_id in runs if run_id in records for key, _ in _measured(records[run_id])})
        logged: dict[tuple[str, str], tuple[int, float]] = {}
        for run_id, key, step, time, value in store.metrics([parent.run_id], keys):
            if step == 0 and time >= logged.get((run_id, key), (0, 0.0))[0]:
                logged[run_id, key] = (time, value)
        trained = (run.tags.get("task_id") for run in runs.values() if run.tags.get("role") == "trial")
        for task in sorted({task for task in trained if task} - listed):
            yield f"{task}: {parent.name} ran it, {NAME} does not list it"
        for run_id, run in runs.items():
            seen.add(run_id)
            if run_id not in records:
                yield f"{run.name} (run {run_id}): in MLflow, but not in {TABLE}"
            else:
                yield from _differences(records[run_id], run, logged)
    for run_id in records.keys() - seen:
        yield f"{records[run_id].exp_id}: run {run_id} is not in MLflow with a record"


def _logged_manifests(store: Store, manifest: Manifest) -> set[str]:
    """The hashes of manifests that MLflow has of campaigns of this name."""
    runs = [run for run in store.sweeps(CAMPAIGN_ROLE) if run.tags.get("campaign") == manifest.campaign]
    return {run.tags[MANIFEST_TAG] for run in runs if MANIFEST_TAG in run.tags}


def _measured(record: Record) -> list[tuple[str, float]]:
    """The numbers that are metrics in MLflow."""
    return [(k, v) for k, v in record.to_dict().items() if isinstance(v, int | float) and k not in INPUTS]


def _differences(record: Record, run: Run, logged: Mapping[tuple[str, str], tuple[int, float]]) -> Iterator[str]:
    if record.profile != run.tags.get("profile"):
        yield f"{record.exp_id}: profile {record.profile} in {TABLE}, {run.tags.get('profile')} in MLflow"
    row = {key: value for key, value in record.to_dict().items() if key not in BESIDE}
    there = {key: logged.get((run.run_id, key), (0, None))[1] for key, _ in _measured(record)}
    given = [(key, value) for key in INPUTS if isinstance(value := row[key], int | float)]
    there |= {key: _float(run.params.get(key)) for key, _ in given}
    try:
        whole = Record.from_json(run.tags["record"]).to_dict()
    except InputError as error:
        yield f"{record.exp_id}: the record in MLflow cannot be read ({error}; run {run.run_id})"
        whole = row
    for key in dict.fromkeys((*row, *whole)):
        value = row.get(key)
        if key in there and there[key] != value:
            yield _differs(record, key, value, there[key], run)
        elif not _same(value, whole.get(key)):
            yield _differs(record, key, value, whole.get(key), run)


def _differs(record: Record, key: str, value: Value, there: Value, run: Run) -> str:
    here, said = ("nothing" if one is None else repr(one) for one in (value, there))
    return f"{record.exp_id}: {key} is {here} in {TABLE}, {said} in MLflow (run {run.run_id})"


def _same(value: Value, there: Value) -> bool:
    """Whether the record that MLflow shows says the same; its longest texts may be cut there."""
    if isinstance(value, str) and isinstance(there, str) and there.endswith("..."):
        return value.startswith(there[:-3])
    return value == there


def _float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _lines(manifest: Manifest, records: Mapping[str, Record]) -> Iterator[tuple[str, bool]]:
    """Verdicts that the table does not bear out, and hard lines that were missed (at the short profile only a note)."""
    for record in records.values():
        if record.profile != manifest.profile:
            yield f"{record.exp_id}: profile {record.profile}, {NAME} says {manifest.profile}", True
    for row in manifest.tasks:
        if not row.finished:
            continue
        try:
            verdict = _judge(row, [records[run_id] for run_id in row.judged if run_id in records])
        except InputError as error:
            yield f"{row.task}: {error}", True
            continue
        if verdict.verdict != row.verdict:
            yield f"{row.task}: {NAME} says {row.verdict}, the table {verdict.verdict}. {verdict.detail}", True
        elif verdict.verdict == "fail":
            what, serious = ("missed its hard line", manifest.profile != SHORT) if row.lines else ("failed", True)
            yield f"{row.task}: {what}. {verdict.detail}", serious


def _judge(row: Row, records: Sequence[Record]) -> Verdict:
    """As the campaign judged: one of the trials meets all lines; without lines, what the one record itself says, or
    whether any came to an end of its own.
    """
    if not row.lines:
        if len(records) == 1 and row.verdict != "n/a":
            return Verdict(str(records[0].verdict), str(records[0].verdict_detail))
        if not records:  # nothing was measured: nobody would claim that without a reason
            return Verdict("fail" if row.verdict == "fail" else "n/a", row.detail)
        return Verdict(judge_any(records, ()).verdict, row.detail)
    return judge_any(records, [line.gate for line in row.lines])
