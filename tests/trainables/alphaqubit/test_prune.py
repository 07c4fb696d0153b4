"""Pruning a decoder: what leaves, what makes up for it, and that the file reads back."""

from pathlib import Path

import pytest
import torch

from engines.errors import InputError
from trainables import checkpoint, evaluate
from trainables.alphaqubit.config import Config, from_data
from trainables.alphaqubit.prune import narrowed, partway, prune
from trainables.prune import Prune

WIDE = {"dim": 8, "layers": 2, "heads": 4, "key_dim": 4, "widening": 2, "conv_channels": 16, "dilations": (1, 2)}
HALF = {"heads": 0.5, "hidden": 0.5, "conv": 0.5}


def bits(shots=64, rounds=3, distance=3):
    events = torch.rand(shots, rounds + 1, distance**2 - 1, generator=torch.Generator().manual_seed(1)) < 0.3
    return events.int(), (events.cumsum(1) % 2).int()


def test_every_layer_loses_the_share_and_steps_lead_there():
    old = Config(**WIDE)
    new = narrowed(old, HALF)
    assert [new.widths(layer) for layer in (0, 1)] == [(2, 8, 8), (2, 8, 8)]
    assert partway(old, new, 0.5).widths(1) == (3, 12, 12) and partway(old, new, 1.0) == new
    assert partway(old, new, 0.0).widths(0) == old.widths(0)
    assert from_data(new.to_data()) == new and "layer_heads" not in old.to_data()
    for part, what in (("heads", "all 4 heads"), ("hidden", "all 16 hidden"), ("conv", "all 16 channels of the conv")):
        with pytest.raises(InputError, match=f"ratio 0.9 of {part} would remove {what}.*lower rho or the factor"):
            narrowed(old, {**HALF, part: 0.9})
    with pytest.raises(InputError, match=r"layer_conv=\[8\] must be 2 numbers of at least 1, one per layer"):
        from_data({**old.to_data(), "layer_conv": [8]})


@pytest.mark.parametrize("distance", [3, 5])
def test_silent_features_leave_and_the_answer_stays(aq, distance):
    """Heads and channels that reach no output are the ones that go."""
    model = aq.new_decoder(distance=distance, **{**WIDE, "dilations": (1,)})
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.out.weight[:, 4:12] = 0  # heads 1 and 2
            layer.dense.out.weight[:, ::2] = 0
            layer.grid.out.weight[:, 1::2] = 0
        shots = bits(distance=distance)
        random = torch.get_rng_state()
        new = prune(model, narrowed(model._config, HALF), *shots)
        assert torch.equal(torch.get_rng_state(), random)
        truth = model.features(*shots)["rnn"]
        moved = (new.features(*shots)["rnn"] - truth).norm() / truth.norm()
    kept = model.layers[0].attention.qkv.weight.view(4, 12, 8)[[0, 3]]
    assert torch.equal(new.layers[0].attention.qkv.weight.view(2, 12, 8), kept)
    both = model.layers[0].dense.both.weight.view(2, 16, 8)[:, 1::2]
    assert torch.equal(new.layers[0].dense.both.weight.view(2, 8, 8), both)
    assert torch.equal(new.layers[0].grid.convs[0].weight, model.layers[0].grid.convs[0].weight[::2])
    assert moved < 1e-3


def test_the_refit_follows_better_than_the_columns_that_are_left(aq, monkeypatch):
    model, shots = aq.new_decoder(**WIDE), bits(256)
    target = narrowed(model._config, HALF)
    with torch.no_grad():
        truth = model.features(*shots)["rnn"]
        fitted = prune(model, target, *shots).features(*shots)["rnn"]
        monkeypatch.setattr("trainables.alphaqubit.prune.refit", lambda layer, samples: None)
        plain = prune(model, target, *shots).features(*shots)["rnn"]
    assert (fitted - truth).norm() < 0.9 * (plain - truth).norm()


def test_a_trial_prunes_in_steps_and_its_file_reloads(aq, tmp_path):
    teacher = str(aq.save(tmp_path / "wide.pth", aq.new_decoder(**WIDE)))
    config = aq.config("a", {"rho": 0.5, "steps": 2}, teacher=teacher, epochs=4)
    trial = Prune(config)
    assert trial.model._config.widths(0) == (3, 12, 12)
    reports = [trial.step() for _ in range(4)]
    assert trial.model._config.widths(0) == (2, 8, 8) and all(0 <= r["val_quality"] <= 1 for r in reports)
    best = Path(config["state_dir"]) / "best.pth"
    saved = checkpoint.load(best)
    assert saved["config"]["layer_heads"] == [2, 2] and saved["model"]["layers.0.attention.out.weight"].shape == (8, 8)
    model = trial.domain.load(best)
    again = float(trial.domain.evaluate(model, "val")["ler"].mean())
    assert again == pytest.approx(min(r["val_quality"] for r in reports))
    job = aq.job(best, teacher=teacher, params={"rho": 0.5})
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, trial.domain.teacher())]
    assert evaluate.measure_quality(job)["extra"]["params_down"] == pytest.approx(1 - sizes[0] / sizes[1])


def test_what_cannot_be_is_refused_before_anything_is_trained(aq):
    domain = aq.domain(rho=0.9)
    with pytest.raises(InputError, match="ratio 0.9 of heads would remove all 2 heads of a layer"):
        domain.pruned(domain.teacher(), 1.0)
    assert domain.pruned_id() == aq.domain(rho=0.9).pruned_id() != aq.domain(rho=0.4).pruned_id()
    assert domain.pruned_id() != aq.domain(rho=0.9, conv=0.5).pruned_id()
