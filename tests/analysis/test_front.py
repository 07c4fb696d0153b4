"""Fronts under uncertainty, their knee and their growth, against the definition and cases worked by hand."""

import random
from datetime import datetime, timedelta, timezone

import moocore
import numpy as np
import pytest

from analysis.front import _on_front, history, hypervolume, knee, mark_front, mark_shares, vertices
from analysis.points import Interval, Point


def point(name: str, x: float, y: float, wide: float = 0.0, kind: str = "pass", when: str = "") -> Point:
    across, drop = (Interval(value, value - wide, value + wide) for value in (x, y))
    return Point(name, kind, across, drop, False, None, {}, when=when)  # type: ignore[arg-type]


@pytest.mark.parametrize("ties", [False, True])
def test_every_draw_has_the_front_of_its_own(ties: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 6, (50, 9)).astype(float) if ties else rng.random((50, 9)) for _ in range(2))
    expected = [moocore.is_nondominated(np.stack(row, axis=1), keep_weakly=True) for row in zip(x, y, strict=True)]
    assert (_on_front(x, y, ties) == np.array(expected)).all()


def test_shares_say_how_sure_the_front_is() -> None:
    far = [point("a", 1, 1, 0.1), point("b", 9, 9, 0.1), point("s", 0, 0, 0.1, "stopped")]
    assert [p.share for p in mark_shares(far)] == [1.0, 0.0, None]
    exact = mark_shares([point("a", 1, 2), point("b", 1, 2), point("c", 1, 3)])
    assert [p.share for p in exact] == [1.0, 1.0, 0.0]
    # Two equal points with equal intervals: each beats the other in a quarter of the draws.
    even = mark_shares([point("a", 1, 1, 0.5), point("b", 1, 1, 0.5)], draws=4000)
    assert [p.share for p in even] == pytest.approx([0.75, 0.75], abs=0.03)  # four standard errors


def test_leaving_out_the_hopeless_changes_no_share() -> None:
    rng = random.Random(3)
    points = [point(str(i), rng.uniform(1, 9), rng.uniform(1, 9), 0.4) for i in range(60)]
    x, y = (np.array([getattr(p, name).value for p in points]) for name in ("x", "drop"))
    noise = np.random.default_rng(1)
    draws = _on_front(
        x + noise.normal(0, 0.4 / 1.96, (20_000, 60)), y + noise.normal(0, 0.4 / 1.96, (20_000, 60)), False
    )
    found = np.array([p.share for p in mark_shares(points, draws=20_000)])
    assert np.abs(found - draws.mean(0)).max() < 0.02  # five standard errors of two estimates


def test_the_knee_bulges_most_and_lies_within_the_gate() -> None:
    front = [point("fast", 1, 9), point("bend", 2, 2), point("slow", 9, 1)]
    found = knee(front, None)
    assert found is not None and found.exp_id == "bend"
    assert knee(front, 5.0) is None  # two points have no bend
    assert knee([point("a", 1, 9), point("b", 8, 8), point("c", 9, 1)], None) is None  # bent away from the ideal


def moment(rng: random.Random) -> str:
    """A time as records have it, on hosts of two time zones."""
    zone = timezone(timedelta(hours=rng.randint(1, 2)))
    return datetime.fromtimestamp(1.7e9 + 7200 * rng.random(), zone).isoformat()


@pytest.mark.parametrize("seed", range(5))
def test_the_front_grows_to_what_it_is(seed: int) -> None:
    rng = random.Random(seed)
    points = [point(str(i), rng.randint(1, 9), rng.randint(1, 9), when=moment(rng)) for i in range(40)]
    points.append(point("stopped", 0, 0, kind="stopped"))
    moments = history(points, (10.0, 10.0))
    worth = [moment.hypervolume for moment in moments]
    assert worth == sorted(worth) and len(set(worth)) == len(worth)
    final = sorted({vertex for vertex in vertices([p for p in mark_front(points) if p.on_front])})
    assert list(moments[-1].front) == final and worth[-1] == pytest.approx(hypervolume(final, (10.0, 10.0)))
    by_time = sorted(points[:-1], key=lambda p: datetime.fromisoformat(p.when))
    assert [by_time[moment.trials - 1].exp_id for moment in moments] == [moment.exp_id for moment in moments]
