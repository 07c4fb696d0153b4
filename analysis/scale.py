"""Axis scales that the PNG and the HTML share, so that both show the same picture."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps a value to its place on an axis.

    linear_to None: linear. Otherwise linear up to +-linear_to and logarithmic beyond (a unit per decade), so
    that a gate of 1 % and a drop of 300 % fit into one picture without hiding either.
    """

    linear_to: float | None = None

    def map(self, value: float) -> float:
        """Place of ``value`` on the axis (the value itself on a linear axis)."""
        if self.linear_to is None or not math.isfinite(value):
            return value
        size = abs(value) / self.linear_to
        return math.copysign(size if size <= 1 else 1 + math.log10(size), value)

    def ticks(self, low: float, high: float, at_most: int = 9) -> list[tuple[float, str]]:
        """Round values within [low, high] (both in the data's unit) with their labels."""
        if self.linear_to is None:
            return _linear_ticks(low, high, at_most)
        wanted: list[float] = []
        for steps in ((1, 2, 5), (1, 3), (1,)):
            decades = range(math.floor(math.log10(self.linear_to)), math.ceil(math.log10(_size(low, high))) + 1)
            sizes = [step * 10.0**decade for decade in decades for step in steps]
            sizes = [size for size in sizes if size >= self.linear_to * 0.999]
            half = [self.linear_to / 2] if steps == (1, 2, 5) else []
            wanted = sorted({0.0, *half, *sizes, *(-size for size in (*half, *sizes))})
            wanted = [value for value in wanted if low <= value <= high]
            if len(wanted) <= at_most:
                break
        return [(value, f"{value:g}") for value in wanted]


def choose(values: Iterable[float], linear_to: float | None, spread: float = 8.0) -> Scale:
    """Linear unless the values reach beyond ``spread`` times ``linear_to``."""
    reach = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return Scale(linear_to if linear_to and reach > spread * linear_to else None)


def limits(scale: Scale, values: Sequence[float], pad: float = 0.08) -> tuple[float, float]:
    """(low, high) in axis places (after ``map``) that show all finite values with a margin."""
    places = [scale.map(value) for value in values if math.isfinite(value)] or [0.0]
    low, high = min(places), max(places)
    margin = (high - low) * pad or abs(high) * pad or 1.0
    return low - margin, high + margin


def unmap(scale: Scale, place: float) -> float:
    """The inverse of ``Scale.map``."""
    if scale.linear_to is None:
        return place
    size = abs(place)
    return math.copysign(scale.linear_to * (size if size <= 1 else 10 ** (size - 1)), place)


def _size(low: float, high: float) -> float:
    return max(abs(low), abs(high), 1e-12)


def _linear_ticks(low: float, high: float, at_most: int) -> list[tuple[float, str]]:
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [(low, f"{low:g}")]
    raw = span / at_most
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 2.5, 5, 10) if base * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(round((first + i) * step, 12), f"{round((first + i) * step, 12):g}") for i in range(count)]
