"""The whole plan as one command: its stages in the order of their needs, each as the script that a user would start.

python sweeps/campaign.py --plan dust3r --dry-run                 # order, hours, disk and files; starts nothing
python sweeps/campaign.py --plan dust3r --profile demo            # everything at a small scale, to see that it works
python sweeps/campaign.py --plan all                              # both domains, profile small
python sweeps/campaign.py --plan all --resume                     # go on after any interruption
python sweeps/campaign.py --plan dust3r --only K KQ               # some stages (or tasks: K-2 stands for K)
python sweeps/campaign.py --plan all --audit 0.2                  # a fifth of the stopped trials runs on
python sweeps/campaign.py --plan dust3r --address auto --profile full --set teacher=FILE.pth    # side by side

A task that missed its hard line (a failed gate) holds up the stages that depend on it; the rest goes on. At profile
demo no gate holds anything up: its few epochs show the machinery, and the INT8 student needs a student, good or not.
--keep-going does the same at the other profiles. What needs a file that was not made is held up in any case.

Exit code: 0 everything ran (and, but for demo and --keep-going, met its hard lines), 1 not so, 2 bad input,
130 interrupted.
"""

from sweeps.interrupts import INTERRUPTED, from_now_on, interruptible  # before what is slow to import

# isort: split
import contextlib
import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from engines.errors import InputError
from sweeps import campaign_run, deliverables, flags, placement
from sweeps import campaign_screen as screen
from sweeps.catalogue import PLANS, Stage, select
from sweeps.conduct import Conductor, Plan
from sweeps.journal import CAMPAIGN, NAME, Journal, read_events
from sweeps.launch import git_commit, program
from sweeps.ledger import refuse_links
from sweeps.settings import parse_set, resolve
from sweeps.tracking import check_reachable, default_uri, masked

SIDE_BY_SIDE = 3  # on a cluster: the stages of the main line keep a third of it


@dataclass(frozen=True)
class Order:
    """What is to be done. storage: where the campaign's folder lies."""

    plan: Plan
    storage: Path
    resume: bool
    dry_run: bool
    command: str


def main(argv: Sequence[str] | None = None, plans: Mapping[str, Sequence[Stage]] = PLANS) -> None:
    """Run a campaign as the command line says; exits with the codes that its help names."""
    code = run(argv, plans)
    if code:
        sys.exit(code)


