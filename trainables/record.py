"""The record: the one row that every trial yields, finished, stopped or failed, and its JSON and CSV forms.

The first 25 fields are the plan's, in its order; after them come the named extras; after those whatever a
domain or a measurement adds (`extra`). A field that does not apply is None. Nothing here needs torch or
numpy.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime as Datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from engines.errors import InputError as InputError
from engines.errors import Parser as Parser

Value = float | int | str | None

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_PART = re.compile(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*")
_LONGEST_TEXT = 100_000  # the csv module reads no cell above 131,072 characters


def _f(
    kind: str,
    unit: str,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    required: bool = False,
) -> Any:
    """A field of `kind` text, int, float or value (float or text); the ends low and high are allowed."""
    meta = {"kind": kind, "unit": unit, "low": low, "high": high, "above": above, "required": required}
    return field(metadata=meta) if required else field(default=None, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured trial. Integers given for float fields become floats; all problems make one InputError.

    NaN and infinity are refused: what could not be measured is None (see `finite`), and `stop_reason` or
    `notes` says why.
    """

    exp_id: str = _f("text", "stage_combo_keyparams_run", required=True)
    combo: str | None = _f("text", "short name of the setting")
    rho: float | None = _f("float", "share of the structure pruned away, 0 to 1", low=0, high=1)
    T: float | None = _f("float", "distillation temperature", above=0)
    beta: float | str | None = _f("value", "weight of the KL term: a number, or its schedule in words", low=0)
    gamma: float | str | None = _f("value", "weight of the feature term: a number or its schedule", low=0)
    bits_w: int | None = _f("int", "bits per weight", low=1, high=64)
    bits_a: int | None = _f("int", "bits per activation", low=1, high=64)
    keep_list: str | None = _f("text", "layers kept in higher precision, separated by commas")
    params_M: float | None = _f("float", "million parameters", low=0)
    flops_G: float | None = _f("float", "1e9 floating point operations per sample (pair or shot)", low=0)
    size_MB: float | None = _f("float", "MB (1e6 bytes) on disk", low=0)
    vram_GB: float | None = _f("float", "GB (1e9 bytes) of device memory, peak", low=0)
    chamfer: float | None = _f("float", "symmetric distance of the clouds", low=0)
    absrel: float | None = _f("float", "mean |depth error| / depth", low=0)
    rmse: float | None = _f("float", "root mean square depth error", low=0)
    delta1: float | None = _f("float", "share of pixels within a factor 1.25, 0 to 1", low=0, high=1)
    t_pair_p50_ms: float | None = _f("float", "ms per sample (pair or shot), median", low=0)
    t_pair_p95_ms: float | None = _f("float", "ms per sample (pair or shot), 95th percentile", low=0)
    t_scene_s: float | None = _f("float", "s per scene", low=0)
    pairs_per_sec: float | None = _f("float", "samples (pairs or shots) per second", low=0)
    gpu_hours: float | None = _f("float", "hours on an accelerator", low=0)
    notes: str | None = _f("text", "anything a reader should know")
    seed: int | None = _f("int", "seed of the trial", low=0)
    datetime: str = _f("text", "ISO 8601 with an offset", required=True)

    task_id: str | None = _f("text", "row of the plan")
    domain: str | None = _f("text", "name of the domain")
    profile: str | None = _f("text", "demo, small or full")
    quality: float | None = _f("float", "primary metric on the test split")
    drop: float | None = _f("float", "fraction, positive = worse than the reference")
    drop_lo: float | None = _f("float", "fraction, lower end of the interval")
    drop_hi: float | None = _f("float", "fraction, upper end of the interval")
    verdict: str | None = _f("text", "pass, fail or n/a")
    verdict_detail: str | None = _f("text", "the numbers behind the verdict")
    stop_reason: str | None = _f("text", "completed, or why the training was stopped")
    epochs: int | None = _f("int", "epochs run", low=0)
    engine: str | None = _f("text", "runtime that was timed")
    device: str | None = _f("text", "device that was timed")
    workload_hash: str | None = _f("text", "hash of the measuring protocol")
    config_hash: str | None = _f("text", "hash of the settings")
    git_commit: str | None = _f("text", "commit of the code")
    parent: str | None = _f("text", "what it was made from")
    extra: dict[str, Value] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, meta in _META.items():
            value, problem = _checked(name, getattr(self, name), meta)
            object.__setattr__(self, name, value)
            problems += [problem] if problem else []
        extra: dict[str, Value] = {}
        for name, given in self.extra.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _META or name == "extra":
                problems.append(f"extra {name!r}: expected a name of letters, digits and _ that no field has")
                continue
            extra[name], problem = _checked(name, given, _EXTRA_META)
            problems += [problem] if problem else []
        object.__setattr__(self, "extra", extra)
        problems += [] if problems else self._relations()
        if problems:
            raise InputError(f"record {self.exp_id!r}: " + "; ".join(problems))

    def _relations(self) -> list[str]:
        problems = []
        if not self.exp_id:
            problems.append("exp_id is empty, expected a name such as K_T3B05_run1")
        if self.verdict not in (None, "pass", "fail", "n/a"):
            problems.append(f"verdict={self.verdict!r}, expected pass, fail or n/a")
        for low, high in (("t_pair_p50_ms", "t_pair_p95_ms"), ("drop_lo", "drop_hi")):
            a, b = getattr(self, low), getattr(self, high)
            if a is not None and b is not None and a > b:
                problems.append(f"{low}={a} is above {high}={b}")
        try:
            aware = Datetime.fromisoformat(self.datetime).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            problems.append(f"datetime={self.datetime!r}, expected ISO 8601 with an offset (record.now() gives it)")
        return problems

    def to_dict(self) -> dict[str, Value]:
        """Flat and ordered: the 25 fields, the named extras, then the keys of `extra`."""
        return {name: getattr(self, name) for name in _META} | self.extra

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Inverse of `to_dict`: keys that are no field become `extra`."""
        missing = [name for name in ("exp_id", "datetime") if name not in data]
        if missing:
            raise InputError(f"record: {', '.join(missing)} missing, expected at least exp_id and datetime")
        known = {k: v for k, v in data.items() if k in _META}
        return cls(**known, extra={k: v for k, v in data.items() if k not in _META})

    def to_json(self) -> str:
        """Compact JSON of `to_dict`, one line."""
        return json.dumps(self.to_dict(), separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Inverse of `to_json`; InputError for text that is no JSON object."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"record: not JSON ({error}), expected what Record.to_json writes") from None
        if not isinstance(data, dict):
            raise InputError(f"record: {type(data).__name__} found, expected a JSON object")
        return cls.from_dict(data)


_META: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(Record) if f.name != "extra"}
_EXTRA_META = {
    "kind": "extra",
    "low": -math.inf,
    "high": math.inf,
    "above": -math.inf,
    "required": False,
    "unit": "",
}
FIELDS: tuple[str, ...] = tuple(_META)[:25]
EXTRAS: tuple[str, ...] = tuple(_META)[25:]
# What a trial was given rather than what was measured: MLflow has these as parameters, all other numbers as metrics.
INPUTS = ("combo", "rho", "T", "beta", "gamma", "bits_w", "bits_a", "keep_list", "seed")
UNITS: dict[str, str] = {name: meta["unit"] for name, meta in _META.items()}


def _checked(name: str, value: Any, meta: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The value in the field's own type, and what is wrong with it (None: nothing)."""
    kind = meta["kind"]
    if value is None:
        return None, f"{name} is missing, expected {meta['unit']}" if meta["required"] else None
    if isinstance(value, str):
        if kind in ("int", "float"):
            return value, f"{name}={value!r} is text, expected {meta['unit']}"
        return str(value), _text_problem(name, value)
    if kind == "text" or isinstance(value, bool) or not isinstance(value, Real):
        return (
            value,
            f"{name}={value!r} is {type(value).__name__}, expected {meta['unit'] or 'a number or text'}",
        )
    if isinstance(value, Integral):
        value = int(value)
        if abs(value) >= 2**63:
            return value, f"{name} does not fit in 64 bits"
        number: int | float = value if kind in ("int", "extra") else float(value)
    else:
        number = float(value)
        if not math.isfinite(number):
            return number, f"{name}={number} is not finite, expected a number or None"
        if kind == "int":
            if not number.is_integer():
                return number, f"{name}={number} is no whole number, expected {meta['unit']}"
            number = int(number)
    if not meta["low"] <= number <= meta["high"] or not number > meta["above"]:
        lowest = f"> {meta['above']:g}" if meta["above"] > -math.inf else f">= {meta['low']:g}"
        highest = f" and <= {meta['high']:g}" if meta["high"] < math.inf else ""
        return number, f"{name}={number}, expected {lowest}{highest} ({meta['unit']})"
    return number, None


