"""Runs a sweep from its flags to its pictures: the one entry of every script under sweeps/.

settings -> trials -> storage -> Ray -> what trials share -> training -> measuring -> files -> MLflow ->
pictures. The journal is written at every step, so an interruption at any point costs at most the epoch in
progress.
"""

from sweeps.interrupts import INTERRUPTED, from_now_on, interruptible  # before what is slow to import

# isort: split
import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from engines.errors import InputError
from sweeps import ablation, audit, deliver, dry, flags, hosts
from sweeps import cluster as ray_cluster
from sweeps.ledger import Ledger, campaign_began, inspect
from sweeps.lineage import best_of
from sweeps.measure import Bench, compile_best, measure, prepare
from sweeps.metrics import exported
from sweeps.placement import Cluster
from sweeps.plan import Planned, Planner, refuse_hidden
from sweeps.progress import Clock, Progress
from sweeps.search import Search, check_space, far_end
from sweeps.settings import Resolved, digest, resolve
from sweeps.spec import Sweep
from sweeps.tracking import Tracker, check_reachable, default_uri, masked
from sweeps.training import rule_of, train
from trainables.config import WORDS
from trainables.domain import DOMAINS, make_domain
from trainables.gang import refuse_uneven

FLUSH_S = 60.0
NOTHING = 1


@dataclass(frozen=True)
class Order:
    """What is to be done: the flags, the checked settings, the planned trials and the sweep's identity."""

    sweep: Sweep
    given: flags.Flags
    resolved: Resolved
    planner: Planner
    planned: Sequence[Planned]
    name: str
    config: Mapping[str, Any]
    command: str

    @property
    def folder(self) -> Path:
        """The sweep's own folder: below that of its campaign, if it belongs to one."""
        return self.given.storage / (self.given.campaign or "") / self.name

    @property
    def tracking_uri(self) -> str:
        """Where MLflow's runs go."""
        return self.given.tracking_uri or default_uri(self.given.storage)

    @property
    def config_hash(self) -> str:
        """Of all that a resumed sweep must have in common with its start; files count by what they hold."""
        return digest({**self.config, **self.resolved.contents})

    @property
    def header(self) -> dict[str, Any]:
        """The journal's first line."""
        return {
            "name": self.name,
            "stage": self.sweep.stage,
            "domain": self.sweep.domain,
            "profile": self.given.profile,
            "campaign": self.given.campaign,
            "campaign_began": campaign_began(self.folder.parent) if self.given.campaign else None,
            "epochs": rule_of(self.sweep, self.resolved.values).max_evals,
            "config_hash": self.config_hash,
            "workload_hash": self.resolved.workload_hash,
            "settings": dict(self.config),
            "git_commit": git_commit(),
            "command": masked(self.command),
        }


def main(sweep: Sweep, argv: Sequence[str] | None = None) -> None:
    """Run the sweep as the command line says.

    Exits with 1 when it ended with nothing to use, 2 for bad input, 130 when interrupted.
    """
    code = run(sweep, argv)
    if code:
        sys.exit(code)


