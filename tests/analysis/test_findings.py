"""Effects and importance from what a store holds, and their sentences."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from logged_sweep import PARENT_TAG, copy_store, log_sweep, record
from mlflow.tracking import MlflowClient

from analysis import findings
from analysis.__main__ import main
from analysis.contrasts import Contrast, against, interaction, main_effect
from analysis.effects import contrast, over_seeds, sentence
from analysis.factors import contrasts
from analysis.importance import importances
from analysis.importance import sentence as said_of
from analysis.store import load

Fresh = Callable[..., str]


def test_arms_of_a_crossed_design_give_main_effects_and_their_interaction() -> None:
    arms = {
        "none": {"a": "0", "b": "0"},
        "A": {"a": "1", "b": "0"},
        "B": {"a": "0", "b": "1"},
        "AB": {"a": "1", "b": "1"},
    }
    assert contrasts(arms) == [
        *(against(arm, "none") for arm in ("A", "B", "AB")),
        main_effect("a 1 instead of 0", ("A", "none"), ("AB", "B")),
        main_effect("b 1 instead of 0", ("B", "none"), ("AB", "A")),
        interaction("a 1 x b 1", both="AB", one="A", other="B", neither="none"),
    ]
    del arms["AB"]  # one pair each is no more than the arms themselves, and there is no square
    assert [one.kind for one in contrasts(arms)] == ["arm", "arm"]


def test_the_interval_over_seeds_covers_the_truth_as_often_as_it_says() -> None:
    rng, true, runs = np.random.default_rng(1), 0.03, 1000
    wanted = against("a", "b")
    covered = 0
    for _ in range(runs):
        base = 1 + rng.normal(0, 0.05, 3)
        other = base + true * base.mean() + rng.normal(0, 0.02, 3)
        found = over_seeds(wanted, {"a": dict(enumerate(other)), "b": dict(enumerate(base))})
        covered += found.lo <= true <= found.hi
    assert 0.93 <= covered / runs <= 0.97  # about three standard errors


def test_as_many_seeds_as_it_says_resolve_an_effect_four_times_in_five() -> None:
    """Of noise known to be as measured: draw that many seeds anew and count."""
    noise = np.array([-0.05, 0.0, 0.05])
    found = over_seeds(against("a", "b"), {"a": dict(enumerate(1.04 + noise)), "b": dict.fromkeys(range(3), 1.0)})
    assert not found.resolved and found.enough_seeds is not None
    assert f"about {found.enough_seeds} seeds ({found.enough_seeds - 3} more)" in sentence(found)
    tiny = over_seeds(against("a", "b"), {"a": dict(enumerate(1.001 + noise)), "b": dict.fromkeys(range(3), 1.0)})
    assert "would take more than 1000 seeds" in sentence(tiny)
    rng, runs = np.random.default_rng(0), 1000
    resolved = 0
    for _ in range(runs):
        values = 1.04 + rng.normal(0, noise.std(ddof=1), found.enough_seeds)
        again = over_seeds(
            against("a", "b"),
            {"a": dict(enumerate(values)), "b": dict.fromkeys(range(found.enough_seeds), 1.0)},
        )
        resolved += again.resolved
    assert 0.75 <= resolved / runs <= 0.9  # of few seeds the next whole number is more than enough


def test_a_search_shows_what_matters_and_claims_nothing_of_noise() -> None:
    rng = np.random.default_rng(5)
    params = [{"lr": float(rng.uniform(0, 1)), "T": float(rng.uniform(1, 10)), "init": str(i % 2)} for i in range(60)]
    drop = [(row["lr"] - 0.2) ** 2 + rng.normal(0, 0.01) for row in params]
    found = importances(params, "drop", drop)
    assert found[0].parameter == "lr" and found[0].shown and sum(one.value for one in found) == pytest.approx(1)
    said = said_of(found, 60)
    assert said.startswith("drop: of 60 trials lr (") and "no influence of" in said and "T" in said
    chance = [importances(params, "drop", list(rng.normal(0, 1, 60)), seed=i) for i in range(4)]
    # At 5 % for all parameters together, more than two of four searches come about once in two thousand.
    assert sum(any(one.shown for one in some) for some in chance) <= 2
    assert importances(params[:5], "drop", drop[:5]) == []


def seeds(uri: str, name: str, arms: dict[str, float]) -> None:
    """A sweep without logged effects: every arm with three seeds."""
    trials = [
        (record(f"K_{arm}_run{seed}", combo=arm, seed=seed, drop=drop + 0.001 * seed, drop_lo=None, drop_hi=None), [])
        for arm, drop in arms.items()
        for seed in (1, 2, 3)
    ]
    log_sweep(uri, name, trials)


def test_a_sweep_with_seeds_is_compared_by_its_records(
    empty_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = copy_store(empty_uri, tmp_path)
    seeds(uri, "s", {"KL": 0.0, "KLF": 0.1})
    out = tmp_path / "out"
    assert main(["effects", "--tracking-uri", uri, "--sweep", "s", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "KLF is worse than KL: the error changes by +9.98 %" in said and "(3 seeds, the same test samples)" in said
    assert {path.name for path in out.iterdir()} == {"effects.md", "s_effects.png"}
    assert "KLF is worse than KL" in (out / "effects.md").read_text(encoding="utf-8")


def test_arms_of_one_combo_are_kept_apart(empty_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule is called by the weight it starts from: K-1 and K-3 share their combo."""
    uri = copy_store(empty_uri, tmp_path)
    arms = {"T3B05": 0.05, "T5B05": 0.06, "T3B05_sched": 0.9}
    drops = {"drop_lo": None, "drop_hi": None}
    trials = [
        (
            record(
                f"K_{arm}_run{seed}", combo=arm.removesuffix("_sched"), seed=seed, drop=drop + 0.001 * seed, **drops
            ),
            [],
        )
        for seed in (1, 2, 3)
        for arm, drop in arms.items()
    ]
    twice = [(record(f"K_T9B05_run{run}", combo="T9B05", seed=1, drop=0.5, **drops), []) for run in (1, 2)]
    log_sweep(uri, "s", [*trials, *twice])
    assert main(["effects", "--tracking-uri", uri, "--sweep", "s", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "K_T3B05_sched is worse than K_T3B05: the error changes by +80.8" in said
    assert "T5B05 is worse than K_T3B05: the error changes by +0.95" in said
    assert "T9B05 has two trials of seed 1: they are not compared" in said


def test_trials_that_broke_or_were_cut_short_are_no_measure_of_their_arm(
    empty_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, drops = copy_store(empty_uri, tmp_path), {"drop_lo": None, "drop_hi": None}
    ends = {("A", 1): "out_of_memory", ("C", 1): "stop_loss", ("C", 2): "asha", ("C", 3): "stop_loss"}
    trials = [
        (
            record(
                f"K_{arm}_run{seed}", combo=arm, seed=seed, epochs=2, stop_reason=ends.get((arm, seed), "plateau"),
                drop=0.9 if (arm, seed) in ends else drop + 0.001 * seed, **drops,
            ),
            [],
        )
        for arm, drop in {"B": 0.0, "A": 0.1, "C": 0.9}.items()
        for seed in (1, 2, 3)
    ]  # fmt: skip
    log_sweep(uri, "s", trials)
    assert main(["effects", "--tracking-uri", uri, "--sweep", "s", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "A is worse than B: the error changes by +9.98 %" in said and "(2 seeds, the same test samples)" in said
    assert "Not compared: K_A_run1 ended by out_of_memory after 2 epochs, and is left out." in said
    assert said.count("and is left out") == 4 and "C is worse" not in said


def test_effects_that_a_sweep_logged_are_shown_as_they_are(fresh: Fresh, tmp_path: Path) -> None:
    uri = fresh("abl", [(record("K_a_run1"), [])])
    rng = np.random.default_rng(0)
    wanted: Contrast = against("a", "b")
    effect = contrast(wanted, {"a": rng.random((3, 50)), "b": rng.random((3, 50))})
    content = {"title": "What a changes", "effects": [effect.to_dict()], "why": "c was not measured"}
    (tmp_path / "ablation_x.json").write_text(json.dumps(content))
    client, data = MlflowClient(tracking_uri=uri), load(uri, "abl")
    client.log_artifact(data.run_id, str(tmp_path / "ablation_x.json"))
    (found,) = findings.collect(uri, load(uri, "abl"))
    assert found.effects == (effect,) and found.title == "What a changes"
    assert sentence(effect) in found.lines and "Not compared: c was not measured." in found.lines
    (tmp_path / "ablation_x.json").write_text('{"effects": [{"arm": "a"}]}')
    client.log_artifact(data.run_id, str(tmp_path / "ablation_x.json"))
    with pytest.raises(ValueError, match=r"^abl: its file ablation_x.json is not an ablation's \(.*\); run .*again"):
        findings.collect(uri, load(uri, "abl"))


def test_a_search_is_drawn_and_told(empty_uri: str, tmp_path: Path) -> None:
    uri = copy_store(empty_uri, tmp_path)
    rng = np.random.default_rng(2)
    trials = []
    for i in range(20):
        drop = float(rng.uniform(0, 0.1))
        trials.append(
            (record(f"K_s{i}_run1", combo=f"s{i}", T=1 + 90 * drop, drop=drop, drop_lo=None, drop_hi=None), [])
        )
    parent = log_sweep(uri, "s_optuna", trials, search="optuna")
    client = MlflowClient(tracking_uri=uri)
    for i, run in enumerate(client.search_runs(["1"], f"tags.`{PARENT_TAG}` = '{parent}'")):
        client.log_param(run.info.run_id, "lr", str(0.001 * (1 + i % 7)))
    data = load(uri, "s_optuna")
    (found,) = findings.collect(uri, data)
    assert found.trials == 20 and found.lines[0].startswith("drop (%): of 20 trials T (")
    paths = findings.write([found], data, tmp_path / "out")
    assert paths[1].name == "s_optuna_search.png" and paths[1].stat().st_size > 20_000
