"""The Pareto picture as PNG, drawn by matplotlib from a computed ``Pareto``."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes as MplAxes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from analysis import style
from analysis.front import Vertex, split_at, steps, vertices
from analysis.labels import Box, place
from analysis.pareto import Pareto
from analysis.points import Other, Point
from analysis.style import Axes, Mark

DPI = 160
FONT = 9.5
OTHER_DASHES: Any = (0, (4, 2, 1, 2))
HALO = withStroke(linewidth=2.2, foreground="#ffffffb0")


@dataclass(frozen=True)
class Canvas:
    """A picture's size in inches. bare: without title and caption, which stand in the text around it."""

    width: float = 10.0
    height: float = 6.4
    bare: bool = False
    legend_rows: int = 1

    @property
    def narrow(self) -> bool:
        """Whether it is for a phone."""
        return self.width < 8

    def figure(self) -> Figure:
        """An empty figure of that size."""
        figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        return figure

    def area(self, figure: Figure, right: float, foot_lines: int = 0) -> MplAxes:
        """The axes: room at the left for the axis title, at the right as many inches as given, the legend above."""
        left, low = (0.72, 0.86) if self.narrow else (0.85, 0.736 + 0.18 * foot_lines)
        top = 0.08 + 0.24 * self.legend_rows if self.bare else 1.12
        return figure.add_axes((left / self.width, low / self.height, 1 - (left + right) / self.width,
                                1 - (low + top) / self.height))  # fmt: skip

    def legend(self, figure: Figure, handles: Sequence[Line2D]) -> None:
        """The legend above the axes, in as many rows as there is room for."""
        figure.legend(
            handles=handles, loc="upper left",
            bbox_to_anchor=(0.012, 1 if self.bare else 1 - 0.61 / self.height),
            ncols=-(-len(handles) // self.legend_rows), frameon=False, fontsize=8.5 if self.narrow else 9,
            handletextpad=0.4, columnspacing=1.0 if self.narrow else 1.4, labelcolor=style.INK,
        )  # fmt: skip


WIDE = Canvas()
REPORT = Canvas(10.0, 5.0, bare=True)
PHONE = Canvas(4.9, 5.4, bare=True, legend_rows=3)


def draw(pareto: Pareto, path: Path, canvas: Canvas = WIDE) -> None:
    """Write the picture to ``path`` (PNG, 160 pixels to the inch: 1600 x 1024 unless told otherwise)."""
    figure = canvas.figure()
    foot = [] if canvas.bare else [piece for line in style.footer(pareto) for piece in textwrap.wrap(line, 160)]
    ax = canvas.area(figure, 0.7 if pareto.rate else 0.2, len(foot))
    frame(figure, ax, canvas, style.title(pareto), pareto.sweep, pareto.headline, foot)
    if not pareto.points:
        ax.set_axis_off()
        ax.text(
            0.5,
            0.5,
            f"no trial has both a drop and {pareto.across.subject} yet",
            ha="center",
            color=style.MUTED,
            fontsize=12,
        )
    else:
        _plane(figure, ax, canvas, pareto)
    save(figure, path)


def frame(
    figure: Figure, ax: MplAxes, canvas: Canvas, title: str, sweep: str, headline: str, foot: Sequence[str]
) -> None:
    """Title, headline and caption around the axes, the same for every picture that is not bare."""
    if not canvas.bare:
        figure.text(0.02, 0.955, title, fontsize=15, fontweight="bold", color=style.INK)
        figure.text(0.98, 0.957, textwrap.shorten(sweep, 70), fontsize=10, color=style.MUTED, ha="right")
        figure.text(0.02, 0.915, headline, fontsize=10.5, color=style.INK)
        for i, line in enumerate(reversed(foot)):
            figure.text(0.02, 0.02 + 0.028 * i, line, fontsize=8, color=style.MUTED)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#b8bcc0")
    ax.tick_params(colors=style.MUTED, labelsize=9, length=3)
    ax.grid(True, color=style.GRID, linewidth=0.8)
    ax.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a figure without the library's version and date, so that equal data give equal bytes."""
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def set_axes(
    ax: MplAxes, canvas: Canvas, axes: Axes, y_ticks: Sequence[tuple[float, str]], x_title: str, y_title: str
) -> None:
    """Limits, ticks (y: place and label) and titles; data go in as places on the axis."""
    size = 8.5 if canvas.narrow else 10
    inches = ax.get_position()
    sides = (inches.width * canvas.width, inches.height * canvas.height)
    # A letter is some .55 of its size wide: a title that is longer than its axis would run into what lies beside it.
    x_title, y_title = (
        textwrap.fill(title, int(side * 72 / (0.55 * size)))
        for title, side in zip((x_title, y_title), sides, strict=True)
    )
    ax.set_xlim(*axes.x_range)
    ax.set_ylim(*axes.y_range)
    x_ticks = axes.x.ticks(axes.x_range[0], axes.right, 5 if canvas.narrow else 9)
    ax.set_xticks([axes.x.map(v) for v, _ in x_ticks], [label for _, label in x_ticks])
    ax.set_yticks([place for place, _ in y_ticks], [label for _, label in y_ticks])
    ax.set_xlabel(x_title, fontsize=size, color=style.INK, labelpad=6)
    ax.set_ylabel(y_title, fontsize=size, color=style.INK, labelpad=6)


def gate_line(ax: MplAxes, axes: Axes, limit: float, text: str, left: bool = False) -> None:
    """The gate: what lies beyond it is shaded; named above its right end, or (left) below its left end."""
    place_y = axes.y.map(limit)
    ax.axhspan(place_y, max(axes.y_range[1], place_y), color="#f6efe8", zorder=0, lw=0)
    ax.axhline(place_y, color=style.GATE, linewidth=1.2, linestyle=(0, (6, 3)), zorder=1.5)
    ax.annotate(
        text,
        (0 if left else 1, place_y),
        xycoords=("axes fraction", "data"),
        xytext=(6, -4) if left else (-4, 3),
        textcoords="offset points",
        ha="left" if left else "right",
        va="top" if left else "bottom",
        fontsize=8.5,
        color=style.GATE,
        path_effects=[HALO],
    )


def _plane(figure: Figure, ax: MplAxes, canvas: Canvas, pareto: Pareto) -> None:
    axes = style.axes(pareto)
    ticks, side = style.y_ticks(pareto, axes)
    set_axes(ax, canvas, axes, ticks, *style.axis_words(pareto))
    if side:
        _right_axis(ax, side)
    limit = pareto.gate.drop_pct if pareto.gate else None
    if limit is not None:
        gate_line(ax, axes, limit, style.gate_text(pareto))
    _others(ax, axes, pareto.others)
    for alpha, moment in zip((0.12, 0.2, 0.3), style.earlier(pareto), strict=False):
        corners = _places(axes, steps(moment.front, axes.top, axes.right))
        ax.plot(*corners, color=style.FRONT, linewidth=1.2, alpha=alpha, zorder=1.8)
    points = style.drawn(pareto)
    line = steps(vertices(pareto.front), axes.top, axes.right)
    above, below = split_at(line, limit)
    for part, dashes in ((above, (0, (1, 2))), (below, "-")):
        if part:
            ax.plot(*_places(axes, part), color=style.FRONT, linewidth=1.6, alpha=0.75, linestyle=dashes, zorder=2)
    for look, group in style.kinds(points):
        _marks(ax, axes, look, group)
    # One entry for all hollow marks: an entry for each does not fit above the axes.
    looks = dict.fromkeys(
        style.plain(point.kind) for look in style.MARKS for point in points if style.mark(point) == look
    )
    handles = [Line2D([], [], linestyle="none", label=look.word, **_mark_style(look)) for look in looks]
    if any(not style.mark(point).filled for point in points):
        hollow = Line2D([], [], linestyle="none", marker="o", markersize=7, color=style.MUTED)
        hollow.set(markerfacecolor="white", markeredgewidth=1.3, label="hollow: dominated")
        handles.append(hollow)
    if any(not other.is_limit for other in pareto.others):
        square = _mark_style(style.OTHER)
        handles.append(Line2D([], [], linestyle=OTHER_DASHES, linewidth=1.1, label=style.OTHER.word, **square))
    handles.append(Line2D([], [], color=style.FRONT, linewidth=1.6, alpha=0.75, label="front"))
    if style.earlier(pareto):
        handles.append(Line2D([], [], color=style.FRONT, linewidth=1.2, alpha=0.25, label="front earlier"))
    canvas.legend(figure, handles)
    missing = _labels(figure, ax, axes, pareto, line)
    if missing and not canvas.bare:
        ax.annotate(
            f"{missing} labels left out for room: pareto.csv has them",
            (1, 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=style.MUTED,
        )


def _right_axis(ax: MplAxes, ticks: Sequence[tuple[float, str]]) -> None:
    right = ax.secondary_yaxis("right")
    right.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    right.tick_params(colors=style.MUTED, labelsize=9, length=3)
    right.spines["right"].set_color("#b8bcc0")
    right.set_ylabel(style.SIDE_TITLE, fontsize=10, color=style.INK, labelpad=6)


def _others(ax: MplAxes, axes: Axes, others: Sequence[Other]) -> None:
    """Other decoders as lines across, with a marker where they were timed; below the limit nothing can lie."""
    for other in others:
        y = axes.y.map(other.drop.value)
        if other.is_limit:
            ax.axhspan(min(axes.y_range[0], y), y, color=style.BEYOND, zorder=0, lw=0)
        colour, dashes = (style.INK, "-") if other.is_limit else (style.OTHER.colour, OTHER_DASHES)
        ax.axhline(y, color=colour, linestyle=dashes, linewidth=1.1, zorder=1.4)
        if other.x is not None:
            ax.plot([axes.x.map(other.x)], [y], linestyle="none", zorder=4, clip_on=False, **_mark_style(style.OTHER))


def _places(axes: Axes, line: Sequence[Vertex]) -> tuple[list[float], list[float]]:
    return [axes.x.map(x) for x, _ in line], [axes.y.map(y) for _, y in line]


def _marks(ax: MplAxes, axes: Axes, look: Mark, group: Sequence[Point]) -> None:
    """The markers of one look over their error bars."""
    xs, ys = _places(axes, [(p.x.value, p.drop.value) for p in group])
    x_bars = [
        [x - axes.x.map(p.x.lo) for x, p in zip(xs, group, strict=True)],
        [axes.x.map(p.x.hi) - x for x, p in zip(xs, group, strict=True)],
    ]
    y_bars = [
        [y - axes.y.map(p.drop.lo) for y, p in zip(ys, group, strict=True)],
        [axes.y.map(p.drop.hi) - y for y, p in zip(ys, group, strict=True)],
    ]
    faint = 0.55 if len(group) < 12 else 0.3
    ax.errorbar(
        xs,
        ys,
        xerr=x_bars,
        yerr=y_bars,
        fmt="none",
        ecolor=look.colour,
        elinewidth=1,
        alpha=faint * look.alpha,
        zorder=3,
    )
    top = 6 if look is style.TEACHER else 5 if look.filled and look is not style.STOPPED else 4
    ax.plot(xs, ys, linestyle="none", zorder=top, clip_on=False, **_mark_style(look))


def _mark_style(look: Mark) -> dict[str, Any]:
    cross = look.mpl == "x"
    edge = style.INK if look is style.TEACHER else "white" if look.filled and not cross else look.colour
    return {
        "marker": look.mpl,
        "markersize": look.size,
        "color": look.colour,
        "alpha": look.alpha,
        "markerfacecolor": look.colour if look.filled else "white",
        "markeredgecolor": edge,
        "markeredgewidth": 1.6 if cross else 0.8 if look.filled else 1.3,
    }


def _labels(figure: Figure, ax: MplAxes, axes: Axes, pareto: Pareto, line: Sequence[Vertex]) -> int:
    """Name the points where there is room; returns how many had none."""
    wanted = style.labelled(pareto, axes)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [
        ax.text(
            0,
            0,
            label.text,
            fontsize=FONT if label.front else FONT - 1.3,
            color=style.MUTED if label.look is style.STOPPED else style.INK,
            fontweight="bold" if label.front and label.look is not style.FAIL else "normal",
            zorder=7,
            path_effects=[HALO],
        )
        for label in wanted
    ]
    sizes = [(box.width + 4, box.height) for box in (t.get_window_extent(renderer) for t in texts)]

    def pixel(x: float, y: float) -> tuple[float, float]:
        px, py = ax.transData.transform((axes.x.map(x), axes.y.map(y)))
        return float(px), float(py)

    unit = DPI / 72
    anchors, hard, soft = [], [], []
    for label in wanted:
        x, y = pixel(label.x, label.drop)
        half = label.look.size / 2 * unit
        anchors.append((x, y))
        hard.append(Box(x - half, y - half, x + half, y + half))
    for point in style.drawn(pareto):
        x, y = pixel(point.x.value, point.drop.value)
        (left, low), (right, high) = pixel(point.x.lo, point.drop.lo), pixel(point.x.hi, point.drop.hi)
        soft += [Box(left, y - unit, right, y + unit), Box(x - unit, low, x + unit, high)]
    corners = [pixel(x, y) for x, y in line]
    for (ax0, ay0), (ax1, ay1) in zip(corners, corners[1:], strict=False):
        soft.append(Box(min(ax0, ax1) - unit, min(ay0, ay1) - unit, max(ax0, ax1) + unit, max(ay0, ay1) + unit))
    area = ax.get_window_extent(renderer)
    bounds = Box(area.x0, area.y0, area.x1, area.y1)
    for other in pareto.others:
        _, y = pixel(0, other.drop.value)
        soft.append(Box(area.x0, y - unit, area.x1, y + unit))
    if pareto.gate and pareto.gate.drop_pct is not None:
        _, gate = pixel(0, pareto.gate.drop_pct)
        soft.append(Box(area.x0, gate - unit, area.x1, gate + unit))
        name = 6 * len(style.gate_text(pareto))
        hard.append(Box(area.x1 - name * unit, gate, area.x1, gate + 16 * unit))  # the gate's own name
    missing = 0
    for drawn, anchor, box in zip(texts, anchors, place(anchors, sizes, hard, soft, bounds, unit), strict=True):
        if box is None:
            drawn.remove()
            missing += 1
            continue
        inverse = ax.transData.inverted()
        x, y = inverse.transform((box.left + 2, (box.bottom + box.top) / 2))
        drawn.set_position((float(x), float(y)))
        drawn.set_verticalalignment("center")
        _leader(ax, anchor, box, unit)
    return missing


def _leader(ax: MplAxes, anchor: tuple[float, float], box: Box, unit: float) -> None:
    """A hair line to a label that had to move away from its point."""
    x = min(max(anchor[0], box.left), box.right)
    y = min(max(anchor[1], box.bottom), box.top)
    if abs(x - anchor[0]) + abs(y - anchor[1]) > 14 * unit:
        ends = ax.transData.inverted().transform([anchor, (x, y)])
        ax.plot(ends[:, 0], ends[:, 1], color="#9aa0a6", linewidth=0.6, zorder=2.5)
