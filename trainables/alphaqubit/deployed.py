"""A decoder as it is used: what depends on the weights alone is computed once, before the first shot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
            self._names = _mapped(decoder.constants(), self._keep)

    def _keep(self, value: Tensor) -> str:
        name = f"constant{len(list(self.buffers(recurse=False)))}"
        self.register_buffer(name, value, persistent=False)
        return name

    def forward(self, events: Tensor, measurements: Tensor) -> Tensor:
        """See above."""
        logits: Tensor = self.decoder(events, measurements, _mapped(self._names, self.get_buffer))
        return logits


def _mapped(part: Any, change: Callable[[Any], Any]) -> Any:
    """The same lists and named tuples, with everything in them but None changed."""
    if part is None or not isinstance(part, list | tuple):
        return None if part is None else change(part)
    parts = [_mapped(one, change) for one in part]
    return parts if isinstance(part, list) else type(part)(*parts)
