"""A matrix product whose weight is computed in the forward pass, as a module."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Product(nn.Module):
    """x W' + b with W and b as arguments. A module of its own, so that exporters name the product after its place in
    the model, and fake quantization finds it (see fake_quant.py).
    """

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in), weight (out, in), bias (out,) -> (..., out)."""
        return F.linear(x, weight, bias)
