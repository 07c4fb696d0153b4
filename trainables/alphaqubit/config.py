"""Sizes of the decoder, checked as a whole before anything is built, and the named ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import InputError

# What the decoder answers, and the width of its logits: the memory's observable; both observables (X, Z); one class
# of I, X, Y, Z.
OUTPUTS = {"observable": 1, "xz": 2, "ixyz": 4}

_COUNTS = ("dim", "layers", "heads", "key_dim", "widening", "conv_channels", "bias_dim", "readout_dim")
_DEPTHS = ("bias_layers", "embed_layers", "readout_layers")
PARTS = ("heads", "hidden", "conv")  # of a layer, which pruning narrows
_LAYERWISE = tuple(f"layer_{part}" for part in PARTS)


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder; names follow Bausch et al. (Nature 2024, s41586-024-08148-8), table of hyperparameters.

    dim: channels of the state of a stabilizer. layers: syndrome-transformer layers per round. heads, key_dim: of the
    attention. widening: of the gated dense block, hidden = widening * dim for each of its two branches.
    conv_channels, dilations: one 3x3 convolution per dilation in every layer. bias_dim, bias_layers: width and depth
    of the network that embeds the layout for the attention bias. embed_layers: depth of the stabilizer embedding.
    readout_dim, readout_layers: width and depth of the readout. next_stabilizer: a head that predicts the next
    round's events, for training only. outputs: a key of OUTPUTS. layer_heads, layer_hidden, layer_conv: of a pruned
    decoder, one number per layer in place of heads, of widening * dim and of conv_channels; empty = the same in all.
    Raises InputError that lists all bad values.
    """

    dim: int = 32
    layers: int = 1
    heads: int = 4
    key_dim: int = 8
    widening: int = 2
    conv_channels: int = 32
    dilations: tuple[int, ...] = (1,)
    bias_dim: int = 16
    bias_layers: int = 1
    embed_layers: int = 1
    readout_dim: int = 32
    readout_layers: int = 2
    next_stabilizer: bool = False
    outputs: str = "observable"
    layer_heads: tuple[int, ...] = ()
    layer_hidden: tuple[int, ...] = ()
    layer_conv: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dilations", *_LAYERWISE):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        bad = [f"{name}={getattr(self, name)} must be at least 1" for name in _COUNTS if getattr(self, name) < 1]
        bad += [f"{name}={getattr(self, name)} must be at least 0" for name in _DEPTHS if getattr(self, name) < 0]
        if not self.dilations or any(dilation < 1 for dilation in self.dilations):
            bad.append(f"dilations={self.dilations} must be one or more numbers of at least 1")
        for name in _LAYERWISE:
            counts = getattr(self, name)
            if counts and (len(counts) != self.layers or min(counts) < 1):
                bad.append(f"{name}={list(counts)} must be {self.layers} numbers of at least 1, one per layer")
        if self.outputs not in OUTPUTS:
            bad.append(f"outputs={self.outputs!r} is unknown, use one of {', '.join(OUTPUTS)}")
        if bad:
            raise InputError("decoder config: " + "; ".join(bad))

    @property
    def logits(self) -> int:
        """K, the width of the logits."""
        return OUTPUTS[self.outputs]

    def to_data(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build an equal config; those of pruning only where it was pruned."""
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {k: v for k, v in data.items() if v or k not in _LAYERWISE}

    def widths(self, layer: int) -> tuple[int, int, int]:
        """Heads of a layer's attention, channels of its gated dense block and of its convolutions, as PARTS."""
        usual = (self.heads, self.widening * self.dim, self.conv_channels)
        own = (self.layer_heads, self.layer_hidden, self.layer_conv)
        heads, hidden, conv = (counts[layer] if counts else all_ for counts, all_ in zip(own, usual, strict=True))
        return heads, hidden, conv


def from_data(data: Mapping[str, Any]) -> Config:
    """The Config of :meth:`Config.to_data` or of a settings file; InputError names unknown keys and wrong types."""
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    unknown = sorted(set(data) - set(defaults))
    if unknown:
        raise InputError(f"decoder config: unknown keys {unknown}, known are {sorted(defaults)}")
    for name, value in data.items():
        wanted = type(defaults[name])
        numbers = isinstance(value, list | tuple) and all(type(x) is int for x in value)
        if not (numbers if wanted is tuple else type(value) is wanted):
            what = "a list of whole numbers" if wanted is tuple else f"a value of type {wanted.__name__}"
            raise InputError(f"decoder config: {name}={value!r}: expected {what}")
    return Config(**data)


# The paper's two. Transcriptions differ on a few sizes (the bias network of the second, how wide the gated block of the
# first is), so that parameter counts agree with the published 5.4 M for the second; the first is "larger than" that.
_PAPER: dict[str, Any] = {
    "layers": 3,
    "heads": 4,
    "key_dim": 32,
    "widening": 5,
    "bias_dim": 48,
    "bias_layers": 8,
    "embed_layers": 2,
}
PRESETS = {
    "sycamore": Config(
        **_PAPER,
        dim=320,
        conv_channels=160,
        dilations=(1, 1, 1),
        readout_dim=64,
        readout_layers=16,
        next_stabilizer=True,
    ),
    "scaling": Config(
        **_PAPER,
        dim=256,
        conv_channels=128,
        dilations=(1, 2, 4),
        readout_dim=32,
        readout_layers=4,
        next_stabilizer=True,
    ),
    "teacher": Config(),
    "student": Config(
        dim=16, key_dim=4, conv_channels=16, bias_dim=8, embed_layers=0, readout_dim=16, readout_layers=1
    ),
}


def preset(name: str, distance: int, **changes: Any) -> Config:
    """A named Config for codes of a distance, with changes; InputError names what is unknown.

    Sizes don't depend on the distance, but for one dilation of Sycamore's: 1, 1, 2 from distance 5 on.
    """
    if name not in PRESETS:
        raise InputError(f"decoder preset {name!r} is unknown, use one of {', '.join(PRESETS)}")
    data = PRESETS[name].to_data()
    if name == "sycamore" and distance >= 5:
        data["dilations"] = [1, 1, 2]
    return from_data({**data, **changes})
