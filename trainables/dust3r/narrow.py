"""How narrow a pruned model shall be: from channel ratios, and what its layers can spare, to a Config.

Heads leave one by one, feed-forward and residual channels by eights (what vector units like). Within a group of
parts (the encoder's heads, the decoder's feed-forward channels, ...) the number to remove is exact to a unit; where
they leave is a least-cost assignment: removing k of the n units of a part is taken to cost s (k / n)^2, s being what
it costs to remove a fixed share, so that taking the cheapest next unit is optimal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from engines.errors import InputError
from trainables.dust3r.config import PARTS, Config

UNIT = 8  # channels


class Part(NamedTuple):
    """The heads of one attention or the channels of one feed-forward part; names as in PARTS."""

    stack: str
    name: str
    layer: int

    @property
    def group(self) -> str:
        """enc_heads, enc_ffn, dec_heads or dec_ffn."""
        return f"{self.stack[:3]}_{'ffn' if self.name == 'mlp' else 'heads'}"

    @property
    def path(self) -> str:
        """The module's name in the model."""
        return f"{self.stack}.{self.layer}.{self.name}"


def parts_of(config: Config) -> list[Part]:
    """Everything that can be narrowed but the residual streams."""
    return [
        Part(stack, name, layer)
        for stack, names in PARTS.items()
        for layer in range(config.depth(stack))
        for name in names
    ]


def unit(part: Part, config: Config) -> int:
    """Heads or channels that leave together."""
    return 1 if part.name != "mlp" else math.gcd(config.count(*part), UNIT)


def narrowed(config: Config, ratios: Mapping[str, float], costs: Mapping[Part, float] | None = None) -> Config:
    """`config` with shares of its width removed.

    ratios: share to remove per group (enc_heads, enc_ffn, dec_heads, dec_ffn) and of both residual streams
    (residual), each in [0, 1). costs: what it costs to remove a fixed share of each part; by default all parts of a
    group lose the same share. Raises InputError for a ratio that would leave a part nothing.
    """
    counts = {part: config.count(*part) for part in parts_of(config)}
    units = {part: unit(part, config) for part in counts}
    for group in dict.fromkeys(part.group for part in counts):
        whole = {part: counts[part] // units[part] for part in counts if part.group == group}
        taken = _assign(whole, _round(sum(whole.values()) * ratios[group]), costs or whole, group, ratios[group])
        for part, number in taken.items():
            counts[part] -= number * units[part]
    return _with_counts(config, counts, {side: _stream(config, side, ratios["residual"]) for side in ("enc", "dec")})


def partway(old: Config, new: Config, share: float) -> Config:
    """The widths at `share` of the way from `old` to its narrower form `new`, in whole units; at 1 exactly `new`."""

    def between(wide: int, narrow: int, step: int) -> int:
        return wide - _round((wide - narrow) / step * share) * step

    counts = {part: between(old.count(*part), new.count(*part), unit(part, old)) for part in parts_of(old)}
    dims = {"enc": (old.enc_embed_dim, new.enc_embed_dim), "dec": (old.dec_embed_dim, new.dec_embed_dim)}
    return _with_counts(old, counts, {side: between(*ends, math.gcd(*ends, UNIT)) for side, ends in dims.items()})


def _assign(
    whole: Mapping[Part, int], remove: int, costs: Mapping[Part, float], group: str, ratio: float
) -> dict[Part, int]:
    """How many of its units each part loses, at the least total cost."""
    spare = sum(whole.values()) - len(whole)
    if remove > spare:
        what = "feed-forward channels" if group.endswith("ffn") else "heads"
        raise InputError(
            f"channel ratio {ratio:.3g} of {group} would remove all {what} of a layer: "
            f"lower rho or the factor {group} until their product is at most {spare / sum(whole.values()):.3g}"
        )
    # What is measured at the ratio itself says little further out: no part loses more than twice as much.
    most = {part: min(count - 1, math.ceil(2 * ratio * count)) for part, count in whole.items()}
    price = {part: costs[part] / count**2 for part, count in whole.items()}
    taken = dict.fromkeys(whole, 0)
    for _ in range(remove):
        able = [part for part in whole if taken[part] < most[part]]
        able = able or [part for part in whole if taken[part] < whole[part] - 1]
        cheapest = min(able, key=lambda part: price[part] * (2 * taken[part] + 1))
        taken[cheapest] += 1
    return taken


def _stream(config: Config, side: str, ratio: float) -> int:
    dim: int = getattr(config, f"{side}_embed_dim")
    step = math.gcd(dim, UNIT)
    kept = dim - _round(dim / step * ratio) * step
    if kept < 1:
        raise InputError(f"channel ratio {ratio:.3g} of the residual stream would remove all {dim} channels: lower it")
    return kept


def _round(number: float) -> int:
    return math.floor(number + 0.5)


def _with_counts(config: Config, counts: Mapping[Part, int], dims: Mapping[str, int]) -> Config:
    layers: dict[str, tuple[int, ...]] = {}
    for part, count in counts.items():
        key = f"{part.stack}.{part.name}"
        layers[key] = (*layers.get(key, ()), count)
    sizes: dict[str, Any] = {f"{side}_head_dim": config.head_width(side) for side in ("enc", "dec")}
    sizes |= {f"{side}_mlp_hidden": config.mlp_hidden(side) for side in ("enc", "dec")}
    sizes |= {f"{side}_embed_dim": dim for side, dim in dims.items()}
    return dataclasses.replace(config, layers=layers, **sizes)
