"""A decoder's file, and from its logits to predicted flips: what every user of a finished decoder shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables import checkpoint
from trainables.alphaqubit.model import Decoder, build
from trainables.alphaqubit.sampler import CLASSES

SHIPPED = Path(__file__).parent / "weights" / "teacher_d3.safetensors"
SHOTS = 1024  # decoded at a time
_FLIPS = np.array([np.argwhere(k == CLASSES)[0] for k in range(4)], np.uint8)  # of I, X, Y, Z: X flip, Z flip


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


def label_flips(label: Tensor, outputs: str) -> np.ndarray:
    """True flips in the form of :func:`flips`, from a batch's label."""
    return np.asarray(_FLIPS[label[:, 0].numpy()] if outputs == "ixyz" else label.numpy())
