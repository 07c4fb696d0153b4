"""Effects of ablations: right on average, covered as often as claimed, and not claimed beyond the interval."""

import numpy as np
import pytest

from analysis import effects_picture
from analysis.contrasts import Comparison, Contrast, against, interaction, main_effect
from analysis.effects import caution, contrast, effect, effects, paired, sentence
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


def test_seeds_are_not_asked_for_what_seeds_average_out():
    """Noise of single errors falls with seeds; what samples differ by does not, and is said."""
    rng, samples, size = np.random.default_rng(6), 400, 0.02
    base = np.ones((3, samples))
    found = [effect("a", "b", base + size + rng.normal(0, 0.5, base.shape), base) for _ in range(200)]
    open_ = [f for f in found if not f.resolved and abs(f.value - size) < 0.002]
    # At this size 80 % power takes (1.96 + .84)^2 * .5^2 / (400 * .02^2) = 12 seeds.
    assert len(open_) >= 15 and all(f.enough_seeds for f in open_)
    assert 8 <= np.median([f.enough_seeds for f in open_]) <= 20
    unlike = base + 0.001 + rng.normal(0, 0.5, samples) + rng.normal(0, 1e-3, base.shape)
    beyond = effect("a", "b", unlike, base)
    assert beyond.enough_seeds == 0 and "more than 1000 seeds, or more test samples" in sentence(beyond)


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


ARMS = ("neither", "A", "B", "AB")


def crossed(rng, a=0.0, b=0.0, ab=0.0, seeds=3, samples=200):
    """Tables of four arms around 1, each with noise of its own over seeds and samples."""
    true = {"neither": 1.0, "A": 1 + a, "B": 1 + b, "AB": 1 + a + b + ab}
    shared = rng.normal(0, 0.3, samples)
    return {
        arm: (mean + shared + rng.normal(0, 0.02, (seeds, 1)) + rng.normal(0, 0.1, samples)
              + rng.normal(0, 0.1, (seeds, samples)))
        for arm, mean in true.items()
    }  # fmt: skip


A_EFFECT = main_effect("A", ("A", "neither"), ("AB", "B"))
A_X_B = interaction("A x B", both="AB", one="A", other="B", neither="neither")


@pytest.mark.parametrize(("wanted", "true"), [(A_EFFECT, -0.05), (A_X_B, 0.06)])
def test_contrasts_cover_the_truth_as_often_as_they_say(wanted, true):
    rng = np.random.default_rng(2)
    found = [contrast(wanted, crossed(rng, a=-0.08, b=0.03, ab=0.06)) for _ in range(400)]
    # Of 400 draws at 95 %, fewer than 91.5 % or more than 99.5 % come about once in 500.
    assert 0.915 <= np.mean([f.lo <= true <= f.hi for f in found]) <= 0.995
    assert np.mean([f.value for f in found]) == pytest.approx(true, abs=0.005)


def test_a_contrast_is_the_sum_of_its_effects():
    tables = crossed(np.random.default_rng(0))
    single = effect("A", "neither", tables["A"], tables["neither"])
    assert contrast(against("A", "neither"), tables) == single
    means = {arm: table.mean() for arm, table in tables.items()}
    both = (means["A"] - means["neither"] + means["AB"] - means["B"]) / 2 / means["neither"]
    assert contrast(A_EFFECT, tables).value == pytest.approx(both)
    joint = (means["AB"] - means["A"] - means["B"] + means["neither"]) / means["neither"]
    found = contrast(A_X_B, tables)
    assert found.value == pytest.approx(joint) and np.mean(found.by_seed) == pytest.approx(joint)


def test_sentences_of_contrasts_claim_no_more_than_their_interval():
    rng = np.random.default_rng(4)
    large = crossed(rng, a=-0.6, b=-0.6, ab=0.5, samples=2000)
    assert sentence(contrast(A_EFFECT, large)).startswith("A lowers the error, averaged over its pairs of arms: -")
    assert "together, the error is higher than their separate effects add up to: +" in sentence(contrast(A_X_B, large))
    none = crossed(rng)
    for wanted, said in ((A_EFFECT, "No effect of A, averaged over"), (A_X_B, "No interaction A x B is shown")):
        found = contrast(wanted, none)
        assert found.resolved or (sentence(found).startswith(said) and "of neither's error" in sentence(found))
    assert "all 11 effects zero, about 0.6 intervals" in caution(11)
    assert caution(1).startswith("Were the effect zero, 5 % of such intervals")


def test_where_seeds_cannot_resolve_an_effect_the_sentence_says_what_could():
    """Alike in every seed, but few samples; and no difference at all, which nothing would resolve."""
    base = np.linspace(1, 2, 10)
    noise = 0.5 * np.random.default_rng(2).normal(0, 1, 10)
    tables = {"a": np.tile(base + noise + 0.01, (3, 1)), "b": np.tile(base, (3, 1))}
    found = contrast(against("a", "b"), tables)
    assert not found.resolved and found.enough_seeds == 0
    assert sentence(found).endswith("; an effect of this size would take more than 1000 seeds, or more test samples.")
    same = contrast(against("a", "b"), {"a": tables["b"], "b": tables["b"]})
    assert sentence(same).endswith("(3 seeds, 10 samples).")


def test_contrasts_share_the_seeds_of_all_their_arms():
    rows = {seed: np.linspace(1, 2, 10) for seed in (1, 2, 3)}
    tables = {arm: dict(rows) for arm in ARMS}
    del tables["AB"][2]
    assert len(paired(A_X_B, tables).by_seed) == 2
    del tables["AB"][3]
    with pytest.raises(InputError, match="AB and A and B and neither share 1 seeds"):
        paired(A_X_B, tables)
    with pytest.raises(InputError, match="A x B: AB was not measured"):
        paired(A_X_B, {arm: rows for arm in ARMS[:3]})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Contrast("x", {"a": 1.0, "b": 1.0}, "b"), "sum 0"),
        (lambda: Contrast("x", {}, "b"), "no arm"),
        (lambda: Contrast("x", {"a": 1.0, "b": -1.0}, "c"), "unit 'c'"),
        (lambda: against("a", "a"), "itself"),
        (lambda: main_effect("x"), "pairs"),
        (lambda: interaction("x", both="a", one="b", other="b", neither="c"), "four different"),
        (lambda: Comparison("x.txt", "X", [A_X_B]), "ends with .json"),
        (lambda: Comparison("x.json", "X", []), "one contrast or more"),
        (lambda: Comparison("x.json", "X", [A_X_B, A_X_B]), "'A x B' stands twice"),
    ],
)
def test_impossible_contrasts_are_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_the_picture_says_what_is_resolved_and_is_the_same_twice(tmp_path):
    tables = crossed(np.random.default_rng(4), a=-0.6, samples=2000)
    found = [contrast(one, tables) for one in (against("A", "neither"), against("B", "neither"), A_EFFECT, A_X_B)]
    assert [effects_picture.look(one).word for one in found[:2]] == ["less error", "not resolved"]
    assert effects_picture.headline(found).endswith("of 4 effects are resolved, with 3 seeds and 2000 test samples")
    for name in ("one.png", "two.png"):
        effects_picture.draw(found, "Title", "sweep", "ler", tmp_path / name)
    effects_picture.draw([], "Title", "sweep", "ler", tmp_path / "none.png")
    one = (tmp_path / "one.png").read_bytes()
    assert one[:8] == b"\x89PNG\r\n\x1a\n" and one == (tmp_path / "two.png").read_bytes()
    assert int.from_bytes(one[16:20]) == 1600 and len(one) > 2 * (tmp_path / "none.png").stat().st_size
