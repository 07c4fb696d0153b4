"""Two workers on a decoder's trial, over Gloo; see tests/trainables/test_gang.py."""

from pathlib import Path

import pytest
import ray
import torch
from torch import nn

from trainables import checkpoint
from trainables.distill import Distill


def state(config):
    found = checkpoint.load(Path(config["state_dir"]) / "state.pt")
    return {key: found[key] for key in ("epoch", "best", "trained", "optimizer")}


class Spare(Distill):
    """Weights that nothing uses have no gradient: a gang leaves them alone, too, instead of decaying them."""

    def build(self):
        super().build()
        self.trained.append(nn.Linear(2, 2))


def test_two_workers_are_one_with_the_same_batch(gang, aq, tiny):
    two, whole = (aq.config(name, weight_decay=0.1) for name in ("two", "whole"))
    pieces = aq.config("pieces", weight_decay=0.1, accumulate=2)
    leader = gang.lead(Spare, two)
    found = [ray.get(leader.step.remote()) for _ in range(2)]
    trials = {1e-6: Spare(pieces), 1e-5: Spare(whole)}
    expected = {rel: [trial.step() for _ in range(2)] for rel, trial in trials.items()}
    assert tiny.same(state(two), state(pieces))
    for rel, reports in expected.items():
        for own, other in zip(found, reports, strict=True):
            assert own["train_loss"] == pytest.approx(other["train_loss"], rel=rel)
            assert own["val_nll"] == pytest.approx(other["val_nll"], rel=rel)
    weights, others = (torch.cat([v.flatten() for v in state(c)["trained"].values()]) for c in (two, whole))
    assert (weights - others).norm() < 1e-3 * others.norm()
