"""The teacher and a student as decoders for sinter.

SLIMSWEEP_STUDENT=aq_baseline.pth sinter collect --circuits *.stim --decoders slimsweep_teacher slimsweep_student \\
    --custom_decoders_module_function "trainables.alphaqubit.sinter_decoders:decoders" \\
    --max_shots 100000 --processes 2 --save_resume_filepath stats.csv

SLIMSWEEP_TEACHER and SLIMSWEEP_STUDENT hold the file of their weights, or several with a colon between them: a circuit
gets those of its distance and basis. The teacher's default are all that ship. Any number of rounds and any noise.
Where there are none of its basis, those of the other serve, with a warning: the code turned by 90 degrees exchanges X
and Z, but stim's circuits do not have that symmetry, which costs accuracy (README).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import sinter
import stim
import torch

from engines.errors import InputError
from trainables.alphaqubit.decisions import SHIPPED, Fit, decode, fitted, read
from trainables.alphaqubit.layout import layout_of
from trainables.alphaqubit.model import Decoder

VARIABLES = {"slimsweep_teacher": "SLIMSWEEP_TEACHER", "slimsweep_student": "SLIMSWEEP_STUDENT"}


class CompiledNeural(sinter.CompiledDecoder):  # type: ignore[misc]
    """A decoder for the detectors of one DEM."""

    def __init__(self, model: Decoder, fit: Fit) -> None:
        self._model, self._fit = model, fit

    def decode_shots_bit_packed(self, *, bit_packed_detection_event_data: np.ndarray) -> np.ndarray:
        """Predicted flips (N, ceil(observables / 8)) uint8, bits from the lowest; the data alike."""
        count = len(self._fit.placement.layer)
        flat = np.unpackbits(bit_packed_detection_event_data, axis=1, count=count, bitorder="little")
        found = decode(self._model, self._fit, flat)
        return np.packbits(found, axis=1, bitorder="little")


class Neural(sinter.Decoder):  # type: ignore[misc]
    """Weights by their paths, so that it pickles; they are read in the process that decodes."""

    def __init__(self, name: str, *paths: str) -> None:
        self.name, self.paths = name, paths

    def compile_decoder_for_dem(self, *, dem: stim.DetectorErrorModel) -> CompiledNeural:
        """InputError where there are no weights, or a circuit is of another distance or other observables."""
        if not self.paths:
            raise InputError(f"{self.name}: no weights; set {VARIABLES[self.name]} to the path of a decoder's file")
        torch.set_num_threads(1)  # sinter's processes are the parallelism
        placement = layout_of(dem)
        layout = placement.layout
        models = {path: read(Path(path)).eval() for path in self.paths}
        nearest = min(
            models,
            key=lambda path: [models[path].config[key] != getattr(layout, key) for key in ("distance", "basis")],
        )
        try:
            fit = fitted(models[nearest], placement, dem)
        except InputError as error:
            raise InputError(f"{self.name} ({nearest}): {error}") from None
        if fit.placement is not placement:
            warnings.warn(
                f"{self.name}: {nearest} is of basis {fit.placement.layout.basis} and decodes a circuit of basis "
                f"{layout.basis} by the code's symmetry, less well than weights of its own: python "
                f"sweeps/aq_pretrain.py --set basis={layout.basis} trains them",
                stacklevel=2,
            )
        return CompiledNeural(models[nearest], fit)


def decoders() -> dict[str, Neural]:
    """For sinter's custom_decoders: the teacher and the student by name."""
    shipped = os.pathsep.join(map(str, sorted(SHIPPED.parent.glob("*.safetensors"))))
    named = {name: os.environ.get(variable, "") for name, variable in VARIABLES.items()}
    named["slimsweep_teacher"] = named["slimsweep_teacher"] or shipped
    # Absolute, for the processes that decode.
    return {name: Neural(name, *(str(Path(path).expanduser().absolute()) for path in paths.split(os.pathsep) if path))
            for name, paths in named.items()}  # fmt: skip
