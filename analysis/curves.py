"""Learning curves of a sweep as PNG: who was stopped when, and why."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes as MplAxes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import picture, style
from analysis.labels import short, spread
from analysis.pareto import Pareto
from analysis.picture import WIDE, Canvas
from analysis.points import Kind, is_stop, kind_of
from analysis.scale import Scale, choose, limits, unmap
from analysis.store import SweepData

LABELS_AT_MOST, LABELS_IN_A_CROWD = 14, 7
SAMPLE = 52  # pixels of a line beside its name
# Shape tells the reasons apart, as colour cannot for 40 thin lines.
REASON_MARKS: Mapping[str, str] = {"stop_loss": "x", "plateau": "s", "asha": "v", "diverged": "*"}
OTHER_MARK = "P"
# (how much white (> 0) or black (< 0) is mixed into the kind's colour, dashes, marker, line width) by which trials of
# one kind differ: wide and light below narrow and dark, so that of equal curves each still shows.
LOOKS: tuple[tuple[float, Any, str, float], ...] = (
    (0.45, "-", "o", 3.4),
    (0.0, (0, (5, 2)), "^", 2.2),
    (-0.45, (0, (1, 1.6)), "D", 1.6),
    (0.0, (0, (6, 1.5, 1, 1.5)), "<", 1.4),
    (-0.45, "-", "h", 1.0),
    (0.45, (0, (2, 1)), ">", 1.0),
)


@dataclass(frozen=True)
class Curve:
    """One trial's validation drop: ``drop`` in percent after each of ``epochs``, non-finite ones too."""

    exp_id: str
    kind: Kind
    epochs: tuple[int, ...]
    drop: tuple[float, ...]
    stop_reason: str | None

    @property
    def last(self) -> tuple[int, float] | None:
        """The last finite value and its epoch."""
        finite = [(e, d) for e, d in zip(self.epochs, self.drop, strict=True) if math.isfinite(d)]
        return finite[-1] if finite else None


def compute(data: SweepData, key: str = "val_drop") -> tuple[Curve, ...]:
    """The curves of all trials that have one, in the order of the trials."""
    by_run: dict[str, list[tuple[int, float]]] = {}
    for run_id, name, step, value in data.curves.iter_rows():
        if name == key:
            by_run.setdefault(run_id, []).append((step, 100 * value))
    curves = []
    for row in data.trials.to_dicts():
        points = by_run.get(row["run_id"])
        if points and row["role"] != "teacher":
            epochs, drops = zip(*points, strict=True)
            reason = row.get("stop_reason")
            curves.append(Curve(str(row["exp_id"]), kind_of(row), epochs, drops, reason if is_stop(reason) else None))
    return tuple(curves)


def draw(data: SweepData, pareto: Pareto, path: Path, canvas: Canvas = WIDE) -> None:
    """Write the picture to ``path`` (PNG, 160 pixels to the inch: 1600 x 1024 unless told otherwise)."""
    curves = compute(data)
    figure = canvas.figure()
    foot = [] if canvas.bare else textwrap.wrap("  ·  ".join(pareto.caption), 160)
    labels = _label_texts(curves)
    longest = max((len(text) for text in labels.values()), default=0)
    wide = 0.1 + 0.064 * longest + SAMPLE / picture.DPI
    ax = canvas.area(figure, min(wide + 0.4, 0.42 * canvas.width) if labels else 0.2, len(foot))
    picture.frame(figure, ax, canvas, "Validation drop while training", pareto.sweep, pareto.headline, foot)
    if any(curve.last for curve in curves):
        _plot(figure, ax, canvas, curves, pareto, labels)
    else:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no validation drop is logged yet", ha="center", color=style.MUTED, fontsize=12)
    picture.save(figure, path)


def _plot(
    figure: Figure,
    ax: MplAxes,
    canvas: Canvas,
    curves: Sequence[Curve],
    pareto: Pareto,
    labels: Mapping[str, str],
) -> None:
    limit = pareto.gate.drop_pct if pareto.gate else None
    drops = [value for curve in curves for value in curve.drop if math.isfinite(value)]
    scale = choose(drops, limit)
    low, high = limits(scale, [*drops, *([limit / 2] if limit is not None else [])])
    last_epoch = max(curve.epochs[-1] for curve in curves)
    first_epoch = min(curve.epochs[0] for curve in curves)
    axes = style.Axes(Scale(), scale, (first_epoch - 0.4, last_epoch + max(0.4, 0.02 * last_epoch)), (low, high))
    ticks = [(scale.map(value), label) for value, label in scale.ticks(unmap(scale, low), axes.top)]
    picture.set_axes(ax, canvas, axes, ticks, "epoch", "◀ better      drop on the validation split (%)")
    whole = [tick for tick in ax.get_xticks() if float(tick).is_integer()]
    ax.set_xticks(whole, [f"{tick:g}" for tick in whole])
    if pareto.gate and limit is not None:
        picture.gate_line(ax, axes, limit, f"gate: {pareto.gate.text}", left=True)
    own = looks(curves)
    for curve in curves:
        look = style.plain(curve.kind)
        places = [scale.map(value) if math.isfinite(value) else math.nan for value in curve.drop]
        width, layer = (1.1, 2) if curve.kind == "stopped" else (1.8, 3)
        thin = {"color": look.colour, "alpha": 0.55 * look.alpha, "linewidth": width}
        ax.plot(curve.epochs, places, zorder=layer, **own.get(curve.exp_id, thin))
        _end(ax, curve, scale)
    canvas.legend(figure, _handles(curves))
    if labels:
        _name(figure, ax, curves, scale, labels)


