"""Colours, markers and words that all pictures share: Okabe and Ito's palette, safe for the colour-blind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.front import Moment
from analysis.labels import short
from analysis.pareto import Pareto
from analysis.points import Kind, Point
from analysis.scale import Scale, choose, limits, round_rates, unmap

INK, MUTED, GRID, GATE, FRONT = "#1a1a1a", "#5f6368", "#e6e8eb", "#7a3b00", "#0072B2"
CROWD, AT_MOST = 60, 2000  # points of which all are named, and points that a picture holds
BEYOND = "#f0f2f4"  # where nothing can lie


@dataclass(frozen=True)
class Mark:
    """How a kind of point looks: shape and colour both tell kinds apart; in either library."""

    word: str
    colour: str
    mpl: str
    plotly: str
    size: float  # matplotlib points; plotly pixels are 1.35 times as many
    filled: bool
    alpha: float = 1.0


TEACHER = Mark("teacher", "#E69F00", "*", "star", 15, True)
PASS = Mark("meets the gate", "#0072B2", "o", "circle", 8.5, True)
PASS_BEATEN = Mark("meets the gate, dominated", "#0072B2", "o", "circle-open", 7, False, 0.7)
FAIL = Mark("misses the gate", "#D55E00", "v", "triangle-down", 8.5, True, 0.7)
FAIL_BEATEN = Mark("misses the gate, dominated", "#D55E00", "v", "triangle-down-open", 7, False, 0.5)
UNJUDGED = Mark("measured", "#009E73", "D", "diamond", 7, True)
UNJUDGED_BEATEN = Mark("measured, dominated", "#009E73", "D", "diamond-open", 6, False, 0.8)
OTHER = Mark("other decoders", "#CC79A7", "s", "square", 7, True)
STOPPED = Mark("stopped early", "#8a8f94", "x", "x-thin-open", 6.5, True, 0.7)
OPEN = Mark("not finished", "#56606a", "P", "cross", 7, True, 0.8)
MARKS = (TEACHER, PASS, PASS_BEATEN, FAIL, FAIL_BEATEN, UNJUDGED, UNJUDGED_BEATEN, STOPPED)

_OF: Mapping[Kind, tuple[Mark, Mark]] = {
    "teacher": (TEACHER, TEACHER),
    "pass": (PASS, PASS_BEATEN),
    "fail": (FAIL, FAIL_BEATEN),
    "unjudged": (UNJUDGED, UNJUDGED_BEATEN),
    "stopped": (STOPPED, STOPPED),
    "open": (OPEN, OPEN),
}


def mark(point: Point) -> Mark:
    """The look of a point."""
    return _OF[point.kind][0 if point.on_front else 1]


def faded(colour: str, crowd: int) -> str:
    """A colour for error bars as CSS rgba: lighter than its marker, lighter still among many."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{0.6 if crowd < 12 else 0.35})"


def plain(kind: Kind) -> Mark:
    """The look of a kind where the front plays no part."""
    return _OF[kind][0]


@dataclass(frozen=True)
class Axes:
    """Scales and limits of the plane; limits are places on the axis (after ``Scale.map``)."""

    x: Scale
    y: Scale
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    @property
    def top(self) -> float:
        """Upper edge in percent."""
        return unmap(self.y, self.y_range[1])

    @property
    def left(self) -> float:
        """Left edge in the unit of x."""
        return unmap(self.x, self.x_range[0])

    @property
    def right(self) -> float:
        """Right edge in the unit of x."""
        return unmap(self.x, self.x_range[1])


def axes(pareto: Pareto) -> Axes:
    """Latency on a linear axis; drop too, or logarithmic beyond the gate where drops go far past it, or as rates."""
    limit = pareto.gate.drop_pct if pareto.gate else None
    y = Scale(rates=True) if pareto.rate else choose([p.drop.value for p in pareto.points], limit)
    drops = [value for p in pareto.points for value in (p.drop.value, p.drop.lo, p.drop.hi)]
    drops += [other.drop.value for other in pareto.others]
    times = [value for p in pareto.points for value in (p.x.value, p.x.lo, p.x.hi)]
    times += [other.x for other in pareto.others if other.x is not None]
    x = Scale()
    left, right = limits(x, times, 0.10)
    y_values = [*drops, 0.0, *([limit] if limit is not None else [])]
    return Axes(x, y, (max(left, 0.0), right), limits(y, y_values))


def y_ticks(pareto: Pareto, axes: Axes) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """(place, label) of the left axis, and of the right one where there is one: rates left, their drops right."""
    low, high = unmap(axes.y, axes.y_range[0]), axes.top
    drops = [(axes.y.map(drop), label) for drop, label in axes.y.ticks(low, high)]
    if not pareto.rate:
        return drops, []
    rates = round_rates(pareto.rate * (1 + low / 100), pareto.rate * (1 + high / 100))
    return [(axes.y.map(100 * (rate / pareto.rate - 1)), label) for rate, label in rates], drops


def gate_text(pareto: Pareto) -> str:
    """The gate in words, with the rate that it stands for where rates are drawn."""
    if not pareto.gate:
        return ""
    limit = pareto.gate.drop_pct
    rate = f" (LER {pareto.rate * (1 + limit / 100):.3g})" if pareto.rate and limit is not None else ""
    return f"gate: {pareto.gate.text}{rate}"


@dataclass(frozen=True)
class Label:
    """A name beside its place: x in its unit, drop in percent. front: on the front, or the teacher."""

    text: str
    x: float
    drop: float
    look: Mark
    front: bool


