"""One page on a campaign, or on any sweeps together: verdicts, pictures, effects, the ledger, what it was run on."""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl

from analysis import curves, findings, pareto, picture, style, table
from analysis.blocks import Block, Heading, Items, Picture, Table, Text, to_html, to_markdown
from analysis.captions import gate_of
from analysis.frames import rows_of
from analysis.front import instant
from analysis.manifest import NAME, Manifest
from analysis.pareto import Pareto
from analysis.points import RATIO, is_stop
from analysis.store import SweepData
from trainables.record import InputError

_MACHINE = ("device", "cpu", "isa", "cores", "threads", "engine")
_MADE_WITH = ("mlflow", "polars", "moocore", "matplotlib")
_TEXT = frozenset({"sweep", "trial", "exp_id", "beta", "stop reason", "best"})


def run(data: SweepData, tracking_uri: str, out_dir: str | Path, deliverables: str | None = None) -> list[Path]:
    """Write report.html (one self-contained page), report.md and its pictures; returns their paths.

    deliverables: the folder of the sweeps' campaign, for the verdicts of its plan's tasks and its ledger. Raises
    InputError for sweeps without a trial, deliverables of another campaign or that cannot be read, and a folder that
    cannot be written; the page appears whole or not at all.
    """
    if data.trials.is_empty():
        raise InputError(f"{data.name}: no trial is logged yet; wait for the first or resume the sweep")
    planned = _tasks(data, Path(deliverables)) if deliverables else []
    counted = _ledger(Path(deliverables) / "ledger.json") if deliverables else []
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweeps = data.each()
        blocks = [
            *_summary(data, sweeps),
            *planned,
            *_verdicts(sweeps),
            *_planes(sweeps, data, folder),
            *_curves(sweeps, folder),
            *_effects(findings.collect(tracking_uri, data), folder),
            *counted,
            *_environment(data),
        ]
        title = f"Report: {data.name}"
        texts = {"report.html": to_html(title, blocks), "report.md": to_markdown(title, blocks)}
        for name, text in texts.items():
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(folder / name)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--out {folder}: cannot be written ({reason}); name another folder") from error
    return [*(folder / name for name in texts), *(block.wide for block in blocks if isinstance(block, Picture))]


def _summary(data: SweepData, sweeps: Sequence[SweepData]) -> list[Block]:
    """How much was run, and a line per sweep."""
    trials = data.trials.filter(pl.col("role") != "teacher")
    counts = dict(trials["verdict"].value_counts().iter_rows())
    times = sorted((time for time in data.trials["datetime"] if time), key=instant)
    stopped = sum(is_stop(reason) for reason in trials["stop_reason"])
    said = [
        f"{len(sweeps)} sweeps" if len(sweeps) > 1 else "One sweep",
        f"{trials.height} trials: {counts.get('pass', 0)} pass, {counts.get('fail', 0)} fail, {stopped} stopped early"
        if trials.height
        else "no trials, the teacher alone",
        f"measured {times[0][:16].replace('T', ' ')} to {times[-1][:16].replace('T', ' ')}" if times else "",
    ]
    return [Text(" · ".join(part for part in said if part)), *([Items(data.notes)] if data.notes else [])]


def _tasks(data: SweepData, folder: Path) -> list[Block]:
    """What the plan asked for and what became of it, what was never run included."""
    manifest = Manifest.read(folder / NAME)
    own = (manifest.campaign, manifest.began)
    strangers = [
        one.name
        for one in data.sweeps
        if (one.tags.get("campaign"), one.tags.get("campaign_began", manifest.began)) != own
    ]
    if strangers:
        raise InputError(
            f"--deliverables {folder}: of a campaign {manifest.campaign} to which {strangers[0]} of this store "
            f"does not belong; give --campaign {manifest.campaign}, and its own --deliverables and store"
        )
    chosen = [row for row in manifest.tasks if row.selected or row.finished]  # of an earlier start of the campaign too
    rows = [(row.task, row.title, row.verdict if row.finished else "not run", row.detail) for row in chosen]
    waiting = [row.task for row in chosen if not row.finished]
    left_out = [row.task for row in manifest.tasks if row not in chosen]
    said = [f"plan {manifest.plan}, profile {manifest.profile}, seed {manifest.seed}"]
    said += [f"unfinished: {len(waiting)} of {len(chosen)} tasks, {', '.join(waiting)}"] if waiting else []
    said += [f"left out by choice: {', '.join(left_out)}"] if left_out else []
    return [
        Heading("Tasks of the plan"),
        Text(" · ".join(said), small=True),
        Table(("task", "what", "verdict", "numbers"), rows, frozenset({"task", "what", "numbers"})),
    ]


