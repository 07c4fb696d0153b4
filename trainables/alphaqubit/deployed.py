"""A decoder as it is used: what depends on the weights alone is computed once, before the first shot."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from trainables.alphaqubit.model import Decoder


class Deployed(nn.Module):
    """Events and measurements (N, R + 1, S) int32 -> logits (N, K).

    The decoder's constants are buffers here, so that every product by a weight is one by a constant matrix in an
    exported graph, where it can be quantized.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        with torch.no_grad():
            values, self._structure = tree.tree_flatten(decoder.constants())
        self._names = [f"constant{i}" for i in range(len(values))]
        for name, value in zip(self._names, values, strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, events: Tensor, measurements: Tensor) -> Tensor:
        """See above."""
        constants = tree.tree_unflatten([getattr(self, name) for name in self._names], self._structure)
        logits: Tensor = self.decoder(events, measurements, constants)
        return logits
