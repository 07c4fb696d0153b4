"""The verdict table: one row per trial, under a line that says what was measured against what."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from analysis.captions import check_one_workload, load_note
from analysis.points import RATIO, UNFINISHED, is_open, number
from analysis.words import PAIRS, Words, words_of
from trainables.record import InputError

COLUMNS = ("exp_id", "T", "beta", "rho", "epochs", "test LER", "test drop % [95 %]", "params down %", "p50",
           "x teacher [95 %]", "x FP32 torch", "verdict", "stop reason")  # fmt: skip
_OPTIONAL = {"T": "T", "beta": "beta", "rho": "rho", "test LER": "ler", "params down %": "params_down",
             "x teacher [95 %]": "ratio", "x FP32 torch": "speedup"}  # fmt: skip
_PARAMETERS = ("T", "beta", "rho")
_LEFT, _WRAPPED = {"exp_id", "beta", "verdict", "stop reason"}, {"exp_id", "beta"}
_STYLES = {"pass": "bold green", "fail": "red", "n/a": "dim"}


@dataclass(frozen=True)
class Row:
    """One line of the table; numbers as measured (drop in percent, p50 in ms), None where there is none.

    ler (error rate) is shown of decoders, params_down (percent) of pruned models, speedup (p50 of the own FP32 form in
    torch over that of the deployed file) of quantized ones. ratio: the teacher's p50 over the own one, in the same
    runtime and rounds.
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
    ratio: float | None = None
    ratio_lo: float | None = None
    ratio_hi: float | None = None
    ler: float | None = None
    chosen: bool = False
    words: Words = PAIRS

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of COLUMNS."""
        return (
            f"{self.exp_id} (chosen)" if self.chosen else self.exp_id,
            _text(self.T),
            _text(self.beta),
            _text(self.rho),
            _text(self.epochs),
            "–" if self.ler is None else f"{self.ler:.5f}",
            _with_interval("+.2f", self.drop, self.drop_lo, self.drop_hi),
            "–" if self.params_down is None else f"{self.params_down:.1f}",
            "–" if self.p50_ms is None else f"{self.words.per_ms * self.p50_ms:.{2 if self.words is PAIRS else 1}f}",
            _with_interval(".2f", self.ratio, self.ratio_lo, self.ratio_hi),
            "–" if self.speedup is None else f"{self.speedup:.2f}",
            self.verdict,
            self.stop_reason or "–",
        )


def rows(records: Iterable[Mapping[str, Any]], chosen: str | None = None) -> list[Row]:
    """Teacher first, then the trials in order. A record is ``Record.to_dict()`` and, where known, ``role``.

    chosen: exp_id of the trial that validation chose.

    Raises InputError for records of different workloads.
    """
    records = list(records)
    check_one_workload(records)
    teacher_first = sorted(records, key=lambda record: record.get("role") != "teacher")
    return [_row(record, chosen) for record in teacher_first]


def title(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """One line: workload, teacher, size of the test, engine, device and what all trials share, as far as known."""
    words = _words(records)

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
        f"{settings[size]} test {words.samples}" if settings.get(size := f"test_{words.samples}") else "",
        f"{known('engine')} on {known('device')}" if known("engine") and known("device") else known("device"),
        ", ".join(f"{key} {_text(value)}" for key, value in _shared(records).items()),
    ]
    return "  ·  ".join(part for part in parts if part)


def foot(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines below the table: which numbers are of the test and which of the validation, and what to beware of."""
    return [*explained(records), *beware(records)]


