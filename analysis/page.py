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
from analysis.labels import Box, place
from analysis.pareto import Pareto, Point, Vertex, split_at, steps
from analysis.scale import unmap
from analysis.store import RUN_COLUMNS
from analysis.style import Axes, Mark
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
_GLANCE = ("T", "beta", "gamma", "rho", "epochs", "params_M", "size_MB", "t_pair_p95_ms", "verdict_detail")


def render(pareto: Pareto) -> str:
    """The whole page as text."""
    figure = go.Figure()
    axes = style.axes(pareto) if pareto.points else None
    records: list[dict[str, Any]] = []
    drawn: list[Point] = []
    if axes:
        _lines(figure, axes, pareto)
        for look, group in style.kinds(pareto.points):
            figure.add_trace(_trace(axes, look, group, len(records)))
            records += [_shown(point.record) for point in group]
            drawn += group
        _layout(figure, axes, pareto)
    # Until someone points at one, the panel shows the trial that most will look for: the fastest that passes.
    fastest = sorted(range(len(drawn)), key=lambda i: (drawn[i].kind != "pass", drawn[i].p50.value))
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
        else "<p>No trial has both a drop and a latency yet.</p>"
    )
    return _PAGE.format(
        font=_FONT,
        title=html.escape(f"Quality against latency: {pareto.sweep}"),
        sweep=html.escape(pareto.sweep),
        headline=html.escape(pareto.headline),
        plot=plot,
        footer="".join(f"<p>{html.escape(line)}</p>" for line in style.footer(pareto)),
        records=_script_json(records),
        units=_script_json(dict(UNITS)),
        first=first,
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
                "text": f"gate: {html.escape(pareto.gate.text)}",
                "font": {"color": style.GATE, "size": 12},
            },
            annotation_position="top right",
        )
    above, below = split_at(steps(pareto.front, axes.top, axes.right), limit)
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
                    legendgroup="front",
                    showlegend=shown,
                    legendrank=2000,
                    hoverinfo="skip",
                )
            )


def _trace(axes: Axes, look: Mark, group: Sequence[Point], first: int) -> go.Scatter:
    xs = [axes.x.map(p.p50.value) for p in group]
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
            [axes.x.map(p.p50.hi) - x for p, x in zip(group, xs, strict=True)],
            [x - axes.x.map(p.p50.lo) for p, x in zip(group, xs, strict=True)],
        ),
        error_y=bars(
            [axes.y.map(p.drop.hi) - y for p, y in zip(group, ys, strict=True)],
            [y - axes.y.map(p.drop.lo) for p, y in zip(group, ys, strict=True)],
        ),
        customdata=list(range(first, first + len(group))),
        text=[_hover(point) for point in group],
        hovertemplate="%{text}<extra></extra>",
    )


def _hover(point: Point) -> str:
    """A glance at the record; the panel beside the picture shows all of it."""
    drop, p50 = point.drop, point.p50
    lines = [f"<b>{html.escape(point.exp_id)}</b>"]
    interval = f"  [{drop.lo:+.2f}, {drop.hi:+.2f}]" if drop.hi > drop.lo else ""
    lines.append(f"drop {drop.value:+.2f} %{interval}")
    interval = f"  [{p50.lo:.2f}, {p50.hi:.2f}]" if p50.hi > p50.lo else ""
    lines.append(f"p50 {p50.value:.2f} ms{interval}")
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
    y_ticks = axes.y.ticks(unmap(axes.y, axes.y_range[0]), axes.top)
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
            "tickvals": [axes.y.map(v) for v, _ in y_ticks],
            "ticktext": [label for _, label in y_ticks],
        },
    )
    if axes.x.linear_to is not None:
        figure.update_xaxes(tickvals=[axes.x.map(v) for v, _ in x_ticks], ticktext=[label for _, label in x_ticks])
    for annotation in _labels(axes, pareto):
        figure.add_annotation(annotation)


