"""A sweep without any model, to try the launcher with: each trial's drops follow a formula, or go wrong as
asked.
"""

import json
import math
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import get_runtime_context
from ray.actor import exit_actor
from ray.tune import Trainable

from sweeps import cluster
from sweeps.launch import main
from sweeps.measure import BASELINE
from sweeps.spec import Gate, Sweep, Trial, uniform
from trainables import preemption

SLEEP = float(os.environ.get("TOY_SLEEP", "0"))
EPOCHS = int(os.environ.get("TOY_EPOCHS", "4"))


class Toy(Trainable):
    """drop = floor + 0.1 / epoch^2; `fault` at epoch `at`: raise, nan, kill (once), sick (raise until healed), hang
    (once, or always), memory (more than there is), stumble (raise once before every epoch), leave
    (be killed just after the last report), notice (raise three times, then leave as for a drain notice). Kill and
    hang at epoch 0 are while the trial is built.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.config_ = config
        self.folder = Path(config["state_dir"])
        self.params = config["params"]
        state = self.folder / "state.pt"
        self.epoch = json.loads(state.read_text())["epoch"] if state.exists() else 0
        self.again = self.epoch > 0
        self.go_wrong(0)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if os.environ.get("TOY_ANEW"):
            return False
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self.again:  # what was saved may not have been reported
            self.again = False
            return self.report()
        end = time.monotonic() + self.params.get("sleep", 0)
        while time.monotonic() < end:
            time.sleep(min(0.2, max(0, end - time.monotonic())))
            if preemption.noticed():
                exit_actor()
        fault, at = self.params.get("fault"), self.params.get("at", 2)
        if fault == "raise" and self.epoch + 1 == at:
            raise RuntimeError("the toy broke")
        if fault == "sick" and self.epoch + 1 == at and not healed(self.config_):
            raise RuntimeError("the toy is sick")
        stumbled = self.folder / f"stumbled_{self.epoch}"
        if fault == "stumble" and not stumbled.exists():
            stumbled.touch()
            raise RuntimeError("the toy stumbled")
        tried = self.folder / "tried"
        if fault == "notice" and self.epoch + 1 == at and tried.touch() is None and tried.stat().st_size < 4:
            with tried.open("a") as log:
                log.write("x")
            if tried.stat().st_size < 4:
                raise RuntimeError("the toy stumbled")
            exit_actor()  # as for a node that is taken away
        hoard = []
        while fault == "memory" and self.epoch + 1 == at:
            hoard.append(b"1" * (20 << 20))
            time.sleep(0.1)
        self.go_wrong(self.epoch + 1)
        self.epoch += 1
        (self.folder / "host").write_text(socket.gethostname())  # for benchmarks/faults.py
        with (self.folder / "steps.log").open("a") as log:
            log.write(f"{self.epoch}\n")
        (self.folder / "best.pth").write_text(f"weights after epoch {self.epoch}")
        temporary = self.folder / "state.tmp"
        temporary.write_text(json.dumps({"epoch": self.epoch}))
        temporary.replace(self.folder / "state.pt")
        if fault == "leave" and self.epoch == EPOCHS:  # dies with its report out, while it becomes the next trial
            threading.Timer(0.004, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return self.report()

    def go_wrong(self, epoch: int) -> None:
        """Be killed or hang, if that is this trial's fault at this epoch."""
        fault, once = self.params.get("fault"), self.folder / "went_wrong"
        if fault not in ("kill", "hang") or epoch != self.params.get("at", 2):
            return
        if once.exists() and not self.params.get("always"):
            return
        once.touch()
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10_000)

    def report(self) -> dict[str, Any]:
        drop = self.params.get("floor", 0.0) + 0.1 / self.epoch**2
        if self.params.get("fault") == "nan" and self.epoch >= self.params.get("at", 2):
            drop = math.nan
        return {"epoch": self.epoch, "val_drop": drop, "val_quality": 0.1 * (1 + drop)}


def healed(job: dict[str, Any]) -> bool:
    """Whether the test has put the file `healed` into the sweep's folder."""
    return (Path(job["state_dir"]).parents[1] / "healed").exists()