def _text_problem(name: str, text: str) -> str | None:
    if len(text) > _LONGEST_TEXT:
        return f"{name} has {len(text)} characters, expected at most {_LONGEST_TEXT}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{name}={text!r} is no valid Unicode"
    return None


def finite(value: float | None) -> float | None:
    """The number, or None where it is None, NaN or infinite: what a record can hold."""
    return float(value) if value is not None and math.isfinite(value) else None


def now() -> str:
    """The current time as records hold it: ISO 8601 with the local offset, to the second."""
    return Datetime.now().astimezone().isoformat(timespec="seconds")


def exp_id(stage: str, combo: str, keyparams: str = "", run: int = 1) -> str:
    """`{stage}_{combo}_{keyparams}_run{run}`, e.g. K_T3B05_sched_run1; without keyparams where there are
    none.
    """
    parts = [part for part in (stage, combo, keyparams) if part]
    bad = [part for part in (stage, combo, *parts[2:]) if not _PART.fullmatch(part)]
    if bad or run < 1:
        what = f"run={run}" if not bad else ", ".join(map(repr, bad))
        raise InputError(f"exp_id: {what}, expected letters, digits, dots, dashes and single _, and run >= 1")
    return "_".join([*parts, f"run{run}"])


def write_csv(path: str | Path, records: Iterable[Record]) -> None:
    """One row per record under one header, UTF-8; the file appears whole or not at all.

    None is an empty cell. Extra keys that only some records have make columns that the others leave empty, so
    a None in `extra` is written as null. Text that would read back as something else is written as a JSON
    string.
    """
    records = list(records)
    extra = list(dict.fromkeys(key for record in records for key in record.extra))
    partial = Path(path).with_name(Path(path).name + ".tmp")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_META, *extra])
        for record in records:
            row = [_cell(getattr(record, name), meta["kind"]) for name, meta in _META.items()]
            row += [_cell(record.extra[key], "extra") if key in record.extra else "" for key in extra]
            writer.writerow(row)
    os.replace(partial, path)