def _labels(axes: Axes, pareto: Pareto) -> list[dict[str, Any]]:
    """Names of the points beside them, as far as there is room; hovering names the rest."""
    # Hovering names a point, so in a crowd only those that matter most carry their name.
    crowd = len(pareto.points) > 16
    wanted = [(p, text) for p, text in style.labelled(pareto) if not crowd or p.on_front]

    def pixel(x: float, y: float) -> Vertex:
        (x0, x1), (y0, y1) = axes.x_range, axes.y_range
        return (axes.x.map(x) - x0) / (x1 - x0) * _AREA.right, (axes.y.map(y) - y0) / (y1 - y0) * _AREA.top

    anchors, sizes, hard, soft = [], [], [], []
    for point in pareto.points:
        x, y = pixel(point.p50.value, point.drop.value)
        half = style.mark(point).size * 0.7
        hard.append(Box(x - half, y - half, x + half, y + half))
        soft.append(Box(x - 1, pixel(0, point.drop.lo)[1], x + 1, pixel(0, point.drop.hi)[1]))
    for point, text in wanted:
        anchors.append(pixel(point.p50.value, point.drop.value))
        sizes.append((7.0 * len(text) + 8, 16.0))
    corners = [pixel(*corner) for corner in steps(pareto.front, axes.top, axes.right)]
    for (ax, ay), (bx, by) in zip(corners, corners[1:], strict=False):
        soft.append(Box(min(ax, bx) - 1, min(ay, by) - 1, max(ax, bx) + 1, max(ay, by) + 1))
    if pareto.gate and pareto.gate.drop_pct is not None:
        gate = pixel(0, pareto.gate.drop_pct)[1]
        soft.append(Box(0, gate - 1, _AREA.right, gate + 1))
        hard.append(Box(_AREA.right - 150, gate, _AREA.right, gate + 22))
    found = []
    for (point, text), anchor, box in zip(wanted, anchors, place(anchors, sizes, hard, soft, _AREA), strict=True):
        if box is None:
            continue
        dx, dy = (box.left + box.right) / 2 - anchor[0], anchor[1] - (box.bottom + box.top) / 2
        far = math.hypot(max(abs(dx) - (box.right - box.left) / 2, 0), max(abs(dy) - 8, 0)) > 14
        found.append(
            {
                "x": axes.x.map(point.p50.value),
                "y": axes.y.map(point.drop.value),
                "ax": dx,
                "ay": dy,
                "text": html.escape(text),
                "showarrow": True,
                "arrowhead": 0,
                "arrowwidth": 0.8,
                "arrowcolor": "#9aa0a6" if far else "rgba(0,0,0,0)",
                "standoff": 6,
                "borderpad": 0,
                "font": {"size": 12, "color": style.MUTED if point.kind == "stopped" else style.INK},
            }
        )
    return found


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record for the panel; NaN, which JSON lacks, becomes text."""
    body = {key: value for key, value in record.items() if key not in RUN_COLUMNS}
    body |= {key: record[key] for key in ("role", "status", "run_id") if key in record}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in body.items()}


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _script_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
  style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 1400px; padding: 20px 24px; background: #fff; color: #1a1a1a;
  font: 14px/1.45 {font}; }}
header {{ display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 16px; }}
h1 {{ font-size: 21px; margin: 0; }}
header span {{ color: #5f6368; margin-left: auto; }}
.headline {{ margin: 4px 0 10px; font-size: 15px; }}
main {{ display: grid; grid-template-columns: minmax(0, 1fr) 300px; gap: 16px; align-items: start; }}
aside {{ border: 1px solid #e0e3e6; border-radius: 8px; padding: 10px 12px; max-height: 560px; overflow: auto;
  box-sizing: border-box; }}
aside h2 {{ font-size: 14px; margin: 0 0 6px; overflow-wrap: anywhere; }}
aside p {{ color: #5f6368; margin: 0 0 6px; font-size: 12.5px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 12.5px; }}
td {{ padding: 2px 0; vertical-align: top; border-top: 1px solid #f0f1f3; overflow-wrap: anywhere; }}
td:first-child {{ color: #5f6368; padding-right: 10px; overflow-wrap: normal; }}
td:last-child {{ text-align: right; font-variant-numeric: tabular-nums; }}
tr.none td {{ color: #b4b8bc; }}
footer {{ color: #5f6368; font-size: 12.5px; margin-top: 8px; }}
footer p {{ margin: 2px 0; }}
@media (max-width: 900px) {{
  main {{ grid-template-columns: minmax(0, 1fr); }}
  aside {{ max-height: none; }}
}}
@media print {{ aside {{ display: none; }} main {{ display: block; }} }}
</style>
</head>
<body>
<header><h1>Quality against latency</h1><span>{sweep}</span></header>
<p class="headline">{headline}</p>
<main><div>{plot}</div>
<aside aria-live="polite"><h2 id="name">Record</h2>
<p id="hint">Point at a trial to see its record; click to keep it. A click on the legend hides a kind.</p>
<table><tbody id="record"></tbody></table></aside></main>
<footer>{footer}</footer>
<script>
(function () {{
  const records = {records}, units = {units};
  const plot = document.getElementById("pareto"), body = document.getElementById("record");
  const name = document.getElementById("name"), hint = document.getElementById("hint");
  const idle = hint.textContent;
  let kept = null;
  function show(index) {{
    const record = records[index];
    name.textContent = record.exp_id;
    body.replaceChildren(...Object.entries(record).map(([key, value]) => {{
      const row = document.createElement("tr");
      const left = document.createElement("td"), right = document.createElement("td");
      left.textContent = key;
      left.title = units[key] || "";
      right.textContent = value === null ? "–" : typeof value === "number" && !Number.isInteger(value)
        ? String(Number(value.toPrecision(6))) : String(value);
      if (value === null) row.className = "none";
      row.append(left, right);
      return row;
    }}));
  }}
  if (!plot || !plot.on) return;
  show({first});
  plot.on("plotly_hover", (event) => {{
    const index = event.points[0].customdata;
    if (kept === null && index !== undefined) show(index);
  }});
  plot.on("plotly_click", (event) => {{
    const index = event.points[0].customdata;
    if (index === undefined) return;
    kept = kept === index ? null : index;
    hint.textContent = kept === null ? idle : "Kept: click the point again to let go.";
    show(index);
  }});
}})();
</script>
</body>
</html>
"""
