"""Effects with their intervals as PNG: a row per contrast, its 95 % bar around 0, a dot per seed."""

import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes as MplAxes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style
from analysis.effects import Effect, caution
from analysis.picture import WIDE, Canvas, frame, save
from analysis.style import Mark

BETTER = Mark("less error", style.PASS.colour, "o", "circle", 8.5, True)
WORSE = Mark("more error", style.FAIL.colour, "v", "triangle-down", 8.5, True)
OPEN = Mark("not resolved", style.MUTED, "o", "circle-open", 7.5, False)
MARKS = (BETTER, WORSE, OPEN)
HEADS = {"arm": "an arm against another", "main": "main effects", "interaction": "interactions (0: effects add up)"}
BARS = "Bars: 95 % intervals over seeds and test samples; small dots: each seed alone."


def look(found: Effect) -> Mark:
    """How an effect is drawn: by its sign, but only where its interval excludes 0."""
    if not found.resolved:
        return OPEN
    return WORSE if found.value > 0 else BETTER


def name(found: Effect) -> str:
    """An effect as its row says it."""
    return f"{found.arm} against {found.reference}" if found.kind == "arm" else found.arm


def headline(found: Sequence[Effect]) -> str:
    """What is resolved, in one line."""
    if not found:
        return "nothing can be compared: no two arms share two seeds"
    sure = sum(one.resolved for one in found)
    seeds = " to ".join(dict.fromkeys(str(n) for n in sorted({len(one.by_seed) for one in found})))
    return f"{sure} of {len(found)} effects are resolved, with {seeds} seeds and {found[0].samples} test samples"


def draw(found: Sequence[Effect], title: str, sweep: str, metric: str, path: Path, canvas: Canvas = WIDE) -> None:
    """Write the picture to ``path`` (PNG, 160 pixels to the inch: 1600 x 1024 unless told otherwise)."""
    figure = canvas.figure()
    foot = textwrap.wrap(f"{BARS} {caution(len(found))}", 160) if found and not canvas.bare else []
    low, top = 0.736 + 0.18 * len(foot), 0.4 if canvas.bare else 1.056
    ax = figure.add_axes((0.27, low / canvas.height, 0.52, 1 - (low + top) / canvas.height))
    frame(figure, ax, canvas, title, sweep, headline(found), foot)
    if found:
        _rows(figure, ax, canvas, found, metric)
    else:
        ax.set_axis_off()
    save(figure, path)


def _rows(figure: Figure, ax: MplAxes, canvas: Canvas, found: Sequence[Effect], metric: str) -> None:
    """Rows from top to bottom, a gap with a heading before each kind."""
    places: list[float] = []
    y = 0.0
    for kind, group in groupby(found, key=lambda one: one.kind):
        ax.annotate(
            HEADS[kind], (0, y), xycoords=("axes fraction", "data"), xytext=(-8, 0), textcoords="offset points",
            ha="right", va="center", fontsize=8.5, color=style.MUTED, style="italic", annotation_clip=False,
        )  # fmt: skip
        for _ in group:
            y += 1.0
            places.append(y)
        y += 1.2
    ax.axvline(0, color=style.INK, linewidth=1.0, zorder=1.5)
    for one, at in zip(found, places, strict=True):
        _row(ax, one, at)
    ax.set_ylim(y - 0.5, -0.6)
    ax.set_yticks(places, [name(one) for one in found], fontsize=9.5, color=style.INK)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.margins(x=0.06)
    what = f"change of {metric}, in shares of the error of the reference (%)"
    ax.set_xlabel(f"◀ better      {what}", fontsize=10, color=style.INK, labelpad=6)
    drawn = [mark for mark in MARKS if any(look(one) == mark for one in found)]
    handles = [Line2D([], [], linestyle="none", label=mark.word, **_style(mark)) for mark in drawn]
    canvas.legend(figure, handles)


def _row(ax: MplAxes, one: Effect, y: float) -> None:
    mark = look(one)
    ax.plot([100 * one.lo, 100 * one.hi], [y, y], color=mark.colour, linewidth=1.6, alpha=0.75, zorder=3)
    seeds = [100 * value for value in one.by_seed]
    ax.plot(seeds, [y + 0.27] * len(seeds), linestyle="none", marker="o", markersize=3, color=mark.colour, alpha=0.7,
            markeredgewidth=0, zorder=4)  # fmt: skip
    ax.plot([100 * one.value], [y], linestyle="none", zorder=5, **_style(mark))
    digits = 1 if max(abs(one.lo), abs(one.hi)) >= 0.01 else 2
    value, lo, hi = (f"{100 * number:+.{digits}f}" for number in (one.value, one.lo, one.hi))
    ax.annotate(
        f"{value} [{lo}, {hi}]", (1, y),
        xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9,
        color=style.INK if one.resolved else style.MUTED, annotation_clip=False,
    )  # fmt: skip


def _style(mark: Mark) -> dict[str, Any]:
    return {
        "marker": mark.mpl,
        "markersize": mark.size,
        "color": mark.colour,
        "markerfacecolor": mark.colour if mark.filled else "white",
        "markeredgecolor": "white" if mark.filled else mark.colour,
        "markeredgewidth": 0.8 if mark.filled else 1.3,
    }
