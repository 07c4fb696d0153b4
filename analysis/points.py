"""Records as points of the plane: latency (or another cost) across, drop upwards, both with intervals.

Absolute times of a shared machine are noise of its load, but every timing ran the teacher in the same rounds. So a
trial stands at the teacher's p50, one value for the whole sweep, divided by the trial's ratio to it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from analysis.words import Measure

Kind = Literal["teacher", "pass", "fail", "stopped", "unjudged", "open"]
UNFINISHED = {"RUNNING": "still running", "KILLED": "interrupted"}  # MLflow's status of a trial without a record
RATIO = "p50_ratio_same_runtime"
_OVER = "ler_over_"
_DECODERS = {"matching": "PyMatching", "correlated": "PyMatching, correlated", "exact": "exact limit"}


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value with its interval; lo == hi == value where none was measured."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True, slots=True)
class Point:
    """One trial in the plane.

    x: what lies across, p50 latency in the domain's unit (ms per pair, µs per shot) by default. drop: percent, positive
    = worse. kind: ``pass``,
    ``fail``, ``unjudged`` (no gate) were trained to the end, or stopped when they already met the gate; ``stopped``
    were stopped before they did; ``open`` (not finished) has no place in the plane. ratio: the teacher's p50 over the
    own one, of the same rounds; None where x is as measured. when: the record's time. share: in which share of the
    bootstrap draws the point is on the front, None where it takes no part.
    """

    exp_id: str
    kind: Kind
    x: Interval
    drop: Interval
    on_front: bool
    stop_reason: str | None
    record: Mapping[str, Any]
    ratio: Interval | None = None
    when: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Other:
    """What decoders are held against on the same shots: another decoder, or the limit that none can pass.

    x: median µs per shot, None where it was not timed. drop: percent against the teacher. record: the same as a row.
    """

    name: str
    x: float | None
    drop: Interval
    is_limit: bool
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Clock:
    """The teacher's p50 in ms that ratios refer to: the median of its ``timings``, one beside each trial."""

    p50_ms: float
    timings: int


def clock_of(rows: Sequence[Mapping[str, Any]]) -> Clock | None:
    """The teacher as each trial's timing saw it: the trial's p50 times its ratio. None where no record has both."""
    seen = [(number(row.get("t_pair_p50_ms")), number(row.get(RATIO))) for row in rows]
    found = [p50 * ratio for p50, ratio in seen if p50 is not None and ratio]
    return Clock(median(found), len(found)) if found else None


def point_of(row: Mapping[str, Any], record: Mapping[str, Any], across: Measure, clock: Clock | None) -> Point | str:
    """The row's place in the plane, or why it has none.

    row: what placing needs; record: all of it, for who points at it. clock: None where x is taken as measured.
    """
    teacher = row["role"] == "teacher"
    x = _interval(row, across.key, across.lo, across.hi, across.factor)
    ratio = _interval(row, RATIO, f"{RATIO}_lo", f"{RATIO}_hi", 1.0)
    if x and clock and ratio and ratio.lo > 0:
        whole = across.factor * clock.p50_ms
        x = Interval(whole / ratio.value, whole / ratio.hi, whole / ratio.lo)
    else:
        ratio = None
    # The teacher's drop against itself is zero by definition, whether or not it was written down.
    drop = Interval(0.0, 0.0, 0.0) if teacher else _interval(row, "drop", "drop_lo", "drop_hi", 100.0)
    missing = [name for name, value in ((across.name, x), ("drop", drop)) if value is None]
    if x is None or drop is None:
        why = f"no {' and no '.join(missing)}"
        status = str(row["status"])
        state = f"stopped: {row['stop_reason']}" if is_stop(row.get("stop_reason")) else status.lower()
        state = UNFINISHED[status] if is_open(row) else state
        return f"{why}; {state}"
    reason = row.get("stop_reason")
    stop = reason if is_stop(reason) else None
    when = str(row.get("datetime") or "")
    return Point(str(row["exp_id"]), kind_of(row), x, drop, False, stop, record, ratio, when)