def looks(curves: Sequence[Curve]) -> dict[str, dict[str, Any]]:
    """How each trial's line differs from the others of its kind, as matplotlib's arguments; empty for a crowd."""
    if len(curves) > LABELS_AT_MOST:
        return {}
    found: dict[str, dict[str, Any]] = {}
    seen: Counter[Kind] = Counter()
    for curve in curves:
        tint, dashes, marker, width = LOOKS[seen[curve.kind] % len(LOOKS)]
        seen[curve.kind] += 1
        to = 1.0 if tint > 0 else 0.0
        colour = tuple(c + (to - c) * abs(tint) for c in to_rgb(style.plain(curve.kind).colour))
        line = {"linestyle": dashes, "linewidth": width, "marker": marker, "markersize": 4.5}
        found[curve.exp_id] = {"color": colour, **line}
    return found


def _end(ax: MplAxes, curve: Curve, scale: Scale) -> None:
    """A mark where the trial ended: the reason's shape, or a dot for one that ran to its last epoch."""
    if curve.last is None:
        return
    epoch, value = curve.last
    look = style.plain(curve.kind)
    shape = REASON_MARKS.get(curve.stop_reason, OTHER_MARK) if curve.stop_reason else "o"
    ax.plot(
        [epoch],
        [scale.map(value)],
        marker=shape,
        markersize=6.5 if shape != "*" else 10,
        color=look.colour,
        markerfacecolor="white" if shape in "sv" else look.colour,
        markeredgewidth=1.5 if shape in "xsv" else 0.5,
        zorder=5,
        clip_on=False,
    )


def _handles(curves: Sequence[Curve]) -> list[Line2D]:
    handles = []
    for kind in ("pass", "fail", "unjudged", "stopped", "open"):
        if any(curve.kind == kind for curve in curves):
            look = style.plain(kind)
            handle = Line2D([], [], color=look.colour, linewidth=1.8, label=look.word)
            handles.append(handle)
    for reason, count in sorted(Counter(c.stop_reason for c in curves if c.stop_reason).items()):
        shape = REASON_MARKS.get(reason, OTHER_MARK)
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker=shape,
                color=style.MUTED,
                markersize=6.5,
                markerfacecolor="white" if shape in "sv" else style.MUTED,
                markeredgewidth=1.4,
                label=f"{reason} ({count})",
            )
        )
    return handles


def _label_texts(curves: Sequence[Curve]) -> dict[str, str]:
    """Names at the right edge: all when they fit, else those not stopped, the best first."""
    names = dict(zip((c.exp_id for c in curves), short([c.exp_id for c in curves]), strict=True))
    shown = [c for c in curves if c.last]
    if len(shown) > LABELS_AT_MOST:
        ended = [c for c in shown if c.kind != "stopped"]
        shown = sorted(ended, key=lambda c: c.last[1] if c.last else 0)[:LABELS_IN_A_CROWD]
    return {c.exp_id: names[c.exp_id] + (f" · {c.stop_reason}" if c.stop_reason else "") for c in shown}


def _name(figure: Figure, ax: MplAxes, curves: Sequence[Curve], scale: Scale, labels: Mapping[str, str]) -> None:
    named = [(curve, curve.last) for curve in curves if curve.exp_id in labels]
    ends = [(curve, last) for curve, last in named if last is not None]
    area = ax.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    points = ax.transData.transform([(float(epoch), scale.map(value)) for _, (epoch, value) in ends])
    centres = spread([float(y) for _, y in points], 13 * picture.DPI / 72, float(area.y0), float(area.y1))
    inverse, own = ax.transData.inverted(), looks(curves)
    for (curve, _), point, centre in zip(ends, points, centres, strict=True):
        edge = area.x1 + 12
        corners = [(float(point[0]), float(point[1])), (area.x1, centre), (edge, centre)]
        line = inverse.transform(corners)
        ax.plot(line[:, 0], line[:, 1], color="#b0b5ba", linewidth=0.6, zorder=1, clip_on=False)
        if curve.exp_id in own:  # a piece of the very line before its name
            piece = inverse.transform([(edge + 3 + step * SAMPLE / 2, centre) for step in range(3)])
            ax.plot(piece[:, 0], piece[:, 1], **own[curve.exp_id], markevery=[1], clip_on=False)
            edge += SAMPLE + 6
        x, y = inverse.transform((edge + 5, centre))
        ax.text(
            x,
            y,
            labels[curve.exp_id],
            fontsize=8.5,
            va="center",
            clip_on=False,
            color=style.MUTED if curve.kind == "stopped" else style.INK,
        )
