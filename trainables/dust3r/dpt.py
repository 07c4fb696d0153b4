"""Convolutional (DPT) head: four token maps at rising resolution, fused from coarse to fine.

Sub-module names follow the published checkpoints; ``scratch.layer_rn.{0-3}`` are the same modules as
``scratch.layer{1-4}_rn`` and ``refinenet4.resConfUnit1`` is present but never used, both as there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The finest fused map has 8 cells per patch side, whatever the patch size.
_FUSED_CELLS_PER_PATCH = 8


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class ResidualConvUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.relu(self.conv1(F.relu(x)))) + x
        return out


class FusionBlock(nn.Module):
    """Add a skip map to the coarser path, refine, resize to the next resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        self.resConfUnit1 = ResidualConvUnit(width)
        self.resConfUnit2 = ResidualConvUnit(width)

    def forward(self, path: Tensor, size: tuple[int, int], skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            path = path + self.resConfUnit1(skip)
        path = self.resConfUnit2(path)
        # A 1x1 convolution commutes with bilinear resizing (weights sum to 1): done first it costs a quarter.
        return _resize(self.out_conv(path), size)


class Scratch(nn.Module):
    """Name space of the fusion stage."""

    def __init__(self, layer_dims: Sequence[int], width: int) -> None:
        super().__init__()
        maps = [nn.Conv2d(dim, width, 3, padding=1, bias=False) for dim in layer_dims]
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = maps
        self.layer_rn = nn.ModuleList(maps)
        self.refinenet1 = FusionBlock(width)
        self.refinenet2 = FusionBlock(width)
        self.refinenet3 = FusionBlock(width)
        self.refinenet4 = FusionBlock(width)


class DPT(nn.Module):
    """Token lists of one view -> raw maps (B, channels, H, W).

    token_dims: widths of the four hooked token layers; layer_dims: widths of their maps; width: of the fused
    maps; last_dim: of the map before the output; hooks: positions in the decoder's list.
    """

    def __init__(
        self,
        token_dims: Sequence[int],
        layer_dims: Sequence[int],
        width: int,
        last_dim: int,
        hooks: Sequence[int],
        channels: int,
        patch_size: int,
    ) -> None:
        super().__init__()
        self.hooks = tuple(hooks)
        self.patch_size = patch_size
        t, m = token_dims, layer_dims
        self.act_postprocess = nn.ModuleList(
            (
                nn.Sequential(nn.Conv2d(t[0], m[0], 1), nn.ConvTranspose2d(m[0], m[0], 4, stride=4)),
                nn.Sequential(nn.Conv2d(t[1], m[1], 1), nn.ConvTranspose2d(m[1], m[1], 2, stride=2)),
                nn.Sequential(nn.Conv2d(t[2], m[2], 1)),
                nn.Sequential(nn.Conv2d(t[3], m[3], 1), nn.Conv2d(m[3], m[3], 3, stride=2, padding=1)),
            )
        )
        self.scratch = Scratch(layer_dims, width)
        # Index 1 of the published head is a resizing layer, which depends on the patch size: see forward.
        self.head = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.Identity(),
            nn.Conv2d(width // 2, last_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(last_dim, channels, 1),
        )

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        maps = [
            rn(post(tokens[hook].transpose(1, 2).reshape(-1, tokens[hook].shape[-1], *grid)))
            for hook, post, rn in zip(self.hooks, self.act_postprocess, self.scratch.layer_rn, strict=True)
        ]
        s = self.scratch
        h, w = grid
        # The stride-2 map of an odd grid doubles to one row or column too many.
        path = s.refinenet4(maps[3], (h + h % 2, w + w % 2))[:, :, :h, :w]
        path = s.refinenet3(path, (2 * h, 2 * w), maps[2])
        path = s.refinenet2(path, (4 * h, 4 * w), maps[1])
        path = self.head[0](s.refinenet1(path, (8 * h, 8 * w), maps[0]))
        if self.patch_size != _FUSED_CELLS_PER_PATCH:
            path = _resize(path, (h * self.patch_size, w * self.patch_size))
        out: Tensor = self.head[2:](path)
        return out


class DPTHead(nn.Module):
    """Name space ``downstream_head{1,2}.dpt`` of the published checkpoints."""

    def __init__(self, dpt: DPT) -> None:
        super().__init__()
        self.dpt = dpt

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Raw maps (B, H, W, channels)."""
        out: Tensor = self.dpt(tokens, grid).permute(0, 2, 3, 1)
        return out


def _channels(name: str) -> tuple[str | None, str | None]:
    """The channels that a tensor of a DPTHead's state makes and reads, by a name that all tensors on them share.

    Maps 0 to 3 come from the tokens ("map"); fusion runs from stream 3 down to 0, each of which a map enters and the
    coarser block ends in; None = of the outside, which no cut touches.
    """
    _, part, *rest = name.split(".")
    if part == "act_postprocess":
        own = f"map{rest[0]}"
        return own, None if rest[1] == "0" else own
    if part == "head":
        return {"0": ("half", "fused"), "2": ("last", "half"), "4": (None, "last")}[rest[0]]
    if rest[0].startswith("layer"):  # layer_rn.0 is layer1_rn
        level = int(rest[1]) if rest[0] == "layer_rn" else int(rest[0][5]) - 1
        return f"stream{level}", f"map{level}"
    level = int(rest[0].removeprefix("refinenet")) - 1
    if rest[1] == "out_conv":
        return f"stream{level - 1}" if level else "fused", f"stream{level}"
    inner = f"{level}{rest[1]}"
    return (inner, f"stream{level}") if rest[2] == "conv1" else (f"stream{level}", inner)


def _axes(name: str, weight: Tensor) -> tuple[int, int]:
    """Which axes of a convolution's weight are the channels that it makes and reads."""
    transposed = name in ("dpt.act_postprocess.0.1.weight", "dpt.act_postprocess.1.1.weight")
    return (1, 0) if transposed else (0, 1)


@torch.no_grad()
def narrowed(head: nn.Module, cut: nn.Module) -> dict[str, Tensor]:
    """The state of `cut`, a narrower DPTHead: of `head` the channels with the largest weights.

    A channel counts by the mean magnitude of the weights that make it and read it, over all tensors that share it,
    each relative to its tensor's mean.
    """
    state, target = head.state_dict(), cut.state_dict()
    score: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for name, weight in state.items():
        if weight.ndim < 2:
            continue
        for group, axis in zip(_channels(name), _axes(name, weight), strict=True):
            if group is not None:
                strength = weight.abs().mean([i for i in range(weight.ndim) if i != axis])
                score[group] = score.get(group, 0) + strength / strength.mean().clamp(min=1e-12)
                sizes[group] = target[name].shape[axis]
    keep = {group: own.topk(sizes[group]).indices.sort().values for group, own in score.items()}
    narrow = {}
    for name, weight in state.items():
        makes, reads = _channels(name)
        made, read = _axes(name, weight)
        if makes is not None:
            weight = weight.index_select(made if weight.ndim > 1 else 0, keep[makes])
        if reads is not None and weight.ndim > 1:
            weight = weight.index_select(read, keep[reads])
        narrow[name] = weight.clone()
    return narrow
