"""What is said around a picture or a table: the gate, what was measured on what, and what to beware of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.front import DRAWS
from analysis.points import Clock, Point, is_open, is_stop, number
from analysis.words import Words
from trainables.record import InputError


@dataclass(frozen=True)
class Limit:
    """The sweep's gate; ``drop_pct`` is the line to draw, None when the gate is about another metric."""

    text: str
    drop_pct: float | None


def clock_note(clock: Clock | None, points: Sequence[Point], words: Words) -> str:
    """One line on how x was found: by paired ratios, and where not."""
    if clock is None or not any(point.ratio for point in points):
        return ""
    unpaired = sum(point.ratio is None for point in points)
    return (
        f"x: the teacher's p50, {words.per_ms * clock.p50_ms:.4g} {words.time} (median of {clock.timings} timings), "
        "divided by each trial's ratio to it, taken in the same alternating rounds"
        + (f"; {unpaired} without a ratio: p50 as measured" if unpaired else "")
    )


def shares_note(points: Sequence[Point], words: Words) -> str:
    """One line on the shares of draws in which points are on the front; "" where no point has an interval."""
    if not any(p.share is not None and (p.drop.hi > p.drop.lo or p.x.hi > p.x.lo) for p in points):
        return ""
    return (
        f"share on the front: of {DRAWS} draws of every point within its own intervals, which are paired with the "
        f"teacher's {words.samples} and rounds; points are drawn independently of each other, so shares are, if "
        "anything, too undecided"
    )


def gate_of(settings: Mapping[str, str]) -> Limit | None:
    """The gate in the parent run's settings (gate_metric, gate_at_most or gate_at_least), if there is one."""
    metric = settings.get("gate_metric")
    if not metric or metric == "None":
        return None
    for key, sign in (("gate_at_most", "≤"), ("gate_at_least", "≥")):
        try:
            value = float(settings.get(key, ""))
        except ValueError:
            continue
        if metric == "drop":
            return Limit(f"drop {sign} {100 * value:g} %", 100 * value)
        return Limit(f"{metric} {sign} {value:g}", None)
    return None


def common_gate(settings: Sequence[Mapping[str, str]]) -> Limit | None:
    """The gate of all sweeps; where they differ, the loosest limit on the drop, which says so; each trial's verdict is
    by its own sweep's.
    """
    gates = list(dict.fromkeys(map(gate_of, settings)))
    if len(gates) == 1:
        return gates[0]
    drops = sorted({gate.drop_pct for gate in gates if gate and gate.drop_pct is not None})
    if not drops:
        return None
    others = ", ".join(f"{drop:g}" for drop in drops[:-1])
    return Limit(f"drop ≤ {drops[-1]:g} %" + (f", of some sweeps {others} %" if others else ""), drops[-1])


def check_one_workload(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raises InputError, listing the workloads, when there is more than one: they are not comparable."""
    groups = _groups(rows, "workload_hash")
    if len(groups) > 1:
        raise InputError(
            f"{len(groups)} different workloads cannot be compared ({_said(groups)}); "
            "measure all on one workload, or name sweeps of one"
        )


def check_one_reference(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError when several sweeps take their drops against different references."""
    groups = _groups((row for row in rows if row["role"] != "teacher"), "reference")
    if len(groups) > 1 and len({row["sweep"] for row in rows}) > 1:
        raise InputError(
            f"drops against {len(groups)} different references cannot be compared ({_said(groups)}); "
            "name sweeps with one reference"
        )


def _groups(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[str]]:
    """Which trials have which value, with their sweep where there are several."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get(key):
            where = f"{row['sweep']}/" if row.get("sweep") else ""
            found.setdefault(str(row[key]), []).append(f"{where}{row['exp_id']}")
    return found


def _said(groups: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(
        f"{key[:24]}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for key, names in groups.items()
    )


def headline(rows: Sequence[Mapping[str, Any]], gate: Limit | None) -> str:
    """One line of what came out, counted over all trials."""
    trials = [row for row in rows if row["role"] != "teacher"]
    passed = sum(row.get("verdict") == "pass" for row in trials)
    stopped = sum(is_stop(row.get("stop_reason")) for row in trials)
    what = f"{passed} of {len(trials)} trials meet the gate ({gate.text})" if gate else f"{len(trials)} trials"
    unfinished = sum(is_open(row) for row in trials)
    what += f"  ·  {stopped} stopped early" if stopped else ""
    return what + (f"  ·  {unfinished} not finished" if unfinished else "")


def load_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """A warning where latency was measured with more runnable processes than cores, else an empty string."""
    pairs = [(number(row.get("load_1m")), number(row.get("cores"))) for row in rows]
    high = [(load, cores) for load, cores in pairs if load is not None and cores is not None and load > cores]
    if not high:
        return ""
    load, cores = max(high)
    return f"load {load:.1f} on {cores:g} cores when latency was measured: trust the ratios, not the times"


def caption(
    rows: Sequence[Mapping[str, Any]],
    loads: Sequence[Mapping[str, Any]],
    settings: Mapping[str, str],
    words: Words,
) -> tuple[str, ...]:
    """Where the numbers come from, as far as is known: workload, domain, engine, device, size of the test.

    loads: of all trials, see ``load_note``.
    """
    parts = []
    for name, key in (
        ("workload", "workload_hash"),
        ("domain", "domain"),
        ("profile", "profile"),
        ("against", "parent"),
        ("engine", "engine"),
        ("device", "device"),
    ):
        found = [row.get("reference") or row.get(key) if name == "against" else row.get(key) for row in rows]
        values = list(dict.fromkeys(str(value) for value in found if value))
        if values:
            shown = [value[:12] for value in values] if key == "workload_hash" else values
            parts.append(f"{name} {' / '.join(shown)}")
    for name, key in (("images", "image_size"), (f"test {words.samples}", f"test_{words.samples}")):
        if settings.get(key):
            parts.append(f"{name} {settings[key]}")
    warning = load_note(loads)
    return (*parts, warning) if warning else tuple(parts)