def run(sweep: Sweep, argv: Sequence[str] | None = None) -> int:
    """`main` with the exit code as its result."""
    command = shlex.join([program("python"), *sys.argv] if argv is None else [sweep.name, *argv])
    try:
        from_now_on()
        order = take_order(sweep, argv, command)
        check_reachable(order.tracking_uri)
        if order.given.dry_run:
            ray_cluster.check(_wanted(order))
            known = inspect(order.folder, order.given.resume, order.header)
            dry.show(order.sweep, order.planned, order.resolved, order.folder, order.given, known)
            return 0
        return _execute(order)
    except (InputError, OSError) as error:
        print("error: " + masked(" ".join(str(error).split())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was a folder: from then on `_execute` says how to go on
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def take_order(sweep: Sweep, argv: Sequence[str] | None, command: str) -> Order:
    """Flags and settings -> checked plan; InputError for anything that cannot be. Touches nothing."""
    script = sys.modules["__main__"].__doc__ or f"Runs the {sweep.stage} sweep."
    given = flags.parse(script, argv, searchable=bool(sweep.space))
    resolved = resolve(sweep.settings, given.profile, _started(sweep, given), sweep.changes.get(given.profile, {}))
    refuse_hidden(sweep, given.overrides)
    kinds = _kinds(sweep, given)
    if given.samples:
        check_space(sweep.space, resolved, sweep.search_task)
    for trial in sweep.trials:  # what its values alone rule out, before anything looks at a model
        Planner(sweep, resolved, given.seed).plan(trial, seed=given.seed)
        refuse_uneven({**resolved.values, **trial.params}, given.placement.workers)
    if sweep.measure:
        job = {"domain": sweep.domain, "settings": dict(resolved.values), "seed": given.seed, "trials": kinds}
        resolved = resolved.identified(*sweep.measure.identify(job))
    elif sweep.domain in DOMAINS:
        make_domain(sweep.domain, resolved.values, {}, given.seed)  # refuses what its data cannot be
    planner = Planner(sweep, resolved, given.seed)
    teacher = [planner.teacher()] if sweep.measure else []
    seeds = range(given.seed, given.seed + (given.seeds or sweep.seeds))
    planned = [*teacher, *(planner.plan(trial, seed=seed) for seed in seeds for trial in sweep.trials)]
    rule_of(sweep, resolved.values)
    stem = sweep.name or Path(sys.argv[0]).stem
    search = "_optuna" if given.search == "optuna" else ""
    gate = {f"gate_{key}": value for key, value in vars(sweep.gate).items()} if sweep.gate else {}
    config = {**resolved.values, "seed": given.seed, "search": given.search, **gate}
    config |= {f"trial {p.exp_id}": dict(p.params) for p in planned if p.role == "trial"}
    if len(seeds) > 1:
        config["seeds"] = len(seeds)
    if given.audit:
        config["audit"] = given.audit
    config |= {f"{key}_content": content for key, content in resolved.contents.items()}
    name = f"{stem}_{given.profile}_seed{given.seed}{search}"
    return Order(sweep, given, resolved, planner, planned, name, config, command)


def _kinds(sweep: Sweep, given: flags.Flags) -> list[Mapping[str, Any]]:
    """Parameters of trials that together need all that any trial will share with others."""
    return [*(trial.params for trial in sweep.trials), *([far_end(sweep.space)] if given.samples else [])]


def _started(sweep: Sweep, given: flags.Flags) -> dict[str, Any]:
    """The overrides, with the model of the earlier stage that the sweep starts from."""
    if not sweep.starts_from:
        return given.overrides
    stage, file = sweep.starts_from
    if given.overrides.get("model") in WORDS:
        raise InputError(
            f"--set model={given.overrides['model']}: this sweep goes on from a student of {stage}; give its file, or "
            "leave model out to take the best one that MLflow knows"
        )
    if "model" in given.overrides:
        return given.overrides
    uri = given.tracking_uri or default_uri(given.storage)
    found = best_of(uri, stage, file, sweep.domain, given.profile, given.storage / "cache" / "models")
    return {**given.overrides, "model": str(found)}


def _execute(order: Order) -> int:
    clock, console = Clock(), Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a log file has no edge at which a table would have to wrap
    ledger = Ledger.open(order.folder, order.given.resume)
    try:
        if order.given.resume:
            ledger.check(order.header)
        # In this order: Ray sets its own handler of SIGTERM, which would abort the process.
        with ray_cluster.connect(_wanted(order)) as cluster, interruptible():
            if order.given.address:
                cluster = replace(cluster, versions=hosts.check(ledger.folder))
            return _sweep(order, ledger, cluster, clock, console)
    except KeyboardInterrupt:
        return _interrupted(order, ledger, console)
    except Exception:
        if ledger.begun:
            with contextlib.suppress(OSError):
                ledger.append("end", status="interrupted")
        raise
    finally:
        ledger.abandon()


def _wanted(order: Order) -> ray_cluster.Wanted:
    given = order.given
    # On one machine `full` may be tried out on cores; on a cluster it would be days of the wrong nodes.
    needs_gpu = given.profile == "full" and given.address is not None
    return ray_cluster.Wanted(given.address, given.share, given.placement, needs_gpu)


def _sweep(order: Order, ledger: Ledger, cluster: Cluster, clock: Clock, console: Console) -> int:
    sweep, values = order.sweep, order.resolved.values
    common = {
        "domain": sweep.domain,
        "profile": order.given.profile,
        "workload_hash": order.resolved.workload_hash,
        "config_hash": order.config_hash,
        "git_commit": git_commit(),
        "seed": order.given.seed,
    }
    cache = order.given.storage / "cache"
    kinds = _kinds(sweep, order.given)
    seeds = sorted({trial.seed for trial in order.planned})
    bench = Bench(sweep, order.resolved, ledger, cluster, cache, common, kinds, seeds)
    progress = Progress(console, rule_of(sweep, values).max_evals, exported(order.name))
    clock.mark("set-up")
    with progress.show():
        if sweep.measure:
            prepare(bench, sweep.measure, progress)
            clock.mark("teacher's outputs")
        ledger.begin(order.header, masked(order.command))
        ledger.add(order.planned)
        progress.watch(ledger.state.trials)
        deliver.write_workload(ledger, order.resolved)
        with contextlib.closing(Tracker(ledger.journal.path, order.tracking_uri)) as tracker:
            tracker.start()
            for batch in _batches(order, ledger, cluster.slots):
                clock.mark("set-up")
                with progress.phase("training"):
                    train(sweep, ledger, batch, values, cluster, progress, cache, order.given)
                clock.mark("training")
                measure(bench, batch, progress)
                clock.mark("measuring")
            compile_best(bench, deliver.choose(ledger).trial, progress)
            with progress.phase("reporting"):
                choice = deliver.write_files(sweep, ledger, order.resolved)
                audited = audit.false_stops(ledger.state.trials.values(), rule_of(sweep, values).budget)
                if audited:
                    ledger.append("summary", metrics=audited.metrics)
                pictures = _pictures(order, ledger, tracker)
                ledger.append("end", status="finished")
                missing = None if tracker.flush(FLUSH_S) else tracker.problem or "MLflow is busy"
    clock.mark("reporting")
    _closing(order, ledger, console, choice, audited, pictures, missing)
    deliver.show_times(console, clock.seconds)
    return _outcome(order, ledger)


def _outcome(order: Order, ledger: Ledger) -> int:
    """The exit code of a sweep that ran to its end: 1 when its baseline is incomplete or no trial left weights."""
    trials = ledger.state.trials.values()
    if order.sweep.baseline and any((t.record or {}).get("verdict") == "fail" for t in trials if t.role == "teacher"):
        return NOTHING
    trained = [ledger.best_weights(trial.trial_id) for trial in trials if trial.role == "trial"]
    return NOTHING if trained and not any(trained) else 0


def _batches(order: Order, ledger: Ledger, slots: int) -> Iterator[Sequence[Planned]]:
    """The plan's trials, then the search's, each batch asked for once the one before it is measured."""
    yield order.planned
    left = order.given.samples
    if not left:
        return
    search = Search(order.sweep.space, order.planner, order.sweep.search_task, order.given.seed)
    search.learn(order.planned, ledger.state.trials, order.resolved.values)
    known = ledger.searched()
    while left > 0:
        count = search.batch(slots, left)
        batch = [search.again(params) for params in known[:count]]
        known = known[count:]
        batch += search.ask(count - len(batch)) if len(batch) < count else []
        ledger.add(batch)
        yield batch
        search.tell([ledger.trial(trial.trial_id) for trial in batch])
        left -= count


def _pictures(order: Order, ledger: Ledger, tracker: Tracker) -> list[Path]:
    """The analysis of this sweep; a store that cannot be read now costs the pictures, not the sweep."""
    from analysis import pareto

    drawn = deliver.draw_effects(order.sweep, ledger)
    if not order.sweep.measure or not order.sweep.latency or not tracker.flush(FLUSH_S):
        return drawn
    sweep_id = str(ledger.state.header["sweep_id"])
    try:
        paths = pareto.run(order.tracking_uri, sweep_id, ledger.folder / "files", log=False)
    except InputError as error:
        print(f"warning: no pictures: {masked(str(error))}", file=sys.stderr)
        return drawn
    for path in paths:
        ledger.append("file", path=f"files/{path.name}", trial_id=None)
    return [*drawn, *paths]


def _closing(
    order: Order,
    ledger: Ledger,
    console: Console,
    choice: deliver.Choice,
    audited: audit.FalseStops | None,
    pictures: list[Path],
    missing: str | None,
) -> None:
    deliver.show_table(console, ledger)
    say = console.print
    if order.sweep.best_files:
        say(f"Best trial: {choice.why}.", soft_wrap=True)
    for line in ablation.sentences(ablation.found(order.sweep, ledger)):
        say(line, soft_wrap=True)
    if audited:
        say(audited.sentence, soft_wrap=True)
    hint = _hint(order, ledger)
    if hint:
        say(hint, soft_wrap=True)
    say(f"Files: {shown(ledger.folder / 'files')}", soft_wrap=True)
    for path in pictures:
        if path.suffix in (".png", ".html"):
            say(f"  {shown(path)}", soft_wrap=True)
    if missing:
        say(
            f"Not all is in MLflow yet ({missing}); the journal holds it: run this again with --resume.",
            soft_wrap=True,
        )
    say(f"Compare the runs: {comparing(order.tracking_uri)}", soft_wrap=True)


def comparing(uri: str) -> str:
    """What to type to see the runs in MLflow."""
    if uri.startswith(("http://", "https://")):
        return f"open {masked(uri)}"
    return f"{program('mlflow')} ui --backend-store-uri {shlex.quote(masked(uri))}"


def program(name: str) -> str:
    """How to call a program of this environment from here: its name alone where the shell would find this very one."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if not own.exists() or (found and Path(found).parent == own.parent) else shown(own)


def _hint(order: Order, ledger: Ledger) -> str:
    """Why a short profile ends in `fail`, so that nobody takes it for a defect."""
    verdicts = [(t.record or {}).get("verdict") for t in ledger.state.trials.values() if t.role == "trial"]
    if order.given.profile != "demo" or "fail" not in verdicts or "pass" in verdicts:
        return ""
    epochs = order.resolved.values.get("epochs", "few")
    return (
        f"No trial passes: the demo's {epochs} epochs show the machinery, not the quality. "
        "Leave --profile demo out: profile small trains longer; README.md shows what it reached."
    )


def _interrupted(order: Order, ledger: Ledger, console: Console) -> int:
    if ledger.begun:
        ledger.append("end", status="interrupted")
        resume = order.command if order.given.resume else f"{order.command} --resume"
        console.print(f"\nInterrupted; nothing finished is lost. Go on with: {masked(resume)}", soft_wrap=True)
    else:
        console.print("\nInterrupted before the first trial; nothing was begun.")
    return INTERRUPTED


def shown(path: Path) -> str:
    """A path as one would type it here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def git_commit() -> str | None:
    """The code's commit, with "+" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