def _verdicts(sweeps: Sequence[SweepData]) -> list[Block]:
    """A row per sweep, then each sweep's own table."""
    head = ("sweep", "gate", "trials", "pass", "fail", "stopped", "best", "drop % [95 %]", "x teacher")
    rows = []
    for one in sweeps:
        trials = one.trials.filter(pl.col("role") != "teacher")
        gate = gate_of(one.settings)
        best = _best(trials, one)
        drop = "–"
        if best and best["drop"] is not None:
            lo, hi = best["drop_lo"], best["drop_hi"]
            interval = f" [{100 * lo:+.2f}, {100 * hi:+.2f}]" if lo is not None and hi is not None else ""
            drop = f"{100 * best['drop']:+.2f}{interval}"
        ratio = best.get(RATIO) if best else None
        rows.append((
            one.name, gate.text if gate else "–", str(trials.height),
            *(str((trials["verdict"] == word).sum() or 0) for word in ("pass", "fail")),
            str(sum(is_stop(reason) for reason in trials["stop_reason"])), best["exp_id"] if best else "–", drop,
            "–" if ratio is None else f"{ratio:.2f}",
        ))  # fmt: skip
    blocks: list[Block] = [Heading("Verdicts")]
    if len(sweeps) > 1:
        blocks += [
            Table(head, rows, _TEXT | {"gate"}),
            Text("best: the trial that validation chose, else the one with the lowest test drop.", small=True),
        ]
    for one in sweeps:
        records = one.trials.to_dicts()
        chosen = one.tags.get("chosen")
        try:
            shown = table.rows(records, chosen)
        except InputError as error:
            blocks += [Heading(one.name, 3), Text(str(error))]
            continue
        names = table.columns(shown)
        cells = [dict(zip(table.COLUMNS, row.cells(), strict=True)) for row in shown]
        blocks += [
            Heading(one.name, 3),
            Text(table.title(records, one.settings), small=True),
            Table(names, [[cell[name] for name in names] for cell in cells], _TEXT),
        ]
    every = [one.trials.to_dicts() for one in sweeps]
    notes = dict.fromkeys(line for records in every for line in table.explained(records))
    warning = table.beware([record for records in every for record in records])
    return [*blocks, *(Text(line, small=True) for line in [*notes, *warning])]


def _best(trials: pl.DataFrame, data: SweepData) -> Mapping[str, Any] | None:
    chosen = trials.filter(pl.col("run_id").is_in(list(data.chosen)))
    rows = chosen if chosen.height else trials.filter(pl.col("drop").is_not_null()).sort("drop")
    return rows.row(0, named=True) if rows.height else None


def _planes(sweeps: Sequence[SweepData], data: SweepData, folder: Path) -> list[Block]:
    """A Pareto picture for every workload and reference of which a trial has both a drop and a latency."""
    groups: dict[tuple[str, str], list[SweepData]] = {}
    for one in sweeps:
        trials = one.trials.filter((pl.col("role") != "teacher") & pl.col("t_pair_p50_ms").is_not_null())
        trials = trials.filter(pl.col("drop").is_not_null())
        if trials.height and trials["workload_hash"].n_unique() == 1:
            against = trials["reference"][0] if "reference" in trials.columns else trials["parent"][0]
            groups.setdefault((str(trials["workload_hash"][0]), str(against)), []).append(one)
    blocks: list[Block] = []
    for (workload, _), some in groups.items():
        ids = {sweep.run_id for one in some for sweep in one.sweeps}
        kept = [sweep for sweep in data.sweeps if sweep.run_id in ids]
        together = data.only(data.trials["sweep_run"].is_in(list(ids)), kept, " + ".join(one.name for one in some))
        found = pareto.compute(together)
        domain = next(iter(together.trials["domain"].drop_nulls()), "")
        name = f"pareto_{domain}_{workload[:8]}" + (f"_{len(blocks)}" if len(groups) > 1 else "")
        blocks += [
            Heading(f"{style.title(found)}: {domain}, workload {workload[:12]}"),
            Text(f"{together.name}: {found.headline}"),
            _pictures(folder, name, f"{style.title(found)}: {found.headline}", _draw_plane(found)),
            *_front_table(found),
            *(Text(line, small=True) for line in style.footer(found)),
        ]
    return blocks


def _draw_plane(found: Pareto) -> Callable[[Path, picture.Canvas], None]:
    return lambda path, canvas: picture.draw(found, path, canvas)


def _front_table(found: Pareto) -> list[Block]:
    """Who is on the front, how surely, and how the front came to be."""
    unit = found.across.unit
    rows = [
        (p.exp_id, f"{p.x.value:.4g}", f"{p.drop.value:+.2f}", "–" if p.share is None else f"{100 * p.share:.0f}",
         "knee" if p is found.knee else "", str(p.record.get("verdict") or "–"))
        for p in found.front
    ]  # fmt: skip
    head = ("trial", f"{found.across.name} {unit}", "drop %", "on the front in % of draws", "", "verdict")
    growth = found.history[-1] if found.history else None
    grown = []
    if growth and len(found.history) > 1:
        first = found.history[0]
        grown = [
            Text(
                f"Front over time: {len(found.history)} of {sum(p.kind != 'stopped' for p in found.points)} measured "
                f"trials moved it, the last one {growth.exp_id} (number {growth.trials}); hypervolume from "
                f"{first.hypervolume:.4g} to {growth.hypervolume:.4g} {unit}·%."
            )
        ]
    return [Table(head, rows, _TEXT), *grown]