def rate_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The teacher's own error rate on the test shots, by which a drop becomes a rate; None where no record tells."""
    for row in sorted(rows, key=lambda row: row["role"] != "teacher"):
        quality, drop = number(row.get("quality")), number(row.get("drop")) or 0.0
        if quality and drop > -1:
            return quality / (1 + drop)
    return None


def others_of(rows: Sequence[Mapping[str, Any]], rate: float | None, timed: bool) -> tuple[Other, ...]:
    """The decoders that the teacher's record (else the first) is compared with, placed by the paired ratio of rates.

    rate: the teacher's own. timed: whether x is their time; of other measures they have none.
    """
    for row in sorted(rows, key=lambda row: row["role"] != "teacher"):
        names = [key.removeprefix(_OVER) for key in row if key.startswith(_OVER) and not key.endswith(("_lo", "_hi"))]
        own = 1 + (number(row.get("drop")) or 0.0)
        found = [_other(name, row, own, rate, rows if timed else ()) for name in names if number(row.get(_OVER + name))]
        if found:
            return tuple(found)
    return ()


def _other(
    name: str, row: Mapping[str, Any], own: float, rate: float | None, rows: Sequence[Mapping[str, Any]]
) -> Other:
    ratio = _interval(row, _OVER + name, f"{_OVER}{name}_lo", f"{_OVER}{name}_hi", 1.0)
    assert ratio is not None
    drops = [100 * (own / part - 1) if part > 0 else math.inf for part in (ratio.value, ratio.hi, ratio.lo)]
    drop = Interval(drops[0], drops[1], drops[2] if math.isfinite(drops[2]) else drops[0])
    times = [time for r in rows if (time := number(r.get(f"us_per_shot_{name}"))) is not None]
    x = median(times) if times else None
    said, is_limit = _DECODERS.get(name, name), name == "exact"
    shown = {
        "exp_id": said,
        "t_pair_p50_ms": None if x is None else x / 1000,
        "domain": row.get("domain"),
        "quality": rate * own / ratio.value if rate else None,
        **{f"drop{end}": getattr(drop, field) / 100 for end, field in (("", "value"), ("_lo", "lo"), ("_hi", "hi"))},
        "workload_hash": row.get("workload_hash"),
        "us_per_shot": x,
        "role": "limit" if is_limit else "other decoder",
    }
    return Other(said, x, drop, is_limit, shown)


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What a trial counts as; one that meets its gate passes even if its training was cut short."""
    if row["role"] == "teacher":
        return "teacher"
    if row.get("verdict") == "pass":
        return "pass"
    if is_stop(row.get("stop_reason")):
        return "stopped"
    if is_open(row):
        return "open"
    return "fail" if row.get("verdict") == "fail" else "unjudged"


def is_open(row: Mapping[str, Any]) -> bool:
    """Whether a trial has no record yet: it runs, or its sweep was interrupted."""
    return row.get("verdict") is None and row.get("status") in UNFINISHED


def is_stop(reason: Any) -> bool:
    """Whether a stop reason says that a trial ended before its last epoch."""
    return bool(reason) and reason != "completed"


def number(value: Any) -> float | None:
    """A finite number, else None."""
    return float(value) if type(value) in (float, int) and math.isfinite(value) else None  # no bool


def _interval(row: Mapping[str, Any], key: str, lo: str, hi: str, unit: float) -> Interval | None:
    value = number(row.get(key))
    if value is None:
        return None
    low, high = number(row.get(lo)), number(row.get(hi))
    # A bootstrap interval can leave its value out; it is widened to it, as bars have no negative length.
    return Interval(
        value * unit,
        min(value if low is None else low, value) * unit,
        max(value if high is None else high, value) * unit,
    )
