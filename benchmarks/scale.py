"""What of a sweep saturates first: many short trials through the launcher, and many reports a second.

    python benchmarks/scale.py trials                # 10,000 trials of one second on 64 slots: seven minutes
    python benchmarks/scale.py trials --count 2000   # two minutes
    python benchmarks/scale.py reports               # 1,000 trials that report every second, for a minute
    python benchmarks/scale.py reports --count 300

`trials`: Ray is told of 64 cores, and the trials sleep, with journal, stop-loss, records and MLflow as in any sweep.
The ideal is 64 trials a second; what is above it is the overhead. The first trials wait for one another: as long as
processes take longer to start than trials last, Ray gives a trial whose process is starting one that has become free,
and ends the other, over and over. `reports`: no actors; the scheduler and the callback that the launcher hands to Ray
are called in Ray's order by a clock, so that what is seen is our own part: how long a report waits for its decision,
and how far MLflow is behind. Its curves are those of `sweeps/curves.py`; a stopped trial makes room for another.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
from ray import tune
from ray.tune import Trainable
from ray.tune.experiment import Trial as RayTrial

from sweeps import cluster
from sweeps.curves import FAMILIES
from sweeps.journal import NAME, read_events
from sweeps.launch import run
from sweeps.spec import Gate, Sweep, Trial
from sweeps.tracking import CURSOR

SLOTS = 64
REACH_MS = 30.0
REPORT_S = 60.0
EPOCHS = 60
CATCH_UP_S = 300.0


class Sleeper(Trainable):
    """One epoch, in which a second passes; in the first trial of each slot, until all slots have one."""

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing to build."""
        self.number, self.meeting = config["params"]["index"], Path(config["state_dir"]).parent / "meeting"

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """An epoch without work."""
        if self.number < SLOTS:
            self.meeting.mkdir(exist_ok=True)
            (self.meeting / str(self.number)).touch()
            while len(list(self.meeting.iterdir())) < SLOTS:
                time.sleep(0.2)
        time.sleep(1.0)
        return {"epoch": 1, "val_drop": 0.0, "val_quality": 1.0}


def sweep_of(count: int, epochs: int) -> Sweep:
    """As many trials that differ in nothing but a number."""
    trials = [Trial(f"S-{n}", combo=f"t{n}", keyparams="", index=n) for n in range(count)]
    return Sweep(
        stage="S",
        domain="none",
        trainable=Sleeper,
        gate=Gate("drop", at_most=0.01),
        trials=trials,
        name="scale",
        epochs=epochs,
    )


def trials(count: int, folder: Path) -> None:
    """`count` trials of a second through the launcher."""
    cluster.cores = lambda: SLOTS  # what Ray is told that this machine has
    me, over = psutil.Process(), threading.Event()
    samples: list[tuple[int, int]] = []  # trials that ended, the driver's memory in bytes
    spent: dict[str, float] = {}

    def sample() -> None:
        path, ended, at = folder / f"scale_small_seed42/{NAME}", 0, 0
        while not over.wait(1.0):
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(at)
                    ended, at = ended + file.read().count(b'"event":"stop"'), file.tell()
            samples.append((ended, me.memory_info().rss))
            if ended < count:
                spent.update(cpu_seconds(me))

    watch = threading.Thread(target=sample, daemon=True)
    watch.start()
    began = time.monotonic()
    code = run(sweep_of(count, 1), ["--storage", str(folder)])
    whole = time.monotonic() - began
    over.set()
    watch.join()
    ends = [e["t"] for e in read_events(folder / f"scale_small_seed42/{NAME}") if e["event"] == "stop"]
    if code not in (0, 1) or len(ends) != count:
        raise RuntimeError(f"the launcher ended with {code} after {len(ends)} of {count} trials")
    tenth = count // 10
    ideal, steady = count / SLOTS, ends[-1] - ends[tenth]
    each = (steady / (count - tenth) - 1 / SLOTS) * 1000
    print(f"\n{count} trials of 1 s on {SLOTS} slots: {whole:.0f} s with start and end, ideal {ideal:.0f} s")
    print(f"overhead per trial, first tenth left out: {each:.1f} ms  (to reach: at most {REACH_MS:g})")
    for share in (0.1, 0.5, 1.0):
        rss = next(bytes_ for ended, bytes_ in samples if ended >= share * count)
        print(f"memory of the driver at {100 * share:3.0f} % of the trials: {rss / 2**20:.0f} MB")
    print("CPU-ms per trial: " + ", ".join(f"{name} {1000 * s / count:.1f}" for name, s in sorted(spent.items())))


