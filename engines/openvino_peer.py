"""OpenVINO as a peer to compare with, where it is installed (the extra `openvino`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from engines.errors import InputError
from engines.runtimes import Arrays, check_threads


def installed() -> bool:
    """Whether OpenVINO can be imported."""
    return find_spec("openvino") is not None


class OpenVino:
    """OpenVINO on the CPU in single precision, one stream of `threads` threads.

    Raises InputError: not installed, a file that it cannot read, `threads` < 1.
    """

    name = "openvino"
    device = "cpu"

    def __init__(self, path: str | Path, threads: int) -> None:
        check_threads(threads)
        if not installed():
            raise InputError("engine openvino is not installed; pip install 'slimsweep[openvino]'")
        import openvino

        # On a CPU with bfloat16 it would use that by itself: no peer for single precision.
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        try:
            compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except Exception as error:  # openvino raises RuntimeError and its own kinds
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: openvino cannot load it ({reason}); export the model again") from error
        self._request = compiled.create_infer_request()

    def run(self, inputs: Arrays) -> Arrays:
        """Run the model on host arrays; returns host arrays of its own."""
        found = self._request.infer(list(inputs))
        return tuple(np.array(found[i]) for i in range(len(found)))

    def close(self) -> None:
        """Release the compiled model."""
        self._request = None
