"""How a decoder stands beside others on the same shots: ratios of error rates with paired intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
from scipy import stats
from torch import Tensor

from engines.errors import InputError
from engines.latency import measure
from trainables.alphaqubit import matching
from trainables.alphaqubit.decisions import label_flips
from trainables.alphaqubit.layout import layout_of
from trainables.alphaqubit.metrics import expected_calibration_error, rate_per_round
from trainables.alphaqubit.sampler import Batch, Experiment
from trainables.gates import paired_drop

SLOW_SHOTS = 2000  # for decoders that take a millisecond a shot
NAMES = {"pymatching": "matching", "pymatching_correlated": "correlated"}  # in records, where it is not their own
FAST = tuple(NAMES)
LEVEL = 0.95


def binomial(wrong: int, shots: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of an error rate."""
    found = stats.binomtest(wrong, shots).proportion_ci(LEVEL)
    return float(found.low), float(found.high)


def ratio(own: np.ndarray, other: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float, float] | None:
    """Mean of own over mean of other, both (N,) of the same shots, with its 95 % paired bootstrap interval.

    None where the other made no error: relative to that nothing has a size.
    """
    if not other.mean() > 0:
        return None
    change = paired_drop(own, other, True, seed=seed, n=resamples)
    return 1 + change.value, 1 + change.lo, 1 + change.hi


def wrong_flips(name: str, experiment: Experiment, shots: Batch) -> np.ndarray:
    """(N, observables) bool, where a decoder of :mod:`trainables.alphaqubit.matching` predicts a flip wrongly."""
    circuit = experiment.circuit()
    flat = layout_of(circuit).to_flat(shots["events"].numpy())
    return np.asarray(matching.decode(name, circuit, flat) != label_flips(shots["label"], experiment.label))


def wrong(name: str, experiment: Experiment, shots: Batch) -> np.ndarray:
    """(N,) float64, 1 where a decoder of :mod:`trainables.alphaqubit.matching` predicts any flip wrongly."""
    return np.asarray(wrong_flips(name, experiment, shots).any(1), np.float64)


def measures(
    own: dict[str, Tensor], experiment: Experiment, shots: Batch, limit: np.ndarray | None, seed: int
) -> dict[str, float]:
    """What a record says of a decoder besides its own error rate.

    own: metrics per shot of AlphaQubit.evaluate on these shots. limit: P(wrong) of the exact decoder per shot, where
    there is one. ler_lo, ler_hi: binomial. ler_over_<decoder>, with _lo and _hi; of slow decoders on the first
    slow_shots shots. ler_over_exact: of posterior probabilities, so that luck with the shots drops out. Of one
    observable: ece, calibration error of its probability; ler_per_round, left out where the LER reaches one half.
    """
    errors = own["ler"].double().numpy()
    low, high = binomial(int(errors.sum()), len(errors))
    found = {"ler_lo": low, "ler_hi": high}
    for name in matching.available():
        count = len(errors) if name in FAST else min(SLOW_SHOTS, len(errors))
        theirs = wrong(name, experiment, {key: value[:count] for key, value in shots.items()})
        said = NAMES.get(name, name)
        found[f"ler_{said}"] = float(theirs.mean())
        found |= _named(f"ler_over_{said}", ratio(errors[:count], theirs, seed))
        if name not in FAST:
            found["slow_shots"] = count
    if limit is not None and "ler_exact" in own:
        found["ler_limit"] = float(limit.mean())
        # Posteriors take many values, which makes resamples slow; 500 give the interval's ends to about 5 % of it.
        found |= _named("ler_over_exact", ratio(own["ler_exact"].double().numpy(), limit, seed, 500))
    if experiment.label == "observable":
        label, right = shots["label"][:, 0].numpy(), np.exp(-own["nll"].double().numpy()).clip(0, 1)
        rate = rate_per_round(float(errors.mean()), experiment.rounds)
        found |= {} if rate is None else {"ler_per_round": rate}
        found["ece"] = expected_calibration_error(np.where(label == 1, right, 1 - right), label)
    return found


def pace(experiment: Experiment, shots: Batch, warmup: int, repeats: int, seed: int) -> dict[str, float]:
    """us_per_shot_matching and _correlated: median microseconds of PyMatching from Python, one of `shots` a call.

    The two take turns within each round, apart from the model's own timing; all shots are run through in turn.
    """
    circuit = experiment.circuit()
    events = layout_of(circuit).to_flat(shots["events"].numpy()).astype(np.uint8)
    decoders = {name: matching.single(circuit, name == "pymatching_correlated") for name in FAST}
    calls = {name: _next_shot(decode, events) for name, decode in decoders.items()}
    times = measure(calls, warmup, repeats, seed)
    return {f"us_per_shot_{NAMES[name]}": 1000 * float(np.median(values)) for name, values in times.items()}


def _next_shot(decode: Callable[[np.ndarray], np.ndarray], events: np.ndarray) -> Callable[[], object]:
    turn = cycle(events)
    return lambda: decode(next(turn))


def _named(name: str, values: Sequence[float] | None) -> dict[str, float]:
    return dict(zip((name, f"{name}_lo", f"{name}_hi"), values, strict=True)) if values else {}


def check_rounds(rounds: Sequence[int]) -> None:
    """InputError where a fit over these numbers of rounds is not possible."""
    if len({n for n in rounds if n > 1}) < 2:
        raise InputError(f"rounds {list(rounds)}: a fit needs two numbers of rounds or more, one round not counted")
