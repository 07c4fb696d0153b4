"""Transformer parts of the two-view model: rotary positions, attention, encoder and decoder blocks.

Sub-module names follow the published checkpoints, so that their state dicts load unchanged.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6


def is_tracing() -> bool:
    """Whether a traced export is under way."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing


class Positions(NamedTuple):
    """A patch grid as the attention layers see it.

    tokens: N, a plain number so that reshapes export as constants; cos, sin: rotary factors, each
    (N, 1, 2 axes, 2 halves, head_dim / 4); None where positions were added to the tokens instead.
    """

    tokens: int
    cos: Tensor | None = None
    sin: Tensor | None = None


def rotary_positions(
    grid: tuple[int, int], head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> Positions:
    """Factors of 2-D rotary positions for the row-major patch grid (h, w).

    The first half of a head's channels turns with the patch's row, the second with its column. Within an
    axis, channels i and i + head_dim / 4 form a pair, turned by position * base^(-i / (head_dim / 4)).
    The sign of the sine is folded into its table, so that applying it takes two products and one sum.
    """
    quarter = head_dim // 4
    # numpy: an ONNX export that makes the tables on its way sees constants, not the nodes that compute them.
    frequency = base ** (-np.arange(quarter) / quarter)
    position = np.indices(grid).reshape(2, -1, 1).swapaxes(0, 1)
    angle = position * frequency  # (N, 2, quarter)
    tables = (
        np.stack((np.cos(angle), np.cos(angle)), axis=2),
        np.stack((-np.sin(angle), np.sin(angle)), axis=2),
    )
    # Tables outlive the call that made them: one made in inference_mode could not be used in training.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an export says that the tables become constants, as they should
        cos, sin = (torch.from_numpy(t[:, None]).to(device=device, dtype=dtype) for t in tables)
    return Positions(grid[0] * grid[1], cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Slices by constants: chunk() would export the nodes that compute its bounds.
    return x * cos + torch.cat((x[..., 1:, :], x[..., :1, :]), dim=-2) * sin


class _Rotation(torch.autograd.Function):
    """Rotation whose gradient is the opposite rotation: less memory traffic than the recorded operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def rotate(x: Tensor, at: Positions, heads: int, head_dim: int) -> Tensor:
    """Turn the channel pairs of x (B, N, heads, head_dim) by the angles of its patch; same shape."""
    if at.cos is None or at.sin is None:
        return x
    pairs = x.view(-1, at.tokens, heads, 2, 2, head_dim // 4)
    if torch.is_grad_enabled() and x.requires_grad and not is_tracing():
        turned: Tensor = _Rotation.apply(pairs, at.cos, at.sin)  # type: ignore[no-untyped-call]
    else:
        turned = _turn(pairs, at.cos, at.sin)
    return turned.view(-1, at.tokens, heads, head_dim)


def attend(q: Tensor, k: Tensor, v: Tensor, at: Positions, heads: int, head_dim: int) -> Tensor:
    """Softmax attention of q (B, N, heads, head_dim) scaled by head_dim^-0.5: (B, N, heads * head_dim)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
    return out.transpose(1, 2).reshape(-1, at.tokens, heads * head_dim)


class SelfAttention(nn.Module):
    """Multi-head self-attention; heads * head_dim need not equal dim (heads may have been cut)."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        h = self.heads
        packed = self.qkv(x).view(-1, at.tokens, 3 * h, self.head_dim)
        # Queries and keys sit on the same grid: one rotation turns both.
        qk = rotate(packed[:, :, : 2 * h], at, 2 * h, self.head_dim)
        out: Tensor = self.proj(attend(qk[:, :, :h], qk[:, :, h:], packed[:, :, 2 * h :], at, h, self.head_dim))
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

    def forward(self, x: Tensor, memory: Tensor, at_x: Positions, at_memory: Positions) -> Tensor:
        h, c = self.heads, self.head_dim
        q = rotate(self.projq(x).view(-1, at_x.tokens, h, c), at_x, h, c)
        k = rotate(self.projk(memory).view(-1, at_memory.tokens, h, c), at_memory, h, c)
        v = self.projv(memory).view(-1, at_memory.tokens, h, c)
        out: Tensor = self.proj(attend(q, k, v, at_x, h, c))
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

    def __init__(self, dim: int, head_dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        x = x + self.attn(self.norm1(x), at)
        x = x + self.mlp(self.norm2(x))
        return x


class DecoderBlock(nn.Module):
    """Self-attention, attention over the other view (normalised by this block's norm_y), feed-forward."""

    def __init__(self, dim: int, head_dim: int, heads: int, cross_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, heads, head_dim)
        self.norm_y = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.cross_attn = CrossAttention(dim, cross_heads, head_dim)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, other: Tensor, at_x: Positions, at_other: Positions) -> Tensor:
        x = x + self.attn(self.norm1(x), at_x)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(other), at_x, at_other)
        x = x + self.mlp(self.norm3(x))
        return x
