"""Two workers on a decoder's trial, over Gloo; see tests/trainables/test_gang.py."""

from pathlib import Path

import pytest
import ray
import torch

from trainables import checkpoint
from trainables.distill import Distill


def state(config):
    found = checkpoint.load(Path(config["state_dir"]) / "state.pt")
    return {key: found[key] for key in ("epoch", "best", "trained", "optimizer")}


def test_two_workers_are_one_with_the_same_batch(gang, aq, tiny):
    """Parts of it have no gradient here (what predicts the next layer's events): they are left alone, not decayed."""
    leader = gang.lead(Distill, aq.config("two"))
    found = [ray.get(leader.step.remote()) for _ in range(2)]
    trials = {"pieces": Distill(aq.config("pieces", accumulate=2)), "whole": Distill(aq.config("whole"))}
    expected = {name: [trial.step() for _ in range(2)] for name, trial in trials.items()}
    assert tiny.same(state(aq.config("two")), state(aq.config("pieces")))
    for name, rel in {"pieces": 1e-6, "whole": 1e-5}.items():
        for own, other in zip(found, expected[name], strict=True):
            assert own["train_loss"] == pytest.approx(other["train_loss"], rel=rel)
            assert own["val_nll"] == pytest.approx(other["val_nll"], rel=rel)
    own, whole = (torch.cat([v.flatten() for v in state(aq.config(n))["trained"].values()]) for n in ("two", "whole"))
    assert (own - whole).norm() < 1e-3 * whole.norm()
    trials["whole"].loss(next(trials["whole"].batches(1)), 0.0)[0].backward()
    assert [name for name, weight in trials["whole"].trained.named_parameters() if weight.grad is None]
