"""Recurrent transformer decoder for surface-code memories (AlphaQubit, Bausch et al., Nature 2024).

Shapes: N shots, R rounds (R + 1 layers of detectors), S = d^2 - 1 stabilizers, D channels, K logits. Events and
measurements are bits (N, R + 1, S) of any integer type or bool; the last layer is the one that the final measurement of
the data qubits yields.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engines.errors import InputError
from trainables.alphaqubit.blocks import (
    LAYOUT_FEATURES,
    Attention,
    AttentionConstants,
    ConvConstants,
    Convolutions,
    GatedDense,
    GridConv,
    ResNet,
    layout_features,
)
from trainables.alphaqubit.config import Config, from_data
from trainables.alphaqubit.layout import Layout, rotated

_DENSE_DISTANCE = 3  # up to here a convolution is fastest as one matrix (measured: 0.8 x the time at 3, 2.6 x at 5)
_CODES = 4  # of two bits


class Constants(NamedTuple):
    """What a forward pass computes from the weights alone, for all its rounds."""

    embedding: Tensor  # (2 * S * 4, D): of a normal and of the last round, per stabilizer, per code 2 m + e
    attention: list[AttentionConstants]
    convolutions: list[list[ConvConstants | None]]
    readout: ConvConstants | None


class Embedding(nn.Module):
    """The input S_n of a round: a linear projection of each input and the stabilizer's own vector, then a ResNet.

    Two bits per stabilizer have four values, so that the whole embedding is a table, made once per forward pass. In
    the last round, stabilizers of the memory's basis have a projection of their own and all others one learned vector.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        super().__init__()
        count = len(layout.cells)
        self.inputs = nn.Linear(2, config.dim)  # measurement, event
        self.final_inputs = nn.Linear(2, config.dim)
        self.off_basis = nn.Parameter(torch.randn(config.dim) * 0.5)
        self.stabilizer = nn.Parameter(torch.randn(count, config.dim) * 0.5)
        self.resnet = ResNet(config.dim, config.embed_layers)
        self.bits: Tensor
        self.on_basis: Tensor
        bits = [[m, e] for m in (0, 1) for e in (0, 1)]
        self.register_buffer("bits", torch.tensor(bits, dtype=torch.float32), persistent=False)
        self.register_buffer("on_basis", torch.from_numpy(layout.on_basis.copy())[:, None, None], persistent=False)

    def table(self) -> Tensor:
        """(2 * S * 4, D), divided by sqrt 2 as the recurrence asks."""
        final = torch.where(self.on_basis, self.final_inputs(self.bits), self.off_basis)
        usual = self.inputs(self.bits).expand_as(final)
        inputs = torch.stack((usual, final)) + self.stabilizer[:, None]
        table: Tensor = self.resnet(inputs).flatten(0, 2) * math.sqrt(0.5)
        return table


class Layer(nn.Module):
    """One syndrome-transformer layer."""

    def __init__(self, config: Config, index: int, layout: Layout) -> None:
        super().__init__()
        c, d = config, layout.distance
        heads, hidden, channels = c.widths(index)
        self.attention = Attention(c.dim, heads, c.key_dim, c.bias_dim)
        self.dense = GatedDense(c.dim, hidden)
        self.grid = Convolutions(layout.cells, d, c.dim, channels, c.dilations, d <= _DENSE_DISTANCE)

    def forward(
        self, x: Tensor, codes: Tensor, attention: AttentionConstants, grid: list[ConvConstants | None]
    ) -> tuple[Tensor, Tensor]:
        """x (..., S, D), codes (..., S) int32 in 0..3 -> the state after the layer and after its attention alone."""
        mixed = self.attention(x, codes, attention)
        return self.grid(self.dense(mixed), grid), mixed


