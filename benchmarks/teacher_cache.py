"""What the teacher costs a training step: none, cached, recomputed. Prints ratios of one interleaved run.

    python benchmarks/teacher_cache.py [--steps 40]

Reach: a cached step costs at most 1.1 times a step without any teacher.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from sweeps.settings import DISTILL, WORKLOAD, resolve
from trainables.distill import Distill
from trainables.domain import Batch

PAIRS = 512


def student(folder: Path, name: str, beta: float) -> Distill:
    """A student in training, without the KL term where beta is 0."""
    values = dict(resolve([WORKLOAD, DISTILL], "small", {"train_samples": PAIRS, "val_pairs": 32}).values)
    config: dict[str, Any] = {
        "trial_id": name, "state_dir": str(folder / name), "cache_dir": str(folder / "cache"),
        "domain": "dust3r", "params": {"T": 3.0, "beta": beta, "gamma": 0.0}, "settings": values, "seed": 0,
    }  # fmt: skip
    return Distill(config)


def main() -> None:
    """Time the three kinds of steps in turn and print the median ratios to a step without a teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="timed rounds (default 40)")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plain, cached = student(Path(folder), "plain", 0.0), student(Path(folder), "cached", 0.5)
        size = plain.settings["batch_size"]
        blocks = cycle(torch.split(torch.randperm(PAIRS), size))
        teacher = cached.domain.teacher()

        def without(rows: torch.Tensor) -> Batch:
            return {name: value for name, value in plain.cache.rows(rows).items() if not name.startswith("teacher")}

        def recomputed(rows: torch.Tensor) -> Batch:
            batch = without(rows)
            return batch | cached.domain.teacher_outputs(teacher, batch)

        kinds: dict[str, tuple[Distill, Callable[[torch.Tensor], Batch]]] = {
            "no teacher": (plain, without),
            "cached": (cached, cached.cache.rows),
            "recomputed": (cached, recomputed),
        }
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for step in range(steps + 3):
            rows = next(blocks)
            for name, (trainable, fetch) in kinds.items():
                start = time.process_time()
                trainable.train_step(fetch(rows), step, steps + 3)
                if step >= 3:
                    seconds[name].append(time.process_time() - start)
    base = seconds["no teacher"]
    print(
        f"batch {size}, {steps} rounds, CPU time of one thread; ratio to a step without a teacher (median, quartiles)"
    )
    for name, times in seconds.items():
        ratios = [own / reference for own, reference in zip(times, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:>12}: {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