def labelled(pareto: Pareto, axes: Axes) -> list[Label]:
    """Names, the most important first: teacher, front, other decoders, passing, failing, stopped (why); of a crowd
    only the front's.
    """
    trials = [p for p in pareto.points if p.kind != "teacher"]
    names = dict(zip((id(p) for p in trials), short([p.exp_id for p in trials]), strict=True))
    rank = {"teacher": 0, "pass": 3, "unjudged": 4, "fail": 5, "stopped": 6, "open": 7}

    def text(point: Point) -> str:
        name = "teacher" if point.kind == "teacher" else names[id(point)]
        notes = [note for note, holds in (("chosen", point.record.get("run_id") in pareto.chosen),
                                          ("knee", point is pareto.knee)) if holds]  # fmt: skip
        chosen = f" ({', '.join(notes)})" if notes else ""
        return f"{name}{chosen} · {point.stop_reason}" if point.stop_reason else name + chosen

    order = sorted(
        pareto.points,
        key=lambda p: (rank[p.kind] if not p.on_front else min(1, rank[p.kind]), p.drop.value, p.exp_id),
    )
    found = [Label(text(p), p.x.value, p.drop.value, mark(p), p.on_front or p.kind == "teacher") for p in order]
    first = sum(label.front for label in found)
    others = [
        Label(other.name, axes.left if other.x is None else other.x, other.drop.value, OTHER, False)
        for other in pareto.others
    ]
    rest = found[first:] if len(found) <= CROWD else []
    return [*found[:first][:CROWD], *others, *rest]


def kinds(points: Sequence[Point]) -> list[tuple[Mark, list[Point]]]:
    """Points by look, in the legend's order, without empty groups."""
    groups = [(look, [p for p in points if mark(p) == look]) for look in MARKS]
    return [(look, group) for look, group in groups if group]


def axis_words(pareto: Pareto) -> tuple[str, str]:
    """Titles of the two axes, with units and the better direction; of rates the right axis has a title of its own."""
    words, paired = pareto.words, ", by the ratio to the teacher's" if pareto.clock else ""
    metric = f" in {pareto.metric}" if pareto.metric else ""
    quality = f"test drop{metric} against the teacher (%)"
    if pareto.rate:
        quality = f"test {words.rate}, logical errors per {words.sample}"
    return f"◀ {pareto.across.better}      {pareto.across.title}{paired}", f"◀ better      {quality}"


def title(pareto: Pareto) -> str:
    """What the picture shows."""
    return f"Quality against {pareto.across.subject}"


def earlier(pareto: Pareto) -> list[Moment]:
    """The fronts as they were after a quarter, half and three quarters of the trials; none of a small sweep."""
    count = sum(p.kind != "stopped" for p in pareto.points)
    if count < 12:
        return []
    found = [[m for m in pareto.history if m.trials <= share * count][-1:] for share in (0.25, 0.5, 0.75)]
    last = pareto.history[-1]
    return [moment for moment in dict.fromkeys(m for some in found for m in some) if moment != last]


def drawn(pareto: Pareto, at_most: int = AT_MOST) -> Sequence[Point]:
    """The points that a picture shows: all, or of very many those that matter most."""
    if len(pareto.points) <= at_most:
        return pareto.points
    order = sorted(pareto.points, key=lambda p: (p.kind != "teacher", not p.on_front, -(p.share or 0.0), p.drop.value))
    return order[:at_most]


SIDE_TITLE = "drop against the teacher (%)"


def footer(pareto: Pareto) -> list[str]:
    """Caption lines: what was measured on what, how x was found, hypervolume, and who is left out."""
    lines = ["  ·  ".join(pareto.caption)] if pareto.caption else []
    lines += [pareto.clock] if pareto.clock else []
    if pareto.reference is not None and pareto.hypervolume is not None:
        (x, y), unit = pareto.reference, pareto.across.unit
        over = f", {pareto.across.name}: over rounds" if pareto.across.lo else ""
        lines.append(
            f"hypervolume {pareto.hypervolume:.4g} {unit}·% against the reference ({x:.4g} {unit}, {y:.3g} %)"
            + (f"  ·  knee: {pareto.knee.exp_id}" if pareto.knee else "")
            + (
                f"  ·  bars: 95 % bootstrap intervals (drop: over test {pareto.words.samples}{over})"
                if any(_bars(p) for p in pareto.points)
                else ""
            )
        )
    lines += [pareto.shares] if pareto.shares else []
    if pareto.others:
        timed = any(other.x is not None for other in pareto.others)
        lines.append(
            f"other decoders on the same {pareto.words.samples}, placed by their paired ratio to the teacher's rate"
            + ("; timed from Python, one a call, apart from the trials' rounds" if timed else "; not timed: lines")
        )
    if len(pareto.points) > AT_MOST:
        lines.append(f"drawn: the {AT_MOST:,} of {len(pareto.points):,} trials nearest the front; pareto.csv has all")
    if pareto.left_out:
        shown = [f"{name} ({why})" for _, name, why in pareto.left_out[:3]]
        more = f" and {len(pareto.left_out) - 3} more" if len(pareto.left_out) > 3 else ""
        lines.append(f"not in the picture: {', '.join(shown)}{more}")
    return lines


def _bars(point: Point) -> bool:
    return point.drop.hi > point.drop.lo or point.x.hi > point.x.lo