def read_csv(path: str | Path) -> list[Record]:
    """Inverse of `write_csv`; InputError for missing columns, a cell that does not fit its field, and no CSV."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        try:
            return _records(csv.reader(file), path)
        except csv.Error as error:
            raise InputError(f"{path}: {error}, expected what write_csv writes") from None


def _records(rows: Any, path: str | Path) -> list[Record]:
    header: list[str] = next(rows, [])
    missing = [name for name in _META if name not in header]
    if missing:
        raise InputError(f"{path}: columns {', '.join(missing)} missing, expected what write_csv writes")
    records = []
    for row in rows:
        if len(row) != len(header):
            raise InputError(f"{path}: line {rows.line_num} has {len(row)} cells, expected {len(header)}")
        cells = {
            name: _parsed(cell, _META.get(name, _EXTRA_META)["kind"])
            for name, cell in zip(header, row, strict=True)
            if cell or name in _META
        }
        records.append(Record.from_dict(cells))
    return records


def _cell(value: Value, kind: str) -> str:
    if value is None:
        return "null" if kind == "extra" else ""
    if not isinstance(value, str):
        return repr(value)
    # Quoted where the bare text would be read back as None, a number or a JSON string.
    plain = value and not value.startswith('"') and (kind == "text" or _parsed(value, kind) == value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _parsed(cell: str, kind: str) -> Value:
    if not cell:
        return None
    if cell.startswith('"'):
        try:
            text = json.loads(cell)
        except ValueError:
            return cell
        return text if isinstance(text, str) else cell
    if kind == "text":
        return cell
    if kind == "extra" and cell == "null":
        return None
    for convert in (int, float):
        try:
            return convert(cell)
        except ValueError:
            continue
    return cell
