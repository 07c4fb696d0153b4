"""The folder that a campaign hands over: the plan's files by their names, the table of all records, the hours, and a
manifest with hashes; at a campaign's end also its report.

Every file appears whole or not at all, and the manifest last: what it lists is there.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.manifest import FORMAT, NAME, REPORT, TABLE, File, Line, Manifest, Row, may_list
from analysis.readers import open_store
from engines.errors import InputError
from sweeps import hours
from sweeps.catalogue import Stage
from sweeps.conduct import Plan
from sweeps.hours import Account, Spans, TrialHours
from sweeps.launch import git_commit
from sweeps.ledger import campaign_began
from sweeps.outcome import Outcome
from trainables.record import Record, now, write_csv

FOLDER = "deliverables"
LEDGER = ("ledger.json", "ledger.csv")
RunIds = Mapping[tuple[str, str | None], str]  # (sweep id, trial id; None for the sweep's own run) -> run id


@dataclass(frozen=True)
class Delivered:
    """What was written. unlogged: records that MLflow does not have yet. report: the page, once it is drawn."""

    folder: Path
    manifest: Manifest
    total: Account
    stages: tuple[Account, ...]
    unlogged: int
    report: Path | None = None


def write(plan: Plan, walls: Mapping[str, Spans], held: Mapping[str, str]) -> Delivered:
    """Collect what the campaign has so far. walls: when each stage was at work, of all its starts. held: why a stage
    did not run or did not end, by stage.

    Files that an earlier call wrote and that no longer belong are removed, and so is an earlier report, which knows
    nothing of what ran since; anything else in the folder stays.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = plan.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [plan.outcome(stage) for stage in plan.stages]
    runs = run_ids(plan)
    files = [file for outcome in outcomes for file in _deliver(outcome, folder, runs)]
    records = [record for outcome in outcomes for record in _records(outcome, runs)]
    write_csv(folder / TABLE, records)
    total, stages, rows = accounts(plan, outcomes, walls)
    _put(folder / LEDGER[0], lambda path: path.write_text(json.dumps(hours.as_data(total, stages, rows), indent=1)))
    _put(folder / LEDGER[1], lambda path: path.write_text(hours.as_csv(rows)))
    files += [_described(folder / name) for name in (TABLE, *LEDGER)]
    chosen = {stage.id for stage in plan.selected}
    manifest = Manifest(
        format=FORMAT, campaign=plan.name, began=campaign_began(plan.folder), plan=plan.plan,
        profile=plan.profile, seed=plan.seed,
        git_commit=git_commit(), written=now(), files=tuple(files),
        tasks=tuple(row for outcome in outcomes for row in _rows(outcome, runs, outcome.stage.id in chosen, held)),
    )  # fmt: skip
    _sweep_out(folder, {file.file for file in files})
    _put(folder / NAME, lambda path: path.write_text(manifest.model_dump_json(indent=1)))
    return Delivered(folder, manifest, total, stages, sum("run_id" not in record.extra for record in records))


def draw_report(found: Delivered, tracking_uri: str) -> Delivered:
    """Draw the report of the campaign as MLflow has it, in `report/` of the deliverables, and list its files.

    Raises:
        InputError: the store cannot be read, or lacks the campaign; a link lies where the folder would.
        OSError: the folder cannot be written.
    """
    from analysis import report, store  # what draws takes seconds to import, which --help need not wait for

    folder = found.folder
    # Drawn elsewhere, so that a failure leaves nothing in the folder; on the same disk, so that moving is renaming.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".report") as place:
        data = store.load_all(tracking_uri, campaign=found.manifest.campaign, began=found.manifest.began)
        page, *_ = report.run(data, tracking_uri, place, str(folder))
        if (folder / REPORT).is_symlink():
            raise InputError(f"{folder / REPORT}: a link; remove it, the report lies in a folder of its own")
        (folder / REPORT).mkdir(exist_ok=True)
        names = sorted(path.name for path in Path(place).iterdir())
        for name in names:
            os.replace(Path(place) / name, folder / REPORT / name)
    files = [_described(folder / REPORT / name, within=f"{REPORT}/") for name in names]
    manifest = found.manifest.model_copy(update={"files": (*found.manifest.files, *files)})
    _put(folder / NAME, lambda path: path.write_text(manifest.model_dump_json(indent=1)))
    return replace(found, manifest=manifest, report=folder / REPORT / page.name)


