"""--dry-run: what would run, what it would leave and about what it would cost, without starting anything."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sweeps.cluster import cores
from sweeps.journal import NAME, SweepState
from sweeps.plan import Planned
from sweeps.progress import duration
from sweeps.settings import Resolved
from sweeps.spec import Sweep
from sweeps.training import rule_of


def show(sweep: Sweep, planned: Sequence[Planned], resolved: Resolved, folder: Path, samples: int) -> None:
    """Print trials, files and cost."""
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
    trials = sum(trial.role == "trial" for trial in planned) + samples
    if samples:
        console.print(f"and {samples} trials that Optuna chooses")
    left = [*(trial.saves for trial in planned), *sweep.best_files, sweep.log, sweep.baseline, "result_table.csv"]
    console.print(f"Folder: {folder}", soft_wrap=True)
    console.print(f"Files: {', '.join(name for name in left if name)}", soft_wrap=True)
    if not trials:
        return
    pairs = resolved.values.get("pairs_per_epoch")
    work = f"at most {trials} trials x {rule.max_evals} epochs"
    if pairs:
        work += f" x {pairs} pairs = {trials * rule.max_evals * pairs:,} pairs"
    console.print(f"Training: {work}; {_time(sweep, folder.parent, resolved, trials, rule.max_evals)}", soft_wrap=True)


def _time(sweep: Sweep, storage: Path, resolved: Resolved, trials: int, epochs: int) -> str:
    """Hours from the epochs of earlier sweeps of the same size, else from what a sample once cost on a CPU."""
    size = ("image_size", "pairs_per_epoch", "batch_size")
    seconds: list[float] = []
    for path in storage.glob(f"*/{NAME}"):
        state = SweepState.replay(path)
        settings = state.header.get("settings", {})
        if all(settings.get(key) == resolved.values.get(key) for key in size):
            for trial in state.trials.values():
                seconds += [metrics["epoch_s"] for _, metrics in trial.results if metrics.get("epoch_s", 0) > 0]
    if not seconds and sweep.sample_cpu_s and resolved.profile != "full":
        hours = trials * epochs * resolved.values["pairs_per_epoch"] * sweep.sample_cpu_s / 3600
        return f"about {hours:.1f} CPU-hours at {1000 * sweep.sample_cpu_s:.0f} ms per pair, as it once took"
    if not seconds:
        return f"time unknown: no sweep of this size was run in {storage} yet"
    mean = sum(seconds) / len(seconds)
    rounds = -(-trials // cores())
    total = duration(mean * epochs * rounds)
    return f"about {total} on {cores()} cores at the {mean:.1f} s per epoch seen before"
