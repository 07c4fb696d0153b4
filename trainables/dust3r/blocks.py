"""Transformer parts of the two-view model: rotary positions, attention, encoder and decoder blocks.

Sub-module names follow the published checkpoints, so that their state dicts load unchanged.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6

# cos and sin factors of a patch grid, each (N, 1, 2 axes, 2 halves, head_dim / 4); None: no rotary positions.
Rotation = tuple[Tensor, Tensor] | None


def rotary_table(
    grid: tuple[int, int], head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Factors of 2-D rotary positions for the row-major patch grid (h, w).

    The first half of a head's channels turns with the patch's row, the second with its column. Within an
    axis, channels i and i + head_dim / 4 form a pair, turned by position * base^(-i / (head_dim / 4)).
    The sign of the sine is folded into its table, so that applying it takes two products and one sum.
    """
    quarter = head_dim // 4
    # Tables outlive the call that made them: one made in inference_mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        frequency = base ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        position = torch.stack((rows.flatten(), columns.flatten()), dim=1).double()
        angle = position[:, :, None] * frequency  # (N, 2, quarter)
        cos = torch.stack((angle.cos(), angle.cos()), dim=2)
        sin = torch.stack((-angle.sin(), angle.sin()), dim=2)
        return (
            cos.unsqueeze(1).to(device=device, dtype=dtype).contiguous(),
            sin.unsqueeze(1).to(device=device, dtype=dtype).contiguous(),
        )


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs of x (B, N, heads, head_dim) by the angles of its patch; same shape."""
    cos, sin = table
    pairs = x.view(*x.shape[:-1], *cos.shape[2:])
    first, second = pairs.chunk(2, dim=-2)
    turned = pairs * cos + torch.cat((second, first), dim=-2) * sin
    return turned.flatten(-3)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, N, heads, head_dim), scaled by head_dim^-0.5: (B, N, heads * head_dim)."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention; heads * head_dim need not equal dim (heads may have been cut)."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        packed = self.qkv(x).unflatten(-1, (3 * self.heads, self.head_dim))
        # Queries and keys sit on the same grid: one rotation turns both.
        qk, v = packed.split((2 * self.heads, self.heads), dim=2)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k = qk.split(self.heads, dim=2)
        out: Tensor = self.proj(_attend(q, k, v))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention of x over the other view's tokens, each side with its own grid positions."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.projq = nn.Linear(dim, heads * head_dim)
        self.projk = nn.Linear(dim, heads * head_dim)
        self.projv = nn.Linear(dim, heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, memory: Tensor, rotation_x: Rotation, rotation_memory: Rotation) -> Tensor:
        shape = (self.heads, self.head_dim)
        q = self.projq(x).unflatten(-1, shape)
        k = self.projk(memory).unflatten(-1, shape)
        v = self.projv(memory).unflatten(-1, shape)
        if rotation_x is not None and rotation_memory is not None:
            q, k = rotate(q, rotation_x), rotate(k, rotation_memory)
        out: Tensor = self.proj(_attend(q, k, v))
        return out


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class EncoderBlock(nn.Module):
    """Pre-norm transformer block on tokens (B, N, dim)."""

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation)
        x = x + self.mlp(self.norm2(x))
        return x


class DecoderBlock(nn.Module):
    """Self-attention, attention over the other view (normalised by this block's norm_y), feed-forward."""

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, heads, head_dim)
        self.norm_y = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.cross_attn = CrossAttention(dim, heads, head_dim)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, other: Tensor, rotation_x: Rotation, rotation_other: Rotation) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation_x)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(other), rotation_x, rotation_other)
        x = x + self.mlp(self.norm3(x))
        return x
