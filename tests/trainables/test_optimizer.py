"""Optimizer: which weights Muon takes, and that a restored one goes on as if it had never stopped."""

import copy

import torch
from torch import nn

from trainables.optimizer import Optimizer


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))


def train(module: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(module(x), x[:, :4].cumsum(1)).backward()
        optimizer.step(1e-2)


def test_muon_updates_of_matrices_are_orthogonal_and_adamw_is_left_as_it_was() -> None:
    for kind, orthogonal in (("muon", True), ("adamw", False)):
        module = model()
        before = copy.deepcopy(module)
        train(module, Optimizer(module, kind, 0.0), 1)
        step = module[0].weight - before[0].weight
        values = torch.linalg.svdvals(step.detach())
        # Newton-Schulz brings all singular values near one size; Adam's first step has one dominant direction.
        assert (values.min() / values.max() > 0.5) == orthogonal
        assert torch.allclose((module[1].weight - before[1].weight).abs(), torch.full((16,), 1e-2), atol=1e-4)


def test_biases_and_norms_are_not_decayed() -> None:
    module = model()
    optimizer = Optimizer(module, "muon", 0.5)
    for p in module.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    assert torch.allclose(module[0].weight, torch.tensor(0.95))
    assert torch.equal(module[0].bias, torch.ones(16)) and torch.equal(module[1].weight, torch.ones(16))


def test_restored_equals_uninterrupted_and_frozen_weights_stay() -> None:
    whole = model()
    whole[3].weight.requires_grad_(False)
    frozen = whole[3].weight.clone()
    optimizer = Optimizer(whole, "muon", 0.05)
    train(whole, optimizer, 3)
    copied = copy.deepcopy(whole)
    again = Optimizer(copied, "muon", 0.05)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(whole, optimizer, 3, first=3)
    train(copied, again, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), copied.parameters(), strict=True))
    assert torch.equal(whole[3].weight, frozen) and optimizer.rate == 1e-2
