"""What a sweep leaves: its files (each whole or absent), the choice of the best student, and the closing
screen.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from engines import graph
from sweeps import ablation
from sweeps.journal import TrialState
from sweeps.ledger import Ledger
from sweeps.progress import duration
from sweeps.settings import WORKLOAD, Resolved
from sweeps.spec import Sweep
from trainables.record import Record, write_csv

DEPLOYED = "deployed"  # what measuring leaves in a trial's folder


@dataclass(frozen=True)
class Choice:
    """The best student of a sweep. trial: None where no trial has weights."""

    trial: TrialState | None
    why: str


def choose(ledger: Ledger) -> Choice:
    """The trial with the lowest validation drop among those with weights.

    Validation chooses, the test split (and with it the verdict) only reports: choosing by the test would make its
    number too good.
    """
    able = [
        trial
        for trial in ledger.state.trials.values()
        if trial.role == "trial" and ledger.best_weights(trial.trial_id) and math.isfinite(trial.best_drop)
    ]
    if not able:
        return Choice(None, "no trial has weights to choose from")
    best = min(able, key=lambda trial: trial.best_drop)
    verdict = (best.record or {}).get("verdict") or "missing"
    rank = f"the lowest validation drop of {len(able)} trials, {100 * best.best_drop:.2f} %"
    return Choice(best, f"{best.exp_id}: it has {rank}; its verdict on the test split is {verdict}")


def write_files(sweep: Sweep, ledger: Ledger, resolved: Resolved) -> Choice:
    """Write the sweep's files below `files/` and the workload beside them; each is told to the journal."""
    files = ledger.folder / "files"
    files.mkdir(exist_ok=True)
    choice = choose(ledger)
    if sweep.best_files and choice.trial:
        ledger.append("choice", exp_id=choice.trial.exp_id, why=choice.why)
    wanted = [(trial.saves, trial) for trial in ledger.state.trials.values() if trial.saves]
    wanted += [(name, choice.trial) for name in sweep.best_files if choice.trial]
    for name, trial in wanted:
        for source, target in _products(ledger, trial.trial_id, name):
            _copy(source, files / target)
            ledger.append("file", path=f"files/{target}", trial_id=trial.trial_id)
    found = {one.comparison.file: one for one in ablation.found(sweep, ledger)}
    texts: dict[str, dict[str, Any]] = {sweep.log: _log(ledger, choice)} if sweep.log else {}
    for name, one in found.items():
        texts[name] = {**texts[name], **one.data} if name == sweep.log else ablation.content(one, ledger)
    for name, content in texts.items():
        _put(files / name, partial(Path.write_text, data=json.dumps(content, indent=1, allow_nan=False)))
        ledger.append("file", path=f"files/{name}", trial_id=None)
    for trial in ledger.state.trials.values():
        if sweep.baseline and trial.role == "teacher" and trial.record:
            record = Record.from_dict(trial.record).to_json()
            _put(files / sweep.baseline, partial(Path.write_text, data=record))
            ledger.append("file", path=f"files/{sweep.baseline}", trial_id=trial.trial_id)
    rows = [Record.from_dict(trial.record) for trial in ledger.state.trials.values() if trial.record]
    write_csv(files / "result_table.csv", rows)
    ledger.append("file", path="files/result_table.csv", trial_id=None)
    return choice


def _products(ledger: Ledger, trial_id: str, name: str) -> list[tuple[Path, str]]:
    """What a trial left for the file `name`, by its suffix, with what explains it (an engine's manifest)."""
    suffix = Path(name).suffix
    if suffix == ".pth":
        weights = ledger.best_weights(trial_id)
        return [(weights, name)] if weights else []
    suffixes = [suffix, f"{suffix}.json"]
    if suffix == ".trt":
        suffixes.append(".qdq.onnx")  # what the engine can be built from on another device
    left = [ledger.state_dir(trial_id) / f"{DEPLOYED}{one}" for one in suffixes]
    return [(path, Path(name).stem + path.name.removeprefix(DEPLOYED)) for path in left if path.exists()]


def _copy(source: Path, target: Path) -> None:
    if any(source.parent.glob(f"{source.name}.*.data")):  # weights past 2 GB, which the file knows by name
        graph.save(graph.load(source), target)
    else:
        _put(target, partial(shutil.copyfile, source))


def draw_effects(sweep: Sweep, ledger: Ledger) -> list[Path]:
    """A picture beside the file of every comparison; each is told to the journal."""
    drawn = []
    for one in ablation.found(sweep, ledger):
        path = ledger.folder / "files" / one.comparison.picture
        _put(path, partial(ablation.draw, one, ledger))
        ledger.append("file", path=f"files/{path.name}", trial_id=None)
        drawn.append(path)
    return drawn


def write_workload(ledger: Ledger, resolved: Resolved) -> None:
    """workload.yaml: the protocol, its hash, and the pairs that follow from it, so that others can measure the same."""
    if resolved.workload:
        data = {"workload_hash": resolved.workload_hash, **resolved.workload, **resolved.sampled}
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None)
        _put(ledger.folder / WORKLOAD.name, lambda path: path.write_text(text))
        ledger.append("file", path=WORKLOAD.name, trial_id=None)


def _put(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{path.name} could not be written ({reason})", str(path)) from error


def _log(ledger: Ledger, choice: Choice) -> dict[str, Any]:
    """All curves, records and verdicts, and the choice with its reason. Non-finite numbers become null."""
    trials = []
    for trial in ledger.state.trials.values():
        stop = dict(zip(("epoch", "reason", "detail"), trial.stop, strict=True)) if trial.stop else None
        curve = [{"epoch": epoch, **_finite(metrics)} for epoch, metrics in trial.results]
        trials.append(
            {
                "trial_id": trial.trial_id,
                "exp_id": trial.exp_id,
                "task_id": trial.task_id,
                "role": trial.role,
                "params": trial.params,
                "stop": stop,
                "error": trial.error,
                "curve": curve,
                "record": trial.record,
            }
        )
    header = {key: value for key, value in ledger.state.header.items() if key not in ("t", "event")}
    chosen = choice.trial.exp_id if choice.trial else None
    return {"sweep": header, "choice": {"exp_id": chosen, "why": choice.why}, "trials": trials}


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}


def show_table(console: Console, ledger: Ledger) -> None:
    """The verdict table: on what workload, against which teacher, with what interval, why each trial was stopped."""
    from analysis import table  # polars takes a second to import, which --help and --dry-run need not wait for

    header = ledger.state.header
    records = [{**trial.record, "role": trial.role} for trial in ledger.state.trials.values() if trial.record]
    console.print(table.render(records, header["settings"], str(header["name"]), ledger.state.chosen))


def show_times(console: Console, seconds: Mapping[str, float]) -> None:
    """Wall time by phase, with each one's share."""
    total = sum(seconds.values())
    parts = [f"{name} {duration(spent)} ({100 * spent / max(total, 1e-9):.0f} %)" for name, spent in seconds.items()]
    console.print(f"Wall time {duration(total)}: " + ", ".join(parts), soft_wrap=True, highlight=False)
