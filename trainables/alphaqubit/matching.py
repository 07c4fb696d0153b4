"""Decoders that a neural one is held against, on the same shots: PyMatching, plain and correlated, and others.

beliefmatching and tesseract are optional, the extra `decoders`; they are offered where they can be imported.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pymatching
import stim

from engines.errors import InputError

BELIEF_ITERATIONS = 20
TESSERACT_BEAM = 20
_MODULES = {
    "pymatching": "pymatching",
    "pymatching_correlated": "pymatching",
    "beliefmatching": "beliefmatching",
    "tesseract": "tesseract_decoder",
}

Source: TypeAlias = stim.Circuit | stim.DetectorErrorModel


def available() -> tuple[str, ...]:
    """The decoders that can be used here."""
    return tuple(name for name, module in _MODULES.items() if importlib.util.find_spec(module) is not None)


def decode(name: str, source: Source, events: np.ndarray) -> np.ndarray:
    """Predicted flips (N, K) uint8 from events (N, D) of 0 and 1, in the order of the source's detectors.

    source: a circuit, or its DEM. Matching needs a DEM whose errors are decomposed. InputError for a decoder that is
    unknown or not installed, for a DEM that is not decomposed and for events of another shape.
    """
    if name not in _MODULES:
        raise InputError(f"decoder {name!r} is unknown, use one of {', '.join(_MODULES)}")
    if name not in available():
        raise InputError(f"decoder {name!r} is not installed: pip install -c constraints.txt -e '.[decoders]'")
    if events.ndim != 2 or events.shape[1] != source.num_detectors:
        raise InputError(f"events of shape {tuple(events.shape)}: expected (shots, {source.num_detectors} detectors)")
    return _DECODERS[name](source, np.ascontiguousarray(events, dtype=np.uint8)).astype(np.uint8)


def single(source: Source, correlated: bool) -> Callable[[np.ndarray], np.ndarray]:
    """PyMatching for one shot a call: events (D,) uint8 -> predicted flips (K,). The graph is built here, once."""
    graph = _graph(source, correlated)
    return lambda events: np.asarray(graph.decode(events, enable_correlations=correlated))


def _matching(source: Source, events: np.ndarray, correlated: bool) -> np.ndarray:
    return np.asarray(_graph(source, correlated).decode_batch(events, enable_correlations=correlated))


def _graph(source: Source, correlated: bool) -> Any:
    dem = source.detector_error_model(decompose_errors=True) if isinstance(source, stim.Circuit) else source
    _check_graph(dem)
    # Correlations take effect only where both the graph and the decoding ask for them.
    return pymatching.Matching.from_detector_error_model(dem, enable_correlations=correlated)


def _check_graph(dem: stim.DetectorErrorModel) -> None:
    """PyMatching leaves out, silently, errors of more than two detectors."""
    for instruction in dem.flattened():
        if instruction.type != "error":
            continue
        for part in instruction.target_groups():
            if sum(target.is_relative_detector_id() for target in part) > 2:
                raise InputError(
                    "an error of the DEM flips more than two detectors: matching needs "
                    "detector_error_model(decompose_errors=True)"
                )


def _belief(source: Source, events: np.ndarray) -> np.ndarray:
    decoder = importlib.import_module("beliefmatching").BeliefMatching(source, max_bp_iters=BELIEF_ITERATIONS)
    return np.asarray(decoder.decode_batch(events))


def _tesseract(source: Source, events: np.ndarray) -> np.ndarray:
    dem = source.detector_error_model() if isinstance(source, stim.Circuit) else source
    tesseract = importlib.import_module("tesseract_decoder").tesseract
    decoder = tesseract.TesseractConfig(dem=dem, det_beam=TESSERACT_BEAM).compile_decoder()
    return np.asarray(decoder.decode_batch(events.astype(bool)))


_DECODERS: dict[str, Callable[[Source, np.ndarray], np.ndarray]] = {
    "pymatching": lambda source, events: _matching(source, events, False),
    "pymatching_correlated": lambda source, events: _matching(source, events, True),
    "beliefmatching": _belief,
    "tesseract": _tesseract,
}