def accounts(
    plan: Plan, outcomes: Sequence[Outcome], walls: Mapping[str, Spans]
) -> tuple[Account, tuple[Account, ...], list[TrialHours]]:
    """The hours of the campaign, of its stages that have begun, and of their trials."""
    rows, stages = [], []
    for outcome in (one for one in outcomes if one.begun):
        stage = outcome.stage
        own = hours.of_trials(stage.id, outcome.state)
        rows += own
        estimated, audit = hours.estimate(stage, plan.profile), hours.audited(outcome.state)
        stages.append(hours.account(stage.id, own, walls.get(stage.id, ()), estimated, audit))
    whole = [span for spans in walls.values() for span in spans]
    return hours.together(plan.name, stages, rows, whole), tuple(stages), rows


def run_ids(plan: Plan) -> RunIds:
    """The MLflow runs of the campaign's sweeps; empty where no store answers."""
    found: dict[tuple[str, str | None], str] = {}
    with contextlib.suppress(InputError), open_store(plan.tracking_uri) as store:
        for parent in store.sweeps():
            if parent.tags.get("campaign") == plan.name:
                sweep_id = parent.tags.get("sweep_id", "")
                found[sweep_id, None] = parent.run_id
                found |= {
                    (sweep_id, run.tags.get("trial_id")): run.run_id
                    for run in store.children([parent.run_id], whole=True)
                }
    return found


def _deliver(outcome: Outcome, folder: Path, runs: RunIds) -> list[File]:
    delivered = []
    for name in (name for task in outcome.stage.tasks for name in task.files):
        found = outcome.file(name) if outcome.finished else None
        if found:
            source, trial_id = found
            _put(folder / name, lambda path, source=source: _link(source, path))  # type: ignore[misc]
            run_id = runs.get((_sweep_id(outcome), trial_id))
            delivered.append(_described(folder / name, outcome.stage, run_id))
    return delivered


def _records(outcome: Outcome, runs: RunIds) -> list[Record]:
    """The stage's records, each with its stage and its run in MLflow."""
    found = []
    for trial in outcome.state.trials.values():
        if trial.record:
            record, run_id = Record.from_dict(trial.record), runs.get((_sweep_id(outcome), trial.trial_id))
            beside = {"stage": outcome.stage.id} | ({"run_id": run_id} if run_id else {})
            found.append(replace(record, extra={**record.extra, **beside}))
    return found


def _rows(outcome: Outcome, runs: RunIds, selected: bool, held: Mapping[str, str]) -> list[Row]:
    rows = []
    for task in outcome.stage.tasks:
        verdict = outcome.verdict(task)
        detail = verdict.detail if outcome.finished else held.get(outcome.stage.id, verdict.detail)
        judged = [runs.get((_sweep_id(outcome), trial.trial_id)) for trial in outcome.judged(task)]
        row = Row(
            task=task.id, stage=outcome.stage.id, title=task.title, selected=selected, finished=outcome.finished,
            files=task.files, missing=tuple(outcome.missing(task)), verdict=verdict.verdict, detail=detail,
            lines=tuple(Line(**vars(gate)) for gate in task.gates), judged=tuple(run for run in judged if run),
        )  # fmt: skip
        rows.append(row)
    return rows


def _sweep_id(outcome: Outcome) -> str:
    return str(outcome.state.header.get("sweep_id", ""))


def _described(path: Path, stage: Stage | None = None, run_id: str | None = None, within: str = "") -> File:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name, size = within + path.name, path.stat().st_size
    return File(file=name, sha256=digest, bytes=size, stage=stage.id if stage else None, run_id=run_id)


def _link(source: Path, target: Path) -> None:
    """The same content without the space, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _put(path: Path, make: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    make(temporary)
    os.replace(temporary, path)
    temporary.unlink(missing_ok=True)  # of two links to one file a rename does nothing


def _sweep_out(folder: Path, kept: set[str]) -> None:
    """Remove what an earlier manifest listed and this one does not."""
    try:
        listed = {file.file for file in Manifest.read(folder / NAME).files}
    except InputError:
        return
    for name in listed - kept:
        if may_list(name):
            (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or holds something of somebody else
        (folder / REPORT).rmdir()
