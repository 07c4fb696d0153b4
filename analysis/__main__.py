"""Command line: python -m analysis pareto|effects|report|table|daily|watch|verify: pictures, tables, checks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.words import ACROSS
from trainables.record import InputError, Parser

if TYPE_CHECKING:
    from analysis.store import SweepData

_EXAMPLES = """examples:
  python -m analysis pareto --sweep k_grid_demo_seed42
  python -m analysis pareto --campaign NAME --x size_MB
  python -m analysis effects --sweep aq_ablation_demo_seed42
  python -m analysis report --campaign NAME
  python -m analysis table --tracking-uri http://127.0.0.1:5000 --sweep k_grid_small_seed42 --csv verdicts.csv
  python -m analysis daily --csv daily.csv
  python -m analysis watch --sweep k_grid_small_seed42
  python -m analysis verify runs/dust3r_small_seed42/deliverables
"""


def parser() -> argparse.ArgumentParser:
    """The command line; InputError for flags that cannot be."""
    top = Parser(
        prog="python -m analysis",
        description="Pictures and tables of sweeps that are logged in MLflow.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    store = Parser(add_help=False)
    store.add_argument(
        "--tracking-uri",
        default="sqlite:///runs/mlflow.db",  # where a sweep logs that was not told otherwise
        metavar="URI",
        help="sqlite:///path/mlflow.db, postgresql://... or the address of a server (default: %(default)s)",
    )
    several = Parser(add_help=False, parents=[store])
    which = several.add_mutually_exclusive_group(required=True)
    which.add_argument("--sweep", nargs="+", metavar="NAME", default=(), help="run names (or run ids) of sweeps")
    which.add_argument("--campaign", metavar="NAME", help="all sweeps that this campaign started")
    folder = "folder for the files, made if missing (default: named as the command)"
    several.add_argument("--out", metavar="DIR", help=folder)
    commands = top.add_subparsers(dest="command", required=True)
    pareto = commands.add_parser(
        "pareto",
        parents=[several],
        help="quality against latency: pareto.csv, pareto.png, pareto.html; learning curves: curves.png",
    )
    pareto.add_argument("--x", choices=ACROSS, default=ACROSS[0], help="what lies across (default: %(default)s)")
    pareto.add_argument(
        "--no-log", action="store_true", help="of one sweep against p50: do not attach them to its run in MLflow"
    )
    commands.add_parser(
        "effects",
        parents=[several],
        help="what the arms of ablations and the parameters of searches change: effects.md and pictures",
    )
    report = commands.add_parser(
        "report", parents=[several], help="verdicts, Pareto, curves, effects, environment: report.html, report.md"
    )
    report.add_argument(
        "--deliverables", metavar="FOLDER", help="the campaign's, for its tasks and ledger (default: beside the store)"
    )
    table = commands.add_parser("table", parents=[store], help="the verdict table")
    table.add_argument("--sweep", required=True, metavar="NAME", help="the sweep's run name (or run id)")
    table.add_argument("--csv", metavar="FILE", help="also write it as CSV, with full precision")
    table.add_argument("--markdown", metavar="FILE", help="also write it as Markdown")
    daily = commands.add_parser("daily", parents=[store], help="the daily sheet: every trial that ran on one day")
    daily.add_argument("--date", metavar="YYYY-MM-DD", help="which day, in this machine's time zone (default: today)")
    daily.add_argument("--csv", metavar="FILE", help="also write it as CSV")
    daily.add_argument("--markdown", metavar="FILE", help="also write it as Markdown, which it is printed as")
    watch = commands.add_parser("watch", parents=[store], help="a running sweep on one screen, until it ends")
    watch.add_argument("--sweep", required=True, metavar="NAME", help="the sweep's run name (or run id)")
    watch.add_argument(
        "--every", type=float, default=10.0, metavar="S", help="seconds (default: %(default)g; 0: look once)"
    )
    watch.add_argument(
        "--command", dest="shell", metavar="SHELL", help="run on every new verdict: SLIMSWEEP_TRIAL, SLIMSWEEP_VERDICT"
    )
    verify = commands.add_parser("verify", help="check a campaign's deliverables; exit code 1 for any problem")
    verify.add_argument("folder", metavar="FOLDER", help="the folder `deliverables` of a campaign")
    verify.add_argument("--tracking-uri", metavar="URI", help="where its runs are (default: mlflow.db of its storage)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for problems that `verify` found, or 2 after a one-line error."""
    commands = {
        "pareto": _pareto, "effects": _effects, "report": _report, "table": _table, "daily": _daily, "watch": _watch,
        "verify": _verify,
    }  # fmt: skip
    try:
        options = parser().parse_args(arguments)
        if "out" in options:
            options.out = options.out or options.command
        return commands[options.command](options) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _load(options: argparse.Namespace, began: str = "") -> "SweepData":
    from analysis import store  # polars takes a while to import, which --help need not wait for

    data = store.load_all(options.tracking_uri, options.sweep, options.campaign, began)
    for note in data.notes:
        print(note)
    return data


