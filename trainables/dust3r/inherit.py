"""A cut student filled from its teacher: what is kept, and how it makes up for what is not.

Layers are kept evenly, the first and the last always; encoder and decoders may be cut by different shares.
Then, from the images on, every attention and feed-forward part of a kept layer is one least squares problem.
Its features A are what enters the part's output projection when the teacher's layer runs on the student's
residual stream x; its goal is the teacher's stream h after the same part or, for the feed-forward part, at the
entrance of the next kept layer, so that it also makes up for the layers dropped in between. With H = A'A +
ridge the full-width optimum is W = H^-1 A'(h - x). Heads and channels leave in the order in which that raises
the error least once all others are refitted: group g costs tr(W_g' (H^-1_gg)^-1 W_g) (the optimal brain
surgeon). The survivors' refit is the student's projection; queries, keys, values and first feed-forward layers
are the teacher's rows. The decoder's embedding and linear heads are refitted in the same way; of a convolutional
head the channels with the largest weights are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables.dust3r.blocks import DecoderBlock, EncoderBlock, Positions
from trainables.dust3r.config import Config
from trainables.dust3r.dpt import narrowed
from trainables.dust3r.model import DUSt3R, LinearHead
from trainables.least_squares import normal_equations, refit, solve, survivors

Block = EncoderBlock | DecoderBlock
# The residual streams of one batch: both images of the encoder in one tensor, or one tensor per view.
Streams = tuple[Tensor, ...]

BATCH_TOKENS = 8192  # bounds memory: features of one batch are this many rows of float64


def student_config(
    teacher_config: dict[str, Any],
    depth: float,
    heads: float,
    ffn: float,
    dec_depth: float | None = None,
    head: float = 1.0,
    shared_head: bool = False,
) -> dict[str, Any]:
    """The teacher's architecture with shares of its layers, heads and feed-forward channels, in (0, 1] each.

    Both the encoder and the decoders are cut, the decoders' layers by `dec_depth` where it is given; widths of
    embeddings and of attention's heads stay. `head`: share of the channels of a DPT head; shared_head: one for both
    views. Counts round to the nearest (at least 1), feed-forward widths and a head's channels to a multiple of 8.
    Raises InputError that names every bad ratio.
    """
    depths = {"enc": depth, "dec": depth if dec_depth is None else dec_depth}
    ratios = {"depth": depth, "heads": heads, "ffn": ffn, "dec_depth": depths["dec"], "head": head}
    bad = [f"{name}={value}" for name, value in ratios.items() if not 0 < value <= 1]
    if bad:
        raise InputError(f"student ratios {', '.join(bad)} must lie above 0 and at most at 1, e.g. 0.7")
    old = Config(**teacher_config)
    if old.layers is not None:
        raise InputError("a student cannot be cut from a pruned teacher: its layers differ in width; give another one")
    new: dict[str, Any] = {}
    for side in ("enc", "dec"):
        hidden = old.mlp_hidden(side)
        new[f"{side}_depth"] = _share(getattr(old, f"{side}_depth"), depths[side])
        new[f"{side}_num_heads"] = _share(getattr(old, f"{side}_num_heads"), heads)
        new[f"{side}_head_dim"] = old.head_width(side)
        new[f"{side}_mlp_hidden"] = _eights(hidden, ffn)
    new["shared_head"] = shared_head or old.shared_head
    if old.head_type == "linear" and head != 1:
        raise InputError(f"head={head}: this teacher's heads are linear and have no channels to cut; leave it at 1")
    if old.head_type == "dpt":
        new |= {"feature_dim": _eights(old.feature_dim, head), "last_dim": _eights(old.last_dim, head)}
        new["layer_dims"] = tuple(_eights(width, head) for width in old.layer_dims)
        new["hooks"] = tuple(_hook(h, _ends(old.dec_depth, new["dec_depth"])) for h in old.head_hooks)
    return dataclasses.replace(old, **new).to_data()


def _hook(position: int, ends: list[int]) -> int:
    """Where a student's head finds the teacher's `position` in the list [encoder output, layer 1, ..., layer n].

    ends: the teacher's position for each of the student's layers.
    """
    return 0 if position == 0 else 1 + min(range(len(ends)), key=lambda i: abs(ends[i] - position))


def _share(count: float, ratio: float) -> int:
    return max(1, math.floor(count * ratio + 0.5))


def _eights(width: int, ratio: float) -> int:
    return width if ratio == 1 else min(width, 8 * _share(width / 8, ratio))


def kept_layers(depth: int, keep: int) -> list[int]:
    """Indices of `keep` of `depth` layers, evenly spread, first and last among them where keep >= 2.

    Between two layers the earlier stays: of the small teacher's encoder 0 2 5 lose less than 0 3 5.
    """
    return [math.ceil(i * (depth - 1) / max(1, keep - 1) - 0.5) for i in range(keep)]


def _ends(depth: int, keep: int) -> list[int]:
    """How many of the teacher's layers each kept layer stands for, counted from the first layer."""
    return [*kept_layers(depth, keep)[1:], depth]


