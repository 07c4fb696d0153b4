"""The verdict table: one row per trial, under a line that says what was measured against what."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from analysis.pareto import UNFINISHED, check_one_workload, is_open, is_stop, load_note, number
from analysis.store import SweepData
from trainables.record import InputError

COLUMNS = ("exp_id", "T", "beta", "rho", "epochs", "test drop % [95 %]", "params down %", "p50 ms", "x FP32 torch",
           "verdict", "stop reason")  # fmt: skip
_OPTIONAL = {"T": "T", "beta": "beta", "rho": "rho", "params down %": "params_down", "x FP32 torch": "speedup"}
_LEFT = {"exp_id", "beta", "verdict", "stop reason"}
FOOT = (
    "Drop: of the best validated weights on the test pairs against the teacher, with a paired bootstrap 95 % interval. "
    "Validation pairs alone chose the weights and the best student."
)
_STYLES = {"pass": "bold green", "fail": "red", "n/a": "dim"}


@dataclass(frozen=True)
class Row:
    """One line of the table; numbers as measured (drop in percent, p50 in ms), None where there is none.

    params_down (percent) is shown of pruned models, speedup (p50 of the own FP32 form in torch over that of the
    deployed file) of quantized ones.
    """

    exp_id: str
    T: float | None
    beta: float | str | None
    epochs: int | None
    drop: float | None
    drop_lo: float | None
    drop_hi: float | None
    p50_ms: float | None
    verdict: str
    stop_reason: str
    role: str
    rho: float | None = None
    params_down: float | None = None
    speedup: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        drop = "–" if self.drop is None else f"{self.drop:+.2f}"
        if self.drop is not None and self.drop_lo is not None and self.drop_hi is not None:
            drop += f" [{self.drop_lo:+.2f}, {self.drop_hi:+.2f}]"
        reason = self.stop_reason if is_stop(self.stop_reason) else "–"
        return (
            self.exp_id,
            _text(self.T),
            _text(self.beta),
            _text(self.rho),
            _text(self.epochs),
            drop,
            "–" if self.params_down is None else f"{self.params_down:.1f}",
            "–" if self.p50_ms is None else f"{self.p50_ms:.2f}",
            "–" if self.speedup is None else f"{self.speedup:.2f}",
            self.verdict,
            reason,
        )


def rows(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Teacher first, then the trials in order. A record is ``Record.to_dict()`` and, where known, ``role``.

    Raises InputError for records of different workloads.
    """
    records = list(records)
    check_one_workload(records)
    teacher_first = sorted(records, key=lambda record: record.get("role") != "teacher")
    return [_row(record) for record in teacher_first]


def title(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """One line: workload, teacher, number of test pairs, engine and device, as far as they are known."""

    def known(key: str) -> str:
        return " / ".join(dict.fromkeys(str(record[key]) for record in records if record.get(key)))

    # What the trials were compared with, by content; a sweep in progress may know only the teacher's name yet.
    named = (record.get("reference") or record.get("parent") for record in records)
    teachers = list(dict.fromkeys(str(name) for name in named if name)) or [
        str(record["exp_id"]) for record in records if record.get("role") == "teacher"
    ]
    parts = [
        f"workload {known('workload_hash') or 'unknown'}",
        f"against {', '.join(teachers) or 'a teacher not measured yet'}",
        f"{settings['test_pairs']} test pairs" if settings.get("test_pairs") else "",
        f"{known('engine')} on {known('device')}" if known("engine") and known("device") else known("device"),
    ]
    return "  ·  ".join(part for part in parts if part)


def foot(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines below the table: which numbers are of the test and which of the validation, and what to beware of."""
    warning = load_note(records)
    return [FOOT, *([f"Beware: {warning}."] if warning else [])]


def render(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], sweep: str = "") -> Table:
    """The table for a terminal; ``settings``: the sweep's settings, for the number of pairs."""
    table = Table(
        title=escape("  ·  ".join(part for part in (sweep, title(records, settings)) if part)),
        title_justify="left",
        title_style="bold",
        caption=escape("\n".join(foot(records))),
        caption_justify="left",
    )
    shown = rows(records)
    names = columns(shown)
    for name in names:
        right = name not in _LEFT
        table.add_column(escape(name), justify="right" if right else "left", no_wrap=name != "exp_id", overflow="fold")
    for row in shown:
        cells = {name: escape(cell) for name, cell in zip(COLUMNS, row.cells(), strict=True)}
        if row.verdict in _STYLES:
            cells["verdict"] = f"[{_STYLES[row.verdict]}]{cells['verdict']}[/]"
        table.add_row(*(cells[name] for name in names), style="dim" if row.role == "teacher" else None)
    return table


def columns(shown: Sequence[Row]) -> list[str]:
    """The table's columns: a parameter's or a stage's own only where a trial has it."""
    empty = {name for name, field in _OPTIONAL.items() if all(getattr(row, field) is None for row in shown)}
    return [name for name in COLUMNS if name not in empty]


def markdown(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """The same as GitHub Markdown, ending in a newline."""
    shown = rows(records)
    names = columns(shown)
    lines = [title(records, settings), "", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in shown:
        cells = zip(COLUMNS, row.cells(), strict=True)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for name, cell in cells if name in names) + " |")
    return "\n".join([*lines, "", *foot(records)]) + "\n"


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """The same as CSV with full precision; drop and its interval in percent, p50 in ms."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "exp_id",
            "T",
            "beta",
            "epochs",
            "drop_pct",
            "drop_lo_pct",
            "drop_hi_pct",
            "p50_ms",
            "verdict",
            "stop_reason",
        ]
    )
    for r in rows(records):
        writer.writerow(
            [
                r.exp_id,
                r.T,
                r.beta,
                r.epochs,
                r.drop,
                r.drop_lo,
                r.drop_hi,
                r.p50_ms,
                r.verdict,
                r.stop_reason,
            ]
        )
    return text.getvalue()


def save(path: str | Path, text: str) -> None:
    """Write a text file that appears whole or not at all. Raises InputError where it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another file") from error


def records_of(data: SweepData) -> list[dict[str, Any]]:
    """The sweep's trials as flat dictionaries."""
    return data.trials.to_dicts()


def _row(record: Mapping[str, Any]) -> Row:
    epochs = number(record.get("epochs"))
    beta = record.get("beta")
    return Row(
        exp_id=str(record["exp_id"]),
        T=number(record.get("T")),
        beta=beta if isinstance(beta, str) else number(beta),
        epochs=None if epochs is None else int(epochs),
        drop=_percent(record.get("drop")),
        drop_lo=_percent(record.get("drop_lo")),
        drop_hi=_percent(record.get("drop_hi")),
        p50_ms=number(record.get("t_pair_p50_ms")),
        verdict=str(record.get("verdict") or "–"),
        stop_reason=UNFINISHED[str(record["status"])] if is_open(record) else str(record.get("stop_reason") or ""),
        role=str(record.get("role") or "trial"),
        rho=number(record.get("rho")),
        params_down=_percent(record.get("params_down")) if record.get("rho") is not None else None,
        speedup=number(record.get("p50_ratio_fp32")) if record.get("bits_w") is not None else None,
    )


def _percent(value: Any) -> float | None:
    found = number(value)
    return None if found is None else 100 * found


def _text(value: float | int | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:g}"
