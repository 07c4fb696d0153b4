"""The front of a set of points in the plane: who is on it, how surely, where its knee is, and how it grew.

Less is better on both axes. The exact parts (dominance, hypervolume) are moocore's.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import NormalDist

import moocore
import numpy as np

from analysis.points import Interval, Point

Vertex = tuple[float, float]
DRAWS = 500
_HALF = NormalDist().inv_cdf(0.975)  # half a 95 % interval, in standard deviations
_CELLS = 2_000_000  # drawn values held at once


@dataclass(frozen=True)
class Moment:
    """The front once ``trials`` points were measured: the last of them, ``exp_id``, moved it.

    ``when``: its record's time. ``front``: (x, drop) of its points, smallest x first.
    """

    trials: int
    when: str
    exp_id: str
    hypervolume: float
    front: tuple[Vertex, ...]


def mark_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The same points with ``on_front`` set: not beaten in both x and drop by another that is not stopped.

    Points with equal values are on the front together.
    """
    allowed = [i for i, point in enumerate(points) if point.kind != "stopped"]
    if not allowed:
        return tuple(points)
    plane = np.array([(points[i].x.value, points[i].drop.value) for i in allowed])
    best = moocore.is_nondominated(plane, keep_weakly=True)
    marked = list(points)
    for i in np.array(allowed)[best]:
        marked[i] = replace(points[i], on_front=True)
    return tuple(marked)


