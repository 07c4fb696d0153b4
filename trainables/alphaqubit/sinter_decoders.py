"""The teacher and a student as decoders for sinter.

SLIMSWEEP_STUDENT=aq_baseline.pth sinter collect --circuits *.stim --decoders slimsweep_teacher slimsweep_student \\
    --custom_decoders_module_function "trainables.alphaqubit.sinter_decoders:decoders" \\
    --max_shots 100000 --processes 2 --save_resume_filepath stats.csv

SLIMSWEEP_TEACHER and SLIMSWEEP_STUDENT hold the files of their weights; the teacher's default is the shipped one. Any
number of rounds and any noise; distance and basis must be those of the weights.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import sinter
import stim
import torch

from engines.errors import InputError
from trainables.alphaqubit.decisions import SHIPPED, flips, logits, read
from trainables.alphaqubit.layout import Placement, layout_of
from trainables.alphaqubit.model import Decoder

VARIABLES = {"slimsweep_teacher": "SLIMSWEEP_TEACHER", "slimsweep_student": "SLIMSWEEP_STUDENT"}


class CompiledNeural(sinter.CompiledDecoder):  # type: ignore[misc]
    """A decoder for the detectors of one DEM."""

    def __init__(self, model: Decoder, placement: Placement) -> None:
        self._model, self._placement = model, placement

    def decode_shots_bit_packed(self, *, bit_packed_detection_event_data: np.ndarray) -> np.ndarray:
        """Predicted flips (N, ceil(observables / 8)) uint8, bits from the lowest; the data alike."""
        count = len(self._placement.layer)
        flat = np.unpackbits(bit_packed_detection_event_data, axis=1, count=count, bitorder="little")
        grid = self._placement.to_grid(flat)
        bits = (torch.from_numpy(part) for part in (grid, self._placement.measurements(grid)))
        found = flips(logits(self._model, *bits), self._model.config["outputs"])
        return np.packbits(found, axis=1, bitorder="little")


class Neural(sinter.Decoder):  # type: ignore[misc]
    """Weights by their path, so that it pickles; they are read in the process that decodes."""

    def __init__(self, name: str, path: str | None) -> None:
        self.name, self.path = name, path

    def compile_decoder_for_dem(self, *, dem: stim.DetectorErrorModel) -> CompiledNeural:
        """InputError where there are no weights, or a circuit is not of their experiment."""
        if self.path is None:
            raise InputError(f"{self.name}: no weights; set {VARIABLES[self.name]} to the path of a decoder's file")
        torch.set_num_threads(1)  # sinter's processes are the parallelism
        model = read(Path(self.path)).eval()
        placement = layout_of(dem)
        layout, config = placement.layout, model.config
        for key, theirs in (("distance", layout.distance), ("basis", layout.basis)):
            if config[key] != theirs:
                raise InputError(
                    f"{self.name}: the circuit is of {key}={theirs}, {self.path} of {key}={config[key]}: train a "
                    f"decoder for it (python sweeps/aq_pretrain.py --set {key}={theirs}) or give another circuit"
                )
        expected = 1 if config["outputs"] == "observable" else 2
        if dem.num_observables != expected:
            raise InputError(
                f"{self.name}: the circuit has {dem.num_observables} observables, {self.path} with "
                f"outputs={config['outputs']} predicts {expected}: keep as many in the circuit"
            )
        return CompiledNeural(model, placement)


def decoders() -> dict[str, Neural]:
    """For sinter's custom_decoders: the teacher and the student by name."""
    paths = {name: os.environ.get(variable) for name, variable in VARIABLES.items()}
    paths["slimsweep_teacher"] = paths["slimsweep_teacher"] or str(SHIPPED)
    # Absolute, for the processes that decode.
    return {name: Neural(name, str(Path(path).expanduser().absolute()) if path else None)
            for name, path in paths.items()}  # fmt: skip
