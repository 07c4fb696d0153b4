"""Structured pruning of a decoder: heads of the attention, channels of the gated dense block and of the convolutions.

Each of these is a feature of one block, which adds linear(features) to the state: with it leave its columns of that
layer and whatever computes it, and the states keep their width. Which ones leave, and how the linear layer makes up
for them, is decided by least squares as in dust3r/inherit.py, on rounds that start from the unpruned decoder's states.
(Torch-Pruning's graph, by which DUSt3R is cut, follows modules that are called; here products run on matrices that are
computed from the weights of several modules.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engines.errors import InputError
from trainables.alphaqubit.blocks import Attention, Convolutions, GatedDense
from trainables.alphaqubit.config import PARTS, Config
from trainables.alphaqubit.model import Decoder, build
from trainables.least_squares import normal_equations, refit, survivors

UNIT = 4  # channels that leave together: what 8-bit vector units multiply at once
BATCH_ROWS = 8192  # of features in float64 at a time
_WORDS = {"heads": "heads", "hidden": "hidden channels", "conv": "channels of the convolutions"}
Block = Attention | GatedDense | Convolutions


def narrowed(config: Config, ratios: Mapping[str, float]) -> Config:
    """`config` without a share of every layer's heads, hidden channels and convolutions' channels.

    ratios: for each of PARTS, in [0, 1). Raises InputError for one that would leave a layer nothing.
    """

    def kept(part: str, count: int) -> int:
        unit = _unit(part, count)
        left = count - _round(count / unit * ratios[part]) * unit
        if left < 1:
            raise InputError(
                f"channel ratio {ratios[part]:.3g} of {part} would remove all {count} {_WORDS[part]} of a layer: lower "
                f"rho or the factor {part}"
            )
        return left

    return _with_counts(config, {part: [kept(part, count) for count in _counts(config, part)] for part in PARTS})


def partway(old: Config, new: Config, share: float) -> Config:
    """The widths at `share` of the way from `old` to its narrower form `new`, in whole units; at 1 exactly `new`."""

    def between(part: str, wide: int, narrow: int) -> int:
        unit = _unit(part, wide)
        return wide - _round((wide - narrow) / unit * share) * unit

    ends = {part: zip(_counts(old, part), _counts(new, part), strict=True) for part in PARTS}
    return _with_counts(old, {part: [between(part, *both) for both in pairs] for part, pairs in ends.items()})


def _unit(part: str, count: int) -> int:
    return 1 if part == "heads" else math.gcd(count, UNIT)


def _round(number: float) -> int:
    return math.floor(number + 0.5)


def _counts(config: Config, part: str) -> list[int]:
    return [config.widths(layer)[PARTS.index(part)] for layer in range(config.layers)]


def _with_counts(config: Config, counts: Mapping[str, list[int]]) -> Config:
    changes: dict[str, Any] = {f"layer_{part}": tuple(own) for part, own in counts.items()}
    return dataclasses.replace(config, **changes)


@torch.no_grad()
def prune(model: Decoder, target: Config, events: Tensor, measurements: Tensor) -> Decoder:
    """A new decoder of the narrower Config `target` that follows `model`, a plain one, on the given shots.

    events, measurements: bits (N, R + 1, S), of which a thousand shots suffice. Draws no random numbers.
    """
    with torch.random.fork_rng(devices=[]):
        new = build(**{**model.config, **target.to_data()})
    device = model.pairs.device
    new.to(device).eval()
    whole, shapes = model.state_dict(), {name: value.shape for name, value in new.state_dict().items()}
    new.load_state_dict({name: v for name, v in whole.items() if v.shape == shapes[name]}, strict=False)
    const, pairs = model.constants(), model.pair_resnet(model.pair_inputs(model.pairs))
    truth, codes = _rounds(model, events.to(device), measurements.to(device))
    own = truth
    for i, (old, cut) in enumerate(zip(model._layers(), new._layers(), strict=True)):
        heads, hidden, channels = target.widths(i)
        for before, after, keep in (
            (old.attention, cut.attention, heads),
            (old.dense, cut.dense, hidden),
            (old.grid, cut.grid, channels),
        ):
            theirs = _arguments(before, codes, const.attention[i])
            goals = [before(x, *more) for x, more in zip(truth, theirs, strict=True)]
            changes = [goal - x for goal, x in zip(goals, own, strict=True)]
            features = (_features(before, x, *more) for x, more in zip(own, theirs, strict=True))
            normal = normal_equations(before.out, zip(features, changes, strict=True))
            group = before.key_dim if isinstance(before, Attention) else 1
            _select(before, after, survivors(*normal, group, keep))
            ours = _arguments(after, codes, after.constants(pairs) if isinstance(after, Attention) else None)
            features = (_features(after, x, *more) for x, more in zip(own, ours, strict=True))
            refit(after.out, zip(features, changes, strict=True))
            own = [after(x, *more) for x, more in zip(own, ours, strict=True)]
            truth = goals
    return new


def _rounds(model: Decoder, events: Tensor, measurements: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What enters the first layer in every round of every shot (n, S, D), and the events' codes (n, S), in batches."""
    const = model.constants()
    inputs, codes = model._inputs(events, measurements, const)
    states = model.features(events, measurements)["rnn"].unbind(1)
    before = (model.initial_state(len(events)), *states[:-1])
    x = torch.cat([torch.add(new, old, alpha=math.sqrt(0.5)) for new, old in zip(inputs, before, strict=True)])
    size = max(1, BATCH_ROWS // model.stabilizers)
    return list(torch.split(x, size)), list(torch.split(torch.cat(codes), size))


def _arguments(block: Block, codes: list[Tensor], attention: Any) -> list[tuple[Any, ...]]:
    """What a block takes beside the state, batch by batch."""
    if isinstance(block, Attention):
        return [(own, attention) for own in codes]
    return [(block.constants(),) if isinstance(block, Convolutions) else ()] * len(codes)


def _features(block: Block, *arguments: Any) -> Tensor:
    """What enters the block's output projection."""
    seen: list[Tensor] = []
    hook = block.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        block(*arguments)
    finally:
        hook.remove()
    return seen[0]


def _select(old: Block, new: Block, index: Tensor) -> None:
    """Give `new` the features of `old` at `index`, and its columns of the output projection."""

    def copy(into: Tensor, values: Tensor) -> None:
        into.copy_(values.reshape(into.shape))

    copy(new.out.weight, old.out.weight[:, index])
    copy(new.out.bias, old.out.bias)
    if isinstance(old, Attention) and isinstance(new, Attention):
        heads = index[:: old.key_dim] // old.key_dim
        for mine, theirs in zip(new.qkv.parameters(), old.qkv.parameters(), strict=True):
            copy(mine, theirs.view(old.heads, 3 * old.key_dim, -1)[heads])
        copy(new.layout.weight, old.layout.weight[heads])
        copy(new.events, old.events[heads])
    elif isinstance(old, GatedDense) and isinstance(new, GatedDense):
        for mine, theirs in zip(new.both.parameters(), old.both.parameters(), strict=True):
            copy(mine, theirs.view(2, old.out.in_features, -1)[:, index])
    else:
        for i, (mine, theirs) in enumerate(zip(_convs(new), _convs(old), strict=True)):
            inputs = index if i else slice(None)  # the first reads the state
            copy(mine.weight, theirs.weight[index][:, inputs])
            copy(mine.bias, theirs.bias[index])
            copy(mine.padding, theirs.padding[inputs])


def _convs(block: Block) -> list[Any]:
    return list(block.convs) if isinstance(block, Convolutions) else []
