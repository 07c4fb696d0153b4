"""A narrower layer that makes up for what it lost: ridge regressions of an output projection on its features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Pull towards the layer's own weights, in mean feature powers. At 0.001 the refitted weights of DUSt3R grow up to 9
# times as large, do worse on unseen images, and the first hundred training steps only undo them.
RIDGE = 0.3


def normal_equations(layer: nn.Linear, samples: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(H, H W) of the ridge regression of goals on features and a constant one, which comes last; float64.

    The ridge pulls towards `layer`'s own weights. H is (in + 1, in + 1), H W (in + 1, out).
    """
    assert layer.bias is not None
    start = torch.cat((layer.weight.T, layer.bias[None])).double()
    gram, cross = start.new_zeros(len(start), len(start)), torch.zeros_like(start)
    rows = 0
    for features, goals in samples:
        a, b = features.flatten(0, -2).double(), goals.flatten(0, -2).double()
        a = torch.cat((a, a.new_ones(len(a), 1)), 1)
        gram += a.T @ a
        cross += a.T @ b
        rows += len(a)
    gram, cross = gram / rows, cross / rows
    ridge = RIDGE * gram.diagonal()[:-1].mean()
    gram.diagonal().add_(ridge)
    return gram, cross + ridge * start


def survivors(gram: Tensor, cross: Tensor, group: int, keep: int) -> Tensor:
    """Indices of the features in the `keep` groups of neighbours that remain after the cheapest removals.

    One group at a time: of two equal features either can go, but not both.
    """
    inverse = torch.linalg.inv(gram)
    weight = inverse @ cross
    index = torch.arange(len(gram) - 1, device=gram.device).view(-1, group)
    while len(index) > keep:
        local = inverse[index[:, :, None], index[:, None, :]]
        rows = weight[index]
        solved = rows / local if group == 1 else torch.linalg.solve(local, rows)
        cheapest = int((rows * solved).sum((1, 2)).argmin())
        out = index[cheapest]
        column = inverse[:, out]
        weight = weight - column @ solved[cheapest]
        inverse = inverse - column @ torch.linalg.solve(local[cheapest], column.T)
        index = torch.cat((index[:cheapest], index[cheapest + 1 :]))
    return index.flatten()


def solve(layer: nn.Linear, gram: Tensor, cross: Tensor, index: Tensor) -> None:
    """Write the solution restricted to the features in `index` (and the constant) into `layer`."""
    chosen = torch.cat((index, index.new_tensor([len(gram) - 1])))
    solution = torch.linalg.solve(gram[chosen][:, chosen], cross[chosen])
    assert layer.bias is not None
    layer.weight.copy_(solution[:-1].T)
    layer.bias.copy_(solution[-1])


def refit(layer: nn.Linear, samples: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Fit `layer` to (features (..., in), goals (..., out)) by least squares, pulled towards its present weights."""
    gram, cross = normal_equations(layer, samples)
    solve(layer, gram, cross, torch.arange(len(gram) - 1, device=gram.device))
