"""Parts of the decoder: attention with layout bias and event features, gated dense block, convolutions on the grid.

Everywhere S is the number of stabilizers, D the channels of a state, H heads, K channels per head. What
depends on weights alone (bias tables, a convolution as one matrix) is made once per forward pass by a ``constants``
method, not once per round. Norms have no weights of their own: a linear layer follows each, which can scale as well.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainables.product import Product

# Of an event now (e) and in the round before (p), code 2 e + p: what the looking stabilizer brings to the bias, and
# what the one that is looked at does. A term that knows the looking side alone would cancel in the softmax.
_LOOKING = ((1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1))  # 1, e, p
_LOOKED_AT = ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1))  # e, p, e p
_EVENTS = 3  # channels of each
LAYOUT_FEATURES = 8


def normed(x: Tensor) -> Tensor:
    """Layer norm over the last axis, without weights."""
    return F.layer_norm(x, x.shape[-1:])


class _Softmax(torch.autograd.Function):
    """Softmax over a short last axis: torch's own is four times slower there than the operations it stands for."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        p = (scores - scores.amax(-1, keepdim=True)).exp_()
        p /= p.sum(-1, keepdim=True)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        weighted = grads[0] * p
        result: Tensor = weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
        return result


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis; one operator in an exported graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return scores.softmax(-1)
    result: Tensor = _Softmax.apply(scores)  # type: ignore[no-untyped-call]
    return result


class ResNet(nn.Module):
    """x <- x + GELU(linear(norm x)), a number of times."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        for layer in self.layers:
            x = x + F.gelu(layer(normed(x)))
        return x


def layout_features(cells: np.ndarray, on_basis: np.ndarray, distance: int) -> Tensor:
    """(S, S, 8) float32 for each pair (i, j): coordinates of i and of j, signed offset, Manhattan distance, all in
    units of the code's distance; whether both are of one basis.
    """
    at = torch.from_numpy(cells).float() / distance
    first, second = torch.broadcast_tensors(at[:, None], at[None])  # type: ignore[no-untyped-call]
    offset = second - first
    same = torch.from_numpy(on_basis[:, None] == on_basis[None]).float()
    return torch.cat((first, second, offset, offset.abs().sum(-1, keepdim=True), same[..., None]), dim=-1)


class AttentionConstants(NamedTuple):
    """What an attention needs besides its input: weight (H (3 K + 6), D), events (4, H (3 K + 6)), bias (H, S, S)."""

    weight: Tensor
    events: Tensor
    bias: Tensor


class Attention(nn.Module):
    """X <- X + attention(norm X) over the stabilizers, with a bias from the layout and from the events of two rounds.

    The score of j for i in head h is q_i k_j / sqrt K + layout_h(i, j) + u_i M_h v_j, where u = (1, e, p) and
    v = (e, p, e p) of a stabilizer's event now, e, and before, p. The last term is a product like the first, so that
    it rides along as three more channels of the queries and keys, which depend on the code 2 e + p alone.
    """

    def __init__(self, dim: int, heads: int, key_dim: int, bias_dim: int) -> None:
        super().__init__()
        self.heads, self.key_dim = heads, key_dim
        self.qkv = nn.Linear(dim, heads * 3 * key_dim)  # per head: query, key, value
        self.layout = nn.Linear(bias_dim, heads, bias=False)  # a constant per head would cancel in the softmax
        self.events = nn.Parameter(torch.randn(heads, _EVENTS, _EVENTS) * 0.1)
        self.packed = Product()  # by the weight of :meth:`constants`
        self.out = nn.Linear(heads * key_dim, dim)
        self.looking: Tensor
        self.looked_at: Tensor
        self.register_buffer("looking", torch.tensor(_LOOKING, dtype=torch.float32), persistent=False)
        self.register_buffer("looked_at", torch.tensor(_LOOKED_AT, dtype=torch.float32), persistent=False)

    def constants(self, layout: Tensor) -> AttentionConstants:
        """layout: embedded pairs (S, S, bias_dim)."""
        h, k = self.heads, self.key_dim
        weight, offset = self.qkv.weight.view(h, 3 * k, -1), self.qkv.bias.view(h, 3 * k).expand(4, h, 3 * k)
        # Scores are scaled here once, on the side of the queries. The further channels get no part of the input.
        scale, gap = k**-0.5, weight.new_zeros(h, _EVENTS, weight.shape[-1])
        weight = torch.cat((weight[:, :k] * scale, gap, weight[:, k : 2 * k], gap, weight[:, 2 * k :]), dim=1)
        looking = torch.einsum("ca,hab->chb", self.looking, self.events)
        looked_at = self.looked_at[:, None].expand(4, h, _EVENTS)
        parts = (offset[..., :k] * scale, looking, offset[..., k : 2 * k], looked_at, offset[..., 2 * k :])
        return AttentionConstants(weight.flatten(0, 1), torch.cat(parts, dim=2).flatten(1), self.bias(layout))

    def bias(self, layout: Tensor) -> Tensor:
        """(H, S, S) from embedded pairs (S, S, bias_dim)."""
        bias: Tensor = self.layout(layout).permute(2, 0, 1)
        return bias

    def forward(self, x: Tensor, codes: Tensor, const: AttentionConstants) -> Tensor:
        """x (..., S, D), codes (..., S) int32 in 0..3 -> (..., S, D)."""
        k = self.key_dim
        packed = self.packed(normed(x), const.weight) + F.embedding(codes, const.events)
        heads = packed.view(*x.shape[:-1], self.heads, -1).transpose(-3, -2).contiguous()
        q, key, value = torch.split(heads, [k + _EVENTS, k + _EVENTS, k], dim=-1)
        share = softmax(q @ key.transpose(-2, -1) + const.bias)
        mixed = (share @ value).transpose(-3, -2).reshape(*x.shape[:-1], self.heads * k)
        result: Tensor = x + self.out(mixed)
        return result


class GatedDense(nn.Module):
    """X <- X + linear(GELU(a) * g), a and g linear in norm X."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.both = nn.Linear(dim, 2 * hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., S, D) -> (..., S, D)."""
        a, gate = self.both(normed(x)).chunk(2, dim=-1)
        result: Tensor = x + self.out(F.gelu(a) * gate)
        return result


