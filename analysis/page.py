"""The Pareto picture as one self-contained HTML page, drawn by plotly from a computed ``Pareto``.

plotly.js is part of the page and nothing is fetched (the page's own policy forbids it): it works offline, as
a mail attachment, and in MLflow's artifact viewer (an iframe with sandbox="allow-scripts").
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from analysis import style
from analysis.frames import RUN_COLUMNS
from analysis.front import Vertex, split_at, steps, vertices
from analysis.labels import Box, place
from analysis.pareto import Pareto
from analysis.points import Other, Point
from analysis.style import Axes, Mark
from analysis.template import BAR, PAGE
from trainables.record import UNITS

HEIGHT_PX = 560
# Named buttons only: plotly's default set has one that uploads the data to its makers' cloud.
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}
# The plot area that labels are laid out for; in a wider window they only get more room.
_AREA = Box(0, 0, 760, 430)
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_GLANCE = ("sweep", "T", "beta", "gamma", "rho", "epochs", "params_M", "size_MB", "t_pair_p95_ms", "verdict_detail")


def render(pareto: Pareto) -> str:
    """The whole page as text."""
    figure = go.Figure()
    axes = style.axes(pareto) if pareto.points else None
    records: list[dict[str, Any]] = []
    drawn: list[Point] = []
    traces: list[int] = []
    if axes:
        _lines(figure, axes, pareto)
        for look, group in style.kinds(style.drawn(pareto)):
            traces.append(len(figure.data))
            figure.add_trace(_trace(axes, look, group, len(records), pareto))
            records += [_shown(point.record) for point in group]
            drawn += group
        for other in pareto.others:
            if other.is_limit:
                bottom, y = axes.y_range[0], axes.y.map(other.drop.value)
                figure.add_hrect(min(bottom, y), y, fillcolor=style.BEYOND, line_width=0, layer="below")
            figure.add_trace(_other(axes, other, len(records), pareto))
            records.append(_shown(other.record))
        _layout(figure, axes, pareto)
    # Until someone points at one, the panel shows the trial that most will look for: the fastest that passes.
    fastest = sorted(range(len(drawn)), key=lambda i: (drawn[i].kind != "pass", drawn[i].x.value))
    first = fastest[0] if fastest else 0
    plot = (
        figure.to_html(
            full_html=False,
            include_plotlyjs=True,
            include_mathjax=False,
            div_id="pareto",
            default_height=f"{HEIGHT_PX}px",
            config=_CONFIG,
        )
        if axes
        else f"<p>No trial has both a drop and {pareto.across.subject} yet.</p>"
    )
    return PAGE.format(
        font=_FONT,
        title=html.escape(f"{style.title(pareto)}: {pareto.sweep}"),
        heading=html.escape(style.title(pareto)),
        sweep=html.escape(pareto.sweep),
        headline=html.escape(pareto.headline),
        plot=plot,
        footer="".join(f"<p>{html.escape(line)}</p>" for line in style.footer(pareto)),
        records=_script_json(records),
        units=_script_json(dict(UNITS)),
        first=first,
        traces=_script_json(traces),
        moments=_script_json(_moments(pareto, axes) if axes else []),
        bar=BAR if axes else "",
    )


def _lines(figure: go.Figure, axes: Axes, pareto: Pareto) -> None:
    limit = pareto.gate.drop_pct if pareto.gate else None
    if pareto.gate and limit is not None:
        y = axes.y.map(limit)
        figure.add_hrect(y, max(axes.y_range[1], y), fillcolor="#f6efe8", line_width=0, layer="below")
        figure.add_hline(
            y,
            line={"color": style.GATE, "width": 1.5, "dash": "dash"},
            annotation={
                "text": html.escape(style.gate_text(pareto)),
                "font": {"color": style.GATE, "size": 12},
            },
            annotation_position="top right",
        )
    above, below = split_at(steps(vertices(pareto.front), axes.top, axes.right), limit)
    for part, dash, shown in ((above, "dot", not below), (below, "solid", True)):
        if part:
            figure.add_trace(
                go.Scatter(
                    x=[axes.x.map(x) for x, _ in part],
                    y=[axes.y.map(y) for _, y in part],
                    mode="lines",
                    line={"color": style.FRONT, "width": 2, "dash": dash},
                    opacity=0.75,
                    name="front",
                    uid="front-below" if dash == "solid" else "front-above",
                    legendgroup="front",
                    showlegend=shown,
                    legendrank=2000,
                    hoverinfo="skip",
                )
            )


def _moments(pareto: Pareto, axes: Axes) -> list[dict[str, Any]]:
    """The front over time for the slider: its line in places on the axes, and what it was worth."""
    found = []
    for moment in pareto.history:
        line = steps(moment.front, axes.top, axes.right)
        found.append(
            {
                "x": [axes.x.map(x) for x, _ in line],
                "y": [axes.y.map(y) for _, y in line],
                "when": moment.when,
                "text": f"after {moment.trials} measured ({moment.exp_id}): hypervolume {moment.hypervolume:.4g}",
            }
        )
    return found


def _trace(axes: Axes, look: Mark, group: Sequence[Point], first: int, pareto: Pareto) -> go.Scatter:
    xs = [axes.x.map(p.x.value) for p in group]
    ys = [axes.y.map(p.drop.value) for p in group]

    def bars(high: list[float], low: list[float]) -> dict[str, Any]:
        return {
            "type": "data",
            "symmetric": False,
            "array": high,
            "arrayminus": low,
            "width": 0,
            "thickness": 1.3,
            "color": style.faded(look.colour, len(group)),
        }

    thin = "thin" in look.plotly or "open" in look.plotly
    outline = style.INK if look is style.TEACHER else look.colour if thin else "white"
    return go.Scatter(
        x=xs,
        y=ys,
        mode="markers",
        name=look.word,
        opacity=look.alpha,
        marker={
            "symbol": look.plotly,
            "size": 1.35 * look.size,
            "color": look.colour,
            "line": {"width": 2 if thin else 1, "color": outline},
        },
        error_x=bars(
            [axes.x.map(p.x.hi) - x for p, x in zip(group, xs, strict=True)],
            [x - axes.x.map(p.x.lo) for p, x in zip(group, xs, strict=True)],
        ),
        error_y=bars(
            [axes.y.map(p.drop.hi) - y for p, y in zip(group, ys, strict=True)],
            [y - axes.y.map(p.drop.lo) for p, y in zip(group, ys, strict=True)],
        ),
        customdata=list(range(first, first + len(group))),
        text=[_hover(point, pareto) for point in group],
        hovertemplate="%{text}<extra></extra>",
    )


def _other(axes: Axes, other: Other, index: int, pareto: Pareto) -> go.Scatter:
    """Another decoder: a line across, with a marker where it was timed; the line answers a pointer along its length."""
    y, (left, right) = axes.y.map(other.drop.value), axes.x_range
    xs = [left + (right - left) * step / 40 for step in range(41)]
    marked = 0 if other.x is None else 1 + sum(x < axes.x.map(other.x) for x in xs)
    if other.x is not None:
        xs.insert(marked - 1, axes.x.map(other.x))
    interval = f"  [{other.drop.lo:+.2f}, {other.drop.hi:+.2f}]" if other.drop.hi > other.drop.lo else ""
    rate = other.record["quality"]
    lines = [
        f"<b>{html.escape(other.name)}</b>",
        f"{pareto.words.rate} {rate:.4g}" if rate else "",
        f"drop {other.drop.value:+.2f} %{interval}",
        f"p50 {other.x:.3g} {pareto.words.time} per {pareto.words.sample}, from Python" if other.x is not None else "",
    ]
    return go.Scatter(
        x=xs,
        y=[y] * len(xs),
        mode="lines+markers",
        name=other.name,
        line={
            "width": 1.5,
            "color": style.INK if other.is_limit else style.OTHER.colour,
            "dash": "solid" if other.is_limit else "dashdot",
        },
        marker={
            "symbol": style.OTHER.plotly,
            "color": style.OTHER.colour,
            "size": [1.35 * style.OTHER.size if i == marked - 1 else 0 for i in range(len(xs))],
            "opacity": [1.0 if i == marked - 1 else 0.0 for i in range(len(xs))],
        },
        customdata=[index] * len(xs),
        text="<br>".join(line for line in lines if line),
        hovertemplate="%{text}<extra></extra>",
    )


def _hover(point: Point, pareto: Pareto) -> str:
    """A glance at the record; the panel beside the picture shows all of it."""
    drop, x, ratio, words = point.drop, point.x, point.ratio, pareto.words
    lines = [f"<b>{html.escape(point.exp_id)}</b>"]
    interval = f"  [{drop.lo:+.2f}, {drop.hi:+.2f}]" if drop.hi > drop.lo else ""
    lines.append(f"drop {drop.value:+.2f} %{interval}")
    if words.rate and point.record.get("quality") is not None:
        lines.insert(1, f"{words.rate} {point.record['quality']:.4g}")
    interval = f"  [{x.lo:.4g}, {x.hi:.4g}]" if x.hi > x.lo else ""
    lines.append(f"{pareto.across.name} {x.value:.4g} {pareto.across.unit}{interval}")
    if ratio and point.kind != "teacher":
        interval = f"  [{ratio.lo:.2f}, {ratio.hi:.2f}]" if ratio.hi > ratio.lo else ""
        lines.append(f"{ratio.value:.2f} x the teacher's speed, same runtime{interval}")
    if pareto.shares and point.share is not None:
        knee = " · the knee" if point is pareto.knee else ""
        lines.append(f"on the front in {100 * point.share:.0f} % of draws{knee}")
    if point.stop_reason:
        lines.append(f"stopped: {html.escape(point.stop_reason)}")
    for key in _GLANCE:
        value = point.record.get(key)
        if value is not None:
            lines.append(f"{key} {html.escape(_text(value))}")
    return "<br>".join(lines)


def _layout(figure: go.Figure, axes: Axes, pareto: Pareto) -> None:
    x_title, y_title = style.axis_words(pareto)
    x_ticks = axes.x.ticks(axes.x_range[0], axes.right)
    y_ticks, side = style.y_ticks(pareto, axes)
    common = {
        "gridcolor": style.GRID,
        "linecolor": "#b8bcc0",
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "#b8bcc0",
        "tickfont": {"color": style.MUTED},
    }
    figure.update_layout(
        template="none",
        font={"family": _FONT, "size": 13, "color": style.INK},
        margin={"l": 70, "r": 36, "t": 40, "b": 60},
        height=HEIGHT_PX,
        hovermode="closest",
        modebar={"orientation": "v"},
        hoverlabel={
            "bgcolor": "white",
            "bordercolor": "#c4c8cc",
            "align": "left",
            "font": {"color": style.INK},
        },
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"},
        xaxis={**common, "title": {"text": x_title}, "range": axes.x_range},
        yaxis={
            **common,
            "title": {"text": y_title},
            "range": axes.y_range,
            "tickvals": [place for place, _ in y_ticks],
            "ticktext": [label for _, label in y_ticks],
        },
    )
    if side:
        # A second axis is drawn only for a trace of its own: one that shows nothing.
        figure.add_trace(go.Scatter(x=[None], y=[None], yaxis="y2", showlegend=False, hoverinfo="skip"))
        right = {**common, "title": {"text": style.SIDE_TITLE}, "range": axes.y_range, "showgrid": False}
        figure.update_layout(
            yaxis2={
                **right,
                "overlaying": "y",
                "matches": "y",
                "side": "right",
                "tickvals": [place for place, _ in side],
                "ticktext": [label for _, label in side],
            },
            margin={"l": 88, "r": 76},
        )
    if axes.x.linear_to is not None:
        figure.update_xaxes(tickvals=[axes.x.map(v) for v, _ in x_ticks], ticktext=[label for _, label in x_ticks])
    for annotation in _labels(axes, pareto):
        figure.add_annotation(annotation)


def _labels(axes: Axes, pareto: Pareto) -> list[dict[str, Any]]:
    """Names of the points beside them, as far as there is room; hovering names the rest."""
    # Hovering names a point, so in a crowd only those that matter most carry their name.
    crowd = len(pareto.points) > 16
    wanted = [label for label in style.labelled(pareto, axes) if not crowd or label.front or label.look is style.OTHER]

    def pixel(x: float, y: float) -> Vertex:
        (x0, x1), (y0, y1) = axes.x_range, axes.y_range
        return (axes.x.map(x) - x0) / (x1 - x0) * _AREA.right, (axes.y.map(y) - y0) / (y1 - y0) * _AREA.top

    anchors, sizes, hard, soft = [], [], [], []
    for point in style.drawn(pareto):
        x, y = pixel(point.x.value, point.drop.value)
        half = style.mark(point).size * 0.7
        hard.append(Box(x - half, y - half, x + half, y + half))
        (left, low), (right, high) = pixel(point.x.lo, point.drop.lo), pixel(point.x.hi, point.drop.hi)
        soft += [Box(left, y - 1, right, y + 1), Box(x - 1, low, x + 1, high)]
    for label in wanted:
        anchors.append(pixel(label.x, label.drop))
        sizes.append((7.0 * len(label.text) + 8, 16.0))
    for other in pareto.others:
        y = pixel(0, other.drop.value)[1]
        soft.append(Box(0, y - 1, _AREA.right, y + 1))
    corners = [pixel(*corner) for corner in steps(vertices(pareto.front), axes.top, axes.right)]
    for (ax, ay), (bx, by) in zip(corners, corners[1:], strict=False):
        soft.append(Box(min(ax, bx) - 1, min(ay, by) - 1, max(ax, bx) + 1, max(ay, by) + 1))
    if pareto.gate and pareto.gate.drop_pct is not None:
        gate = pixel(0, pareto.gate.drop_pct)[1]
        soft.append(Box(0, gate - 1, _AREA.right, gate + 1))
        hard.append(Box(_AREA.right - 8 * len(style.gate_text(pareto)), gate, _AREA.right, gate + 22))
    found = []
    for label, anchor, box in zip(wanted, anchors, place(anchors, sizes, hard, soft, _AREA), strict=True):
        if box is None:
            continue
        dx, dy = (box.left + box.right) / 2 - anchor[0], anchor[1] - (box.bottom + box.top) / 2
        far = math.hypot(max(abs(dx) - (box.right - box.left) / 2, 0), max(abs(dy) - 8, 0)) > 14
        found.append(
            {
                "x": axes.x.map(label.x),
                "y": axes.y.map(label.drop),
                "ax": dx,
                "ay": dy,
                "text": html.escape(label.text),
                "showarrow": True,
                "arrowhead": 0,
                "arrowwidth": 0.8,
                "arrowcolor": "#9aa0a6" if far else "rgba(0,0,0,0)",
                "standoff": 6,
                "borderpad": 0,
                "font": {"size": 12, "color": style.MUTED if label.look is style.STOPPED else style.INK},
            }
        )
    return found


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record for the panel; NaN, which JSON lacks, becomes text."""
    body = {key: value for key, value in record.items() if key not in RUN_COLUMNS}
    body |= {key: record[key] for key in ("sweep", "role", "status", "run_id") if key in record}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in body.items()}


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _script_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