def _curves(sweeps: Sequence[SweepData], folder: Path) -> list[Block]:
    """Learning curves, with a mark where and why a trial was stopped."""
    blocks: list[Block] = []
    for one in sweeps:
        if not one.curves.is_empty() and curves.compute(one):
            try:
                found = pareto.compute(one)
            except InputError:
                continue  # mixed workloads: its table says so
            said = f"Validation drop while training: {one.name}"
            draw = _draw_curves(one, found)
            blocks += [Heading(one.name, 3), _pictures(folder, f"curves_{one.name}", said, draw)]
    said = "Validation drop by epoch; a mark ends each curve: why it was stopped, or a dot at the end of a whole run."
    return [Heading("Learning curves"), Text(said, small=True), *blocks] if blocks else []


def _draw_curves(data: SweepData, found: Pareto) -> Callable[[Path, picture.Canvas], None]:
    return lambda path, canvas: curves.draw(data, found, path, canvas)


def _pictures(folder: Path, name: str, says: str, draw: Callable[[Path, picture.Canvas], None]) -> Picture:
    """The wide and the narrow form of a picture."""
    wide, narrow = folder / f"{name}.png", folder / f"{name}_narrow.png"
    draw(wide, picture.REPORT)
    draw(narrow, picture.PHONE)
    return Picture(wide, says, narrow)


def _effects(found: Sequence[findings.Finding], folder: Path) -> list[Block]:
    """Ablations and searches: picture, numbers and sentences."""
    blocks: list[Block] = [Heading("Ablations and searches")] if found else []
    for one in found:
        blocks.append(Heading(f"{one.title} ({one.sweep})", 3))
        if drawn := findings.draw(one, folder, bare=True):
            blocks.append(Picture(drawn, f"{one.title}, {one.sweep}"))
        blocks.append(Items(one.lines))
    return blocks


def _ledger(path: Path) -> list[Block]:
    """What the campaign spent and saved, as its ledger says it: numbers as facts, lists of entries as tables."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--deliverables {path.parent}: its {path.name} cannot be read ({reason}); the campaign writes it"
        ) from None
    facts = [(key, _said(value)) for key, value in content.items() if not isinstance(value, list | dict)]
    blocks: list[Block] = [Heading("Ledger"), *([Table((), facts)] if facts else [])]
    for key, value in content.items():
        if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            value = [{key: name, **row} for name, row in value.items()]
        if isinstance(value, dict) and value:
            blocks += [Heading(key, 3), Table((), [(name, _said(one)) for name, one in value.items()])]
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            head = list(dict.fromkeys(name for row in value for name in row))
            text = {name for name in head if any(isinstance(row.get(name), str) for row in value)}
            rows = [[_said(row.get(name)) for name in head] for row in value]
            blocks += [Heading(key, 3), Table(head, rows, frozenset(text))]
    return blocks


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, list):
        return " to ".join(dict.fromkeys(map(_said, value))) or "–"  # an estimate: from and to
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(one)}" for key, one in value.items()) or "–"
    return "–" if value is None else str(value)


def _environment(data: SweepData) -> list[Block]:
    """What it was measured on, by which commit and command, and what this page was made with."""
    facts = [(name, _distinct(data.trials, name)) for name in _MACHINE]
    loads = [row["load_1m"] for row in rows_of(data.trials, ("load_1m",)) if row.get("load_1m") is not None]
    if loads:
        facts.append(("load while timing", f"{min(loads):.1f} to {max(loads):.1f}"))
    commits = dict.fromkeys(tag for sweep in data.sweeps if (tag := sweep.tags.get("git_commit")))
    facts.append(("commit", ", ".join(commits)))
    profiles = dict.fromkeys(tag for sweep in data.sweeps if (tag := sweep.tags.get("profile")))
    facts.append(("profile", ", ".join(profiles)))
    facts += [(sweep.name, sweep.tags.get("mlflow.source.name", "")) for sweep in data.sweeps]
    made = ", ".join(f"{name} {version(name)}" for name in _MADE_WITH)
    facts.append(("this page", f"Python {platform.python_version()}, {made}"))
    return [Heading("Environment"), Table((), [fact for fact in facts if fact[1]])]


def _distinct(trials: pl.DataFrame, name: str) -> str:
    values: list[Any] = (
        trials[name].drop_nulls().unique(maintain_order=True).to_list() if name in trials.columns else []
    )
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