def run(argv: Sequence[str] | None, plans: Mapping[str, Sequence[Stage]] = PLANS) -> int:
    """`main` with the exit code as its result."""
    command = shlex.join([program("python"), *(sys.argv if argv is None else ["campaign", *argv])])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a log file has no edge at which a table would have to wrap
    try:
        from_now_on()
        order = take_order(argv, plans, command)
        check_reachable(order.plan.tracking_uri)
        _refuse(order)
        if not order.resume:
            _ask_stages(order.plan, console)
        if order.dry_run:
            screen.preview(console, order.plan, order.storage)
            return 0
        return _execute(order, console)
    except (InputError, OSError) as error:
        print("error: " + masked(" ".join(str(error).split())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def take_order(argv: Sequence[str] | None, plans: Mapping[str, Sequence[Stage]], command: str) -> Order:
    """Flags -> checked plan; InputError for anything that cannot be. Touches nothing."""
    parser = flags.common(__doc__ or "")
    add = parser.add_argument
    add("--plan", choices=tuple(plans), required=True, help="which plan")
    add("--only", nargs="+", action="extend", default=[], metavar="STAGE", help="run these stages alone")
    add("--from", dest="start", metavar="STAGE", help="leave out what comes before this stage")
    add("--skip", nargs="+", action="extend", default=[], metavar="STAGE", help="leave these stages out")
    add("--keep-going", action="store_true", help="a missed hard line holds nothing up (always so at profile demo)")
    shared = f"stages at a time, each with a share of the cluster (default: {SIDE_BY_SIDE}; 1 without --address)"
    add("--side-by-side", type=int, metavar="N", help=shared)
    add("--campaign", metavar="NAME", help="the campaign's name (default: of plan, profile and seed)")
    placement.add_flags(parser)
    given = parser.parse_args(argv)
    flags.check(given)
    width = given.side_by_side if given.side_by_side is not None else SIDE_BY_SIDE if given.address else 1
    if width < 1 or (width > 1 and not given.address):
        raise InputError(f"--side-by-side {width}: expected 1, or more with --address: one machine runs them in order")
    stages = plans[given.plan]
    name = given.campaign or f"{given.plan}_{given.profile}_seed{given.seed}"
    storage = Path(given.storage).expanduser().absolute()
    passed = ["--storage", str(storage)]
    passed += ["--address", given.address] if given.address else []
    passed += placement.words(placement.read_flags(given))
    passed += ["--audit", f"{given.audit:g}"] if given.audit else []
    passed += ["--hang-after", f"{given.hang_after:g}"] if given.hang_after != flags.HANG_MIN else []
    plan = Plan(
        name=name, plan=given.plan, profile=given.profile, seed=given.seed, stages=stages,
        selected=select(stages, given.only, given.start, given.skip), folder=storage / name,
        tracking_uri=flags.tracking_uri(given) or default_uri(storage), flags=passed,
        overrides=dict(zip(parse_set(given.set), given.set, strict=True)),
        lenient=given.keep_going or given.profile == "demo", width=width, audit=given.audit,
    )  # fmt: skip
    _check_settings(plan)
    _check_needs(plan)
    return Order(plan, storage, given.resume, given.dry_run, command)


def _check_settings(plan: Plan) -> None:
    """InputError for settings that no selected stage knows, and for values that one of them refuses."""
    values = parse_set(list(plan.overrides.values()))
    for key in values:
        if not any(stage.knows(key) for stage in plan.selected):
            raise InputError(f"--set {key}: no stage of this campaign has that setting; see sweeps/settings/*.yaml")
    if "teacher" in values and len({stage.domain for stage in plan.selected}) > 1:
        raise InputError("--set teacher: each domain has a teacher of its own; run --plan dust3r and alphaqubit apart")
    for stage in plan.selected:
        own = {key: value for key, value in values.items() if stage.knows(key)}
        taken = [need.setting for need in stage.needs if need.setting in own]
        if taken:
            raise InputError(f"--set {taken[0]}: stage {stage.id} takes it from an earlier one; run that script alone")
        _check_paths(resolve(stage.settings, plan.profile, own).values, own)


def _check_paths(values: Mapping[str, Any], given: Iterable[str]) -> None:
    """InputError for a path that is not there: the first stage would find out, with the campaign already begun."""
    for key in ("teacher", "data"):
        path = Path(values[key]) if key in given else Path()
        if path.is_absolute() and not path.exists():
            raise InputError(f"--set {key}={path}: no such file or folder")


def _check_needs(plan: Plan) -> None:
    """InputError for a stage that needs the file of one that is neither selected nor finished in this campaign."""
    for stage in plan.selected:
        for need in stage.needs:
            source = plan.source(need)
            if need.file and source.stage not in plan.selected and not source.file(need.file):
                raise InputError(
                    f"stage {stage.id} needs {need.file} of stage {source.stage.id}, which is not selected and not "
                    f"finished in {plan.folder}: select it too, or leave {stage.id} out"
                )


def _ask_stages(plan: Plan, console: Console) -> None:
    """InputError for what the first stage of a domain refuses: a teacher of another size, data that are too few.

    Stages of one domain share teacher and data; one that waits for a file cannot be asked. A resume asks nobody: what
    a later stage refuses is its own affair, and one may be at work.
    """
    asked: set[str] = set()
    for stage in plan.selected:
        if stage.domain in asked or any(need.file for need in stage.needs):
            continue
        asked.add(stage.domain)
        with console.status(f"asking {stage.path.name} whether it can start"):  # on a terminal alone
            done = subprocess.run(
                [*plan.command(stage), "--dry-run"], capture_output=True, text=True, env=plan.environment
            )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            apart = len({stage.domain for stage in plan.selected}) > 1 and "--set teacher" in said[-1]
            hint = "; each domain has a teacher of its own: run --plan dust3r and --plan alphaqubit apart"
            raise InputError(f"stage {stage.id}: {said[-1].removeprefix('error: ')}{hint if apart else ''}")


def _refuse(order: Order) -> None:
    """InputError for a campaign that is there already (without --resume), is not (with it), was another one, or has a
    link in its folder.
    """
    plan, path = order.plan, order.plan.folder / CAMPAIGN
    refuse_links(plan.folder, below=False)
    before = next(read_events(path), None) if path.is_file() else None
    if before and not order.resume:
        raise InputError(
            f"{plan.folder} already holds this campaign: add --resume to go on, or give another --campaign"
        )
    if not before and order.resume:
        there = ", ".join(sorted(found.parent.name for found in order.storage.glob(f"*/{CAMPAIGN}")))
        raise InputError(
            f"--resume: no campaign {plan.name} in {order.storage}" + (f"; there are {there}" if there else "")
            + "; start it without --resume"
        )  # fmt: skip
    if before:
        before.setdefault("audit", 0.0)  # of campaigns from before there was one
        changed = [key for key, value in _identity(plan).items() if before.get(key) != value]
        if changed:
            said = ", ".join(f"{key} was {before.get(key)!r}, is now {_identity(plan)[key]!r}" for key in changed)
            raise InputError(
                f"--resume: campaign {plan.name} was started otherwise ({said}); give the same, or another --campaign"
            )


def _identity(plan: Plan) -> dict[str, object]:
    """What a resumed campaign must have in common with its start."""
    return {"plan": plan.plan, "profile": plan.profile, "seed": plan.seed, "overrides": dict(plan.overrides),
            "audit": plan.audit}  # fmt: skip


def _execute(order: Order, console: Console) -> int:
    plan = order.plan
    with Journal.open(plan.folder, CAMPAIGN) as journal:
        if not order.resume:
            header = {"name": plan.name, **_identity(plan), "git_commit": git_commit()}
            journal.append("campaign", **header)
        journal.append("selected", stages=[stage.id for stage in plan.selected], command=masked(order.command))

        def say(text: str) -> None:
            console.print(text, style="bold", markup=False, soft_wrap=True)

        conductor = Conductor(plan, journal, say, on_end=lambda: _collect(plan, conductor.held))
        try:
            with interruptible():
                conductor.run()
        except KeyboardInterrupt:
            resume = order.command if order.resume else f"{order.command} --resume"
            console.print(f"\nInterrupted; nothing finished is lost. Go on with: {masked(resume)}", soft_wrap=True)
            journal.append("end", status="interrupted")
            return INTERRUPTED
        found = _with_report(plan, _collect(plan, conductor.held))
        screen.closing(console, plan, found)
        journal.append("end", status="finished")
    missed = any(row.selected and row.verdict == "fail" for row in found.manifest.tasks)
    return 1 if conductor.held or (missed and not plan.lenient) else 0


def _collect(plan: Plan, held: Mapping[str, str]) -> deliverables.Delivered:
    return deliverables.write(plan, _walls(plan), held)


def _walls(plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """When each stage was at work, of all its starts. Where the campaign was killed nobody saw a stage end: it lasted
    until a later campaign, which waited for it, did; else until the last event of its own journal.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    began: dict[str, float] = {}  # starts that have no end yet
    for event in read_events(plan.folder / CAMPAIGN):
        if event["event"] not in ("start", "exit"):
            continue
        stage, t = event["stage"], event["t"]
        since, until = began.pop(stage, t), t
        if event["event"] == "start":
            began[stage] = t
            until = _heard(plan, stage, t)
        elif event["code"] is not None:
            since = t - event["wall_s"]
        spans.setdefault(stage, []).append((since, until))
    for stage, since in began.items():  # nobody started it again
        spans.setdefault(stage, []).append((since, _heard(plan, stage, math.inf)))
    whole = {stage: [span for span in found if span[1] > span[0]] for stage, found in spans.items()}
    return {stage: found for stage, found in whole.items() if found}


def _heard(plan: Plan, stage: str, before: float) -> float:
    """When the stage's journal was last written before then; 0 where it was not."""
    path = plan.sweep_folder(next(one for one in plan.stages if one.id == stage)) / NAME
    times = [event["t"] for event in read_events(path)] if path.is_file() else []
    return max((t for t in times if t < before), default=0.0)


def _with_report(plan: Plan, found: deliverables.Delivered) -> deliverables.Delivered:
    """The deliverables with the campaign's report, where it can be drawn, and both in MLflow, where it takes them."""
    if not found.stages:  # nothing has begun: each stage said why
        return found
    with _or_a_warning("no report"):
        found = deliverables.draw_report(found, plan.tracking_uri)
    with _or_a_warning("manifest and report are not in MLflow"):
        campaign_run.log(plan, found)
    return found


@contextlib.contextmanager
def _or_a_warning(missing: str) -> Iterator[None]:
    """What comes after hours of training may fail in any way, and then costs itself alone."""
    try:
        yield
    except Exception as error:
        said = masked(" ".join(f"{type(error).__name__}: {error}".split()))
        print(f"warning: {missing} ({said}); --resume tries again, and runs nothing twice", file=sys.stderr)


if __name__ == "__main__":
    main()
