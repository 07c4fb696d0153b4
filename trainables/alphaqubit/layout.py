"""Where the stabilizers of a rotated surface code lie, found from the coordinates of a circuit's or DEM's detectors.

Two ways of writing coordinates are read: stim's generated circuits (x, y, t), stabilizers at even x and y, and those
of Google's devices (row, column, t), turned by 45 degrees: u = row + column and v = row - column are the axes of the
code. Both end on the same grid, so that a model sees one arrangement whatever the source:

cell (i, j), 0 <= i, j <= d, is stim's (x, y) = (2 j, 2 i); cells with i + j even measure Z, odd ones X; rows 0 and d
hold X stabilizers only, columns 0 and d Z stabilizers only. Data qubit (i, j), 0 <= i, j < d, is stim's
(2 j + 1, 2 i + 1) and touches cells (i, j), (i, j+1), (i+1, j), (i+1, j+1) where those are stabilizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import stim

from engines.errors import InputError

BOTH = "XZ"
_EXPECTED = "expected those of stim's rotated surface code circuits or of Google's devices (row, column, round)"


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the stabilizers of a rotated surface code of distance d lie, and which observable a basis has.

    distance: d, odd, 3 or more. basis: 'X' or 'Z' of a memory experiment, 'XZ' where both observables are kept in one
    shot. cells: (S, 2) int64, S = d^2 - 1, row and column on the (d+1) x (d+1) grid, sorted. on_basis: (S,) bool, the
    stabilizers that the experiment's beginning and end fix: those of the memory's basis, all of them for 'XZ'.

    The observable is a line of data qubits: Z along a row (all rows are equivalent) for 'Z', X along a column for 'X'.
    """

    distance: int
    basis: str
    cells: np.ndarray
    on_basis: np.ndarray


@dataclass(frozen=True, eq=False)
class Placement:
    """How the D detectors of an experiment of R rounds fill its R+1 layers of S stabilizers.

    layer, slot: (D,) int64, of each detector in the order of the circuit or DEM. Layers 0 and R hold the detectors of
    on-basis stabilizers only.
    """

    layout: Layout
    rounds: int
    layer: np.ndarray
    slot: np.ndarray

    def to_grid(self, flat: np.ndarray) -> np.ndarray:
        """Detection events (N, D) -> (N, R+1, S) uint8, zeros where there is no detector."""
        if flat.ndim != 2 or flat.shape[1] != len(self.layer):
            raise InputError(f"events of shape {tuple(flat.shape)}: expected (shots, {len(self.layer)} detectors)")
        grid = np.zeros((len(flat), self.rounds + 1, len(self.layout.cells)), np.uint8)
        grid[:, self.layer, self.slot] = flat
        return grid

    def to_flat(self, grid: np.ndarray) -> np.ndarray:
        """Detection events (N, R+1, S) -> (N, D), the inverse of :meth:`to_grid`."""
        flat: np.ndarray = grid[:, self.layer, self.slot]
        return flat

    def measurements(self, grid: np.ndarray) -> np.ndarray:
        """Stabilizer outcomes (N, R+1, S) uint8 from events: their cumulative XOR along the layers.

        An off-basis stabilizer counts from its first outcome, which is random, and is 0 in layer R, where the data
        qubits' measurement says nothing of it.
        """
        outcomes = np.bitwise_xor.accumulate(grid, axis=1)
        outcomes[:, -1, ~self.layout.on_basis] = 0
        return outcomes

    def exchanged(self) -> Placement:
        """The detectors of a memory experiment as if they were those of the other basis: the code turned by 90 degrees.

        The turn (i, j) -> (j, d - i) maps the grid onto itself, X stabilizers onto Z stabilizers and back, and the X
        observable's columns of data qubits onto the Z observable's rows. It is a symmetry of the code, and not of
        stim's circuits: turned, the order in which an X stabilizer touches its data qubits is not that of a Z
        stabilizer, so that errors between two of these gates show elsewhere, and no turn or reflection mends that. At
        distance 3 and p = .005, 88 % of the error model's probability is common to both bases.
        """
        layout = self.layout
        known = {(int(i), int(j)): slot for slot, (i, j) in enumerate(layout.cells)}
        slots = np.array([known[i, j] for i, j in _quarter_turn(layout.cells, layout.distance).tolist()])
        other = rotated(layout.distance, "Z" if layout.basis == "X" else "X")
        return Placement(other, self.rounds, self.layer, slots[self.slot])


def grid_cells(distance: int) -> np.ndarray:
    """(d^2 - 1, 2) int64: the stabilizers of a distance-d code by row and column, sorted."""
    inside = [(i, j) for i in range(1, distance) for j in range(1, distance)]
    even, odd = range(2, distance, 2), range(1, distance, 2)
    rows = [(0, j) for j in odd] + [(distance, j) for j in even]
    columns = [(i, 0) for i in even] + [(i, distance) for i in odd]
    return np.array(sorted(inside + rows + columns), np.int64)


