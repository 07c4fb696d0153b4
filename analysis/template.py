"""The page around the Pareto plot: its layout and the panel that shows the record of the point under the pointer."""

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
