"""Streaming decoding: one round at a time by ONNX Runtime, as the measurements come in.

The step's graph takes the state (S, D) float32 and a round's codes (S,) int32 and gives the next state; a second graph
reads the logits (1, K) from a state, after any round. What depends on weights alone is computed at export. At batch 1 a
step costs what its operators cost to start, so there is no batch axis (products of two axes need no reshaping), and
state and codes stay in arrays that the graph reads and writes in place.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engines.errors import InputError
from engines.export import export_onnx
from engines.runtimes import OnnxRuntime
from trainables.alphaqubit.model import Decoder, Layer, without_training_heads

CODES = 16  # 8 last + 4 measurement + 2 event + event before
STEP, READ = "step.onnx", "read.onnx"


class Step(nn.Module):
    """One round of a decoder: state and codes in, state out."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        with torch.no_grad():
            const = decoder.constants()
        # One lookup per table from all that is known of a stabilizer in a round.
        rows = const.embedding.view(2, decoder.stabilizers, 4, -1).repeat_interleave(2, dim=2)
        self.table = rows.transpose(0, 1).reshape(decoder.stabilizers * CODES, -1)
        repeated = torch.arange(CODES) % 4
        self.attention = [own._replace(events=own.events[repeated]) for own in const.attention]
        self.grids, self.layers = const.convolutions, nn.ModuleList(decoder._layers())
        self.first = torch.arange(0, CODES * decoder.stabilizers, CODES, dtype=torch.int32)

    def forward(self, state: Tensor, codes: Tensor) -> Tensor:
        """(S, D), (S,) int32 in 0..15 -> (S, D)."""
        x = torch.add(F.embedding(codes + self.first, self.table), state, alpha=math.sqrt(0.5))
        for layer, attention, grid in zip(self.layers, self.attention, self.grids, strict=True):
            assert isinstance(layer, Layer)
            x, _ = layer(x, codes, attention, grid)
        return x


class Read(nn.Module):
    """Logits of a state."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        with torch.no_grad():
            self.const = decoder.constants()
        self.decoder = decoder

    def forward(self, state: Tensor) -> Tensor:
        """(S, D) -> (1, K)."""
        return self.decoder.read(state[None], self.const)


def export(decoder: Decoder, folder: Path) -> tuple[Path, Path]:
    """Write step.onnx (state, codes -> next_state) and read.onnx (state -> logits), checked against torch."""
    plain = without_training_heads(decoder).eval()
    state = torch.randn(plain.stabilizers, plain.config["dim"], generator=torch.Generator().manual_seed(0))
    codes = torch.arange(plain.stabilizers, dtype=torch.int32) % CODES
    step, read = folder / STEP, folder / READ
    with torch.no_grad():
        export_onnx(Step(plain), (state, codes), step, ["state", "codes"], ["next_state"])
        export_onnx(Read(plain), (state,), read, ["state"], ["logits"])
    return step, read


class Streaming:
    """Decodes one shot after the other, round by round::

    stream.start(); stream.push(events, measurements), ..., stream.push(events, measurements, last=True)
    stream.logits()
    """

    def __init__(self, decoder: Decoder, threads: int = 1) -> None:
        shape = (decoder.stabilizers, int(decoder.config["dim"]))
        with TemporaryDirectory(prefix="slimsweep_stream_") as folder:
            step, self._read = (OnnxRuntime(path, "cpu", threads) for path in export(decoder, Path(folder)))
        self._codes = np.zeros(shape[0], np.int32)
        self._before, self._now = np.zeros_like(self._codes), np.zeros_like(self._codes)
        self._state, self._next = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        # There and back: what one round writes the next one reads.
        there, back = ((self._state, self._codes), (self._next,)), ((self._next, self._codes), (self._state,))
        self._step, self._turn = step.bind(*there), step.bind(*back)
        self.start()

    def start(self) -> None:
        """Begin a shot."""
        self._state.fill(0)
        self._before.fill(0)
        self._ended = False

    def push(self, events: np.ndarray, measurements: np.ndarray, last: bool = False) -> None:
        """Take in a layer of detectors: bits (S,) in the order of Layout.cells; last: of the data qubits."""
        if events.shape != self._before.shape or measurements.shape != self._before.shape:
            raise InputError(
                f"events {events.shape}, measurements {measurements.shape}: expected {self._before.shape} both, one "
                "bit per stabilizer"
            )
        if self._ended:
            raise InputError("push after the last round: call start() for the next shot")
        codes, now = self._codes, self._now
        codes[:], now[:] = measurements, events
        codes += codes
        codes += now
        codes += codes
        codes += self._before
        if last:
            codes += 8
        self._step()
        self._before, self._now = now, self._before
        self._state, self._next = self._next, self._state
        self._step, self._turn = self._turn, self._step
        self._ended = last

    def logits(self) -> np.ndarray:
        """(K,) after the rounds so far; a decision about the shot once the last one is in."""
        found: np.ndarray = self._read.run((self._state,))[0][0]
        return found
