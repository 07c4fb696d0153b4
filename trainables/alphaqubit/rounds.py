"""Logical error rate per round: the paper's fit over several numbers of rounds, beside matching and the exact decoder.

python -m trainables.alphaqubit.rounds                                      # the shipped teacher
python -m trainables.alphaqubit.rounds STUDENT.pth --rounds 3 5 7 9 --p 0.01
python -m trainables.alphaqubit.rounds STUDENT.pth --csv rounds.csv         # for sinter plot

log(1 - 2 LER) is a line in the number of rounds; its slope gives the rate per round. One round is left out of the fit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engines.errors import command_line
from trainables.alphaqubit import compare, exact, sinter_csv
from trainables.alphaqubit.decisions import SHIPPED, flips, label_flips, logits, read
from trainables.alphaqubit.layout import BOTH, layout_of
from trainables.alphaqubit.metrics import RoundFit, ler_per_round
from trainables.alphaqubit.model import Decoder
from trainables.alphaqubit.sampler import Batch, Experiment, fixed_shots


@dataclass(frozen=True)
class Counted:
    """Errors of one decoder on `shots` shots of one experiment, and the seconds that decoding took."""

    decoder: str
    experiment: Experiment
    shots: int
    errors: int
    seconds: float


def count(model: Decoder, experiment: Experiment, shots: int, seed: int) -> list[Counted]:
    """Errors of the decoder, of matching, plain and correlated, and of the exact decoder, on the same fresh shots."""
    batch = fixed_shots(experiment, seed, shots)[0]

    def own() -> np.ndarray:
        found = flips(logits(model, batch["events"], batch["measurements"]), experiment.label)
        return np.asarray((found != label_flips(batch["label"], experiment.label)).any(1))

    decoders: dict[str, Callable[[], np.ndarray]] = {"decoder": own}
    decoders |= {name: partial(compare.wrong, name, experiment, batch) for name in compare.FAST}
    if experiment.distance == 3:
        decoders["exact"] = partial(_exact, experiment, batch)
    rows = []
    for name, decode in decoders.items():
        started = time.perf_counter()
        errors = int(decode().sum())
        rows.append(Counted(name, experiment, shots, errors, time.perf_counter() - started))
    return rows


def _exact(experiment: Experiment, batch: Batch) -> np.ndarray:
    circuit = experiment.circuit()
    posterior = exact.ExactDecoder(circuit).posterior(layout_of(circuit).to_flat(batch["events"].numpy()))
    truth = label_flips(batch["label"], experiment.label)
    patterns = truth.astype(np.int64) @ (1 << np.arange(truth.shape[1]))
    return np.asarray(posterior.argmax(1) != patterns)


def experiment_of(model: Decoder, rounds: int, p: float, noise: str) -> Experiment:
    """The experiment that a decoder is for, with these rounds and this noise."""
    config = model.config
    basis = "Z" if config["basis"] == BOTH else config["basis"]
    return Experiment(config["distance"], rounds, p, noise, basis, config["outputs"])


def fits(rows: Sequence[Counted], seed: int) -> dict[str, RoundFit]:
    """The fit of every decoder."""
    found = {}
    for name in dict.fromkeys(row.decoder for row in rows):
        own = [row for row in rows if row.decoder == name]
        rounds, lers = [row.experiment.rounds for row in own], [row.errors / row.shots for row in own]
        found[name] = ler_per_round(rounds, lers, [row.shots for row in own], seed)
    return found


def table(rows: Sequence[Counted], found: dict[str, RoundFit]) -> str:
    """LERs by rounds and the fit, one line per decoder."""
    rounds = list(dict.fromkeys(row.experiment.rounds for row in rows))
    head = f"{'decoder':22}" + "".join(f"{f'R={n}':>9}" for n in rounds)
    lines = [f"{head}  {'LER per round':26}{'R^2':>7}{'F0':>7}"]
    for name, fit in found.items():
        lers = {row.experiment.rounds: row.errors / row.shots for row in rows if row.decoder == name}
        cells = "".join(f"{lers[n]:9.5f}" for n in rounds)
        rate = f"{fit.eps:.6f} [{fit.low:.6f}, {fit.high:.6f}]"
        lines.append(f"{name:22}{cells}  {rate:26}{fit.r2:7.4f}{fit.f0:7.4f}")
    return "\n".join(lines)


@command_line
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainables.alphaqubit.rounds", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("weights", type=Path, nargs="?", default=SHIPPED, help="a decoder's file (default: shipped)")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 5, 7, 9, 13], help="default: %(default)s")
    parser.add_argument("--p", type=float, default=0.005, help="error probability (default: %(default)s)")
    parser.add_argument("--noise", default="uniform", help="uniform or si1000 (default: %(default)s)")
    parser.add_argument("--shots", type=int, default=50000, help="per number of rounds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of shots and bootstrap (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="also append the counts to this file, in sinter's format")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = read(given.weights).eval()
    compare.check_rounds(given.rounds)
    experiments = [experiment_of(model, n, given.p, given.noise) for n in dict.fromkeys(given.rounds)]
    rows = [row for one in experiments for row in count(model, one, given.shots, given.seed)]
    print(table(rows, fits(rows, given.seed)))
    if given.csv:
        own = {"decoder": given.weights.stem}
        lines = [
            sinter_csv.stats(r.experiment, own.get(r.decoder, r.decoder), r.shots, r.errors, r.seconds) for r in rows
        ]
        sinter_csv.append(given.csv, lines)


if __name__ == "__main__":
    sys.exit(main())
