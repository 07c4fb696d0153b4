"""What drawing training samples costs beside learning from them, in pretraining; on one core and in the background.

    python benchmarks/sampling.py                       # both domains at their teachers' sizes
    python benchmarks/sampling.py --domain alphaqubit --steps 200

CPU time of one thread that trains, samples drawn in its own turn (inline) and by a thread ahead of use (as
trainables/pretrain.py does), in alternate pieces. share: of the sampling thread's CPU time in that of a whole step.
waited: of the time on the clock that training spent waiting for a batch.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from engines.latency import environment
from sweeps.settings import DECODER_PRETRAIN, DECODER_SIZES, DECODER_WORKLOAD, PRETRAIN, WORKLOAD, resolve
from trainables.pretrain import Pretrain
from trainables.stream import Batch, Stream

SETTINGS = {
    "dust3r": resolve((WORKLOAD, PRETRAIN), "small", {}),
    "alphaqubit": resolve((DECODER_WORKLOAD, DECODER_SIZES, DECODER_PRETRAIN), "small", {"size": "teacher"}),
}
PIECE = 10  # steps in a row of one kind


def trial(domain: str) -> Pretrain:
    """A pretraining trial of the profile small, before its first step."""
    values = dict(SETTINGS[domain].values)
    config = {"domain": domain, "params": {}, "settings": values, "seed": 0, "state_dir": tempfile.mkdtemp()}
    return Pretrain(config)


def drawn(pretrain: Pretrain, piece: int) -> Iterator[Batch]:
    """The samples of one piece, none of them seen before."""
    size = int(pretrain.settings["batch_size"]) // pretrain.domain.group
    for start in range(piece * PIECE * size, (piece + 1) * PIECE * size, size):
        yield pretrain.domain.pretraining_samples(torch.arange(start, start + size))


def learn(pretrain: Pretrain, batches: Iterable[Batch]) -> tuple[float, float, float]:
    """Seconds per step: CPU time of the whole process, on the clock, and waiting for batches."""
    waited, cpu, started = 0.0, time.process_time(), time.perf_counter()
    mark = started
    for step, batch in enumerate(batches):
        waited += time.perf_counter() - mark
        pretrain.train_step(batch, step, 1000 * PIECE)
        mark = time.perf_counter()
    found = time.process_time() - cpu, time.perf_counter() - started, waited
    return found[0] / PIECE, found[1] / PIECE, found[2] / PIECE


def measured(domain: str, steps: int) -> str:
    """One line."""
    pretrain = trial(domain)
    learn(pretrain, drawn(pretrain, 0))
    inline, ahead, shares = [], [], []
    for piece in range(1, 2 * max(1, steps // PIECE), 2):
        inline.append(learn(pretrain, drawn(pretrain, piece)))
        with Stream(drawn(pretrain, piece + 1)) as stream:
            ahead.append(learn(pretrain, stream))
        shares.append(stream.cpu_seconds / PIECE / ahead[-1][0])
    one, other = (np.median(np.array(rows), axis=0) for rows in (inline, ahead))
    return (
        f"{domain:12} step {1000 * one[0]:.1f} ms of CPU inline, {1000 * other[0]:.1f} ahead "
        f"({np.median(np.array(ahead)[:, 0] / np.array(inline)[:, 0]):.2f} x); clock {1000 * one[1]:.1f}, "
        f"{1000 * other[1]:.1f}; share of sampling {100 * float(np.median(shares)):.1f} %; "
        f"waited {100 * one[2] / one[1]:.1f} % inline, {100 * other[2] / other[1]:.1f} % ahead"
    )


def main() -> None:
    """Print a line per domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=list(SETTINGS), nargs="+", default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=100, help="of each kind (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{key}={value}" for key, value in environment().items() if value is not None))
    for domain in given.domain:
        print(measured(domain, given.steps))


if __name__ == "__main__":
    main()
