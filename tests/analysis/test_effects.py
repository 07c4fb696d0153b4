"""Effects of ablations: right on average, covered as often as claimed, and not claimed beyond the interval."""

import numpy as np
import pytest

from analysis.effects import effect, effects, sentence
from engines.errors import InputError


def tables(rng, true, seeds=3, samples=200, by_seed=0.02, by_sample=0.3, noise=0.2):
    base = 1 + rng.normal(0, by_sample, samples) + rng.normal(0, noise / 2, (seeds, samples))
    shift = true + rng.normal(0, by_seed, (seeds, 1)) + rng.normal(0, by_sample, samples)
    return base + shift + rng.normal(0, noise / 2, (seeds, samples)), base


@pytest.mark.parametrize(("by_seed", "by_sample"), [(0.05, 0.0), (0.0, 0.3), (0.02, 0.3)])
def test_the_interval_covers_the_truth_as_often_as_it_says(by_seed, by_sample):
    rng, true, runs = np.random.default_rng(1), 0.03, 600
    found = [effect("a", "b", *tables(rng, true, by_seed=by_seed, by_sample=by_sample)) for _ in range(runs)]
    # The reference's mean is 1 up to the samples drawn, so the relative change is the absolute one.
    covered = np.mean([f.lo <= true <= f.hi for f in found])
    assert 0.92 <= covered <= 0.995
    assert np.mean([f.value for f in found]) == pytest.approx(true, abs=0.01)


def test_direction_and_sentence_agree():
    rng = np.random.default_rng(0)
    worse, base = tables(rng, 0.5, by_seed=0.001)
    found = effect("without LayerNorm", "all kept", worse, base)
    assert found.resolved and "is worse than all kept" in sentence(found) and len(found.by_seed) == 3
    turned = effect("all kept", "without LayerNorm", base, worse)
    assert turned.value < 0 and turned.resolved and "is better than without LayerNorm" in sentence(turned)
    unclear = effect("a", "b", *tables(np.random.default_rng(3), 0.0))
    assert not unclear.resolved and sentence(unclear).startswith("No difference between a and b is shown")


def test_seeds_that_would_resolve_it_shrink_with_the_effect():
    rng = np.random.default_rng(5)
    base = np.ones((3, 50))
    noise = np.array([[0.04], [-0.02], [0.05]])
    found = effect("a", "b", base + noise + rng.normal(0, 1e-4, (3, 50)), base)
    assert not found.resolved and found.enough_seeds and found.enough_seeds > 3
    assert f"about {found.enough_seeds} seeds" in sentence(found)
    same = effect("a", "b", base, base)
    assert (same.value, same.lo, same.hi) == (0, 0, 0) and not same.resolved


def test_only_shared_seeds_are_paired_and_bad_tables_are_refused():
    rows = {seed: list(np.linspace(1, 2, 10)) for seed in (1, 2, 3)}
    more = {seed: [1.1 * x for x in values] for seed, values in rows.items()}
    (found,) = effects({"kept": rows, "out": {2: more[2], 3: more[3], 4: more[1]}}, "kept")
    assert len(found.by_seed) == 2 and found.value == pytest.approx(0.1)
    for wrong, said in (
        ({"out": more}, "reference arm 'kept'"),
        ({"kept": rows, "out": {9: more[1], 1: more[1]}}, "share 1 seeds"),
        ({"kept": rows, "out": {1: [1.0], 2: [1.0]}}, "one shape"),
        ({"kept": rows, "out": {s: [float("nan")] * 10 for s in rows}}, "not finite"),
    ):
        with pytest.raises(InputError, match=said):
            effects(wrong, "kept")