class ConvConstants(NamedTuple):
    """A convolution as one matrix (cells out * channels out, S * channels in), and its bias, one per row."""

    matrix: Tensor
    bias: Tensor


class GridConv(nn.Module):
    """Scatter the stabilizers to the (d+1) x (d+1) grid, convolve, gather.

    kernel 3: dilated, zeros beyond the grid, (..., S, in) -> (..., S, out). kernel 2: to the d x d data qubits between
    the cells, (..., S, in) -> (..., d^2, out). Cells of the grid without a stabilizer hold a learned vector.
    dense: as one matrix, which small codes do faster; else a convolution over all cells, both with the same result.
    """

    def __init__(
        self, cells: np.ndarray, distance: int, channels: tuple[int, int], kernel: int, dilation: int, dense: bool
    ) -> None:
        super().__init__()
        self.side, self.kernel, self.dilation, self.dense = distance + 1, kernel, dilation, dense
        inputs, outputs = channels
        bound = 1 / math.sqrt(inputs * kernel**2)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.padding = nn.Parameter(torch.zeros(inputs))
        self.product = Product()  # by the matrix of :meth:`constants`
        flat = cells @ (self.side, 1)
        where = np.full(self.side**2, len(cells))  # of each cell of the grid: its stabilizer, or the learned vector
        where[flat] = np.arange(len(cells))
        self.scatter: Tensor
        self.gather: Tensor
        self.taps: Tensor
        self.padded: Tensor
        self._buffer("scatter", where)
        self._buffer("gather", flat)
        targets = cells if kernel == 3 else np.argwhere(np.ones((distance, distance)))
        taps, padded = self._connections(where, targets, len(cells))
        self._buffer("taps", taps.ravel())
        self.register_buffer("padded", torch.from_numpy(padded).float(), persistent=False)

    def _buffer(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(values.astype(np.int64)), persistent=False)

    def _connections(self, where: np.ndarray, targets: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Which tap of the kernel, if any (else kernel^2), leads from a stabilizer to a target (S, targets); and
        whether a target's tap sees a cell without stabilizer (targets, kernel^2).
        """
        k = self.kernel
        taps, padded = np.full((count, len(targets)), k * k), np.zeros((len(targets), k * k))
        for target, (row, column) in enumerate(targets):
            for tap in range(k * k):
                shift = np.array(divmod(tap, k)) - (k == 3)
                r, c = np.array((row, column)) + self.dilation * shift
                if 0 <= r < self.side and 0 <= c < self.side:
                    source = where[r * self.side + c]
                    if source < count:
                        taps[source, target] = tap
                    else:
                        padded[target, tap] = 1
        return taps, padded

    def constants(self) -> ConvConstants | None:
        """The matrix, where the convolution is dense."""
        if not self.dense:
            return None
        outputs, inputs = self.weight.shape[:2]
        sources = len(self.taps) // len(self.padded)
        kernels = self.weight.flatten(2).permute(2, 1, 0)  # tap, in, out
        blocks = torch.cat((kernels, kernels.new_zeros(1, inputs, outputs))).index_select(0, self.taps)
        matrix = blocks.view(sources, -1, inputs, outputs).permute(1, 3, 0, 2).reshape(-1, sources * inputs)
        return ConvConstants(matrix, (self.padded @ (self.padding @ kernels) + self.bias).flatten())

    def forward(self, x: Tensor, const: ConvConstants | None) -> Tensor:
        """(..., S, in) -> (..., cells out, out)."""
        *shots, stabilizers, inputs = x.shape
        if const is not None:
            product: Tensor = self.product(x.reshape(-1, stabilizers * inputs), const.matrix, const.bias)
            return product.view(*shots, -1, len(self.bias))
        x = x.reshape(-1, stabilizers, inputs)
        n = len(x)
        filled = torch.cat((x, self.padding.expand(n, 1, inputs)), dim=1).index_select(1, self.scatter)
        # Channels stay last in memory, as convolutions on CPUs like it.
        grid = filled.view(n, self.side, self.side, inputs).permute(0, 3, 1, 2)
        edge = self.dilation if self.kernel == 3 else 0
        out = F.conv2d(grid, self.weight, self.bias, padding=edge, dilation=self.dilation)
        cells = out.permute(0, 2, 3, 1).reshape(n, -1, len(self.bias))
        cells = cells.index_select(1, self.gather) if self.kernel == 3 else cells
        return cells.view(*shots, -1, len(self.bias))


class Convolutions(nn.Module):
    """X <- X + linear(y) with y = GELU(conv(norm X)), then y <- y + GELU(conv(norm y)) for each further dilation."""

    def __init__(
        self, cells: np.ndarray, distance: int, dim: int, channels: int, dilations: tuple[int, ...], dense: bool
    ) -> None:
        super().__init__()
        widths = [dim] + [channels] * len(dilations)
        self.convs = nn.ModuleList(
            GridConv(cells, distance, (widths[i], widths[i + 1]), 3, dilation, dense)
            for i, dilation in enumerate(dilations)
        )
        self.out = nn.Linear(channels, dim)

    def constants(self) -> list[ConvConstants | None]:
        """Those of each convolution."""
        return [conv.constants() for conv in self.convs]  # type: ignore[operator]

    def forward(self, x: Tensor, const: list[ConvConstants | None]) -> Tensor:
        """(..., S, D) -> (..., S, D)."""
        y = F.gelu(self.convs[0](normed(x), const[0]))
        for conv, own in zip(list(self.convs)[1:], const[1:], strict=True):
            y = y + F.gelu(conv(normed(y), own))
        result: Tensor = x + self.out(y)
        return result
