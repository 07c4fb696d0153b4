"""Many small trials while workers are killed at random: what grows must grow with the number of trials, and no faster.

    python benchmarks/soak.py                               # 2,000 trials, a worker killed every 10 s: half an hour
    python benchmarks/soak.py --trials 200 --kill-every 5   # a minute or two

Prints, as the trials end, what the driver and the mirror of MLflow hold in memory and open files, and what the
journal, the sweep's folder and MLflow's tables hold per trial; at the end what is missing or stands twice. Exit code 1
when anything is, or when memory or files grew.
"""

import argparse
import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.tune import Trainable

from sweeps.journal import SweepState, read_events

EPOCHS, EPOCH_S, WEIGHTS = 5, 0.1, bytes(100_000)
GROWN = 1.5  # times what the driver or the mirror held at a quarter of the trials: more is a leak


class Small(Trainable):
    """Five short epochs with a state and weights on disk."""

    def setup(self, config: dict[str, Any]) -> None:
        """Go on from the state."""
        self.folder = Path(config["state_dir"])
        state = self.folder / "state.pt"
        self.epoch = int(state.read_text()) if state.exists() else 0
        self.again = self.epoch > 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """An epoch; first, what was saved is said again: the driver may not have heard it."""
        if self.again:
            self.again = False
            return self.result()
        time.sleep(EPOCH_S)
        self.epoch += 1
        (self.folder / "best.pth").write_bytes(WEIGHTS)
        temporary = self.folder / "state.tmp"
        temporary.write_text(str(self.epoch))
        temporary.replace(self.folder / "state.pt")
        return self.result()

    def result(self) -> dict[str, Any]:
        """The last epoch's."""
        return {"epoch": self.epoch, "val_drop": 0.1 / self.epoch**2, "val_quality": 1.0, "kept": 1.0}


def drive(trials: int, folder: Path) -> int:
    """The sweep; its exit code."""
    from sweeps.launch import run
    from sweeps.spec import Gate, Sweep, Trial

    sweep = Sweep(
        stage="S", domain="none", trainable=Small, gate=Gate("drop", at_most=0.01), epochs=EPOCHS, name="soak",
        trials=[Trial("S-1", combo=f"t{index}", keyparams="", index=index) for index in range(trials)],
    )  # fmt: skip
    return run(sweep, ["--storage", str(folder)])


@dataclass(frozen=True)
class Sample:
    """What was held at one moment. Memory in MB (1e6 bytes), disk in kB."""

    done: int
    driver_MB: float
    driver_files: int
    mirror_MB: float
    mirror_files: int
    journal_kB: float
    folder_kB: float
    rows: int

    @classmethod
    def take(cls, driver: psutil.Process, storage: Path) -> "Sample":
        """Now. Files that go while they are counted do not count."""
        folder = storage / "soak_small_seed42"
        mirror = next((p for p in driver.children(recursive=True) if "sweeps.mlflow_writer" in p.cmdline()), None)
        sizes = []
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                sizes.append(path.stat().st_size)
        with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as store:
            rows = sum(
                store.execute(f"select count(*) from {table}").fetchone()[0] for table in ("runs", "metrics", "tags")
            )
        journal = folder / "journal.jsonl"
        done = sum(b'"event":"stop"' in line for line in journal.read_bytes().splitlines())
        return cls(
            done, driver.memory_info().rss / 1e6, driver.num_fds(), mirror.memory_info().rss / 1e6 if mirror else 0,
            mirror.num_fds() if mirror else 0, journal.stat().st_size / 1e3, sum(sizes) / 1e3, rows,
        )  # fmt: skip

    def line(self) -> str:
        """One row of the table."""
        each = [value / max(self.done, 1) for value in (self.journal_kB, self.folder_kB, self.rows)]
        return (
            f"{self.done:6} {self.driver_MB:9.0f} {self.driver_files:6} {self.mirror_MB:9.0f} {self.mirror_files:6} "
            + " ".join(f"{value:11.2f}" for value in each)
        )


