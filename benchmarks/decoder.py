"""Decoders of the surface code beside each other: time per round in one interleaved run, error rates on fresh shots.

    python benchmarks/decoder.py --student runs/aq_baseline_small_seed42/files/aq_baseline_best.pth
    python benchmarks/decoder.py --teacher T.pth --shots 400000 --rounds 5
    python benchmarks/decoder.py --shots 0                  # times alone

Times are medians at batch 1 on one thread, per layer of detectors (rounds + 1 of them): a streaming step by ONNX
Runtime with what Python adds to it, the whole graph, and PyMatching. Rates over the exact decoder's (distance 3) are of
posterior probabilities on the same shots, all intervals 95 %, paired where they are of a ratio.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import pymatching
import torch

from engines.errors import InputError, command_line
from engines.export import export_onnx
from engines.latency import environment, interleaved
from engines.runtimes import OnnxRuntime
from trainables.alphaqubit import compare
from trainables.alphaqubit.decisions import SHIPPED, flips, label_flips, logits, read
from trainables.alphaqubit.exact import ExactDecoder
from trainables.alphaqubit.layout import layout_of
from trainables.alphaqubit.matching import decode
from trainables.alphaqubit.model import Decoder
from trainables.alphaqubit.rounds import experiment_of
from trainables.alphaqubit.sampler import Experiment, fixed_shots
from trainables.alphaqubit.streaming import Streaming

TIMED_SHOTS = 50
FRESH = 2_000_003  # no workload and no training has this seed


def calls(model: Decoder, name: str, experiment: Experiment, folder: Path) -> dict[str, Callable[[], object]]:
    """One streaming step, and one pass of the whole graph."""
    batch = fixed_shots(experiment, FRESH, TIMED_SHOTS)[0]
    events, measurements = (batch[key].int() for key in ("events", "measurements"))
    path, stream = folder / f"{name}.onnx", Streaming(model)
    export_onnx(model, (events[:1], measurements[:1]), path, ["events", "measurements"], ["logits"])
    whole = OnnxRuntime(path, "cpu", 1)
    shots = cycle([(events[k : k + 1].numpy(), measurements[k : k + 1].numpy()) for k in range(TIMED_SHOTS)])
    middle = cycle([(events[k, 1].numpy(), measurements[k, 1].numpy()) for k in range(TIMED_SHOTS)])
    return {f"{name} step": lambda: stream.push(*next(middle)), f"{name} whole": lambda: whole.run(next(shots))}


def times(models: dict[str, Decoder], experiment: Experiment, repeats: int) -> str:
    """Microseconds per layer of detectors, with the ratio to the first model's whole graph."""
    circuit, layers = experiment.circuit(), experiment.rounds + 1
    matching = pymatching.Matching.from_detector_error_model(circuit.detector_error_model(decompose_errors=True))
    flat = circuit.compile_detector_sampler(seed=FRESH).sample(TIMED_SHOTS)
    shots = cycle(list(flat))
    with tempfile.TemporaryDirectory() as folder:
        candidates: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            candidates |= calls(model, name, experiment, Path(folder))
        candidates["pymatching"] = lambda: matching.decode(next(shots))
        reference = f"{next(iter(models))} whole"
        found = interleaved(candidates, reference, repeats // 10 + 1, repeats, 0)
    lines = [f"{'batch 1, one thread':24}{'us per round':>14}{'95 %':>20}{'whole / own':>14}"]
    for name, one in found.items():
        share = 1 if name.endswith(" step") else layers
        per, low, high = (1000 * value / share for value in (one.p50_ms, one.p50_lo, one.p50_hi))
        ratio = one.ratio * share / layers
        lines.append(f"{name:24}{per:14.1f}{f'[{low:.1f}, {high:.1f}]':>20}{ratio:14.2f}")
    return "\n".join(lines)


def rates(models: dict[str, Decoder], experiment: Experiment, shots: int) -> str:
    """LER, and its ratios to the exact decoder's and to matching's, one line per decoder."""
    batch = fixed_shots(experiment, FRESH, shots)[0]
    circuit, truth = experiment.circuit(), label_flips(batch["label"], experiment.label)
    flat = layout_of(circuit).to_flat(batch["events"].numpy())
    decisions = {name: flips(logits(model, batch["events"], batch["measurements"]), experiment.label)
                 for name, model in models.items()}  # fmt: skip
    decisions |= {name: decode(name, circuit, flat) for name in compare.FAST}
    flipped = None
    if experiment.distance == 3 and experiment.label == "observable":
        flipped = ExactDecoder(circuit).flips(flat)
        decisions["exact"] = (flipped > 0.5).astype(np.uint8)
    wrong = {name: (found != truth).any(1).astype(np.float64) for name, found in decisions.items()}
    lines = [f"p={experiment.p:g}, R={experiment.rounds}, {shots} shots"]
    lines += [f"{'decoder':24}{'LER':>9}{'95 %':>20}{'over exact':>25}{'over matching':>25}"]
    for name, errors in wrong.items():
        low, high = compare.binomial(int(errors.sum()), shots)
        over = ""
        if flipped is not None:
            own, limit = (np.where(decisions[who] == 1, 1 - flipped, flipped)[:, 0] for who in (name, "exact"))
            over = said(compare.ratio(own, limit, 0, 500))
        beside = said(compare.ratio(errors, wrong["pymatching"], 0))
        lines.append(f"{name:24}{errors.mean():9.5f}{f'[{low:.5f}, {high:.5f}]':>20}{over:>25}{beside:>25}")
    names = list(models)
    if len(names) == 2:
        lines.append(f"{names[1]} over {names[0]}: {said(compare.ratio(wrong[names[1]], wrong[names[0]], 0))}")
    return "\n".join(lines)


def said(found: tuple[float, float, float] | None) -> str:
    """A ratio with its interval, in words."""
    return f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]" if found else "no error to compare"


@command_line
def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=SHIPPED, help="a decoder's file (default: the shipped one)")
    parser.add_argument("--student", type=Path, help="another one")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--p", type=float, nargs="+", default=[0.005, 0.01], help="default: %(default)s")
    parser.add_argument("--shots", type=int, default=200000, help="per p, 0 = no rates (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=300, help="timed rounds, 0 = no times (default: %(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    paths = {"teacher": given.teacher, **({"student": given.student} if given.student else {})}
    models = {name: read(path).eval() for name, path in paths.items()}
    first, *others = models.values()
    for other in others:
        if any(other.config[key] != first.config[key] for key in ("distance", "basis", "outputs")):
            raise InputError(f"{given.student}: of another experiment than {given.teacher}: give two of one")
    experiments = [experiment_of(first, given.rounds, p, "uniform") for p in given.p]
    if given.repeats:
        print(", ".join(f"{key}={value}" for key, value in environment().items() if value is not None))
        print(times(models, experiments[0], given.repeats))
    if given.shots:
        for experiment in experiments:
            print(rates(models, experiment, given.shots))


if __name__ == "__main__":
    sys.exit(main())
