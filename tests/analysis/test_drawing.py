"""What the pictures compute before they draw: label places, axis scales, learning curves."""

import math
import random

import pytest

from analysis import curves
from analysis.labels import Box, place, short, spread
from analysis.points import Kind
from analysis.scale import Scale, choose, unmap
from analysis.store import load


@pytest.mark.parametrize("seed", range(5))
def test_labels_cover_neither_each_other_nor_a_marker(seed: int) -> None:
    rng = random.Random(seed)
    anchors = [(rng.gauss(400, 120), rng.gauss(250, 80)) for _ in range(40)]
    hard = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    bounds = Box(0, 0, 800, 500)
    placed = [b for b in place(anchors, [(70.0, 14.0)] * 40, hard, [], bounds) if b]
    assert len(placed) >= 20
    for i, box in enumerate(placed):
        assert all(box.overlap(other) == 0 for other in (*placed[:i], *hard))
        assert box.left >= 0 and box.bottom >= 0 and box.right <= 800 and box.top <= 500


def test_spread_keeps_order_and_distance() -> None:
    found = spread([50, 52, 51, 90], 10, 0, 95)
    assert sorted(range(4), key=lambda i: found[i]) == [0, 2, 1, 3]
    ordered = sorted(found)
    assert all(b - a >= 10 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    assert ordered[0] >= 5 and ordered[-1] <= 90


def test_short_names_stay_distinct() -> None:
    assert short(["K_T3B05_run1", "K_T5B05_run1", "K_T3B05_sched_run1"]) == ["T3B05", "T5B05", "T3B05_sched"]
    assert short(["K_a_run1"]) == ["K_a_run1"]
    assert short(["K_a", "K_a_b"]) == ["a", "a_b"]


@pytest.mark.parametrize("scale", [Scale(), Scale(1.0), Scale(3.0)])
def test_scales_are_monotonic_and_invertible(scale: Scale) -> None:
    values = [-300.0, -2.0, -0.5, 0.0, 0.2, 1.0, 1.5, 9.0, 400.0]
    places = [scale.map(v) for v in values]
    assert places == sorted(places) and [unmap(scale, p) for p in places] == pytest.approx(values)
    ticks = scale.ticks(-2, 400)
    assert 3 <= len(ticks) <= 10 and all(-2 <= value <= 400 for value, _ in ticks)


def test_the_axis_is_linear_until_drops_go_far_past_the_gate() -> None:
    assert choose([0.5, 2.0], 1.0) == Scale() and choose([0.5, 60.0], 1.0) == Scale(1.0)
    assert choose([0.5, 60.0], None) == Scale() and choose([math.nan, math.inf], 1.0) == Scale()


@pytest.mark.parametrize("kinds", [["pass"] * 6, ["pass", "fail"] * 4, ["stopped"] * 3])
def test_every_trial_of_a_verdict_has_a_look_of_its_own(kinds: list[Kind]) -> None:
    lines = [curves.Curve(f"K_{i}", kind, (1,), (0.5,), None) for i, kind in enumerate(kinds)]
    looks = curves.looks(lines)
    for kind in set(kinds):
        mine = [looks[line.exp_id] for line in lines if line.kind == kind]
        assert len({look["marker"] for look in mine}) == len({(look["linestyle"], look["color"]) for look in mine})
        assert len({look["marker"] for look in mine}) == len(mine)
        widths = [look["linewidth"] for look in mine]
        assert widths == sorted(widths, reverse=True), "what is drawn later must leave what is below visible"


def test_a_crowd_is_told_apart_by_verdict_alone() -> None:
    assert curves.looks([curves.Curve(f"K_{i}", "pass", (1,), (0.5,), None) for i in range(40)]) == {}


def test_curves_end_where_their_trial_did(uri: str) -> None:
    found = {c.exp_id: c for c in curves.compute(load(uri, "forty"))}
    assert len(found) == 41 and "K_teacher_run1" not in found
    diverged = found["K_search40_run1"]
    assert diverged.stop_reason == "diverged" and math.isnan(diverged.drop[-1])
    assert diverged.last == (2, 70.0)