def kill_one(driver: psutil.Process, draw: random.Random) -> bool:
    """SIGKILL to one worker that trains; False where none does."""
    workers = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "Trainable" in "".join(process.cmdline()[:1]):  # Ray's own processes are called ray:: as well
                workers.append(process)
    if not workers:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        draw.choice(workers).kill()
    return True


def account(storage: Path, trials: int) -> list[str]:
    """What is missing and what stands twice, in the journal and in MLflow."""
    journal = storage / "soak_small_seed42" / "journal.jsonl"
    state = SweepState.replay(journal)
    wrong = [] if state.ended == "finished" else [f"the sweep ended as {state.ended}"]
    lines = Counter((e["trial_id"], e["epoch"]) for e in read_events(journal) if e["event"] == "result")
    wrong += [f"journal: epoch {epoch} of {key}, {count} times" for (key, epoch), count in lines.items() if count > 1]
    wrong += [f"{trials - len(state.trials)} trials are missing"] if len(state.trials) != trials else []
    for trial in state.trials.values():
        whole = [epoch for epoch, _ in trial.results] == list(range(1, EPOCHS + 1))
        if not whole or (trial.record or {}).get("verdict") != "pass":
            wrong.append(f"{trial.exp_id}: epochs {[e for e, _ in trial.results]}, {json.dumps(trial.error)}")
    with contextlib.closing(sqlite3.connect(storage / "mlflow.db")) as store:
        runs = store.execute("select name, status, count(*) from runs group by name, status").fetchall()
        steps = store.execute(
            "select count(*), count(distinct run_uuid || ' ' || step) from metrics where key = 'val_drop'"
        )
        total, distinct = steps.fetchone()
    wrong += [f"MLflow: run {name} is {status}, {n} times" for name, status, n in runs if status != "FINISHED" or n > 1]
    if (total, distinct, len(runs)) != (trials * EPOCHS, trials * EPOCHS, trials + 1):
        wrong.append(f"MLflow: {total} steps, {distinct} different ones, {len(runs)} runs")
    return wrong


def main() -> int:
    """The soak; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--kill-every", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.drive:
        return drive(given.trials, given.drive)
    draw, killed, samples = random.Random(0), 0, list[Sample]()
    with tempfile.TemporaryDirectory(prefix="soak") as place:
        storage = Path(place)
        command = [sys.executable, __file__, "--drive", place, "--trials", str(given.trials)]
        with (storage / "driver.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        driver, began, last = psutil.Process(process.pid), time.monotonic(), time.monotonic()
        print("trials driver_MB  files mirror_MB  files  journal_kB   folder_kB  MLflow rows, all three per trial")
        while process.poll() is None:
            time.sleep(1)
            if time.monotonic() - last > given.kill_every:
                last = time.monotonic()
                killed += kill_one(driver, draw)
                with contextlib.suppress(psutil.Error, sqlite3.Error, OSError):
                    sample = Sample.take(driver, storage)
                    if sample.done >= (len(samples) + 1) * given.trials / 10:
                        samples.append(sample)
                        print(sample.line(), flush=True)
        wrong = account(storage, given.trials)
        if process.returncode:
            wrong.append(f"exit code {process.returncode}: {(storage / 'driver.log').read_text()[-1000:]}")
    took = time.monotonic() - began
    print(f"{given.trials} trials, {killed} workers killed, {took:.0f} s; lost or doubled: {len(wrong)}")
    if len(samples) > 3:
        first, end = samples[1], samples[-1]
        for name in ("driver_MB", "driver_files", "mirror_MB", "mirror_files"):
            if getattr(end, name) > GROWN * getattr(first, name):
                wrong.append(
                    f"{name}: {getattr(first, name):.0f} after {first.done} trials, "
                    f"{getattr(end, name):.0f} after {end.done}"
                )
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