def beware(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The warning, if one is due, that a loaded machine timed these; of several tables the highest load."""
    warning = load_note(records)
    return [f"Beware: {warning}."] if warning else []


def explained(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table's numbers are."""
    samples = _words(records).samples
    lines = [
        f"Drop: of the best validated weights on the test {samples} against the teacher, with a paired bootstrap 95 % "
        f"interval. Validation {samples} alone chose the weights and the best student."
    ]
    if any(record.get(RATIO) is not None for record in records):
        lines.append(
            "x teacher: the deployed teacher's p50 over the trial's, timed in the same alternating rounds; where it "
            "and p50 disagree about two trials, trust the ratio."
        )
    return lines


def render(
    records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], sweep: str = "", chosen: str | None = None
) -> Table:
    """The table for a terminal; ``settings``: the sweep's settings, for the size of the test."""
    table = Table(
        title=escape("  ·  ".join(part for part in (sweep, title(records, settings)) if part)),
        title_justify="left",
        title_style="bold",
        caption=escape("\n".join(foot(records))),
        caption_justify="left",
    )
    shown = rows(records, chosen)
    names = columns(shown)
    for name in names:
        side: Literal["left", "right"] = "left" if name in _LEFT else "right"
        head = escape(_heading(name, shown))
        table.add_column(head, justify=side, no_wrap=name not in _WRAPPED, overflow="fold")
    for row in shown:
        cells = {name: escape(cell) for name, cell in zip(COLUMNS, row.cells(), strict=True)}
        if row.verdict in _STYLES:
            cells["verdict"] = f"[{_STYLES[row.verdict]}]{cells['verdict']}[/]"
        table.add_row(*(cells[name] for name in names), style="dim" if row.role == "teacher" else None)
    return table


def columns(shown: Sequence[Row]) -> list[str]:
    """The table's columns: a parameter's or a stage's own only where a trial has it, and not where all share it."""
    empty = {name for name, field in _OPTIONAL.items() if all(getattr(row, field) is None for row in shown)}
    shared = _shared([vars(row) for row in shown])
    return [name for name in COLUMNS if name not in empty and name not in shared]


def _shared(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters that all of several trials have in common, with their value."""
    trials = [record for record in records if record.get("role") != "teacher"]
    found = {key: list(dict.fromkeys(record.get(key) for record in trials)) for key in _PARAMETERS}
    return {key: v[0] for key, v in found.items() if len(trials) > 1 and len(v) == 1 and v[0] is not None}


def markdown(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], chosen: str | None = None) -> str:
    """The same as GitHub Markdown, ending in a newline."""
    shown = rows(records, chosen)
    names = columns(shown)
    heads = [_heading(name, shown) for name in names]
    lines = [title(records, settings), "", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(names)]
    for row in shown:
        cells = zip(COLUMNS, row.cells(), strict=True)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for name, cell in cells if name in names) + " |")
    return "\n".join([*lines, "", *foot(records)]) + "\n"


def csv_text(records: Sequence[Mapping[str, Any]], chosen: str | None = None) -> str:
    """The same as CSV with full precision; drop and its interval in percent, p50 in ms."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("exp_id", "T", "beta", "epochs", "ler", "drop", "drop_lo", "drop_hi", "p50_ms", "ratio", "ratio_lo",
             "ratio_hi", "verdict", "stop_reason", "chosen")  # fmt: skip
    said = {"drop": "drop_pct", "drop_lo": "drop_lo_pct", "drop_hi": "drop_hi_pct"}
    said |= {name: name.replace("ratio", RATIO) for name in names if name.startswith("ratio")}
    writer.writerow([said.get(name, name) for name in names])
    for row in rows(records, chosen):
        writer.writerow([getattr(row, name) for name in names])
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


def _row(record: Mapping[str, Any], chosen: str | None) -> Row:
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
        ratio=number(record.get(RATIO)),
        ratio_lo=number(record.get(f"{RATIO}_lo")),
        ratio_hi=number(record.get(f"{RATIO}_hi")),
        ler=number(record.get("ler")),
        chosen=chosen is not None and record["exp_id"] == chosen,
        words=words_of(record.get("domain")),
    )


def _words(records: Iterable[Mapping[str, Any]]) -> Words:
    return words_of(next((record["domain"] for record in records if record.get("domain")), None))


def _heading(name: str, shown: Sequence[Row]) -> str:
    return f"p50 {shown[0].words.time}" if name == "p50" and shown else name


def _with_interval(form: str, value: float | None, lo: float | None, hi: float | None) -> str:
    if value is None:
        return "–"
    bounds = "" if lo is None or hi is None or lo == hi else f" [{lo:{form}}, {hi:{form}}]"
    return f"{value:{form}}{bounds}"


def _percent(value: Any) -> float | None:
    found = number(value)
    return None if found is None else 100 * found


def _text(value: float | int | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:g}"
