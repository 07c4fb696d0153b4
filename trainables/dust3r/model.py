"""Two-view pointmap network (DUSt3R, Wang et al., arXiv:2312.14132).

A shared ViT encoder, two cross-attending decoders, one head per view; both pointmaps are in the frame of the
first camera, up to one common scale. State-dict names are those of the published checkpoints. Heads and
feed-forward layers may be narrower than the embedding, so that a pruned student is the same class with
another ``Config``.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables.dust3r.blocks import LAYER_NORM_EPS, DecoderBlock, EncoderBlock, Rotation, rotary_table
from trainables.dust3r.dpt import DPT, DPTHead

_CHANNELS = 4  # x, y, z and confidence

# Values of the published constructor that this implementation covers; anything else is refused by name.
_FIXED: dict[str, Any] = {
    "output_mode": "pts3d",
    "depth_mode": ("exp", "-inf", "inf"),
    "conf_mode": ("exp", "1", "inf"),
    "patch_embed_cls": "PatchEmbedDust3R",
    "landscape_only": False,
}

Pointmaps = tuple[Tensor, Tensor, Tensor, Tensor]


def _plain_mode(mode: Any) -> tuple[str, ...]:
    """('exp', 1, inf), ('exp', 1.0, 'inf') -> ('exp', '1', 'inf'): JSON has no infinities."""
    if not isinstance(mode, list | tuple):
        return (str(mode),)
    return tuple(x if isinstance(x, str) else format(x, "g") for x in mode)


@dataclass(frozen=True)
class Config:
    """Architecture. Names and defaults of the published constructor (512_dpt), then this project's additions.

    img_size (H, W) in pixels matters only for pos_embed 'cosine', whose tables are fixed; 'RoPE<base>' takes
    every size that the patch size divides. hooks index the decoder's list [encoder output, block 1, ...,
    block n]. enc_head_dim, dec_head_dim: channels per head (default embed_dim / heads); enc_mlp_hidden,
    dec_mlp_hidden: feed-forward width (default 4 * embed_dim). Raises InputError that lists all bad values.
    """

    output_mode: str = "pts3d"
    head_type: str = "dpt"
    depth_mode: tuple[str, ...] = ("exp", "-inf", "inf")
    conf_mode: tuple[str, ...] = ("exp", "1", "inf")
    patch_embed_cls: str = "PatchEmbedDust3R"
    landscape_only: bool = False
    pos_embed: str = "RoPE100"
    img_size: tuple[int, int] = (512, 512)
    patch_size: int = 16
    enc_embed_dim: int = 1024
    enc_depth: int = 24
    enc_num_heads: int = 16
    dec_embed_dim: int = 768
    dec_depth: int = 12
    dec_num_heads: int = 12
    feature_dim: int = 256
    last_dim: int = 128
    layer_dims: tuple[int, ...] = (96, 192, 384, 768)
    hooks: tuple[int, ...] | None = None
    enc_head_dim: int | None = None
    dec_head_dim: int | None = None
    enc_mlp_hidden: int | None = None
    dec_mlp_hidden: int | None = None

    def __post_init__(self) -> None:
        for name, mode in (("depth_mode", self.depth_mode), ("conf_mode", self.conf_mode)):
            object.__setattr__(self, name, _plain_mode(mode))
        object.__setattr__(self, "img_size", tuple(self.img_size))
        object.__setattr__(self, "layer_dims", tuple(self.layer_dims))
        if self.hooks is not None:
            object.__setattr__(self, "hooks", tuple(self.hooks))
        problems = self._problems()
        if problems:
            raise InputError("model config: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        bad = [
            f"{name}={getattr(self, name)!r} is not supported, use {value!r}"
            for name, value in _FIXED.items()
            if getattr(self, name) != value
        ]
        if self.head_type not in ("linear", "dpt"):
            bad.append(f"head_type={self.head_type!r} is not supported, use 'linear' or 'dpt'")
        sizes = ["patch_size", "feature_dim", "last_dim"]
        parts = ("embed_dim", "depth", "num_heads", "head_dim", "mlp_hidden")
        sizes += [f"{side}_{part}" for side in ("enc", "dec") for part in parts]
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                bad.append(f"{name}={value} must be at least 1")
        if bad:
            return bad
        rope = self.rope_base is not None
        if not rope and self.pos_embed != "cosine":
            bad.append(f"pos_embed={self.pos_embed!r} is not supported, use 'RoPE<base>' or 'cosine'")
        for side in ("enc", "dec"):
            dim, heads = getattr(self, f"{side}_embed_dim"), getattr(self, f"{side}_num_heads")
            own = getattr(self, f"{side}_head_dim")
            if own is None and dim % heads:
                bad.append(f"{side}_embed_dim={dim} is not a multiple of {side}_num_heads={heads}")
            elif rope and self.head_width(side) % 4:
                bad.append(f"{side} head width {self.head_width(side)} must be a multiple of 4 for RoPE")
            if self.pos_embed == "cosine" and dim % 4:
                bad.append(f"{side}_embed_dim={dim} must be a multiple of 4 for cosine positions")
        if len(self.img_size) != 2 or any(s < 1 or s % self.patch_size for s in self.img_size):
            bad.append(f"img_size={self.img_size} must be two multiples of patch_size={self.patch_size}")
        if self.head_type == "dpt":
            hooks = self.head_hooks
            if len(self.layer_dims) != 4 or len(hooks) != 4:
                bad.append(f"layer_dims={self.layer_dims} and hooks={hooks} must have 4 entries each")
            if any(h < 0 or h > self.dec_depth for h in hooks):
                bad.append(f"hooks={hooks} must lie in 0..dec_depth={self.dec_depth}")
        return bad

    @property
    def rope_base(self) -> float | None:
        match = re.fullmatch(r"RoPE(\d+(?:\.\d+)?)", self.pos_embed)
        return float(match.group(1)) if match and float(match.group(1)) > 0 else None

    @property
    def head_hooks(self) -> tuple[int, ...]:
        n = self.dec_depth
        return self.hooks if self.hooks is not None else (0, n * 2 // 4, n * 3 // 4, n)

    def head_width(self, side: str) -> int:
        """Channels per attention head of 'enc' or 'dec'."""
        own: int | None = getattr(self, f"{side}_head_dim")
        width: int = own or getattr(self, f"{side}_embed_dim") // getattr(self, f"{side}_num_heads")
        return width

    def mlp_hidden(self, side: str) -> int:
        """Feed-forward width of 'enc' or 'dec'."""
        own: int | None = getattr(self, f"{side}_mlp_hidden")
        width: int = own or 4 * getattr(self, f"{side}_embed_dim")
        return width

    def to_data(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build an equal config."""
        data = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


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
        enc = (c.enc_embed_dim, c.enc_num_heads, c.head_width("enc"), c.mlp_hidden("enc"))
        dec = (c.dec_embed_dim, c.dec_num_heads, c.head_width("dec"), c.mlp_hidden("dec"))
        self.enc_blocks = nn.ModuleList(EncoderBlock(*enc) for _ in range(c.enc_depth))
        self.enc_norm = nn.LayerNorm(c.enc_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_embed = nn.Linear(c.enc_embed_dim, c.dec_embed_dim)
        self.dec_blocks = nn.ModuleList(DecoderBlock(*dec) for _ in range(c.dec_depth))
        self.dec_norm = nn.LayerNorm(c.dec_embed_dim, eps=LAYER_NORM_EPS)
        self.dec_blocks2 = nn.ModuleList(DecoderBlock(*dec) for _ in range(c.dec_depth))
        self.downstream_head1 = _make_head(c)
        self.downstream_head2 = _make_head(c)
        self.enc_pos_embed: Tensor | None = None
        self.dec_pos_embed: Tensor | None = None
        if c.pos_embed == "cosine":
            grid = (c.img_size[0] // c.patch_size, c.img_size[1] // c.patch_size)
            del self.enc_pos_embed, self.dec_pos_embed
            self.register_buffer("enc_pos_embed", cosine_table(grid, c.enc_embed_dim))
            self.register_buffer("dec_pos_embed", cosine_table(grid, c.dec_embed_dim))
        self._rotations: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
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

    def _rotation(self, grid: tuple[int, int], side: str, like: Tensor) -> Rotation:
        base = self._config.rope_base
        if base is None:
            return None
        dtype = like.dtype
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        head_dim = self._config.head_width(side)
        key = (grid, head_dim, like.device, dtype)
        if key not in self._rotations:
            self._rotations[key] = rotary_table(grid, head_dim, base, like.device, dtype)
        return self._rotations[key]

    def _encode(self, img: Tensor, blocks: list[Tensor] | None = None) -> Tensor:
        grid = self._grid((img.shape[-2], img.shape[-1]))
        x: Tensor = self.patch_embed(img)
        if self.enc_pos_embed is not None:
            x = x + self.enc_pos_embed
        rotation = self._rotation(grid, "enc", x)
        for block in self.enc_blocks:
            x = block(x, rotation)
            if blocks is not None:
                blocks.append(x)
        x = self.enc_norm(x)
        return x

    def encode(self, img: Tensor) -> Tensor:
        """Tokens (B, N, enc_embed_dim) of images (B, 3, H, W), after enc_norm."""
        return self._encode(img)

    def _encode_pair(self, img1: Tensor, img2: Tensor, blocks: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        if img1.shape == img2.shape:
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

    def _normed(self, outputs: list[Tensor]) -> list[Tensor]:
        return [*outputs[:-1], self.dec_norm(outputs[-1])]

    def _decode(
        self, feat1: Tensor, hw1: tuple[int, int], feat2: Tensor, hw2: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        x1, x2 = self.decoder_embed(feat1), self.decoder_embed(feat2)
        if self.dec_pos_embed is not None:
            x1, x2 = x1 + self.dec_pos_embed, x2 + self.dec_pos_embed
        r1 = self._rotation(self._grid(hw1), "dec", feat1)
        r2 = self._rotation(self._grid(hw2), "dec", feat2)
        list1, list2 = [feat1], [feat2]
        for block1, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            x1, x2 = block1(x1, x2, r1, r2), block2(x2, x1, r2, r1)
            list1.append(x1)
            list2.append(x2)
        return list1, list2

    def _heads(
        self, list1: list[Tensor], hw1: tuple[int, int], list2: list[Tensor], hw2: tuple[int, int]
    ) -> Pointmaps:
        # Heads end in exponentials: single precision even where the transformer runs in half.
        with torch.autocast(list1[0].device.type, enabled=False):
            raw1 = self.downstream_head1([t.float() for t in list1], self._grid(hw1))
            raw2 = self.downstream_head2([t.float() for t in list2], self._grid(hw2))
            return (*_to_pointmap(raw1), *_to_pointmap(raw2))

    def features(
        self, img1: Tensor, img2: Tensor, blocks: bool = False, symmetric: bool = False
    ) -> tuple[Pointmaps, dict[str, Tensor]]:
        """The pointmaps (see ``pointmaps``) and the hidden states they came from.

        With symmetric (views of equal shape only) the batch is followed by the same pairs with their views swapped,
        2B in all, though each image is encoded once.

        'enc1', 'enc2' (B, N, enc_embed_dim) after enc_norm; 'dec1', 'dec2' (B, N, dec_embed_dim) after
        dec_norm. With blocks (views of equal shape only): 'enc_block{i}' over the batch of both views
        (2B, ...) and 'dec1_block{i}', 'dec2_block{i}', i from 0, all before the final norms.
        """
        hw1, hw2 = (img1.shape[-2], img1.shape[-1]), (img2.shape[-2], img2.shape[-1])
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

    def forward(
        self, view1: dict[str, Any], view2: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Views with key 'img' -> {'pts3d', 'conf'} and {'pts3d_in_other_view', 'conf'}."""
        pts1, conf1, pts2, conf2 = self.pointmaps(view1["img"], view2["img"])
        return {"pts3d": pts1, "conf": conf1}, {"pts3d_in_other_view": pts2, "conf": conf2}
