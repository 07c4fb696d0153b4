"""Two-view pointmap network (DUSt3R, Wang et al., arXiv:2312.14132).

A shared ViT encoder, two cross-attending decoders, one head per view; both pointmaps are in the frame of the
first camera, up to one common scale. State-dict names are those of the published checkpoints. Heads and
feed-forward layers may be narrower than the embedding, so that a pruned student is the same class with
another ``Config``.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables.dust3r.blocks import (
    LAYER_NORM_EPS,
    DecoderBlock,
    EncoderBlock,
    Positions,
    is_tracing,
    rotary_positions,
)
from trainables.dust3r.config import PARTS, Config
from trainables.dust3r.dpt import DPT, DPTHead

_CHANNELS = 4  # x, y, z and confidence

Pointmaps = tuple[Tensor, Tensor, Tensor, Tensor]


def _image_size(img: Tensor) -> tuple[int, int]:
    """(H, W) as plain numbers: a traced export keeps the batch free and the image size fixed."""
    if not is_tracing():
        return img.shape[-2], img.shape[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "converting a tensor to an integer"
        return int(img.shape[-2]), int(img.shape[-1])


def from_reference_config(**config: Any) -> "DUSt3R":
    """Build the model from the published constructor's keyword arguments (or a ``DUSt3R.config``)."""
    known = {f.name for f in dataclasses.fields(Config)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise InputError(f"model config: unknown keys {unknown}, known are {sorted(known)}")
    return DUSt3R(Config(**config))


def cosine_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (h * w, dim), row-major.

    The first half of the channels encodes the column, the second the row, each as dim / 4 sines followed by
    dim / 4 cosines of position * 10000^(-i / (dim / 4)).
    """
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    parts = [p.flatten().double()[:, None] * frequency for p in (columns, rows)]
    return torch.cat([f for a in parts for f in (a.sin(), a.cos())], dim=1).float()


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, img: Tensor) -> Tensor:
        out: Tensor = self.proj(img).flatten(2).transpose(1, 2)
        return out


class LinearHead(nn.Module):
    """One linear map from each token of the last layer to its patch of pixels."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(dim, _CHANNELS * patch_size**2)

    def forward(self, tokens: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Raw maps (B, H, W, channels)."""
        h, w, p = *grid, self.patch_size
        raw: Tensor = self.proj(tokens[-1])
        # Output features are ordered (channel, row in patch, column in patch).
        raw = raw.reshape(-1, h, w, _CHANNELS, p, p).permute(0, 1, 4, 2, 5, 3)
        return raw.reshape(-1, h * p, w * p, _CHANNELS)


def _stack(config: Config, stack: str) -> nn.ModuleList:
    """The layers of one stack, each with as many heads and channels as the config says."""
    side = stack[:3]
    dim, head_dim = getattr(config, f"{side}_embed_dim"), config.head_width(side)
    block = EncoderBlock if side == "enc" else DecoderBlock
    counts = ([config.count(stack, part, i) for part in PARTS[stack]] for i in range(config.depth(stack)))
    return nn.ModuleList(block(dim, head_dim, *widths) for widths in counts)


def _make_head(config: Config) -> nn.Module:
    if config.head_type == "linear":
        return LinearHead(config.dec_embed_dim, config.patch_size)
    hooks = config.head_hooks
    token_dims = [config.dec_embed_dim if h else config.enc_embed_dim for h in hooks]
    widths = (config.layer_dims, config.feature_dim, config.last_dim)
    return DPTHead(DPT(token_dims, *widths, hooks, _CHANNELS, config.patch_size))


def _to_pointmap(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Raw maps (..., 4) -> points (..., 3) at expm1 of the raw distance, and confidence 1 + exp (...)."""
    xyz, conf = raw[..., :3], raw[..., 3]
    distance = xyz.norm(dim=-1, keepdim=True)
    # expm1(d) = tanh(d / 2) (exp(d) + 1): as exact near zero, and ONNX has no expm1.
    scaled = torch.tanh(distance / 2) * (distance.exp() + 1)
    return xyz * (scaled / distance.clamp(min=1e-8)), 1 + conf.exp()


class DUSt3R(nn.Module):
    """Images in [-1, 1], (B, 3, H, W) with H and W multiples of the patch size -> two pointmaps.

    ``config`` holds JSON-able keyword arguments: ``from_reference_config(**model.config)`` builds an equal
    module. Raises InputError for an image size that the patch size does not divide.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = self._config = config
        self.config: dict[str, Any] = config.to_data()
        # Part of every checkpoint, left over from masked pre-training; the two-view model never reads it.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.dec_embed_dim), requires_grad=False)
        self.patch_embed = PatchEmbed(c.patch_size, c.enc_embed_dim)
        self.enc_blocks = _stack(c, "enc_blocks")
        self.enc_norm = nn.LayerNorm(c.enc_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(c.enc_embed_dim, c.dec_embed_dim)
        self.dec_blocks = _stack(c, "dec_blocks")
        self.dec_norm = nn.LayerNorm(c.dec_embed_dim, eps=LAYER_NORM_EPS)
        self.dec_blocks2 = _stack(c, "dec_blocks2")
        self.downstream_head1 = _make_head(c)
        self.downstream_head2 = self.downstream_head1 if c.shared_head else _make_head(c)
        self.enc_pos_embed: Tensor | None = None
        self.dec_pos_embed: Tensor | None = None
        if c.pos_embed == "cosine":
            grid = (c.img_size[0] // c.patch_size, c.img_size[1] // c.patch_size)
            del self.enc_pos_embed, self.dec_pos_embed
            self.register_buffer("enc_pos_embed", cosine_table(grid, c.enc_embed_dim))
            self.register_buffer("dec_pos_embed", cosine_table(grid, c.dec_embed_dim))
        self._positions_cache: dict[tuple[Any, ...], Positions] = {}
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch embedding is a linear map of the flattened patch.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)

    def _grid(self, hw: tuple[int, int]) -> tuple[int, int]:
        p, fixed = self._config.patch_size, self._config.img_size
        if hw[0] % p or hw[1] % p:
            raise InputError(f"image size {tuple(hw)} is not a multiple of patch_size={p}: crop or resize")
        if self._config.rope_base is None and tuple(hw) != fixed:
            raise InputError(f"image size {tuple(hw)} must be img_size={fixed} with pos_embed='cosine'")
        return hw[0] // p, hw[1] // p

    def _positions(self, grid: tuple[int, int], side: str, like: Tensor) -> Positions:
        base = self._config.rope_base
        if base is None:
            return Positions(grid[0] * grid[1])
        dtype = like.dtype
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        head_dim = self._config.head_width(side)
        key = (grid, head_dim, like.device, dtype)
        if key not in self._positions_cache:
            self._positions_cache[key] = rotary_positions(grid, head_dim, base, like.device, dtype)
        return self._positions_cache[key]

    def _encode(self, img: Tensor, blocks: list[Tensor] | None = None) -> Tensor:
        grid = self._grid(_image_size(img))
        x: Tensor = self.patch_embed(img)
        if self.enc_pos_embed is not None:
            x = x + self.enc_pos_embed
        at = self._positions(grid, "enc", x)
        for block in self.enc_blocks:
            x = block(x, at)
            if blocks is not None:
                blocks.append(x)
        x = self.enc_norm(x)
        return x

    def encode(self, img: Tensor) -> Tensor:
        """Tokens (B, N, enc_embed_dim) of images (B, 3, H, W), after enc_norm."""
        return self._encode(img)

    def _encode_pair(self, img1: Tensor, img2: Tensor, blocks: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        if _image_size(img1) == _image_size(img2):
            both = self._encode(torch.cat((img1, img2)), blocks)
            first, second = both.chunk(2)
            return first, second
        if blocks is not None:
            shapes = f"{tuple(img1.shape)} and {tuple(img2.shape)}"
            raise InputError(f"per-block features need two views of equal shape, got {shapes}")
        return self._encode(img1), self._encode(img2)

    def decode(
        self, feat1: Tensor, hw1: tuple[int, int], feat2: Tensor, hw2: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per view [encoder output, block 1, ..., block n]; only the last one has passed dec_norm.

        feat: encoder outputs (B, N, enc_embed_dim); hw: image sizes (H, W) in pixels. Both streams of a layer
        read the previous layer's outputs of both.
        """
        list1, list2 = self._decode(feat1, hw1, feat2, hw2)
        return self._normed(list1), self._normed(list2)

    def pair(self, feat1: Tensor, hw1: tuple[int, int], feat2: Tensor, hw2: tuple[int, int]) -> Pointmaps:
        """What :meth:`pointmaps` gives for images whose encoder outputs are known; arguments as of :meth:`decode`."""
        list1, list2 = self.decode(feat1, hw1, feat2, hw2)
        return self._heads(list1, hw1, list2, hw2)

    def _normed(self, outputs: list[Tensor]) -> list[Tensor]:
        return [*outputs[:-1], self.dec_norm(outputs[-1])]

    def _decode(
        self, feat1: Tensor, hw1: tuple[int, int], feat2: Tensor, hw2: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        x1, x2 = self.decoder_embed(feat1), self.decoder_embed(feat2)
        if self.dec_pos_embed is not None:
            x1, x2 = x1 + self.dec_pos_embed, x2 + self.dec_pos_embed
        at1 = self._positions(self._grid(hw1), "dec", feat1)
        at2 = self._positions(self._grid(hw2), "dec", feat2)
        list1, list2 = [feat1], [feat2]
        for block1, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            x1, x2 = block1(x1, x2, at1, at2), block2(x2, x1, at2, at1)
            list1.append(x1)
            list2.append(x2)
        return list1, list2

    def _heads(self, list1: list[Tensor], hw1: tuple[int, int], list2: list[Tensor], hw2: tuple[int, int]) -> Pointmaps:
        # Heads end in exponentials: single precision even where the transformer runs in half.
        with torch.autocast(list1[0].device.type, enabled=False):
            raw1 = self.downstream_head1([t.float() for t in list1], self._grid(hw1))
            raw2 = self.downstream_head2([t.float() for t in list2], self._grid(hw2))
            return (*_to_pointmap(raw1), *_to_pointmap(raw2))

    def features(
        self, img1: Tensor, img2: Tensor, blocks: bool = False, symmetric: bool = False
    ) -> tuple[Pointmaps, dict[str, Tensor]]:
        """The pointmaps (see ``pointmaps``) and the hidden states they came from.

        With symmetric (views of equal shape only) the batch is followed by the same pairs with their views
        swapped, 2B in all, though each image is encoded once.

        'enc1', 'enc2' (B, N, enc_embed_dim) after enc_norm; 'dec1', 'dec2' (B, N, dec_embed_dim) after
        dec_norm. With blocks (views of equal shape only): 'enc_block{i}' over the batch of both views
        (2B, ...) and 'dec1_block{i}', 'dec2_block{i}', i from 0, all before the final norms.
        """
        hw1, hw2 = _image_size(img1), _image_size(img2)
        enc_blocks: list[Tensor] | None = [] if blocks else None
        feat1, feat2 = self._encode_pair(img1, img2, enc_blocks)
        if symmetric:
            feat1, feat2 = torch.cat((feat1, feat2)), torch.cat((feat2, feat1))
        raw1, raw2 = self._decode(feat1, hw1, feat2, hw2)
        list1, list2 = self._normed(raw1), self._normed(raw2)
        states = {"enc1": feat1, "enc2": feat2, "dec1": list1[-1], "dec2": list2[-1]}
        if enc_blocks is not None:
            for name, outputs in (("enc", enc_blocks), ("dec1", raw1[1:]), ("dec2", raw2[1:])):
                states |= {f"{name}_block{i}": t for i, t in enumerate(outputs)}
        return self._heads(list1, hw1, list2, hw2), states

    def pointmaps(self, img1: Tensor, img2: Tensor) -> Pointmaps:
        """pts1 (B, H, W, 3), conf1 (B, H, W), pts2, conf2: points in the first camera's frame, conf > 1."""
        return self.features(img1, img2)[0]

    def forward(self, view1: dict[str, Any], view2: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Views with key 'img' -> {'pts3d', 'conf'} and {'pts3d_in_other_view', 'conf'}.

        With landscape_only every image is at least as wide as high; 'true_shape' (B, 2), the (H, W) of each image as
        it was taken, says which of them are portraits with their axes swapped. Their maps come with swapped axes, too.
        """
        img1, img2 = view1["img"], view2["img"]
        if self._config.landscape_only:
            pts1, conf1, pts2, conf2 = self._mixed(img1, _portraits(view1), img2, _portraits(view2))
        else:
            pts1, conf1, pts2, conf2 = self.pointmaps(img1, img2)
        return {"pts3d": pts1, "conf": conf1}, {"pts3d_in_other_view": pts2, "conf": conf2}

    def _mixed(self, img1: Tensor, portrait1: Tensor, img2: Tensor, portrait2: Tensor) -> Pointmaps:
        """A batch of pairs, each view upright or on its side: one pass per combination that occurs."""
        combination = 2 * portrait1.int() + portrait2.int()
        maps: list[list[Tensor]] = []
        rows: list[Tensor] = []
        for kind in sorted(set(combination.tolist())):
            own = (combination == kind).nonzero().flatten()
            turned = (bool(kind & 2), bool(kind & 1))
            found = self.pointmaps(*(_swapped(img[own], t, 2, 3) for img, t in zip((img1, img2), turned, strict=True)))
            lying = [_swapped(part, turned[i // 2], 1, 2) for i, part in enumerate(found)]
            rows.append(own)
            maps.append(lying)
        order = torch.cat(rows).argsort()
        pts1, conf1, pts2, conf2 = (torch.cat(parts)[order] for parts in zip(*maps, strict=True))
        return pts1, conf1, pts2, conf2


def _swapped(x: Tensor, swap: bool, first: int, second: int) -> Tensor:
    return x.transpose(first, second) if swap else x


def _portraits(view: dict[str, Any]) -> Tensor:
    """Which images of a landscape_only batch are portraits on their side, (B,) bool."""
    img, true = view["img"], torch.as_tensor(view["true_shape"])
    portrait = true[:, 0] > true[:, 1]
    stored = torch.where(portrait[:, None], true.flip(1), true)
    if (stored != torch.tensor(img.shape[-2:], device=true.device)).any():
        raise InputError(
            f"true_shape={true.tolist()}: with landscape_only an image of shape {tuple(img.shape[-2:])} stands for "
            "that or, with its axes swapped, for a portrait"
        )
    return portrait
