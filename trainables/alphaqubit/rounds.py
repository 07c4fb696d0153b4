"""Logical error rate per round: the paper's fit over several numbers of rounds, beside matching and the exact decoder.

python -m trainables.alphaqubit.rounds                                      # the shipped teacher
python -m trainables.alphaqubit.rounds STUDENT.pth --rounds 3 5 7 9 --p 0.01
python -m trainables.alphaqubit.rounds STUDENT.pth --csv rounds.csv         # for sinter plot

log(1 - 2 LER) is a line in the number of rounds; its slope gives the rate per round. One round is left out of the fit.
That holds for the flips of one observable: of a decoder of two, outputs xz or ixyz, each has a line of its own. The CSV
counts shots, wrong where either is, as sinter does.
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
import sinter
import torch

from engines.errors import command_line
from trainables.alphaqubit import compare, exact, sinter_csv
from trainables.alphaqubit.decisions import SHIPPED, flips, label_flips, logits, read
from trainables.alphaqubit.layout import BOTH, layout_of
from trainables.alphaqubit.metrics import RoundFit, ler_per_round
from trainables.alphaqubit.model import Decoder
from trainables.alphaqubit.sampler import Batch, Experiment, fixed_shots
from trainables.checkpoint import model_hash
from trainables.record import Value

OWN = "decoder"  # the neural one's name in the table


@dataclass(frozen=True)
class Counted:
    """Errors of one decoder on `shots` shots of one experiment, and the seconds that decoding took.

    errors: shots with any flip predicted wrongly. flips: of each observable, the shots with this one predicted wrongly.
    """

    decoder: str
    experiment: Experiment
    shots: int
    errors: int
    flips: tuple[int, ...]
    seconds: float


def count(model: Decoder, experiment: Experiment, shots: int, seed: int) -> list[Counted]:
    """Errors of the decoder, of matching, plain and correlated, and of the exact decoder, on the same fresh shots."""
    batch = fixed_shots(experiment, seed, shots)[0]

    def own() -> np.ndarray:
        found = flips(logits(model, batch["events"], batch["measurements"]), experiment.label)
        return np.asarray(found != label_flips(batch["label"], experiment.label))

    decoders: dict[str, Callable[[], np.ndarray]] = {OWN: own}
    decoders |= {name: partial(compare.wrong_flips, name, experiment, batch) for name in compare.FAST}
    if experiment.distance == 3:
        decoders["exact"] = partial(_exact, experiment, batch)
    rows = []
    for name, decode in decoders.items():
        started = time.perf_counter()
        wrong = decode()
        seconds, flips_wrong = time.perf_counter() - started, tuple(wrong.sum(0).tolist())
        rows.append(Counted(name, experiment, shots, int(wrong.any(1).sum()), flips_wrong, seconds))
    return rows


def _exact(experiment: Experiment, batch: Batch) -> np.ndarray:
    """(N, observables) bool, where the most probable pattern of flips is wrong."""
    circuit = experiment.circuit()
    posterior = exact.ExactDecoder(circuit).posterior(layout_of(circuit).to_flat(batch["events"].numpy()))
    truth = label_flips(batch["label"], experiment.label)
    return np.asarray((posterior.argmax(1)[:, None] >> np.arange(truth.shape[1]) & 1) != truth)


def experiment_of(model: Decoder, rounds: int, p: float, noise: str) -> Experiment:
    """The experiment that a decoder is for, with these rounds and this noise."""
    config = model.config
    basis = "Z" if config["basis"] == BOTH else config["basis"]
    return Experiment(config["distance"], rounds, p, noise, basis, config["outputs"])


def _lers(rows: Sequence[Counted]) -> dict[str, dict[int, float]]:
    """LERs by rounds of every decoder; where there are two observables, of each: `NAME, X` and `NAME, Z`."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for which, wrong in zip(BOTH if len(row.flips) > 1 else [""], row.flips, strict=True):
            lers = found.setdefault(f"{row.decoder}, {which}" if which else row.decoder, {})
            lers[row.experiment.rounds] = wrong / row.shots
    return found


def fits(rows: Sequence[Counted], seed: int) -> dict[str, RoundFit]:
    """The fit of every decoder, of each observable apart; all rows are of as many shots."""
    shots = rows[0].shots
    return {name: ler_per_round([*lers], [*lers.values()], shots, seed) for name, lers in _lers(rows).items()}


def table(rows: Sequence[Counted], found: dict[str, RoundFit]) -> str:
    """LERs by rounds and the fit, one line per decoder, or two where there are two observables."""
    rounds = list(dict.fromkeys(row.experiment.rounds for row in rows))
    width = max(22, *map(len, found))
    head = f"{'decoder':{width}}" + "".join(f"{f'R={n}':>9}" for n in rounds)
    lines = [f"{head}  {'LER per round':26}{'R^2':>7}{'F0':>7}"]
    lers = _lers(rows)
    for name, fit in found.items():
        cells = "".join(f"{lers[name][n]:9.5f}" for n in rounds)
        rate = f"{fit.eps:.6f} [{fit.low:.6f}, {fit.high:.6f}]"
        lines.append(f"{name:{width}}{cells}  {rate:26}{fit.r2:7.4f}{fit.f0:7.4f}")
    if len(rows[0].flips) > 1:
        lines.append("LERs are of one observable each, X or Z, not of either.")
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
        lines = [_line(row, given.weights.stem, model_hash(model), given.seed) for row in rows]
        known = len(lines) - sinter_csv.append(given.csv, lines)
        if known:
            print(f"{given.csv}: {known} of {len(lines)} lines were there already and are not added again")


def _line(row: Counted, name: str, weights: str, seed: int) -> sinter.TaskStats:
    """A line of sinter's CSV; name and weights: the decoder's file and its hash."""
    own = row.decoder == OWN
    origin: dict[str, Value] = {"seed": seed, "weights": weights if own else None}
    return sinter_csv.stats(row.experiment, name if own else row.decoder, row.shots, row.errors, row.seconds, origin)


if __name__ == "__main__":
    sys.exit(main())
