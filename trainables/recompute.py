"""Activation checkpointing: blocks keep their inputs alone and run again in the backward pass (Chen et al. 2016).

A step then needs the memory of one block's activations instead of all blocks', for about a third more computation.
Gradients are the same numbers, as the second run repeats the first one's operations.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def _forward(block: nn.Module, *inputs: Any) -> Any:
    plain = partial(type(block).forward, block)
    if not block.training:  # validation and exports keep nothing anyway
        return plain(*inputs)
    return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random


def install(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let every block of these kinds in `model` run again in the backward pass, while it is in training mode."""
    for block in model.modules():
        if isinstance(block, kinds):
            block.forward = MethodType(_forward, block)