def mark_shares(points: Sequence[Point], seed: int = 0, draws: int = DRAWS) -> tuple[Point, ...]:
    """The same points with ``share`` set: of how many draws a point is on the front, as a fraction; stopped ones None.

    A draw moves every point within its own intervals: a normal value around the measured one, as wide to either side as
    the 95 % interval reaches there. Both intervals are relative to the teacher in the same samples and rounds, which is
    what the records pair; beyond that points are drawn independently, so that what trials have in common (the same hard
    samples) makes their order look less sure than it is. A value without an interval stays where it is.
    """
    able = np.array([i for i, point in enumerate(points) if point.kind != "stopped"], dtype=int)
    shares = np.zeros(len(points))
    near = able[_never_beaten([points[i] for i in able])] if len(able) else able
    rng = np.random.default_rng(seed)
    # Only points that do not move across can have the same x in a draw.
    ties = sum(points[i].x.lo == points[i].x.hi for i in near) > 1
    x, drop = (_Spread([getattr(points[i], name) for i in near]) for name in ("x", "drop"))
    done = 0
    while done < draws and len(near):
        rows = min(draws - done, max(1, _CELLS // len(near)))
        shares[near] += _on_front(x.draw(rng, rows), drop.draw(rng, rows), ties).sum(0)
        done += rows
    ranked = set(able.tolist())
    return tuple(
        replace(point, share=float(shares[i]) / draws) if i in ranked else point for i, point in enumerate(points)
    )


class _Spread:
    """Values with the standard deviations that their intervals say, downwards and upwards: (points,) each."""

    def __init__(self, intervals: Sequence[Interval]) -> None:
        self._value = np.array([one.value for one in intervals])
        self._down = (self._value - [one.lo for one in intervals]) / _HALF
        self._up = ([one.hi for one in intervals] - self._value) / _HALF

    def draw(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        """(rows, points) values."""
        z = rng.standard_normal((rows, len(self._value)), dtype=np.float32)
        return np.asarray(self._value + np.maximum(z, 0) * self._up + np.minimum(z, 0) * self._down)


def _never_beaten(points: Sequence[Point], reach: float = 3.0) -> np.ndarray:
    """Which points have any chance: their best corner, ``reach`` standard deviations out, is not beaten by the worst
    corner of another.
    """
    far = reach / _HALF
    planes = [np.array([[getattr(one, end) for one in (p.x, p.drop)] for p in points]) for end in ("value", "lo", "hi")]
    best, worst = (planes[0] + far * (end - planes[0]) for end in planes[1:])
    order = np.argsort(worst[:, 0], kind="stable")
    lowest = np.minimum.accumulate(worst[order, 1])
    place = np.searchsorted(worst[order, 0], best[:, 0], side="left") - 1
    return np.asarray((place < 0) | (lowest[np.maximum(place, 0)] >= best[:, 1]))


def _on_front(x: np.ndarray, y: np.ndarray, ties: bool) -> np.ndarray:
    """Which points of each row of (rows, points) no other of that row beats; equal points are on it together.

    ties: whether x may have equal values.
    """
    order = np.lexsort((y, x), axis=1) if ties else np.argsort(x, axis=1)
    ys, xs = (np.take_along_axis(values, order, axis=1) for values in (y, x))
    before = np.concatenate([np.full((len(y), 1), np.inf), np.minimum.accumulate(ys, axis=1)[:, :-1]], axis=1)
    good = ys < before
    for column in range(1, xs.shape[1]) if ties else ():
        equal = (xs[:, column] == xs[:, column - 1]) & (ys[:, column] == ys[:, column - 1])
        good[:, column] |= equal & good[:, column - 1]
    found = np.empty_like(good)
    np.put_along_axis(found, order, good, axis=1)
    return found


def knee(front: Sequence[Point], limit: float | None) -> Point | None:
    """The point of the front, within the limit (percent), that bulges most towards the ideal: farthest below the
    straight line between the front's ends, both axes scaled to the front (Das 1999). None where fewer than three points
    are left, or none lies below that line.
    """
    inside = [point for point in front if limit is None or point.drop.value <= limit]
    if len(inside) < 3:
        return None
    x, y = (np.array([getattr(point, name).value for point in inside]) for name in ("x", "drop"))
    wide, high = x[-1] - x[0], y[0] - y[-1]
    if wide <= 0 or high <= 0:
        return None
    below = 1 - (x - x[0]) / wide - (y - y[-1]) / high
    best = int(below.argmax())
    return inside[best] if below[best] > 1e-9 else None


def reference_of(points: Sequence[Point], limit: float | None) -> Vertex | None:
    """(x, drop in percent): the teacher's x and the gate's limit, where known, else a tenth beyond the worst point."""
    if not points:
        return None
    teachers = [p.x.value for p in points if p.kind == "teacher"]
    slowest, worst = max(p.x.value for p in points), max(p.drop.value for p in points)
    return (
        max(teachers) if teachers else 1.1 * slowest,
        limit if limit is not None else worst + 0.1 * (abs(worst) or 1.0),
    )


def hypervolume(front: Sequence[Vertex], reference: Vertex | None) -> float | None:
    """Area between the front and the reference, in the product of the axes' units; None without a reference."""
    if reference is None:
        return None
    inside = [(x, y) for x, y in front if x < reference[0] and y < reference[1]]
    return float(moocore.hypervolume(np.array(inside), ref=np.array(reference))) if inside else 0.0


def history(points: Sequence[Point], reference: Vertex | None) -> tuple[Moment, ...]:
    """The front after every trial that moved it, in the order of their records' times; stopped ones take no part."""
    able = sorted((p for p in points if p.kind != "stopped"), key=lambda p: instant(p.when))
    front: list[Vertex] = []
    moments = []
    for count, point in enumerate(able, 1):
        new = (point.x.value, point.drop.value)
        at = bisect_left(front, new)
        if new in front[at : at + 1] or (at and front[at - 1][1] <= new[1]):
            continue
        beaten = at
        while beaten < len(front) and front[beaten][1] >= new[1]:
            beaten += 1
        front[at:beaten] = [new]
        moments.append(Moment(count, point.when, point.exp_id, hypervolume(front, reference) or 0.0, tuple(front)))
    return tuple(moments)


def instant(when: str) -> float:
    """A record's time in seconds: as text, times of different offsets (a change of clocks) would be in disorder."""
    try:
        return datetime.fromisoformat(when).timestamp()
    except ValueError:
        return math.inf


def vertices(front: Sequence[Point]) -> list[Vertex]:
    """Where points stand."""
    return [(point.x.value, point.drop.value) for point in front]


def steps(front: Sequence[Vertex], top: float, right: float) -> list[Vertex]:
    """Corners (x, percent) of the front's step line, from the upper edge ``top`` to ``right``."""
    line: list[Vertex] = []
    for x, y in front:
        line.append((x, line[-1][1] if line else max(top, y)))
        line.append((x, y))
    if line:
        line.append((max(right, line[-1][0]), line[-1][1]))
    return line


def split_at(line: Sequence[Vertex], limit: float | None) -> tuple[list[Vertex], list[Vertex]]:
    """A step line in two: above ``limit`` percent, and at or below it (all of it without a limit)."""
    if limit is None:
        return [], list(line)
    above: list[Vertex] = []
    for i, (x, y) in enumerate(line):
        if y <= limit:
            crossing = [(x, limit)] if above else []
            return above + crossing, crossing + list(line[i:])
        above.append((x, y))
    return above, []
