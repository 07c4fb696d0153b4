"""python -m trainables.dust3r describe: what teacher and student cost at a profile's scale, before anything is run.

python -m trainables.dust3r describe --profile full
python -m trainables.dust3r describe --profile full --set head=0.5 --set shared_head=true --set precision=bfloat16
python -m trainables.dust3r describe --set teacher=MODEL.pth
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from engines.errors import InputError, command_line
from trainables import checkpoint
from trainables.config import DistillSettings, WorkloadSettings
from trainables.dust3r.config import Config
from trainables.dust3r.describe import describe
from trainables.dust3r.domain import SMALL_TEACHER

SETTINGS = Path(__file__).parents[2] / "sweeps" / "settings"  # data, not code: nothing here imports a sweep


def settings(profile: str, changes: list[str]) -> dict[str, Any]:
    """The values of workload.yaml and distill.yaml for a profile, with KEY=VALUE changes on top."""
    values: dict[str, Any] = {}
    for name in ("workload.yaml", "distill.yaml"):
        data = yaml.safe_load((SETTINGS / name).read_text())
        values |= {**data["defaults"], **data["profiles"].get(profile, {})}
    for change in changes:
        key, given, value = change.partition("=")
        if not given or key not in values:
            raise InputError(f"--set {change}: expected KEY=VALUE, KEY of workload.yaml or distill.yaml")
        values[key] = yaml.safe_load(value)
    return values


def teacher_of(named: str, profile: str) -> dict[str, Any]:
    """The architecture of a teacher's file; 'shipped' at profile full stands for the released 512_dpt."""
    if named != "shipped":
        config, _ = checkpoint.read_model(Path(named))
        return config
    return Config().to_data() if profile == "full" else dict(SMALL_TEACHER)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["describe"])
    parser.add_argument("--profile", choices=["demo", "small", "full"], default="small")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable"
    )
    given = parser.parse_args(arguments)
    values = settings(given.profile, given.set)
    try:
        workload, distill = WorkloadSettings.among(values), DistillSettings.among(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc'])) or 'settings'}: {first['msg']}") from None
    print(describe(teacher_of(distill.teacher, given.profile), workload, distill))


if __name__ == "__main__":
    sys.exit(main())
