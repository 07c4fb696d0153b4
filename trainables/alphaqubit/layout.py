"""The stabilizers of a rotated surface code on their grid, as a decoder sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Where the stabilizers of a rotated surface code of distance d lie, and which observable a basis has.

    Stabilizers are ordered by (row, column). Data qubits form the d x d grid between the cells: data qubit (i, j)
    touches cells (i, j), (i, j+1), (i+1, j) and (i+1, j+1) where those are stabilizers. The observable is a line of
    data qubits: Z along a row for Z memory (all rows are equivalent), X along a column for X memory.
    """

    distance: int
    basis: str  # 'X' or 'Z': of the memory experiment
    cells: np.ndarray  # (S, 2) int64, S = d^2 - 1: row and column of each stabilizer on the (d+1) x (d+1) grid
    on_basis: np.ndarray  # (S,) bool: stabilizers of the memory's basis, which the final data measurement yields too


def rotated(distance: int, basis: str) -> Layout:
    """The layout of stim's generated rotated memory experiments: grid cell = (y/2, x/2) of stim's coordinates.

    Raises InputError for an even distance, one below 3, or an unknown basis.
    """
    if distance < 3 or distance % 2 == 0:
        raise InputError(f"distance={distance}: expected an odd number of at least 3")
    if basis not in ("X", "Z"):
        raise InputError(f"basis={basis!r}: expected 'X' or 'Z'")
    row, column = np.indices((distance + 1, distance + 1))
    is_z = (row + column) % 2 == 0
    inner_row, inner_column = ((x > 0) & (x < distance) for x in (row, column))
    # X stabilizers end the code at the top and bottom, Z stabilizers at the left and right: corners belong to none.
    present = (inner_row & inner_column) | (inner_column & ~inner_row & ~is_z) | (inner_row & ~inner_column & is_z)
    return Layout(distance, basis, np.argwhere(present), (is_z == (basis == "Z"))[present])
