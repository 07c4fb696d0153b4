"""Structured pruning: whole heads, feed-forward channels and residual channels leave, and what stays makes up for it.

Torch-Pruning's dependency graph says which rows and columns of which layers go together; the channels with the least
L1 norm over their group leave first. The result is a plain DUSt3R of a narrower Config, whose file loads without any
tracing. :func:`refit` then adapts its output projections by least squares (see inherit.py) to the model that it was
cut from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch_pruning as tp
from torch import Tensor, nn

from trainables import least_squares
from trainables.dust3r import inherit
from trainables.dust3r.blocks import CrossAttention, Positions, SelfAttention
from trainables.dust3r.config import Config
from trainables.dust3r.inherit import Streams
from trainables.dust3r.model import DUSt3R, LinearHead
from trainables.dust3r.narrow import Part, parts_of, unit

_FUSED = ("projq", "projk", "projv")
_TABLES = ("enc_pos_embed", "dec_pos_embed")
_L1 = tp.importance.GroupMagnitudeImportance(p=1, group_reduction="sum", normalizer=None)


class _Separate(CrossAttention):
    """A self-attention with layers of their own for queries, keys and values, whose channels the graph can follow."""

    def __init__(self, fused: SelfAttention) -> None:
        super().__init__(fused.qkv.in_features, fused.heads, fused.head_dim)
        weights, biases = fused.qkv.weight.chunk(3), fused.qkv.bias.chunk(3)
        for name, weight, bias in zip(_FUSED, weights, biases, strict=True):
            getattr(self, name).load_state_dict({"weight": weight, "bias": bias})
        self.proj.load_state_dict(fused.proj.state_dict())

    def forward(self, x: Tensor, at: Positions) -> Tensor:  # type: ignore[override]
        """Attention of x over itself."""
        return super().forward(x, x, at, at)


class _Graph:
    """A copy of a model on the CPU with its dependency graph, to rank and remove channels of."""

    def __init__(self, model: DUSt3R) -> None:
        config = Config(**model.config)
        # Rotary positions cannot be traced, tables for a grid of 2 x 2 patches can; either leaves channels where
        # they are, so that the graph is the same.
        side = 2 * config.patch_size
        with torch.random.fork_rng(devices=[]):
            self.copy = DUSt3R(dataclasses.replace(config, pos_embed="cosine", img_size=(side, side)))
            weights = {name: value for name, value in model.state_dict().items() if name not in _TABLES}
            self.copy.load_state_dict(weights, strict=False)
            for block in (*self.copy.enc_blocks, *self.copy.dec_blocks, *self.copy.dec_blocks2):
                block.attn = _Separate(cast(SelfAttention, block.attn))
        del self.copy.mask_token  # it is never read, and the graph would warn of it
        self.copy.requires_grad_(True)
        with torch.enable_grad():
            self.graph = tp.DependencyGraph().build_dependency(
                self.copy,
                torch.zeros(1, 3, side, side),
                lambda copy, image: copy.pointmaps(image, image),
                verbose=False,
            )

    def rank(self, root: nn.Linear | nn.Conv2d, block: int = 1) -> Tensor:
        """Output channels of `root` in blocks of neighbours (n, block), the least important block first."""
        scores: Tensor = _L1(self._group(root)).view(-1, block).sum(1)
        order = scores.argsort(stable=True)
        return order[:, None] * block + torch.arange(block)

    def keep(self, root: nn.Linear | nn.Conv2d, channels: int, block: int = 1) -> Tensor:
        """Remove all but `channels` output channels of `root` and what depends on them; the indices that stay."""
        order = self.rank(root, block)
        leaving = order[: len(order) - channels // block].flatten().tolist()
        if leaving:
            self._group(root).prune(idxs=leaving)
        return order[len(order) - channels // block :].flatten().sort().values

    def _group(self, root: nn.Linear | nn.Conv2d) -> Any:
        conv = isinstance(root, nn.Conv2d)
        remove = tp.prune_conv_out_channels if conv else tp.prune_linear_out_channels
        return self.graph.get_pruning_group(root, remove, list(range(len(root.weight))))

    def root(self, part: Part) -> nn.Linear:
        """The layer whose output channels are the part's."""
        module: Any = self.copy.get_submodule(part.path)
        layer: nn.Linear = module.fc1 if part.name == "mlp" else module.projq
        return layer

    def weights(self) -> dict[str, Tensor]:
        """The state dict under the names of a plain DUSt3R, without what this copy lacks."""
        state = {name: value for name, value in self.copy.state_dict().items() if name not in _TABLES}
        for stack in ("enc_blocks", "dec_blocks", "dec_blocks2"):
            for layer in range(len(getattr(self.copy, stack))):
                for kind in ("weight", "bias"):
                    path = f"{stack}.{layer}.attn"
                    state[f"{path}.qkv.{kind}"] = torch.cat([state.pop(f"{path}.{name}.{kind}") for name in _FUSED])
        return state


def _block(part: Part, config: Config) -> int:
    """Output channels of a part's root layer that are one head or one channel."""
    return 1 if part.name == "mlp" else config.head_width(part.stack[:3])


