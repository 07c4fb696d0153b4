"""The command line, the same for every sweep script; what a campaign has in common with them."""

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import InputError, Parser
from sweeps.placement import Placement, add_flags, read_flags
from sweeps.settings import PROFILES, parse_set
from sweeps.tracking import URI

HANG_MIN = 120.0


@dataclass(frozen=True)
class Flags:
    """What was asked for. storage: an absolute folder. samples: searched trials (0 for the grid). audit: share of
    stopped trials that run on, 0 to 1. campaign: the campaign that the sweep belongs to. share: part of the cluster's
    slots that the sweep uses. placement: what a trial needs of its node. hang_min:
    minutes without a report after which a trial is taken to hang.
    """

    address: str | None
    profile: str
    search: str
    samples: int
    overrides: dict[str, Any]
    storage: Path
    tracking_uri: str | None
    resume: bool
    dry_run: bool
    seed: int
    seeds: int | None
    campaign: str | None
    share: float
    audit: float
    placement: Placement
    hang_min: float


def common(doc: str) -> argparse.ArgumentParser:
    """The flags that sweeps and campaigns share. doc: the script's docstring, shown by --help."""
    first, _, rest = doc.strip().partition("\n")
    parser = Parser(
        description=first,
        epilog=f"examples:\n{rest}" if rest.strip() else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--address", metavar="HOST:PORT", help="a running Ray cluster, or `auto`; default: this machine alone")
    add("--profile", choices=PROFILES, default="small", help="scale of everything (default: %(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable")
    add("--storage", default="./runs", metavar="FOLDER", help="where sweeps are kept (default: %(default)s)")
    add("--tracking-uri", metavar="URI", help=f"MLflow store or server (default: ${URI}, else sqlite in the storage)")
    add("--resume", action="store_true", help="go on with what was interrupted; what is finished is kept")
    add("--dry-run", action="store_true", help="print what would run, its files and estimated cost; start nothing")
    add("--seed", type=int, default=42, help="seed of the trials (default: %(default)s)")
    share = "let this share of the trials that stop-loss would end run on, to count its false stops (default: 0)"
    add("--audit", type=float, default=0.0, metavar="SHARE", help=share)
    hang = "without a report a trial is killed, and retried once (default: %(default)g)"
    add("--hang-after", type=float, default=HANG_MIN, metavar="MIN", help=hang)
    return parser


def check(given: argparse.Namespace) -> None:
    """InputError for what cannot be among the flags of `common` and --campaign."""
    for flag in ("storage", "tracking_uri", "address"):
        if getattr(given, flag) == "":
            raise InputError(f"--{flag.replace('_', '-')} is empty: give a value or leave it out")
    if "://" in given.storage:
        raise InputError(
            f"--storage {given.storage}: expected a folder, as a sweep appends to, renames and locks its files; mount "
            "one on every host (NFS 4, Lustre, CephFS). A bucket can hold MLflow's artifacts: deploy/mlflow_server.sh"
        )
    _check_storage(Path(given.storage).expanduser().absolute())
    if given.seed < 0:
        raise InputError(f"--seed {given.seed}: expected 0 or more")
    if not 0 <= given.audit <= 1:
        raise InputError(f"--audit {given.audit:g}: expected a share from 0 to 1, for example 0.2")
    if not 0 < given.hang_after < math.inf:
        raise InputError(f"--hang-after {given.hang_after:g}: expected minutes, more than the longest epoch takes")
    if given.campaign is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", given.campaign):
        raise InputError(f"--campaign {given.campaign!r}: expected a name of letters, digits, dots, - and _")


def tracking_uri(given: argparse.Namespace) -> str | None:
    """Where MLflow's runs shall go: the flag, else the environment, in which a password stands in no process list."""
    return given.tracking_uri or os.environ.get(URI) or None


def _check_storage(storage: Path) -> None:
    """InputError for a storage in which a start could make no folder: so that a dry run tells it as well."""
    place = next(place for place in (storage, *storage.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise InputError(f"--storage {storage}: {place} is no folder; give a folder, it is made where it is missing")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--storage {storage}: {place} may not be written by this user; give another folder")


def parse(doc: str, argv: Sequence[str] | None, searchable: bool = True) -> Flags:
    """Read the flags of a sweep; InputError for what cannot be. doc: as for `common`."""
    parser = common(doc)
    add = parser.add_argument
    add(
        "--search",
        choices=("grid", "optuna"),
        default="grid",
        help="the plan's trials, or a search beyond them",
    )
    add("--samples", type=int, metavar="N", help="trials that --search optuna adds to the plan's own")
    add("--seeds", type=int, metavar="N", help="run every trial with N seeds from --seed on (default: the script's)")
    add("--campaign", metavar="NAME", help="the campaign that this belongs to: its folder, and a tag in MLflow")
    add("--share", type=float, default=1.0, metavar="X", help="use this part of the cluster, 0 to 1 (default: all)")
    add_flags(parser)
    given = parser.parse_args(argv)
    check(given)
    if not 0 < given.share <= 1:
        raise InputError(f"--share {given.share:g}: expected a part of the cluster, above 0 and at most 1")
    if given.seeds is not None and given.seeds < 1:
        raise InputError(f"--seeds {given.seeds}: expected 1 or more")
    return Flags(
        address=given.address,
        profile=given.profile,
        search=given.search,
        samples=_samples(given.search, given.samples, searchable),
        overrides=parse_set(given.set),
        storage=Path(given.storage).expanduser().absolute(),
        tracking_uri=tracking_uri(given),
        resume=given.resume,
        dry_run=given.dry_run,
        seed=given.seed,
        seeds=given.seeds,
        campaign=given.campaign,
        share=given.share,
        audit=given.audit,
        placement=read_flags(given),
        hang_min=given.hang_after,
    )


def _samples(search: str, samples: int | None, searchable: bool) -> int:
    if samples is not None and samples < 1:
        raise InputError(f"--samples {samples}: expected 1 or more")
    if search == "grid":
        if samples is not None:
            raise InputError(f"--samples {samples}: only --search optuna takes samples; add it or drop --samples")
        return 0
    if not searchable:
        raise InputError("--search optuna: this sweep has no search space; use --search grid")
    if samples is None:
        raise InputError("--search optuna: expected --samples N, the number of trials to search")
    return samples
