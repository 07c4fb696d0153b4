"""The page around the Pareto plot: its layout, its filter, and the panel that shows the record under the pointer."""

BAR = """<div class="bar">
<label>Filter <input id="filter" type="search" placeholder="K_T3  rho<=0.3  verdict=pass" size="28"
  title="Words that must all hold: part of a name, or a field, =, !=, <, <=, > or >=, and a value"></label>
<label id="time">Front over time <input id="moment" type="range" min="0" value="0"></label>
<output id="said"></output></div>"""

PAGE = """<!DOCTYPE html>
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
.bar {{ display: flex; flex-wrap: wrap; gap: 6px 20px; align-items: center; color: #5f6368; font-size: 13px; }}
.bar label {{ display: flex; gap: 8px; align-items: center; }}
.bar input[type=search] {{ font: inherit; padding: 4px 8px; border: 1px solid #c4c8cc; border-radius: 6px; }}
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
@media print {{ aside, .bar {{ display: none; }} main {{ display: block; }} }}
</style>
</head>
<body>
<header><h1>{heading}</h1><span>{sweep}</span></header>
<p class="headline">{headline}</p>
<main><div>{bar}{plot}</div>
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
  if (plot.clientWidth < 600) {{  // a phone: titles in lines, a trial's name when it is pointed at
    const lined = (text) => text.trim().replace(/(.{{1,40}})(\\s+|$)/g, "$1<br>").replace(/<br>$/, "");
    const change = {{annotations: [], "margin.b": 84, "margin.l": 76}};
    for (const axis of ["xaxis", "yaxis"]) {{
      change[`${{axis}}.title.text`] = lined(plot.layout[axis].title.text);
      change[`${{axis}}.title.font.size`] = 11;
    }}
    Plotly.relayout(plot, change);
  }}
  const traces = {traces}, moments = {moments}, places = traces.map((i) => [plot.data[i].x, plot.data[i].customdata]);
  const filter = document.getElementById("filter"), moment = document.getElementById("moment");
  const said = document.getElementById("said"), front = plot.data.flatMap((one, i) => one.name === "front" ? [i] : []);
  const lines = front.map((i) => [plot.data[i].x, plot.data[i].y]), last = moments.length - 1;
  const tests = {{"=": (a, b) => a == b, "!=": (a, b) => a != b, "<": (a, b) => a < b, "<=": (a, b) => a <= b,
    ">": (a, b) => a > b, ">=": (a, b) => a >= b}};
  function holds(record, word) {{
    const parts = /^([A-Za-z0-9_]+)(!=|<=|>=|=|<|>)(.*)$/.exec(word);
    if (!parts) return `${{record.sweep || ""}} ${{record.exp_id}}`.toLowerCase().includes(word.toLowerCase());
    const value = record[parts[1]], percent = /^(.+)%$/.exec(parts[3]);  // a fraction, in percent
    const number = percent ? Number(percent[1]) / 100 : Number(parts[3]);
    if (value === null || value === undefined) return false;
    return tests[parts[2]](typeof value === "number" ? value : String(value),
      typeof value === "number" && parts[3] !== "" && !Number.isNaN(number) ? number : parts[3]);
  }}
  function draw() {{
    const words = filter.value.split(" ").filter(Boolean), now = last < 0 ? last : Number(moment.value);
    const until = now < last ? moments[now].when : null;
    let count = 0, all = 0;
    const shown = places.map(([xs, indices]) => xs.map((x, i) => {{
      const record = records[indices[i]];
      const good = words.every((word) => holds(record, word)) && (until === null || record.datetime <= until);
      all += 1;
      count += good;
      return good ? x : null;
    }}));
    Plotly.restyle(plot, {{x: shown}}, traces);
    front.forEach((i, at) => {{
      const line = until === null ? lines[at] : at === 0 ? [moments[now].x, moments[now].y] : [[], []];
      Plotly.restyle(plot, {{x: [line[0]], y: [line[1]]}}, [i]);
    }});
    plot.classList.toggle("some", count < all);
    const texts = (plot.layout.annotations || []).length && plot.querySelectorAll(".annotation");
    if (texts) texts.forEach((text) => {{ text.style.opacity = count < all ? 0.15 : 1; }});
    said.textContent = [count < all ? `${{count}} of ${{all}} points` : "", until === null ? "" : moments[now].text]
      .filter(Boolean).join("  ·  ");
  }}
  if (last < 1) document.getElementById("time").remove();
  moment.max = last;
  moment.value = last;
  filter.addEventListener("input", draw);
  moment.addEventListener("input", draw);
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
