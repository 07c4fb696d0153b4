"""Axis scales that the PNG and the HTML share, so that both show the same picture."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LOWEST = 1e-3  # of the reference's rate: what is below (no error seen at all) is drawn here


@dataclass(frozen=True)
class Scale:
    """Maps a value to its place on an axis.

    linear_to None: linear. Otherwise linear up to +-linear_to and logarithmic beyond (a unit per decade), so
    that a gate of 1 % and a drop of 300 % fit into one picture without hiding either.
    rates: values are drops in percent, placed by the logarithm of the rate they make of the reference's (a unit per
    decade), as error rates are commonly drawn.
    """

    linear_to: float | None = None
    rates: bool = False

    def map(self, value: float) -> float:
        """Place of ``value`` on the axis (the value itself on a linear axis)."""
        if self.rates and math.isfinite(value):
            return math.log10(max(1 + value / 100, _LOWEST))
        if self.linear_to is None or not math.isfinite(value):
            return value
        size = abs(value) / self.linear_to
        return math.copysign(size if size <= 1 else 1 + math.log10(size), value)

    def ticks(self, low: float, high: float, at_most: int = 9) -> list[tuple[float, str]]:
        """Round values within [low, high] (both in the data's unit) with their labels."""
        if self.rates:
            shares = round_rates(1 + low / 100, 1 + high / 100, at_most)
            return [(100 * (share - 1), f"{100 * (share - 1):+g}" if share != 1 else "0") for share, _ in shares]
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


def round_rates(low: float, high: float, at_most: int = 9) -> list[tuple[float, str]]:
    """Round rates within [low, high], both positive, with labels: even steps, or 1, 2, 5 where they span decades."""
    low = max(low, _LOWEST * high)
    if high < 5 * low:
        return _linear_ticks(low, high, at_most)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        wanted = [rate for decade in decades for step in steps if low <= (rate := step * 10.0**decade) <= high]
        if len(wanted) <= at_most:
            break
    return [(rate, f"{rate:g}") for rate in wanted]


def unmap(scale: Scale, place: float) -> float:
    """The inverse of ``Scale.map``."""
    if scale.rates:
        return 100 * (10**place - 1)
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
