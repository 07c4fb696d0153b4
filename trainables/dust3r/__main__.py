"""What a model costs before anything is run, and the cloud that it makes of a scene.

python -m trainables.dust3r describe --profile full
python -m trainables.dust3r describe --profile full --set head=0.5 --set shared_head=true --set precision=bfloat16
python -m trainables.dust3r describe --set teacher=MODEL.pth
python -m trainables.dust3r scene --out FOLDER
python -m trainables.dust3r scene --model MODEL.pth --data FOLDER --set pair_graph=complete --known-poses --out FOLDER
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from engines.errors import InputError, Parser, command_line
from engines.untrusted import yaml_data
from trainables.config import DistillSettings, WorkloadSettings
from trainables.dust3r import released, scene_report
from trainables.dust3r.config import Config
from trainables.dust3r.describe import describe
from trainables.dust3r.domain import SMALL_TEACHER, Dust3r

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
        values[key] = yaml_data(value, f"--set {key}")
    return values


def teacher_of(named: str, profile: str) -> dict[str, Any]:
    """The architecture of a teacher's file; 'shipped' at profile full stands for the released 512_dpt."""
    if named != "shipped":
        return released.read(Path(named))[0]
    return Config().to_data() if profile == "full" else dict(SMALL_TEACHER)


def scene(given: argparse.Namespace) -> str:
    """Reconstruct the workload's test scene; images are as large as those that the model was made for, if not told."""
    values, told = settings("small", given.set), {change.partition("=")[0] for change in given.set}
    values |= {key: flag for key, flag in (("teacher", given.model), ("data", given.data)) if key not in told}
    if "image_size" not in told:
        height, width = teacher_of(values["teacher"], "small")["img_size"]
        values["image_size"] = f"{width}x{height}"
    domain = Dust3r(values, seed=0)
    model = domain.teacher().to("cuda" if torch.cuda.is_available() else "cpu")
    steps = domain.workload.scene_steps
    return scene_report.write(model, domain.source.scene(), Path(given.out), given.known_poses, steps)


def table(given: argparse.Namespace) -> str:
    """The costs of teacher and student."""
    values = settings(given.profile, given.set)
    workload, distill = WorkloadSettings.among(values), DistillSettings.among(values)
    return describe(teacher_of(distill.teacher, given.profile), workload, distill)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Print what the chosen command has to say."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="describe|scene")
    costs = commands.add_parser("describe", help="parameters, FLOPs, memory and cache of teacher and student")
    costs.add_argument("--profile", choices=["demo", "small", "full"], default="small")
    costs.set_defaults(run=table)
    whole = commands.add_parser("scene", help="cloud.ply, cloud.png and poses.json of the workload's test scene")
    whole.add_argument("--model", default="shipped", metavar="FILE", help="checkpoint; default: the shipped teacher")
    whole.add_argument("--data", default="rooms", metavar="FOLDER", help="recordings; default: procedural rooms")
    whole.add_argument("--out", required=True, metavar="FOLDER", help="where the files go")
    whole.add_argument("--known-poses", action="store_true", help="keep the recorded poses: the cloud is in metres")
    whole.set_defaults(run=scene)
    for command in (costs, whole):
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    given = parser.parse_args(arguments)
    try:
        print(given.run(given))
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        key = ".".join(map(str, first["loc"]))  # empty where several do not go together: the message names them
        raise InputError(f"{key}={first['input']!r}: {said}" if key else said) from None


if __name__ == "__main__":
    sys.exit(main())
