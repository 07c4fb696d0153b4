"""What a campaign shows: the plan before it starts, and what became of it at the end."""

import itertools
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sweeps import hours
from sweeps.catalogue import Stage
from sweeps.cluster import cores
from sweeps.conduct import Plan
from sweeps.deliverables import Delivered
from sweeps.launch import comparing, program, shown
from sweeps.ledger import sweeps_in
from sweeps.progress import duration
from sweeps.settings import parse_set
from sweeps.tracking import default_uri, masked

HERE = "as measured here"
_STYLES = {"pass": "bold green", "fail": "red", "n/a": "dim"}


def preview(console: Console, plan: Plan, storage: Path) -> None:
    """The stages in their order: what they wait for, what they leave, about how long they take."""
    measured = _measured(plan, storage)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "script", "tasks", "waits for", "hours of training", "files"):
        table.add_column(name, overflow="fold")
    low = high = 0.0
    unknown, left = [], [stage.id for stage in plan.selected if not plan.outcome(stage).finished]
    for stage in plan.selected:
        known = measured.get(stage.id)
        estimated = (known[0],) * 2 if known else hours.estimate(stage, plan.profile)
        if stage.id in left:
            low, high = low + (estimated or (0, 0))[0], high + (estimated or (0, 0))[1]
            unknown += [] if estimated else [stage.id]
            unit, origin = _unit(plan)
            took = _hours(estimated, f"{unit}, {HERE if known else origin}")
        else:
            took = "finished"
        files = [name for task in stage.tasks for name in task.files]
        needs = [need.task + (f" ({need.file})" if need.file else "") for need in stage.needs]
        row = (stage.id, stage.path.name, ", ".join(task.id for task in stage.tasks), ", ".join(needs) or "-", took)
        table.add_row(*map(escape, row), escape(", ".join(files)))
    console.print(table)
    unit, origin = _unit(plan)
    sure = {key for key in left if key not in unknown}
    origins = [origin] if sure - measured.keys() else []
    origins += [HERE] if sure & measured.keys() else []
    said = [f"{_hours((low, high), unit)} of training, {' and '.join(origins)}"] if sure else []
    settled = not plan.overrides or origin not in origins  # with --set, hours of the default say little
    if sure and settled and plan.profile != "full" and not {"--address", "--gpus-per-trial"} & set(plan.flags):
        said[0] += f", at least {duration(3600 * low / cores())} on {cores()} cores, measuring not counted"
    said += [f"unknown for {', '.join(unknown)}"] if unknown else []
    done = len(plan.selected) - len(left)
    said += [f"{done} of {len(plan.selected)} stages finished"] if done else []
    console.print(f"Hours: {'; '.join(said)}", soft_wrap=True)
    place = next(place for place in (storage, *storage.parents) if place.exists())
    disk = [size for key, (_, size) in measured.items() if key in {stage.id for stage in plan.selected}]
    took = "what it takes is known after a first run"
    if disk:
        took = f"earlier runs of {len(disk)} of {len(plan.selected)} stages took {sum(disk) / 1e9:.2f} GB"
    console.print(f"Disk: {shutil.disk_usage(place).free / 1e9:.1f} GB free; {took}", soft_wrap=True)
    console.print(f"Folder: {plan.folder}", soft_wrap=True)


def closing(console: Console, plan: Plan, found: Delivered) -> None:
    """The verdicts of all selected tasks, the hours, and where everything lies."""
    table = Table(title=plan.name, title_justify="left", title_style="bold")
    for name in ("task", "what", "verdict", "numbers", "files"):
        table.add_column(name, overflow="fold")
    for row in found.manifest.tasks:
        if row.selected:
            there = [name for name in row.files if not _lacks(row.missing, name)]
            files = ", ".join([*there, *(f"no {entry}" for entry in row.missing)])
            verdict = row.verdict if row.finished else "not run"
            table.add_row(*map(escape, (row.task, row.title)), f"[{_STYLES.get(verdict, 'red')}]{verdict}[/]",
                          escape(row.detail), escape(files if row.finished else ""))  # fmt: skip
    console.print(table)
    say = console.print
    for account in found.stages:
        say(f"{account.name}: {account.sentence}", markup=False, soft_wrap=True)
    say(f"All: {found.total.sentence}", markup=False, soft_wrap=True)
    if any(row.verdict == "fail" and row.selected for row in found.manifest.tasks) and plan.profile == "demo":
        say("The demo's few epochs show the machinery, not the quality: profile small is meant to meet the hard lines.")
    if found.unlogged:
        say(f"{found.unlogged} records are not in MLflow yet; --resume sends them.")
    say(f"Deliverables: {shown(found.folder)}", soft_wrap=True)
    if found.report:
        say(f"Report: {shown(found.report)}", soft_wrap=True)
    if not found.stages:
        return
    uri = plan.tracking_uri
    named = "" if uri == default_uri(plan.folder.parent) else f" --tracking-uri {shlex.quote(masked(uri))}"
    say(f"Check them: {program('python')} -m analysis verify {shlex.quote(shown(found.folder))}{named}", soft_wrap=True)
    say(f"Compare the runs: {comparing(uri)}", soft_wrap=True)


def _lacks(missing: tuple[str, ...], name: str) -> bool:
    return any(entry.split(" (")[0] == name for entry in missing)


def _measured(plan: Plan, storage: Path) -> dict[str, tuple[float, int]]:
    """Hours of training and bytes of the newest finished sweep of each stage at this profile."""
    names: dict[str, Stage] = {stage.path.stem: stage for stage in plan.stages}
    newest: dict[str, tuple[float, float, int]] = {}
    for folder, state in sweeps_in(storage):
        stage = names.get(folder.name.partition(f"_{plan.profile}_seed")[0])
        began = float(state.header.get("t", 0))
        if not stage or state.ended != "finished" or "optuna" in folder.name or not _alike(plan, stage, state.header):
            continue
        if began >= newest.get(stage.id, (0.0, 0.0, 0))[0]:
            took = sum(row.hours for row in hours.of_trials(stage.id, state))
            newest[stage.id] = (began, took, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
    return {key: (took, size) for key, (_, took, size) in newest.items()}


def _alike(plan: Plan, stage: Stage, header: Mapping[str, Any]) -> bool:
    """Whether an earlier sweep of the stage was told the same: of other epochs or seeds it says little."""
    words = shlex.split(str(header.get("command", "")).replace(" --set=", " --set "))
    told = parse_set([word for flag, word in itertools.pairwise(words) if flag == "--set"])
    given = parse_set([text for key, text in plan.overrides.items() if stage.knows(key)])
    filled = {need.setting for need in stage.needs}
    same = {key: value for key, value in told.items() if key not in filled} == given
    return same and "seeds" not in header.get("settings", {})


def _unit(plan: Plan) -> tuple[str, str]:
    """Of the catalogue's hours: what they are, and where from."""
    taken = "as once taken" + (" without --set" if plan.overrides else "")
    return ("GPU-hours", "the plan's") if plan.profile == "full" else ("CPU-hours", taken)


def _hours(estimated: tuple[float, float] | None, unit: str) -> str:
    if estimated is None:
        return "unknown"
    low, high = estimated
    return f"{low:.3g} {unit}" if low == high else f"{low:.3g} to {high:.3g} {unit}"