@torch.no_grad()
def inherit(teacher: DUSt3R, student: DUSt3R, images: Tensor) -> None:
    """Fill `student` (of a config by :func:`student_config`) from `teacher`, which is left as it is.

    images: calibration pairs (n, 2, 3, H, W) in [-1, 1], of which 64 to 256 suffice. Deterministic. A student
    of the teacher's own size becomes its exact copy. Memory: two residual streams of all images, and one
    square matrix of the feed-forward width in float64. Raises InputError where the student is not a cut form
    of the teacher.
    """
    old, new = Config(**teacher.config), Config(**student.config)
    _check(old, new, images)
    state, target = teacher.state_dict(), student.state_dict()
    same = all(name in state and state[name].shape == t.shape for name, t in target.items())
    if same and len(state) == len(target) and old.shared_head == new.shared_head:
        student.load_state_dict(state)
        return
    kept_whole = {name: t for name, t in state.items() if "_blocks" not in name and "downstream" not in name}
    student.load_state_dict(kept_whole, strict=False)

    device = next(teacher.parameters()).device
    height, width = images.shape[-2:]
    grid = teacher._grid((height, width))
    pairs = max(1, BATCH_TOKENS // (2 * grid[0] * grid[1]))
    at = teacher._positions(grid, "enc", images.new_zeros((), device=device))
    batches = (images[i : i + pairs].to(device) for i in range(0, len(images), pairs))
    truth: list[Streams] = [(embed(teacher, batch),) for batch in batches]
    own = list(truth)
    kept = kept_layers(old.enc_depth, new.enc_depth)
    truth, own = _fit_stack((teacher.enc_blocks,), (student.enc_blocks,), kept, truth, own, at)

    features = [teacher.enc_norm(x) for (x,) in own]
    goals = [teacher.decoder_embed(teacher.enc_norm(x)) for (x,) in truth]
    refit(student.decoder_embed, zip(features, goals, strict=True))
    truth = [two_views(teacher, x) for x in goals]
    own = [two_views(teacher, student.decoder_embed(x)) for x in features]
    at = teacher._positions(grid, "dec", truth[0][0])
    kept = kept_layers(old.dec_depth, new.dec_depth)
    old_stacks, new_stacks = ((m.dec_blocks, m.dec_blocks2) for m in (teacher, student))
    truth, own = _fit_stack(old_stacks, new_stacks, kept, truth, own, at)

    _fit_heads(teacher, student, truth, own)


def _fit_heads(teacher: DUSt3R, student: DUSt3R, truth: list[Streams], own: list[Streams]) -> None:
    """DPT heads keep their strongest channels, linear ones are refitted; one head for both views starts as view 1's."""
    norm = teacher.dec_norm
    heads: list[nn.Module] = [teacher.downstream_head1, teacher.downstream_head2]
    cuts: list[nn.Module] = [student.downstream_head1, student.downstream_head2]
    once = cuts[0] is cuts[1]
    for view in (0,) if once else (0, 1):
        cut, views = cuts[view], (0, 1) if once else (view,)
        if isinstance(cut, LinearHead):
            cut.load_state_dict(heads[view].state_dict())  # what the refit stays near
            ends = ((heads[v], x[v], t[v]) for v in views for x, t in zip(own, truth, strict=True))
            refit(cut.proj, ((norm(x), head.get_submodule("proj")(norm(t))) for head, x, t in ends))
        else:
            cut.load_state_dict(narrowed(heads[view], cut))


def _check(old: Config, new: Config, images: Tensor) -> None:
    def same(config: Config) -> dict[str, Any]:
        cut = ("depth", "num_heads", "head_dim", "mlp_hidden")
        head = ("hooks", "feature_dim", "last_dim", "layer_dims", "shared_head")
        data = {k: v for k, v in config.to_data().items() if k[4:] not in cut and k not in head}
        return data | {side: config.head_width(side) for side in ("enc", "dec")}

    def sizes(config: Config) -> dict[str, int]:
        counts = {
            f"{s}_{part}": getattr(config, f"{s}_{part}") for s in ("enc", "dec") for part in ("depth", "num_heads")
        }
        counts |= {f"layer_dims[{i}]": width for i, width in enumerate(config.layer_dims)}
        counts |= {"feature_dim": config.feature_dim, "last_dim": config.last_dim}
        return counts | {f"{s}_mlp_hidden": config.mlp_hidden(s) for s in ("enc", "dec")}

    bad = [f"{k}={v!r} (teacher {same(old)[k]!r})" for k, v in same(new).items() if v != same(old)[k]]
    bad += [f"{k}={v} (teacher {sizes(old)[k]})" for k, v in sizes(new).items() if v > sizes(old)[k]]
    if bad:
        raise InputError(f"student is not a cut form of its teacher: {', '.join(bad)}; make it by student_config")
    if images.ndim != 5 or not len(images) or images.shape[1:3] != (2, 3):
        raise InputError(f"calibration images {tuple(images.shape)} must be pairs (n, 2, 3, H, W), n at least 1")


def embed(model: DUSt3R, pairs: Tensor) -> Tensor:
    """Encoder tokens (2n, N, dim) before the first layer: all first views, then all second views."""
    x: Tensor = model.patch_embed(torch.cat((pairs[:, 0], pairs[:, 1])))
    return x if model.enc_pos_embed is None else x + model.enc_pos_embed


def two_views(model: DUSt3R, x: Tensor) -> Streams:
    """Decoder tokens (2n, N, dim) of both views -> one tensor (n, N, dim) per view, with their positions."""
    if model.dec_pos_embed is not None:
        x = x + model.dec_pos_embed
    return x.chunk(2)


def _fit_stack(
    old: Sequence[nn.ModuleList],
    new: Sequence[nn.ModuleList],
    kept: list[int],
    truth: list[Streams],
    own: list[Streams],
    at: Positions,
) -> tuple[list[Streams], list[Streams]]:
    """Fill the student's layers (one stack per view); returns both sides' streams after the last layer."""
    ends = [*kept[1:], len(old[0])]
    for layer, (first, end) in enumerate(zip(kept, ends, strict=True)):
        blocks = [stack[first] for stack in old]
        cuts = [stack[layer] for stack in new]
        entered, own_entered = truth, own
        for part in block_parts(blocks[0]):
            truth = [advance(blocks, part, x, i, at) for x, i in zip(truth, entered, strict=True)]
            if part == "mlp":
                for skipped in range(first + 1, end):
                    truth = [_layer([stack[skipped] for stack in old], x, at) for x in truth]
            for view, (block, cut) in enumerate(zip(blocks, cuts, strict=True)):
                samples = (
                    sample(block, part, x[view], i[-1 - view], goal[view], at)
                    for x, i, goal in zip(own, own_entered, truth, strict=True)
                )
                _fit_part(block, cut, part, samples)
            own = [advance(cuts, part, x, i, at) for x, i in zip(own, own_entered, strict=True)]
    return truth, own


def block_parts(block: nn.Module) -> tuple[str, ...]:
    """The parts of a layer that add to its stream, in the order of its forward pass."""
    return ("attn", "cross_attn", "mlp") if isinstance(block, DecoderBlock) else ("attn", "mlp")


def _update(block: Any, part: str, x: Tensor, other: Tensor, at: Positions) -> Tensor:
    """What `part` adds to the stream x; other is the other view's stream at the entrance of the layer."""
    if part == "attn":
        out: Tensor = block.attn(block.norm1(x), at)
    elif part == "cross_attn":
        out = block.cross_attn(block.norm2(x), block.norm_y(other), at, at)
    else:
        out = block.mlp((block.norm3 if isinstance(block, DecoderBlock) else block.norm2)(x))
    return out


def advance(blocks: Sequence[nn.Module], part: str, x: Streams, entered: Streams, at: Positions) -> Streams:
    """The streams x (one per view and block) after `part`; entered: those at the entrance of the layer."""
    return tuple(s + _update(b, part, s, entered[-1 - v], at) for v, (b, s) in enumerate(zip(blocks, x, strict=True)))


def _layer(blocks: Sequence[nn.Module], x: Streams, at: Positions) -> Streams:
    entered = x
    for part in block_parts(blocks[0]):
        x = advance(blocks, part, x, entered, at)
    return x


def output(block: Any, part: str) -> nn.Linear:
    """The output projection of a part."""
    layer: nn.Linear = block.mlp.fc2 if part == "mlp" else getattr(block, part).proj
    return layer


def sample(block: nn.Module, part: str, x: Tensor, other: Tensor, goal: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
    """Features that enter the part's output projection, and what the projection should make of them."""
    seen: list[Tensor] = []
    hook = output(block, part).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        _update(block, part, x, other, at)
    finally:
        hook.remove()
    return seen[0], goal - x


def _fit_part(block: Any, cut: Any, part: str, samples: Iterator[tuple[Tensor, Tensor]]) -> None:
    gram, cross = normal_equations(output(block, part), samples)
    if part == "mlp":
        index = survivors(gram, cross, 1, cut.mlp.fc1.out_features)
    else:
        attention = getattr(cut, part)
        index = survivors(gram, cross, attention.head_dim, attention.heads)
    solve(output(cut, part), gram, cross, index)
    for name, norm in block.named_children():
        if isinstance(norm, nn.LayerNorm):
            getattr(cut, name).load_state_dict(norm.state_dict())
    inputs = {"attn": ("qkv",), "cross_attn": ("projq", "projk", "projv"), "mlp": ("fc1",)}[part]
    for name in inputs:
        old, new = getattr(getattr(block, part), name), getattr(getattr(cut, part), name)
        stacked = 3 if name == "qkv" else 1
        new.weight.copy_(old.weight.view(stacked, -1, old.in_features)[:, index].flatten(0, 1))
        new.bias.copy_(old.bias.view(stacked, -1)[:, index].flatten())
