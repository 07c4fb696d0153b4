"""Where labels go so that they cover neither each other nor the points. Pure geometry: pixels, y upwards."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Shared area, 0 when they only touch."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0


# (sign of x, sign of y, how welcome): right of the point reads best, then left, above, below and the corners.
_DIRECTIONS = ((1, 0, 0), (-1, 0, 1), (1, 1, 2), (1, -1, 2), (-1, 1, 3), (-1, -1, 3), (0, 1, 4), (0, -1, 4))
_DISTANCES = (8.0, 13.0, 22.0, 34.0, 50.0)


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    hard: Sequence[Box],
    soft: Sequence[Box],
    bounds: Box,
    unit: float = 1.0,
) -> list[Box | None]:
    """A box for each label beside its anchor, in order of importance; None where there is no room.

    sizes: (width, height) of each label. hard: what no label may cover (markers); soft: what it should not
    cover (lines, error bars). Labels never overlap each other or leave ``bounds``. unit: pixels per point,
    for distances.
    """
    taken: list[Box] = []
    placed: list[Box | None] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        best: tuple[float, Box] | None = None
        for ring, distance in enumerate(_DISTANCES):
            for dx, dy, rank in _DIRECTIONS:
                box = _beside(x, y, width, height, dx, dy, distance * unit)
                inside = (
                    box.left >= bounds.left
                    and box.right <= bounds.right
                    and box.bottom >= bounds.bottom
                    and box.top <= bounds.top
                )
                if not inside or any(box.overlap(other) > 0 for other in (*taken, *hard)):
                    continue
                area = width * height
                crossed = [share for other in soft if (share := box.overlap(other) / area)]
                cost = 3 * ring + 0.5 * rank + sum(1.5 + 10 * share for share in crossed)
                if best is None or cost < best[0]:
                    best = (cost, box)
        placed.append(best[1] if best else None)
        if best:
            taken.append(best[1])
    return placed


def spread(wanted: Sequence[float], height: float, low: float, high: float) -> list[float]:
    """Centres near ``wanted``, in its order, ``height`` apart and, room permitting, within [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    centres = [0.0] * len(wanted)
    floor = low + height / 2
    for i in order:
        centres[i] = floor = max(wanted[i], floor)
        floor += height
    ceiling = high - height / 2
    for i in reversed(order):
        centres[i] = ceiling = min(centres[i], ceiling)
        ceiling -= height
    return centres


def short(names: Sequence[str]) -> list[str]:
    """The names without the words that all of them share at the start and the end (words are joined by _)."""
    words = [name.split("_") for name in names]
    if len(set(names)) < 2:
        return list(names)
    start = end = 0
    least = min(len(parts) for parts in words)
    while start < least - 1 and len({parts[start] for parts in words}) == 1:
        start += 1
    while end < least - 1 - start and len({parts[-1 - end] for parts in words}) == 1:
        end += 1
    return ["_".join(parts[start : len(parts) - end]) for parts in words]


def _beside(x: float, y: float, width: float, height: float, dx: int, dy: int, distance: float) -> Box:
    reach = distance if not (dx and dy) else 0.75 * distance
    left = x + reach if dx > 0 else x - reach - width if dx < 0 else x - width / 2
    bottom = y + reach if dy > 0 else y - reach - height if dy < 0 else y - height / 2
    return Box(left, bottom, left + width, bottom + height)
