import json
import math
from pathlib import Path

import pytest
import torch

from engines.errors import InputError
from trainables import checkpoint, evaluate
from trainables.config import Dust3rPruneSettings
from trainables.prune import Prune

GO_ON = """
import json, sys
import numpy, torch
from trainables.prune import Prune
torch.set_num_threads(1)
config, steps = json.loads(sys.argv[1])
torch.rand(5), numpy.random.rand(5)
trial = Prune(config)
print(json.dumps([trial.step() for _ in range(steps)]))
"""
DISTILL_ONLY = ("depth", "heads", "ffn", "init", "gamma")


@pytest.fixture
def pruning(tiny):
    """pruning(name, params, **changes): a trial's config with the settings of prune.yaml."""

    def config(name, params=None, **changes):
        given = tiny.config(name, params, **changes)
        own = {key: value for key, value in given["settings"].items() if key not in DISTILL_ONLY}
        asked = Dust3rPruneSettings.among(own).model_dump()
        return {**given, "settings": {**asked, **own}}

    return config


def kept(config):
    state = checkpoint.load(Path(config["state_dir"]) / "state.pt")
    return {key: value for key, value in state.items() if key != "metrics"}


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_resumed_in_a_fresh_process_is_uninterrupted(tiny, pruning):
    """Two pruning steps, one on either side of the interruption, ratios by sensitivity, a residual stream cut too."""
    params = {"rho": 0.4, "steps": 2, "ratios": "sensitivity", "residual": 0.5}
    straight, cut = (pruning(name, params, epochs=4) for name in ("straight", "cut"))
    expected = [trial.step() for trial in [Prune(straight)] for _ in range(4)]
    first = Prune(cut).step()
    repeated, *others = json.loads(tiny.python(GO_ON, json.dumps((cut, 4))))
    assert repeated == first
    found = [first, *others]
    assert list(map(tiny.without_clocks, found)) == list(map(tiny.without_clocks, expected))
    assert tiny.same(kept(cut), kept(straight))
    best = [checkpoint.load(Path(c["state_dir"]) / "best.pth") for c in (cut, straight)]
    assert tiny.same(best[0]["model"], best[1]["model"]) and best[0]["config"] == best[1]["config"]


def test_steps_narrow_the_model_bit_by_bit_and_all_epochs_are_judged_at_its_final_width(pruning):
    config = pruning("a", {"rho": 0.4, "steps": 2}, epochs=4)
    trial = Prune(config)
    sizes, judged = [size(trial.model)], []
    for _ in range(4):
        trial.step()
        sizes.append(size(trial.model))
        judged.append(size(trial.candidate()))
    whole = size(trial.domain.teacher())
    assert whole > sizes[0] == sizes[1] > sizes[2] == sizes[3] == sizes[4]
    assert judged == [sizes[4]] * 4
    once = Prune(pruning("b", {"rho": 0.4}, epochs=4))
    assert size(once.model) == sizes[4], "in one step or two, the widths are the same"


def test_saved_model_reloads_and_trains_towards_the_task(pruning):
    config = pruning("a", {"rho": 0.3}, epochs=3, samples_per_epoch=64, train_samples=64)
    trial = Prune(config)
    reports = [trial.step() for _ in range(3)]
    assert reports[-1]["train_loss"] < reports[0]["train_loss"]
    best = min(reports, key=lambda report: report["val_quality"])
    saved = checkpoint.load(Path(config["state_dir"]) / "best.pth")
    assert saved["origin"] == {"params": {"rho": 0.3}, "seed": 7, "epoch": best["epoch"]}
    model = trial.domain.load(Path(config["state_dir"]) / "best.pth")
    found = float(trial.domain.evaluate(model, "val")["absrel"].mean())
    assert found == pytest.approx(best["val_quality"], rel=1e-5)


def test_the_teachers_kd_is_an_option(pruning):
    alone, both = Prune(pruning("a", {"beta": 0.0})), Prune(pruning("b", {"beta": 0.5}))
    batch = next(both.batches(1))
    total, parts = alone.loss(batch, 0.0)
    assert parts.keys() == {"task"} and torch.equal(total, parts["task"])
    total, parts = both.loss(batch, 0.0)
    assert total.item() == pytest.approx((parts["task"] + 0.5 * parts["kl"]).item(), rel=1e-6)


def test_preparing_prunes_once_and_measuring_reports_the_achieved_ratio(tiny, pruning, monkeypatch):
    config = pruning("a", {"rho": 0.3}, epochs=1)
    job = {**tiny.job(), "settings": config["settings"], "trials": [{"rho": 0.3}, {"rho": 0.1}]}
    monkeypatch.setattr(evaluate, "environment", lambda: {"cores": 1})
    evaluate.prepare(job)
    made = {path: path.stat().st_mtime_ns for path in Path(job["cache_dir"]).glob("pruned_*.pth")}
    assert len(made) == 2

    def never(*arguments):
        raise AssertionError("pruned again")

    monkeypatch.setattr("trainables.dust3r.prune.prune", never)
    trial = Prune(config)
    trial.step()
    assert {path: path.stat().st_mtime_ns for path in made} == made
    found = evaluate.measure_quality({**job, "params": {"rho": 0.3}, "weights": config["state_dir"] + "/best.pth"})
    expected = 1 - size(trial.model) / size(trial.domain.teacher())
    assert found["extra"]["params_down"] == pytest.approx(expected) and 0.2 < expected < 0.35
    assert "params_down" not in evaluate.measure_quality({**job, "weights": None})["extra"]


def test_a_ratio_that_removes_all_heads_is_refused_before_anything_is_trained(tiny, pruning):
    job = {**tiny.job(), "settings": pruning("a")["settings"], "trials": [{"rho": 0.3}, {"rho": 0.9}]}
    with pytest.raises(InputError, match="0.9 of enc_heads would remove all heads of a layer") as error:
        evaluate.prepare(job)
    assert "\n" not in str(error.value)
    assert not list(Path(job["cache_dir"]).glob("*/layout.json")), "the expensive outputs were not computed for it"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"rho": 0.0}, "greater than 0"),
        ({"rho": 1.0}, "less than 1"),
        ({"rho": math.nan}, "finite"),
        ({"rho": 0.5, "dec_ffn": 2.0}, "rho=0.5 x dec_ffn=2 removes all there is"),
        ({"steps": 3, "epochs": 5}, "steps=3 need at least 6 epochs"),
        ({"ratios": "global"}, "'uniform' or 'sensitivity'"),
    ],
)
def test_settings_that_cannot_be(given, named):
    with pytest.raises(ValueError, match=named):
        Dust3rPruneSettings(**given)


@pytest.mark.parametrize(("steps", "epochs", "expected"), [(1, 1, [0]), (2, 4, [0, 1]), (3, 12, [0, 2, 4])])
def test_steps_fall_into_the_first_half(steps, epochs, expected):
    assert Dust3rPruneSettings(steps=steps, epochs=epochs).step_epochs == expected
