"""The optimiser of every training: AdamW, or Muon for the matrices with AdamW for the rest."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

_BETAS = (0.9, 0.95)


class Optimizer:
    """All trained weights of `module` behind the calls that a training loop needs.

    muon: momentum whose update is orthogonalised (Jordan et al. 2024, torch.optim.Muon), for the weights of linear
    layers, scaled to AdamW's usual update size (Liu et al., arXiv:2502.16982, section 2.2), so that one learning rate
    serves both; AdamW for everything else. Matrices are decayed; biases, norms and single vectors are not.
    """

    def __init__(self, module: nn.Module, kind: Literal["muon", "adamw"], weight_decay: float) -> None:
        weights = [p for p in module.parameters() if p.requires_grad]
        linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
        matrices = [p for p in weights if kind == "muon" and id(p) in linear]
        taken = set(map(id, matrices))
        rest = [p for p in weights if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=1.0, betas=_BETAS, fused=True)]
        if matrices:
            self._parts.append(
                torch.optim.Muon(matrices, lr=1.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )

    @property
    def rate(self) -> float:
        """The learning rate of the last step; 1 before the first."""
        return float(self._parts[0].param_groups[0]["lr"])

    def step(self, rate: float) -> None:
        """Update the weights at learning rate `rate` and drop their gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """The momenta, for a checkpoint."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over the momenta of :meth:`state_dict`."""
        for part, own in zip(self._parts, state, strict=True):
            part.load_state_dict(own)
