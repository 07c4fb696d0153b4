"""Which of its equivalent lines of data qubits an observable lies on, found from an error model.

Every row of data qubits carries the same logical Z, every column the same logical X; circuits differ in which they
read out, and the orientation of a device decides it as well. In a shot two lines differ by the final parities of the
stabilizers between them, so a decoder that answers for one line answers for all of them.
"""

from __future__ import annotations

import numpy as np
import stim

from engines.errors import InputError
from trainables.alphaqubit.layout import BOTH, Placement

_AGREE = 0.9  # of the errors, by probability: hook errors along the line's own direction may be misread


def kinds(placement: Placement) -> str:
    """The stabilizers' kind that tells the flips of each observable: 'X' or 'Z' of a memory, 'XZ' of both."""
    return placement.layout.basis if placement.layout.basis != BOTH else "XZ"


def _along(placement: Placement, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(S,) bool, the stabilizers of a kind; and (S,) the row of each for 'Z', the column for 'X'."""
    cells = placement.layout.cells
    return cells.sum(1) % 2 == (kind == "X"), cells[:, int(kind == "X")]


def observable_lines(dem: stim.DetectorErrorModel, placement: Placement) -> list[int]:
    """The line, 0 to d - 1, of every observable: a row of data qubits for Z, a column for X.

    An error's detectors say on which lines it flips data qubits: line k - 1 and line k differ by the parity of the
    stabilizers in row (column) k of cells. That leaves the lines or their complement, of which the fewer are taken.
    InputError where no line agrees with the flips that the error model says.
    """
    distance = placement.layout.distance
    weight, fired, flips = [], [], []
    for instruction in dem.flattened():
        if instruction.type == "error":
            targets = [target for target in instruction.targets_copy() if not target.is_separator()]
            weight.append(instruction.args_copy()[0])
            fired.append([target.val for target in targets if target.is_relative_detector_id()])
            flips.append([target.val for target in targets if target.is_logical_observable_id()])
    found = []
    for observable, kind in enumerate(kinds(placement)):
        own, line = _along(placement, kind)
        parity = np.zeros((len(fired), distance + 1), np.uint8)
        for error, detectors in enumerate(fired):
            slots = placement.slot[detectors]
            np.bitwise_xor.at(parity[error], line[slots[own[slots]]], 1)
        crossed = np.bitwise_xor.accumulate(parity[:, :distance], axis=1)
        crossed ^= (2 * crossed.sum(1) > distance)[:, None]
        flipped = np.array([own_flips.count(observable) % 2 for own_flips in flips], np.uint8)
        logical = crossed.any(1) | (flipped > 0)
        share = np.asarray(weight)[logical] @ (crossed == flipped[:, None])[logical]
        best = int(share.argmax())
        if not logical.any() or share[best] < _AGREE * np.asarray(weight)[logical].sum():
            raise InputError(
                f"observable {observable} is no {'row' if kind == 'Z' else 'column'} of data qubits of the code: a "
                "decoder cannot say whether it flips; let it be one, as in stim's generated circuits"
            )
        found.append(best)
    return found


def between(placement: Placement, lines: list[int]) -> list[np.ndarray]:
    """For every observable the slots of the stabilizers whose final parities lie between line 0 and its own."""
    slots = []
    for kind, k in zip(kinds(placement), lines, strict=True):
        own, line = _along(placement, kind)
        slots.append(np.flatnonzero(own & (line >= 1) & (line <= k)))
    return slots