def _pareto(options: argparse.Namespace) -> None:
    from analysis import pareto

    data = _load(options)
    computed = pareto.compute(data, options.x)
    paths = pareto.write(data, computed, options.out)
    if computed.left_out:
        print("not in the picture: " + ", ".join(f"{name} ({why})" for _, name, why in computed.left_out))
    for path in paths:
        print(path)
    # What a sweep left there itself is its own picture: of one sweep, against p50. Others would take its name.
    if not options.no_log and len(data.sweeps) == 1 and options.x == ACROSS[0]:
        pareto.log_files(options.tracking_uri, data.run_id, paths)
        print(f"attached to {data.name} in MLflow")


def _effects(options: argparse.Namespace) -> None:
    from analysis import findings

    data = _load(options)
    found = findings.collect(options.tracking_uri, data)
    for path in findings.write(found, data, options.out):
        print(path)
    for line in findings.lines(found):
        print(line)


def _report(options: argparse.Namespace) -> None:
    from analysis import manifest, report

    folder = options.deliverables or _beside(options.tracking_uri, options.campaign)
    known = manifest.Manifest.read(Path(folder) / manifest.NAME) if folder and options.campaign else None
    # Of campaigns of one name the folder says which is meant.
    data = _load(options, known.began if known and known.campaign == options.campaign else "")
    if options.campaign and not folder:
        print("no tasks of the plan and no ledger: give --deliverables FOLDER, which the campaign said at its end")
    for path in report.run(data, options.tracking_uri, options.out, folder):
        print(path)


def _beside(uri: str, campaign: str | None) -> str | None:
    """A campaign's deliverables where a campaign puts them by default: beside the store."""
    kind, _, file = uri.partition(":///")
    folder = Path(file).parent / (campaign or "") / "deliverables"
    return str(folder) if kind == "sqlite" and campaign and (folder / "manifest.json").is_file() else None


def _table(options: argparse.Namespace) -> None:
    from rich.console import Console

    from analysis import store, table

    data = store.load(options.tracking_uri, options.sweep, curve_keys=())
    records = data.trials.to_dicts()
    chosen = data.tags.get("chosen")
    rendered = table.render(records, data.settings, data.name, chosen)
    if options.csv:
        table.save(options.csv, table.csv_text(records, chosen))
    if options.markdown:
        table.save(options.markdown, table.markdown(records, data.settings, chosen))
    for note in data.notes:
        print(note)
    console = Console()
    # A pipe has no width: wide enough that no cell is folded away from whoever reads the file.
    (console if console.is_terminal else Console(width=160)).print(rendered)


def _daily(options: argparse.Namespace) -> None:
    from datetime import date

    from analysis import daily, table

    sheet = daily.compute(
        options.tracking_uri, date.today() if options.date is None else daily.parse_date(options.date)
    )
    if options.csv:
        table.save(options.csv, daily.csv_text(sheet))
    if options.markdown:
        table.save(options.markdown, daily.markdown(sheet))
    print(daily.markdown(sheet), end="")


def _watch(options: argparse.Namespace) -> None:
    from analysis import watch

    def show(view: watch.View) -> None:
        clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
        print(clear + "\n".join(watch.lines(view)), flush=True)

    if not 0 <= options.every <= 86_400:
        raise InputError(f"--every {options.every:g}: expected seconds from 0 to 86400")
    if options.every:
        watch.follow(options.tracking_uri, options.sweep, options.every, options.shell, show)
    else:
        show(watch.look(options.tracking_uri, options.sweep))


def _verify(options: argparse.Namespace) -> int:
    from analysis import verify

    found = verify.check(Path(options.folder), options.tracking_uri)
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"problem: {problem}")
    print(found.summary + (f"; {len(found.problems)} problems" if found.problems else "; no problem"))
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
