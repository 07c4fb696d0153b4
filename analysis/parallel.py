"""A search's trials as parallel coordinates: a line per trial through its parameters, its drop and its latency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from analysis import style
from analysis.importance import Importance
from analysis.picture import Canvas, frame, save

COLOURS = "cividis"  # reads the same for all kinds of colour vision, and in grey


def draw(
    rows: Sequence[Mapping[str, Any]],
    importances: Sequence[Importance],
    title: str,
    sweep: str,
    path: Path,
    canvas: Canvas,
) -> None:
    """Write the picture to ``path``. rows: parameters, then objectives, of every trial; the first objective, whose name
    begins with "drop", colours the lines: dark is better.
    """
    names = [name for name in rows[0] if all(row[name] is not None for row in rows)]
    drop = next(name for name in names if name.startswith("drop"))
    order = np.argsort([-row[drop] for row in rows])  # the best on top
    figure = canvas.figure()
    low, top = 0.75, 0.3 if canvas.bare else 1.0
    ax = figure.add_axes((0.05, low / canvas.height, 0.9, 1 - (low + top) / canvas.height))
    frame(figure, ax, canvas, title, sweep, f"{len(rows)} trials, a line each; dark: a low drop", [])
    ax.grid(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    columns = {name: _places([row[name] for row in rows]) for name in names}
    heights = np.array([columns[name][0] for name in names])
    ranks = np.empty(len(rows))
    ranks[order] = np.linspace(1, 0, len(rows))
    colours = matplotlib.colormaps[COLOURS](0.9 * ranks)
    for i in order:
        ax.plot(range(len(names)), heights[:, i], color=colours[i], linewidth=1.1, alpha=0.8, zorder=2)
    for at, name in enumerate(names):
        ax.axvline(at, color="#b8bcc0", linewidth=1, zorder=1)
        for place, label in columns[name][1]:
            ax.annotate(
                label, (at, place), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center",
                color=style.INK, zorder=4, bbox={"boxstyle": "square,pad=0.1", "fc": "#ffffffc0", "ec": "none"},
            )  # fmt: skip
    weights = {one.parameter: one for one in importances if one.objective == drop}
    ax.set_xticks(range(len(names)), [_name(name, weights.get(name)) for name in names], fontsize=9, color=style.INK)
    ax.set_yticks([])
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.1, len(names) - 0.75)
    ax.set_ylim(-0.04, 1.04)
    save(figure, path)


def _places(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Places from 0 to 1 on an axis, and its labels: numbers between their ends (by logarithm over decades)."""
    if all(isinstance(value, int | float) for value in values):
        numbers = np.array(values, dtype=float)
        ends = numbers.min(), numbers.max()
        decades = ends[0] > 0 and ends[1] > 20 * ends[0]
        scaled = np.log(numbers) if decades else numbers
        low, high = scaled.min(), scaled.max()
        span = high - low or 1.0
        middle = float(np.exp((low + high) / 2) if decades else (low + high) / 2)
        return list((scaled - low) / span), [(0.0, f"{ends[0]:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{ends[1]:.3g}")]
    kinds = sorted({str(value) for value in values})
    step = 1 / max(len(kinds) - 1, 1)
    return [kinds.index(str(value)) * step for value in values], [(i * step, kind[:18]) for i, kind in enumerate(kinds)]


def _name(name: str, weight: Importance | None) -> str:
    """The axis' name; below it the importance for the drop, in brackets where chance explains as much."""
    if weight is None:
        return name
    return f"{name}\n{weight.value:.2f}" if weight.shown else f"{name}\n({weight.value:.2f})"
