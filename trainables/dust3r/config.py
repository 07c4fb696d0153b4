"""Architecture of the two-view pointmap network, checked as a whole before anything is built."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import InputError

# Values of the published constructor that this implementation covers; anything else is refused by name.
_FIXED: dict[str, Any] = {
    "output_mode": "pts3d",
    "depth_mode": ("exp", "-inf", "inf"),
    "conf_mode": ("exp", "1", "inf"),
}
# Patch embedding -> landscape_only: every image as it is, or portraits lying on their side among landscapes.
_EMBEDDINGS = {"PatchEmbedDust3R": False, "ManyAR_PatchEmbed": True}
# The stacks of layers and the parts of a layer that can be narrowed, by their names in the state dict.
PARTS: dict[str, tuple[str, ...]] = {
    "enc_blocks": ("attn", "mlp"),
    "dec_blocks": ("attn", "cross_attn", "mlp"),
    "dec_blocks2": ("attn", "cross_attn", "mlp"),
}


def _plain_mode(mode: Any) -> tuple[str, ...]:
    """('exp', 1, inf), ('exp', 1.0, 'inf') -> ('exp', '1', 'inf'): JSON has no infinities."""
    if not isinstance(mode, list | tuple):
        return (str(mode),)
    return tuple(x if isinstance(x, str) else format(x, "g") for x in mode)


@dataclass(frozen=True)
class Config:
    """Architecture. Names and defaults of the published constructor (512_dpt), then this project's additions.

    patch_embed_cls 'ManyAR_PatchEmbed' goes with landscape_only: a batch mixes landscapes and portraits (see
    ``DUSt3R.forward``). img_size (H, W) in pixels matters only for pos_embed 'cosine', whose tables are fixed;
    'RoPE<base>' takes every size that the patch size divides. hooks index the decoder's list [encoder output, block 1,
    ..., block n]. enc_head_dim, dec_head_dim: channels per head (default embed_dim / heads); enc_mlp_hidden,
    dec_mlp_hidden: feed-forward width (default 4 * embed_dim). shared_head: one head serves both views. layers: of a
    pruned model, heads of every attention and channels of every feed-forward part, one per layer and instead of the
    numbers for all layers, e.g. {"enc_blocks.attn": (5, 4), "dec_blocks2.mlp": (384, 512), ...} with every part of
    every stack; its embeddings may be narrower than heads times head width. Raises InputError that lists all bad
    values.
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
    shared_head: bool = False
    layers: Mapping[str, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        for name, mode in (("depth_mode", self.depth_mode), ("conf_mode", self.conf_mode)):
            object.__setattr__(self, name, _plain_mode(mode))
        object.__setattr__(self, "img_size", tuple(self.img_size))
        object.__setattr__(self, "layer_dims", tuple(self.layer_dims))
        if self.hooks is not None:
            object.__setattr__(self, "hooks", tuple(self.hooks))
        if self.layers is not None:
            object.__setattr__(self, "layers", {part: tuple(counts) for part, counts in self.layers.items()})
        problems = self._problems()
        if problems:
            raise InputError("model config: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        bad = [
            f"{name}={getattr(self, name)!r} is not supported, use {value!r}"
            for name, value in _FIXED.items()
            if getattr(self, name) != value
        ]
        if _EMBEDDINGS.get(self.patch_embed_cls) is not self.landscape_only:
            bad.append(
                f"patch_embed_cls={self.patch_embed_cls!r} with landscape_only={self.landscape_only} is not supported, "
                f"use one of {_EMBEDDINGS}"
            )
        if self.head_type not in ("linear", "dpt"):
            bad.append(f"head_type={self.head_type!r} is not supported, use 'linear' or 'dpt'")
        if self.feature_dim % 2:
            bad.append(f"feature_dim={self.feature_dim} must be even: the head ends in half of it")
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
        bad += self._bad_layers()
        if len(self.img_size) != 2 or any(s < 1 or s % self.patch_size for s in self.img_size):
            bad.append(f"img_size={self.img_size} must be two multiples of patch_size={self.patch_size}")
        if self.head_type == "dpt":
            hooks = self.head_hooks
            if len(self.layer_dims) != 4 or len(hooks) != 4:
                bad.append(f"layer_dims={self.layer_dims} and hooks={hooks} must have 4 entries each")
            if any(h < 0 or h > self.dec_depth for h in hooks):
                bad.append(f"hooks={hooks} must lie in 0..dec_depth={self.dec_depth}")
        return bad

    def _bad_layers(self) -> list[str]:
        if self.layers is None:
            return []
        depths = {f"{stack}.{part}": self.depth(stack) for stack, parts in PARTS.items() for part in parts}
        bad = [f"layers has no part {part!r}" for part in self.layers.keys() - depths.keys()]
        bad += [f"layers lacks {part!r}" for part in depths.keys() - self.layers.keys()]
        for part, counts in self.layers.items():
            if len(counts) != depths.get(part, len(counts)) or any(count < 1 for count in counts):
                bad.append(f"layers {part}={counts} must be {depths.get(part)} numbers of at least 1")
        return sorted(bad)

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

    def depth(self, stack: str) -> int:
        """Layers of a stack of PARTS."""
        depth: int = getattr(self, f"{stack[:3]}_depth")
        return depth

    def count(self, stack: str, part: str, layer: int) -> int:
        """Heads of an attention or channels of a feed-forward part of one layer; names as in PARTS."""
        if self.layers is not None:
            return self.layers[f"{stack}.{part}"][layer]
        heads: int = getattr(self, f"{stack[:3]}_num_heads")
        return self.mlp_hidden(stack[:3]) if part == "mlp" else heads

    def to_data(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build an equal config."""
        data = dataclasses.asdict(self)
        if self.layers is not None:
            data["layers"] = {part: list(counts) for part, counts in self.layers.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}
