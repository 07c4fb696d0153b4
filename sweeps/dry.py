"""--dry-run: what would run, what it would leave and about what it would cost, without starting anything."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from analysis.words import PICTURES
from sweeps.cluster import cores
from sweeps.flags import Flags
from sweeps.journal import SweepState
from sweeps.ledger import sweeps_in
from sweeps.plan import Planned
from sweeps.progress import duration
from sweeps.settings import WORKLOAD, Resolved
from sweeps.spec import Sweep
from sweeps.training import rule_of


def show(
    sweep: Sweep,
    planned: Sequence[Planned],
    resolved: Resolved,
    folder: Path,
    given: Flags,
    known: SweepState | None,
) -> None:
    """Print trials, files and cost. folder: the sweep's; known: what a resume finds there, of which the rest costs."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    rule = rule_of(sweep, resolved.values)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "exp_id", "trial_id", "parameters", "saves"):
        table.add_column(name, no_wrap=name in ("exp_id", "trial_id"))
    for trial in planned:
        params = ", ".join(f"{key}={value}" for key, value in trial.flat.items()) or "-"
        table.add_row(trial.task_id, trial.exp_id, trial.trial_id, params, trial.saves or "-")
    console.print(table)
    if given.samples:
        console.print(f"and {given.samples} trials that Optuna chooses")
    files = [*(trial.saves for trial in planned), *sweep.best_files, sweep.log, *sweep.effect_files, sweep.baseline]
    files += ["result_table.csv", *(PICTURES if sweep.measure and sweep.latency else ())]
    files += [WORKLOAD.name] if resolved.workload else []
    console.print(f"Folder: {folder}", soft_wrap=True)
    console.print(f"Files: {', '.join(name for name in files if name)}", soft_wrap=True)
    trials = sum(trial.role == "trial" for trial in planned) + given.samples
    if not trials:
        return
    epochs = trials * rule.max_evals
    work = f"at most {trials} trials x {rule.max_evals} epochs"
    if known:
        seen = [trial for trial in known.trials.values() if trial.role == "trial"]
        epochs -= sum(trial.epoch if trial.stop is None else rule.max_evals for trial in seen)
        work += f", of which {epochs} epochs are left"
    pairs = resolved.values.get("samples_per_epoch")
    if pairs:
        work += f" x {pairs} samples = {epochs * pairs:,} samples"
    console.print(f"Training: {work}; {_time(sweep, given.storage, resolved, epochs)}", soft_wrap=True)


def _time(sweep: Sweep, storage: Path, resolved: Resolved, epochs: int) -> str:
    """Hours from the epochs of earlier sweeps of the same size, else from what a sample once cost on a CPU."""
    size = ("image_size", "samples_per_epoch", "batch_size")
    seconds: list[float] = []
    for _, state in sweeps_in(storage):
        settings = state.header.get("settings", {})
        if all(settings.get(key) == resolved.values.get(key) for key in size):
            for trial in state.trials.values():
                seconds += [metrics["epoch_s"] for _, metrics in trial.results if metrics.get("epoch_s", 0) > 0]
    if not seconds and sweep.sample_cpu_s and resolved.profile != "full":
        hours = epochs * resolved.values["samples_per_epoch"] * sweep.sample_cpu_s / 3600
        return f"about {hours:.1f} CPU-hours at {1000 * sweep.sample_cpu_s:.3g} ms per sample, as it once took"
    if not seconds:
        return f"time unknown: no sweep of this size was run in {storage} yet"
    mean = sum(seconds) / len(seconds)
    return f"about {duration(mean * epochs / cores())} on {cores()} cores at the {mean:.1f} s per epoch seen before"