def rotated(distance: int, basis: str) -> Layout:
    """The layout of a code of this distance; basis 'X', 'Z' or 'XZ'. InputError for what is none."""
    if distance < 3 or distance % 2 == 0:
        raise InputError(f"distance={distance}: expected an odd number of at least 3")
    if basis not in ("X", "Z", BOTH):
        raise InputError(f"basis={basis!r}: expected 'X', 'Z' or '{BOTH}'")
    cells = grid_cells(distance)
    return Layout(distance, basis, cells, _on_basis(cells, basis))


def _quarter_turn(cells: np.ndarray, distance: int) -> np.ndarray:
    """(n, 2) cells after a turn by 90 degrees, which swaps X and Z stabilizers (d is odd)."""
    return np.stack([cells[:, 1], distance - cells[:, 0]], 1)


def _on_basis(cells: np.ndarray, basis: str) -> np.ndarray:
    """(S,) bool: the stabilizers that an experiment of this basis fixes at its beginning and end."""
    parity = cells.sum(1) % 2
    on: np.ndarray = np.ones(len(cells), bool) if basis == BOTH else parity == (basis == "X")
    return on


def layout_of(source: stim.Circuit | stim.DetectorErrorModel, basis: str | None = None) -> Placement:
    """The layout behind a circuit's or DEM's detectors, and where each detector belongs.

    basis: of the memory experiment. Not needed for coordinates as stim writes them. Those of a device do not tell
    it; then None calls the basis Z if its stabilizers end at the left and right of the grid. InputError where the
    coordinates are not those of a rotated surface code, or not of this basis.
    """
    if basis not in (None, "X", "Z"):
        raise InputError(f"basis {basis!r} is unknown, use X or Z")
    table = source.get_detector_coordinates()
    if not table:
        raise InputError(f"no detectors found: {_EXPECTED}")
    coordinates = [table[k] for k in range(len(table))]
    for k, values in enumerate(coordinates):
        if len(values) < 3 or len(values) % 3:
            raise InputError(f"detector {k} has coordinates {tuple(values)}: {_EXPECTED}")
    # A device's detector may list the three coordinates of several qubits; the measured one is the last or the first.
    for part in (slice(-3, None), slice(0, 3)):
        points = np.array([values[part] for values in coordinates])
        for turned in (False, True):
            placement = _place(points, turned, basis)
            if placement is not None:
                return placement
    points = np.array([values[:3] for values in coordinates])
    places, layers = len(np.unique(points[:, :2], axis=0)), len(np.unique(points[:, 2]))
    raise InputError(
        f"coordinates of {len(points)} detectors at {places} places in {layers} layers match no rotated surface code "
        f"of odd distance: {_EXPECTED}"
    )


def _place(points: np.ndarray, turned: bool, basis: str | None) -> Placement | None:
    """The placement of (D, 3) coordinates read in one of the two ways, None where they do not fit it."""
    place, time = points[:, :2], points[:, 2] - points[:, 2].min()
    place = np.stack([place.sum(1), place[:, 0] - place[:, 1]], 1) if turned else place[:, ::-1]
    half = (place - place.min(0)) / 2
    if (half % 1).any() or (time % 1).any() or time.max() < 1:
        return None
    cells, layer, rounds = half.astype(np.int64), time.astype(np.int64), int(time.max())
    # One round of a memory experiment shows its own basis only, which does not reach two sides of the grid.
    distance = int(cells.max())
    cells = cells + (cells.max(0) == distance - 2)
    if distance < 3 or distance % 2 == 0 or (cells.max(0) < distance - 1).any():
        return None
    known = {(int(i), int(j)): slot for slot, (i, j) in enumerate(grid_cells(distance))}
    if not all((i, j) in known for i, j in cells.tolist()):
        cells[:, 1] = distance - cells[:, 1]  # a device's code may be the mirror image
    if not all((i, j) in known for i, j in cells.tolist()):
        return None
    first = np.array(sorted({(i, j) for i, j in cells[layer == 0].tolist()}))
    found = _basis_of(first, distance)
    if found is None:
        return None
    if basis is not None and found != basis:
        if not turned or found == BOTH:
            raise InputError(f"basis={basis} but the detectors are of basis {found}: give the basis of the experiment")
        cells = _quarter_turn(cells, distance)
        found = basis
    layout = rotated(distance, found)
    on = layout.on_basis
    slot = np.array([known[i, j] for i, j in cells.tolist()])
    expected = np.ones((rounds + 1, len(on)), bool)
    expected[[0, -1]] = on
    count = np.zeros(expected.shape, np.int64)
    np.add.at(count, (layer, slot), 1)
    if not np.array_equal(count, expected):
        return None
    return Placement(layout, rounds, layer, slot)


def _basis_of(first: np.ndarray, distance: int) -> str | None:
    """'X', 'Z' or 'XZ' by which stabilizers the first layer shows, None where it is none of these."""
    parities = set((first.sum(1) % 2).tolist())
    if len(first) == distance**2 - 1:
        return BOTH
    if len(parities) != 1 or 2 * len(first) != distance**2 - 1:
        return None
    return "X" if parities == {1} else "Z"
