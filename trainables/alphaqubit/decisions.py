"""A decoder's file, and from its logits to predicted flips: what every user of a finished decoder shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import stim
import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables import checkpoint
from trainables.alphaqubit.layout import BOTH, Placement
from trainables.alphaqubit.lines import between, observable_lines
from trainables.alphaqubit.model import Decoder, build
from trainables.alphaqubit.sampler import CLASSES

WEIGHTS = Path(__file__).parent / "weights"
SHOTS = 1024  # decoded at a time
_FLIPS = np.array([np.argwhere(k == CLASSES)[0] for k in range(4)], np.uint8)  # of I, X, Y, Z: X flip, Z flip


def shipped(distance: int) -> Path:
    """Where the teacher of a distance lies in the package, if it has one."""
    return WEIGHTS / f"teacher_d{distance}.safetensors"


SHIPPED = shipped(3)


def read(path: Path) -> Decoder:
    """A decoder from a .pth that slimsweep wrote or from .safetensors with its config in the header."""
    config, weights = checkpoint.read_model(path)
    try:
        with torch.random.fork_rng(devices=[]):
            model = build(**config)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, InputError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a decoder of this architecture ({reason})") from None
    return model


@dataclass(frozen=True, eq=False)
class Fit:
    """How a decoder is used on a circuit: where its detectors go, and for every observable the stabilizers (slots)
    whose final parities lie between the line that the decoder answers for, the first, and the circuit's.
    """

    placement: Placement
    between: list[np.ndarray]


def fitted(model: Decoder, placement: Placement, dem: stim.DetectorErrorModel) -> Fit:
    """How this decoder decodes a circuit with these errors; InputError, without a subject, where it cannot.

    A decoder of one basis decodes a memory of the other as well, by the code's own symmetry, though less well where the
    circuit has not that symmetry: see :meth:`~trainables.alphaqubit.layout.Placement.exchanged`.
    """
    layout, config = placement.layout, model.config
    both = BOTH in (layout.basis, config["basis"])
    for key, theirs in (("distance", layout.distance), *([("basis", layout.basis)] if both else [])):
        if config[key] != theirs:
            # No setting says basis=XZ: it is what the outputs xz and ixyz have.
            wanted = f"{key}={theirs}" if key == "distance" else f"outputs={'xz' if theirs == BOTH else 'observable'}"
            raise InputError(
                f"the circuit is of {key}={theirs}, the decoder of {key}={config[key]}: train one for it (python "
                f"sweeps/aq_pretrain.py --set {wanted}) or give another circuit"
            )
    expected = 1 if config["outputs"] == "observable" else 2
    if dem.num_observables != expected:
        raise InputError(
            f"the circuit has {dem.num_observables} observables, the decoder with outputs={config['outputs']} predicts "
            f"{expected}: keep as many in the circuit"
        )
    placed = placement if layout.basis == config["basis"] else placement.exchanged()
    return Fit(placed, between(placed, observable_lines(dem, placed)))


@torch.no_grad()
def logits(model: nn.Module, events: Tensor, measurements: Tensor) -> Tensor:
    """(N, K) float32 on the CPU from bits (N, R + 1, S), a chunk of shots at a time."""
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    parts = []
    for at in range(0, len(events), SHOTS):
        answer = model(*(bits[at : at + SHOTS].to(device).int() for bits in (events, measurements)))
        parts.append((answer if isinstance(answer, Tensor) else answer[0]).float().cpu())
    return torch.cat(parts)


def flips(logits: Tensor, outputs: str) -> np.ndarray:
    """(N, observables) uint8: predicted flips; of the X and then the Z observable where there are both."""
    if outputs == "ixyz":
        return np.asarray(_FLIPS[logits.argmax(1).numpy()])
    return np.asarray((logits > 0).numpy().astype(np.uint8))


def decode(model: Decoder, fit: Fit, flat: np.ndarray) -> np.ndarray:
    """:func:`flips` of a circuit's own observables, from its detection events (N, D); fit: of :func:`fitted`."""
    grid = fit.placement.to_grid(flat)
    outcomes = fit.placement.measurements(grid)
    found = flips(logits(model, torch.from_numpy(grid), torch.from_numpy(outcomes)), model.config["outputs"])
    for observable, slots in enumerate(fit.between):
        found[:, observable] ^= np.bitwise_xor.reduce(outcomes[:, -1, slots], axis=1)
    return found


def label_flips(label: Tensor, outputs: str) -> np.ndarray:
    """True flips in the form of :func:`flips`, from a batch's label."""
    return np.asarray(_FLIPS[label[:, 0].numpy()] if outputs == "ixyz" else label.numpy())
