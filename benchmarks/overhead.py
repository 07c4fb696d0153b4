"""What the launcher costs per trial, beside plain Ray Tune with and without Ray's own MLflow callback.

    python benchmarks/overhead.py                # about five minutes on two cores
    python benchmarks/overhead.py --trials 100   # steadier

All three run the same trivial class trainable, one epoch a trial, with reuse_actors and without Ray's file
loggers. Each case runs in a process of its own with few and with many trials; the difference of the two
over the difference in trials is the time per trial, so that what only the start costs (Ray, imports, an
empty database) drops out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Trainable

FEW = 5
REACH = {"mlflow callback": 1 / 8, "plain": 1.5}


class Trivial(Trainable):
    """One number per epoch and nothing else."""

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing to build."""
        self.epoch = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """An epoch without work."""
        self.epoch += 1
        return {"epoch": self.epoch, "val_drop": 0.0, "val_quality": 1.0}


def ours(trials: int, folder: Path) -> None:
    """The launcher: journal, stop-loss, records, files and MLflow, flushed before it returns."""
    from sweeps.launch import NOTHING, run
    from sweeps.spec import Gate, Sweep, Trial

    sweep = Sweep(
        stage="B",
        domain="none",
        trainable=Trivial,
        gate=Gate("drop", at_most=0.01),
        trials=[Trial(f"B-{index}", combo=f"t{index}", keyparams="", index=index) for index in range(trials)],
        name="overhead",
    )
    if run(sweep, ["--storage", str(folder)]) not in (0, NOTHING):  # these trials leave no weights
        raise RuntimeError("the launcher refused the sweep")


def plain(trials: int, folder: Path, callbacks: list[Any]) -> None:
    """Ray Tune as its documentation shows it."""
    import ray

    ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False, log_to_driver=False)
    tune.Tuner(
        tune.with_resources(Trivial, {"cpu": 1}),
        param_space={"index": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name="plain",
            storage_path=str(folder),
            stop={"training_iteration": 1},
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=callbacks,
            verbose=0,
        ),
    ).fit()
    ray.shutdown()


def mlflow_callback(trials: int, folder: Path) -> None:
    """The same with Ray's MLflow callback on sqlite."""
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    plain(trials, folder, [MLflowLoggerCallback(tracking_uri=uri, experiment_name="overhead")])


CASES = {"ours": ours, "plain": lambda n, folder: plain(n, folder, []), "mlflow callback": mlflow_callback}


def seconds(case: str, trials: int) -> float:
    """Wall seconds of one case in a fresh process."""
    command = [sys.executable, __file__, "--case", case, "--trials", str(trials)]
    env = {**os.environ, "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_worker_niceness": "0"}
    started = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    return time.monotonic() - started


def main() -> None:
    """Run all cases and print the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="trials of the long runs (default: %(default)s)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        with tempfile.TemporaryDirectory() as folder:
            CASES[given.case](given.trials, Path(folder))
        return
    if given.trials <= FEW:
        parser.error(f"--trials {given.trials}: expected more than {FEW}")
    each: dict[str, float] = {}
    for case in CASES:
        few, many = seconds(case, FEW), seconds(case, given.trials)
        each[case] = (many - few) / (given.trials - FEW)
        print(
            f"{case:16} {1000 * each[case]:8.1f} ms per trial  ({few:.1f} s for {FEW}, {many:.1f} s for {given.trials})"
        )
    for case, reach in REACH.items():
        print(f"ours / {case:16} {each['ours'] / each[case]:.3f}  (to reach: at most {reach:.3f})")


if __name__ == "__main__":
    main()