class Readout(nn.Module):
    """Logits from a state: 2x2 convolution to the data qubits, mean along each line of them that carries the
    observable, a ResNet per line, and one logit per line, of which the mean is taken.

    Z observables lie along rows, X observables along columns. For both in one shot each has its own lines ('xz'); for
    'ixyz' the four classes are linear in both. The mean goes before the last linear layer, which is the same.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        super().__init__()
        d, dim = layout.distance, config.readout_dim
        self.distance, self.outputs, self.basis = d, config.outputs, layout.basis
        self.qubits = GridConv(layout.cells, d, (config.dim, dim), 2, 1, d <= _DENSE_DISTANCE)
        sides = layout.basis if config.outputs == "observable" else "XZ"
        self.lines = nn.ModuleDict({side: ResNet(dim, config.readout_layers) for side in sides})
        joint = config.outputs == "ixyz"
        heads = {"both": nn.Linear(2 * dim, 4)} if joint else {side: nn.Linear(dim, 1) for side in sides}
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor, const: ConvConstants | None) -> Tensor:
        """(N, S, D) -> (N, K)."""
        d = self.distance
        qubits = F.gelu(self.qubits(x, const)).view(len(x), d, d, -1)
        along = {"Z": 2, "X": 1}
        pooled = {side: net(qubits.mean(along[side])).mean(1) for side, net in self.lines.items()}
        if self.outputs == "ixyz":
            logits: Tensor = self.heads["both"](torch.cat(list(pooled.values()), dim=-1))
            return logits
        return torch.cat([self.heads[side](lines) for side, lines in pooled.items()], dim=-1)


class Decoder(nn.Module):
    """Events and measurements -> logits of the observables' flips; one plain module, any number of rounds.

    ``config`` holds JSON-able keyword arguments: :func:`build` makes an equal module of them. ``xz``: logit 0 is of the
    X observable, logit 1 of the Z observable; ``ixyz``: classes in that order.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        super().__init__()
        self._config = config
        self.config: dict[str, Any] = {**config.to_data(), "distance": layout.distance, "basis": layout.basis}
        self.stabilizers = len(layout.cells)
        self.embedding = Embedding(config, layout)
        self.pairs: Tensor
        self.register_buffer("pairs", layout_features(layout.cells, layout.on_basis, layout.distance), persistent=False)
        self.pair_inputs = nn.Linear(LAYOUT_FEATURES, config.bias_dim)
        self.pair_resnet = ResNet(config.bias_dim, config.bias_layers)
        self.layers = nn.ModuleList(Layer(config, i, layout) for i in range(config.layers))
        self.readout = Readout(config, layout)
        self.next_stabilizer = nn.Linear(config.dim, 1) if config.next_stabilizer else None

    def constants(self) -> Constants:
        """What depends on the weights alone; pass it to several calls of :meth:`step`, :meth:`read`, forward."""
        pairs = self.pair_resnet(self.pair_inputs(self.pairs))
        return Constants(
            self.embedding.table(),
            [layer.attention.constants(pairs) for layer in self._layers()],
            [layer.grid.constants() for layer in self._layers()],
            self.readout.qubits.constants(),
        )

    def initial_state(self, shots: int) -> Tensor:
        """(N, S, D) of zeros, before the first round."""
        return self.pairs.new_zeros(shots, self.stabilizers, self._config.dim)

    def step(
        self,
        state: Tensor,
        events: Tensor,
        previous_events: Tensor,
        measurements: Tensor,
        final: bool | Tensor,
        constants: Constants | None = None,
    ) -> Tensor:
        """The state after one more layer of detectors.

        state (N, S, D) float32; events, previous_events (zeros before the first round), measurements (N, S) bits;
        final: whether this is the last layer, or a whole number 0 or 1 as a tensor of one element.
        """
        const = self.constants() if constants is None else constants
        now, inputs = events.int(), self._rows(events, measurements)
        inputs = inputs + final * (_CODES * self.stabilizers)
        state, _ = self._round(state, F.embedding(inputs, const.embedding), 2 * now + previous_events.int(), const)
        return state

    def read(self, state: Tensor, constants: Constants | None = None) -> Tensor:
        """Logits (N, K) of a state (N, S, D), whatever round it is of."""
        const = self.readout.qubits.constants() if constants is None else constants.readout
        logits: Tensor = self.readout(state, const)
        return logits

    def forward(self, events: Tensor, measurements: Tensor, constants: Constants | None = None) -> Tensor:
        """Logits (N, K) after the last layer; events, measurements (N, R + 1, S) bits."""
        const = self.constants() if constants is None else constants
        inputs, codes = self._inputs(events, measurements, const)
        state = self.initial_state(len(events))
        alone = len(events) == 1
        if alone:  # without that axis products have two axes, which engines do not reshape first
            state, inputs, codes = state[0], tuple(x[0] for x in inputs), tuple(code[0] for code in codes)
        for x, code in zip(inputs, codes, strict=True):
            state, _ = self._round(state, x, code, const)
        return self.read(state[None] if alone else state, const)

    def features(self, events: Tensor, measurements: Tensor) -> dict[str, Tensor]:
        """'logits' (N, K) as :meth:`forward`, and what they came from, one entry per layer of detectors.

        'transformer' (N, R + 1, S, D): the state after the last layer's attention, which mixes stabilizers; 'rnn', of
        the same shape: the recurrent state that the round leaves behind; 'readout' (N, R + 1, K): logits that
        :meth:`read` gives then, the last ones being 'logits'. With the training head also 'next' (N, R, S): logits of
        the next layer's events.
        """
        const = self.constants()
        inputs, codes = self._inputs(events, measurements, const)
        state, mixed, states = self.initial_state(len(events)), [], []
        for x, code in zip(inputs, codes, strict=True):
            state, middle = self._round(state, x, code, const)
            mixed.append(middle)
            states.append(state)
        rnn = torch.stack(states, dim=1)
        readout = self.read(rnn.flatten(0, 1), const).view(*rnn.shape[:2], -1)
        features = {"logits": readout[:, -1], "transformer": torch.stack(mixed, dim=1), "rnn": rnn, "readout": readout}
        if self.next_stabilizer is not None:
            features["next"] = self.next_stabilizer(rnn[:, :-1]).squeeze(-1)
        return features

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _rows(self, events: Tensor, measurements: Tensor) -> Tensor:
        """Rows of the embedding's table for a normal round (..., S) int32."""
        first = torch.arange(0, _CODES * self.stabilizers, _CODES, dtype=torch.int32, device=events.device)
        return 2 * measurements.int() + events.int() + first

    def _inputs(
        self, events: Tensor, measurements: Tensor, const: Constants
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Per layer of detectors: the embedded input (N, S, D), and the code 2 e + (e before) (N, S)."""
        if events.ndim != 3 or events.shape != measurements.shape or events.shape[-1] != self.stabilizers:
            shapes = f"events {tuple(events.shape)}, measurements {tuple(measurements.shape)}"
            raise InputError(
                f"{shapes}: this decoder of distance {self.config['distance']} needs both (shots, rounds + 1, "
                f"{self.stabilizers}); use data of a circuit of that distance"
            )
        now = events.int()
        rows = self._rows(events, measurements)
        rows = torch.cat((rows[:, :-1], rows[:, -1:] + _CODES * self.stabilizers), dim=1)
        codes = 2 * now + F.pad(now[:, :-1], (0, 0, 1, 0))
        # Rounds first, so that what one round reads lies together.
        embedded = F.embedding(rows.transpose(0, 1).contiguous(), const.embedding)
        return embedded.unbind(0), codes.transpose(0, 1).contiguous().unbind(0)

    def _round(self, state: Tensor, inputs: Tensor, codes: Tensor, const: Constants) -> tuple[Tensor, Tensor]:
        """X <- (X + S_n) / sqrt 2 and all layers; the state, and what it was after the last attention."""
        x = mixed = torch.add(inputs, state, alpha=math.sqrt(0.5))
        for layer, attention, grid in zip(self._layers(), const.attention, const.convolutions, strict=True):
            x, mixed = layer(x, codes, attention, grid)
        return x, mixed


def build(**config: Any) -> Decoder:
    """The decoder of the keyword arguments that ``Decoder.config`` holds; InputError names what does not fit."""
    for name, kind in (("distance", int), ("basis", str)):
        if type(config.get(name)) is not kind:
            raise InputError(f"decoder config: {name}={config.get(name)!r}: expected a value of type {kind.__name__}")
    sizes = {key: value for key, value in config.items() if key not in ("distance", "basis")}
    return Decoder(from_data(sizes), rotated(config["distance"], config["basis"]))


def without_training_heads(model: Decoder) -> Decoder:
    """The same decoder without what only its training needs: a new module, or `model` itself where there is nothing."""
    if model.next_stabilizer is None:
        return model
    config = dataclasses.replace(model._config, next_stabilizer=False)
    plain = build(**{**config.to_data(), "distance": model.config["distance"], "basis": model.config["basis"]})
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("next_stabilizer.")}
    plain.load_state_dict(state)
    return plain.to(model.pairs.device).train(model.training)
