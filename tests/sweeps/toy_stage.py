"""Stages of a made-up campaign: real sweeps of the toy; the script of a stage calls `run` with its name.

first ends well, second needs the file of first, third misses its gate, fourth needs third to have met it.
"""

import os
from dataclasses import replace
from pathlib import Path

import toy_sweep
from pydantic import BaseModel

from sweeps.catalogue import Needs, Stage, Task, drop
from sweeps.launch import main
from sweeps.spec import SettingsFile, Trial


class ToySettings(BaseModel):
    """What a toy trial may be told."""

    floor: float
    sleep: float
    model: str


SETTINGS = SettingsFile(str(Path(__file__).with_name("toy_settings.yaml")), ToySettings)
SLEEP = {name: float(os.environ.get(f"TOY_SLEEP_{name.upper()}", "0")) for name in ("first", "second")}
TRIALS = {
    "first": [
        Trial("A-1", combo="good", keyparams="", floor=0.0, sleep=SLEEP["first"], saves="good.pth"),
        Trial("A-2", combo="bad", keyparams="", floor=0.3, sleep=SLEEP["first"], saves="bad.pth"),
    ],
    "second": [Trial("B-1", combo="next", keyparams="", floor=0.0, sleep=SLEEP["second"], saves="second.pth")],
    "third": [Trial("C-1", combo="poor", keyparams="", floor=0.3, saves="third.pth")],
    "fourth": [Trial("D-1", combo="last", keyparams="", floor=0.0, saves="fourth.pth")],
}


def run(name: str) -> None:
    """The sweep of one stage."""
    best = "first_best.pth" if name == "first" else None
    sweep = replace(toy_sweep.SWEEP, trials=TRIALS[name], settings=(SETTINGS,), best=best, log=f"{name}.json", space={},
                    latency=False, epochs=6, name=name)  # fmt: skip
    main(sweep)


def plan(scripts: Path) -> list[Stage]:
    """The catalogue; scripts: the folder of the stages' scripts."""

    def stage(key: str, name: str, tasks: list[Task], *needs: Needs) -> Stage:
        return Stage(key, "toy", str(scripts / f"{name}.py"), (SETTINGS,), tasks, needs, {"small": 0.001})

    return [
        stage("A", "first", [
            Task("A-1", "a good one", ("good.pth",), (drop(0.01),)),
            Task("A-2", "a bad one"),
            Task("A-3", "the best", ("first_best.pth", "first.json"), (drop(0.01),)),
        ]),
        stage("B", "second", [Task("B-1", "what comes of it", ("second.pth",), (drop(0.01),))],
              Needs("A-3", file="first_best.pth", setting="model")),
        stage("C", "third", [Task("C-1", "a poor one", ("third.pth",), (drop(0.01),))]),
        stage("D", "fourth", [Task("D-1", "after the poor one", ("fourth.pth",), (drop(0.01),))], Needs("C-1")),
    ]  # fmt: skip