def identify(job: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    return {}, {}


def prepare(job: dict[str, Any]) -> None:
    if os.environ.get("TOY_PREPARE") == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    Path(job["cache_dir"]).mkdir(parents=True, exist_ok=True)
    for done in range(0, 4 if SLEEP else 0):
        Path(job["report"]).write_text(json.dumps(["toys", done, 3]))
        time.sleep(1.5)


def measure_quality(job: dict[str, Any]) -> dict[str, Any]:
    time.sleep(float(os.environ.get("TOY_QUALITY", "0")))
    drop = 0.0 if job["weights"] is None else job["params"].get("floor", 0.0)
    quality = 0.1 * (1 + drop)
    if job["weights"]:
        jitter = np.random.default_rng([job["seed"], int(1000 * drop)]).normal(0, 1e-3, 50)
        np.save(Path(job["state_dir"]) / "test_costs.npy", quality + jitter)
        (Path(job["state_dir"]) / "deployed.onnx").write_text(f"graph of {job['exp_id']}")
    return {
        "quality": quality,
        "absrel": quality,
        "drop": drop,
        "drop_lo": drop - 1e-3,
        "drop_hi": drop + 1e-3,
    }


def measure_latency(job: dict[str, Any]) -> dict[str, Any]:
    if job["params"].get("fault") == "shy" and not healed(job):
        raise RuntimeError("the toy cannot be timed")
    with (Path(job["work_dir"]) / "timed").open("a") as log:
        log.write(f"{get_runtime_context().get_node_id()} {job['exp_id']}\n")
    time.sleep(float(os.environ.get("TOY_TIMING", "0")))
    whole = dict.fromkeys(BASELINE, 0.5) if os.environ.get("TOY_WHOLE") else {}
    p50 = 2.0 if job["weights"] is None else 1.0
    return {
        **whole,
        "t_pair_p50_ms": p50,
        "t_pair_p95_ms": 1.2 * p50,
        "engine": "none",
        "extra": {"p50_ratio": 2.0 / p50},
    }


def compile_engine(job: dict[str, Any]) -> dict[str, Any]:
    if os.environ.get("TOY_REFUSES"):
        raise RuntimeError("no compiler here")
    for suffix in ("trt", "trt.json", "qdq.onnx"):
        (Path(job["state_dir"]) / f"deployed.{suffix}").write_text(f"engine of {job['exp_id']}")
    return {"trt": "compiled, not executed", "trt_int8_share": 1.0}


MEASURES = SimpleNamespace(
    identify=identify, prepare=prepare, measure_quality=measure_quality, measure_latency=measure_latency,
    compile_engine=compile_engine,
)  # fmt: skip
TRIALS = {
    "good": [
        Trial("T-1", combo="good", keyparams="", floor=0.0, sleep=SLEEP, saves="good.pth"),
        Trial("T-2", combo="bad", keyparams="", floor=0.3, sleep=SLEEP, saves="bad.pth"),
    ],
    "faulty": [
        Trial("T-1", combo="good", keyparams="", floor=0.0, saves="good.pth"),
        Trial("T-2", combo="nan", keyparams="", fault="nan"),
        Trial("T-3", combo="raises", keyparams="", fault="raise"),
        Trial("T-4", combo="killed", keyparams="", floor=0.005, fault="kill", at=3),
    ],
    "healing": [
        Trial("T-1", combo="good", keyparams="", floor=0.0, saves="good.pth"),
        Trial("T-2", combo="sick", keyparams="", fault="sick", at=3),
        Trial("T-3", combo="shy", keyparams="", fault="shy"),
    ],
    "steady": [
        Trial("T-1", combo=name, keyparams="", floor=number / 1000, sleep=SLEEP, saves=f"{name}.pth")
        for number, name in enumerate("abc")
    ],
    "hanging": [
        Trial("T-1", combo="once", keyparams="", fault="hang", always=False, saves="good.pth"),
        Trial("T-2", combo="always", keyparams="", fault="hang", always=True),
        Trial("T-3", combo="stumbles", keyparams="", fault="stumble"),
    ],
    "building": [
        Trial("T-1", combo="good", keyparams="", floor=0.0, saves="good.pth"),
        Trial("T-2", combo="killed", keyparams="", fault="kill", at=0),
        Trial("T-3", combo="hangs", keyparams="", fault="hang", at=0),
    ],
    "leaving": [
        Trial("T-1", combo=name, keyparams="", floor=i / 2000, sleep=SLEEP, fault="leave", saves=f"{name}.pth")
        for i, name in enumerate("abcdefgh")
    ],
    "noticed": [Trial("T-1", combo="noticed", keyparams="", floor=0.0, fault="notice", saves="noticed.pth")],
    "greedy": [
        Trial("T-1", combo="good", keyparams="", floor=0.0, sleep=SLEEP, saves="good.pth"),
        Trial("T-2", combo="greedy", keyparams="", fault="memory", at=3),
    ],
    "hopeless": [Trial("T-1", combo="raises", keyparams="", fault="raise", at=1)],
    "baseline": [],
    "arms": [
        Trial("T-1", combo="kept", keyparams="", floor=0.0),
        Trial("T-1", combo="out", keyparams="", floor=0.2, saves="out.onnx"),
    ],
}
ARMS = os.environ.get("TOY_TRIALS") == "arms"

SWEEP = Sweep(
    stage="T",
    epochs=EPOCHS,
    domain="toy",
    trainable=Toy,
    measure=MEASURES,
    gate=Gate("drop", at_most=0.01),
    trials=TRIALS[os.environ.get("TOY_TRIALS", "good")],
    space={"floor": uniform(0, 0.2)},
    search_task="T-search",
    best=("best.pth", "best.onnx", "best.trt") if ARMS else "best.pth",
    seeds=3 if ARMS else 1,
    reference="kept" if ARMS else None,
    log="log.json",
    baseline="teacher.json" if os.environ.get("TOY_TRIALS") == "baseline" else None,
    name="toy",
)

if __name__ == "__main__":
    cluster.LOOK_S = float(os.environ.get("TOY_LOOK", cluster.LOOK_S))
    main(SWEEP)