def prune(model: DUSt3R, target: Config) -> tuple[DUSt3R, dict[str, Tensor]]:
    """A new model of the narrower Config `target` (see narrow.py) from the most important channels of `model`.

    Also the residual channels that it kept, by side: 'enc' and 'dec', ascending indices into the model's. Exactly
    the model's function with the other heads and feed-forward channels silenced; where the residual streams stay as
    they are, that is. Draws no random numbers.
    """
    graph, old = _Graph(model), Config(**model.config)
    kept = {
        "enc": graph.keep(graph.copy.patch_embed.proj, target.enc_embed_dim),
        "dec": graph.keep(graph.copy.decoder_embed, target.dec_embed_dim),
    }
    for part in parts_of(old):
        graph.keep(graph.root(part), target.count(*part) * _block(part, old), _block(part, old))
    state, whole = graph.weights(), model.state_dict()
    state["mask_token"] = whole["mask_token"].cpu()[..., kept["dec"]]
    state |= {name: whole[name].cpu()[:, kept[name[:3]]] for name in _TABLES if name in whole}
    with torch.random.fork_rng(devices=[]):
        pruned = DUSt3R(target)
    pruned.load_state_dict(state)
    return pruned.to(next(model.parameters()).device).eval(), kept


@torch.no_grad()
def sensitivities(model: DUSt3R, share: float, distance: Callable[[DUSt3R], float]) -> dict[Part, float]:
    """What each part costs when `share` of it (at least one unit) is silenced alone: the growth of `distance`.

    distance: how far a model's outputs are from where they should be, on data of the caller's choice. The model is
    changed on the way and put back.
    """
    config, graph = Config(**model.config), _Graph(model)
    costs, base = {}, distance(model)
    for part in parts_of(config):
        order = graph.rank(graph.root(part), _block(part, config))
        step = unit(part, config)
        units = len(order) // step
        silenced = max(1, round(units * share))
        layer = inherit.output(model.get_submodule(f"{part.stack}.{part.layer}"), part.name)
        before = layer.weight.clone()
        layer.weight[:, order[: silenced * step].flatten().to(before.device)] = 0
        # Per (share)^2, for where units are few the share that leaves is far from the share that was asked for.
        costs[part] = max(0.0, distance(model) - base) * (share * units / silenced) ** 2
        layer.weight.copy_(before)
    return costs


@torch.no_grad()
def refit(old: DUSt3R, new: DUSt3R, kept: dict[str, Tensor], images: Tensor) -> None:
    """Adapt the output projections of `new`, pruned from `old`, so that its streams follow the old model's.

    One ridge regression per part in the order of the forward pass, each on the narrowed model's own features:
    what the parts before could not make up for is part of its goal. kept: from :func:`prune`; images: (n, 2, 3, H, W)
    in [-1, 1].
    """
    device = next(old.parameters()).device
    kept = {side: index.to(device) for side, index in kept.items()}
    grid = old._grid((images.shape[-2], images.shape[-1]))
    pairs = max(1, inherit.BATCH_TOKENS // (2 * grid[0] * grid[1]))
    batches = [batch.to(device) for batch in torch.split(images, pairs)]
    truth: list[Streams] = [(inherit.embed(old, batch),) for batch in batches]
    own: list[Streams] = [(inherit.embed(new, batch),) for batch in batches]
    at = old._positions(grid, "enc", truth[0][0])
    truth, own = _refit_stack((old.enc_blocks,), (new.enc_blocks,), kept["enc"], truth, own, at)

    features = [new.enc_norm(x) for (x,) in own]
    goals = [old.decoder_embed(old.enc_norm(x)) for (x,) in truth]
    least_squares.refit(
        new.decoder_embed, ((x, goal[..., kept["dec"]]) for x, goal in zip(features, goals, strict=True))
    )
    truth = [inherit.two_views(old, x) for x in goals]
    own = [inherit.two_views(new, new.decoder_embed(x)) for x in features]
    at = old._positions(grid, "dec", truth[0][0])
    old_stacks, new_stacks = ((m.dec_blocks, m.dec_blocks2) for m in (old, new))
    truth, own = _refit_stack(old_stacks, new_stacks, kept["dec"], truth, own, at)

    for view, name in enumerate(("downstream_head1", "downstream_head2")):
        head, cut = getattr(old, name), getattr(new, name)
        if isinstance(cut, LinearHead):
            views = [(new.dec_norm(x[view]), head.proj(old.dec_norm(t[view]))) for x, t in zip(own, truth, strict=True)]
            least_squares.refit(cut.proj, iter(views))


def _refit_stack(
    old: Sequence[nn.ModuleList],
    new: Sequence[nn.ModuleList],
    kept: Tensor,
    truth: list[Streams],
    own: list[Streams],
    at: Positions,
) -> tuple[list[Streams], list[Streams]]:
    """Refit the layers of one stack per view; both sides' streams after the last layer."""
    for layer in range(len(old[0])):
        blocks, cuts = ([stack[layer] for stack in stacks] for stacks in (old, new))
        entered, own_entered = truth, own
        for part in inherit.block_parts(blocks[0]):
            truth = [inherit.advance(blocks, part, x, i, at) for x, i in zip(truth, entered, strict=True)]
            for view, cut in enumerate(cuts):
                samples = (
                    inherit.sample(cut, part, x[view], i[-1 - view], goal[view][..., kept], at)
                    for x, i, goal in zip(own, own_entered, truth, strict=True)
                )
                least_squares.refit(inherit.output(cut, part), samples)
            own = [inherit.advance(cuts, part, x, i, at) for x, i in zip(own, own_entered, strict=True)]
    return truth, own
