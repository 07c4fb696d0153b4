"""A report as blocks (headings, text, tables, pictures) that become one HTML page or Markdown; nothing here knows what
they say.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """level: 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph. small: a caption or a caution."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells as text; the columns named in ``left`` are text, all others numbers. An empty head: a table of facts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A PNG file, and where it was also drawn for a narrow screen that file; what it shows, for who cannot see it."""

    wide: Path
    says: str
    narrow: Path | None = None


Block = Heading | Text | Items | Table | Picture
_MARKS = {"pass": "✓ pass", "fail": "✗ fail"}  # a sign as well as a colour

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:;
  form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0 auto; max-width: 1060px; padding: 20px 24px 48px; background: #fff; color: #1a1a1a;
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }}
h1 {{ font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; margin: 36px 0 8px; padding-top: 12px; border-top: 2px solid #e0e3e6; }}
h3 {{ font-size: 15px; margin: 22px 0 4px; overflow-wrap: anywhere; }}
p, ul {{ margin: 6px 0; overflow-wrap: anywhere; }}
ul {{ padding-left: 20px; }}
.small {{ color: #5f6368; font-size: 13px; }}
nav {{ display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 14px; margin: 10px 0; }}
nav a {{ color: #0b5a8a; }}
.scroll {{ overflow-x: auto; margin: 10px 0; }}
table {{ border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 4px 10px; text-align: right; vertical-align: top; border-bottom: 1px solid #eceef0;
  white-space: nowrap; }}
th {{ color: #5f6368; font-weight: 600; border-bottom: 1px solid #b8bcc0; }}
td.name, th.name {{ text-align: left; padding-left: 0; min-width: 7em; max-width: 22em;
  white-space: normal; overflow-wrap: anywhere; }}
td.pass {{ color: #005a92; font-weight: 600; }}
td.fail {{ color: #a84300; font-weight: 600; }}
table.facts td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
table.facts td:first-child {{ color: #5f6368; white-space: nowrap; }}
img {{ width: 100%; height: auto; display: block; margin: 8px 0; }}
@media (max-width: 600px) {{
  body {{ padding: 14px 14px 40px; }}
  th, td {{ padding: 4px 7px; }}
  .name.stuck {{ position: sticky; left: 0; background: #fff; max-width: 38vw; }}
}}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav {{ display: none; }}
  .scroll {{ overflow: visible; }}
  table {{ font-size: 7.5pt; }}
  th, td {{ padding: 2px 4px; }}
  tr, img {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
<nav>{links}</nav>
{body}
</body>
</html>
"""


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One self-contained page without scripts: pictures are part of it and nothing is fetched."""
    heads = [(i, block) for i, block in enumerate(blocks) if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#s{i}">{html.escape(head.text)}</a>' for i, head in heads)
    body = "\n".join(_html(block, i) for i, block in enumerate(blocks))
    return _PAGE.format(title=html.escape(title), links=links, body=body)


def to_markdown(title: str, blocks: Iterable[Block]) -> str:
    """The same as GitHub Markdown; pictures by the names of their files, which lie beside it."""
    return "\n\n".join([f"# {_plain(title)}", *map(_markdown, blocks)]) + "\n"


def _html(block: Block, index: int) -> str:
    match block:
        case Heading(text, level):
            return f'<h{level} id="s{index}">{html.escape(text)}</h{level}>'
        case Text(text, small):
            return f"<p{' class=small' if small else ''}>{html.escape(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Picture(wide, says, narrow):
            source = f'<source media="(max-width: 600px)" srcset="{_data(narrow)}">' if narrow else ""
            return f'<picture>{source}<img src="{_data(wide)}" alt="{html.escape(says)}"></picture>'
        case Table(head, rows, left):
            names = [name in left for name in head] or [True] * max(map(len, rows), default=0)
            heads = "".join(
                f"<th{_class('name' if text else '', 'stuck' if i == 0 else '')}>{html.escape(name)}</th>"
                for i, (name, text) in enumerate(zip(head, names, strict=bool(head)))
            )
            lines = "".join(f"<tr>{_cells(row, names if head else [])}</tr>" for row in rows)
            top = f"<thead><tr>{heads}</tr></thead>" if head else ""
            facts = "" if head else ' class="facts"'
            return f'<div class="scroll"><table{facts}>{top}<tbody>{lines}</tbody></table></div>'


def _cells(row: Sequence[str], names: Sequence[bool]) -> str:
    found = []
    for i, cell in enumerate(row):
        text = bool(names) and names[i]
        kind = _class("name" if text else "", "stuck" if text and i == 0 else "", cell if cell in _MARKS else "")
        said = html.escape(_MARKS.get(cell, cell))
        found.append(f"<td{kind}>{said.replace('_', '_<wbr>') if text else said}</td>")
    return "".join(found)


def _class(*names: str) -> str:
    kept = " ".join(name for name in names if name)
    return f' class="{kept}"' if kept else ""


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text, _):
            return _plain(text)
        case Items(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Picture(wide, says, _):
            return f"![{_plain(says)}]({wide.name})"
        case Table(head, rows, left):
            top = head or ["", *[""] * (max(map(len, rows), default=1) - 1)]
            sides = [" --- |" if name in left or not head else " ---: |" for name in top]
            lines = ["| " + " | ".join(_plain(name) for name in top) + " |", "|" + "".join(sides)]
            return "\n".join([*lines, *("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)])


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