def cpu_seconds(me: psutil.Process) -> dict[str, float]:
    """CPU-seconds so far of the driver, of MLflow's mirror, and of each kind of Ray's processes."""
    spent = {"driver": _cpu(me)}
    for child in me.children(recursive=True):
        try:
            words = " ".join(child.cmdline())
            name = "mirror" if "sweeps.mlflow_writer" in words else child.name().split("::")[0]
            kind = {"gcs_server": "GCS", "raylet": "raylet", "mirror": "mirror", "ray": "workers"}.get(name, "other")
            spent[kind] = spent.get(kind, 0.0) + _cpu(child)
        except psutil.NoSuchProcess:
            continue
    return spent


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class Clockwork:
    """In place of `tune.Tuner`: calls what it is given as Ray's controller does, with made-up reports in real time."""

    concurrent = 1000
    folder = Path()

    def __init__(self, trainable: Any, *, tune_config: tune.TuneConfig, run_config: tune.RunConfig) -> None:
        """tune_config: scheduler and queue; run_config: callbacks."""
        self.scheduler: Any = tune_config.scheduler
        self.queue: Any = tune_config.search_alg
        self.watch: Any = (run_config.callbacks or [])[0]

    def fit(self) -> None:
        """REPORT_S seconds of reports; says what was seen and interrupts the sweep."""
        rng = np.random.default_rng(1)
        families = list(FAMILIES.values())
        self.curves = [families[n % len(families)](rng, EPOCHS) for n in range(400)]
        self.trials: list[Any] = []
        running = [self._next(rng) for _ in range(self.concurrent)]
        delays, busy = [], []
        began = time.monotonic()
        for number, due in arrivals(rng, self.concurrent, began):
            if (early := due - time.monotonic()) > 0:  # a sleep of nothing gives the core away
                time.sleep(early)
            started, cpu = time.monotonic(), time.thread_time()
            trial, curve = running[number]
            epoch = len(curve.seen) + 1
            curve.seen.append(drop := float(curve.drops[epoch - 1]))
            result = {"epoch": epoch, "val_drop": drop, "val_quality": 1.0, "time_this_iter_s": 1.0}
            result["timestamp"] = time.time() - (started - due)
            said = self.scheduler.on_trial_result(None, trial, result)
            self.watch.on_trial_result(iteration=0, trials=[], trial=trial, result=result)
            decided = time.monotonic()
            if said == "STOP":
                running[number] = self._next(rng)
            self.watch.on_step_end(iteration=0, trials=self.trials)
            delays.append(decided - due)
            busy.append(time.thread_time() - cpu)
            if time.monotonic() - began > REPORT_S:
                break
        self._tell(np.array(delays), np.array(busy), time.monotonic() - began)
        raise KeyboardInterrupt

    def _next(self, rng: np.random.Generator) -> tuple[Any, Any]:
        config = self.queue.suggest("")
        if not isinstance(config, dict):
            raise RuntimeError("more trials were stopped than were planned")
        drops = self.curves[rng.integers(len(self.curves))]
        metadata = SimpleNamespace(num_failures=0)
        trial = SimpleNamespace(config=config, status=RayTrial.RUNNING, run_metadata=metadata)
        self.trials.append(trial)
        self.watch.on_trial_start(iteration=0, trials=[], trial=trial)
        return trial, SimpleNamespace(drops=drops, seen=[])

    def _tell(self, delays: Any, busy: Any, seconds: float) -> None:
        p50, p99 = np.quantile(delays, [0.5, 0.99])
        judged = f"{len(delays)} of {self.concurrent * seconds:.0f} judged in {seconds:.0f} s"
        print(f"\n{self.concurrent} trials, a report a second each: {judged}")
        print(f"report to decision: p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, last {1000 * delays[-1]:.1f} ms")
        print(f"CPU per report: mean {1000 * busy.mean():.2f} ms, p99 {1000 * np.quantile(busy, 0.99):.2f} ms")
        journal = self.folder / f"scale_small_seed42/{NAME}"
        whole, began = journal.stat().st_size, time.monotonic()
        print(f"MLflow is behind by {100 * (1 - mirrored(journal) / whole):.0f} % of the journal", flush=True)
        while mirrored(journal) < whole and time.monotonic() - began < CATCH_UP_S:
            time.sleep(0.2)
        print(f"and has caught up to {100 * mirrored(journal) / whole:.0f} % after {time.monotonic() - began:.0f} s")


def arrivals(rng: np.random.Generator, count: int, began: float) -> Iterator[tuple[int, float]]:
    """Number of the trial and moment of each report: every trial once a second, none at the same time."""
    order = rng.permutation(count)
    second = 0
    while True:
        for place, number in enumerate(order):
            yield int(number), began + second + place / count
        second += 1


def mirrored(journal: Path) -> int:
    """Bytes of the journal that are in MLflow."""
    try:
        return int(json.loads((journal.parent / CURSOR).read_text())["offset"])
    except (OSError, ValueError, KeyError):
        return 0


def reports(count: int, folder: Path) -> None:
    """`count` trials that report once a second."""
    Clockwork.concurrent, Clockwork.folder = count, folder
    vars(tune)["Tuner"] = Clockwork
    run(sweep_of(6 * count, EPOCHS), ["--storage", str(folder)])


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("trials", "reports"))
    parser.add_argument("--count", type=int, help="trials; 10,000 one after the other, or 1,000 at a time")
    given = parser.parse_args(argv)
    count = given.count or {"trials": 10_000, "reports": 1_000}[given.what]
    least = {"trials": 10 * SLOTS, "reports": 1}[given.what]
    if count < least:
        parser.error(f"--count {count}: expected {least} or more")
    with tempfile.TemporaryDirectory() as folder:
        {"trials": trials, "reports": reports}[given.what](count, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
