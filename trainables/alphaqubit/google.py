"""Surface-code data that Google published, the Sycamore and the Willow folders: read, and decoded.

python -m trainables.alphaqubit.google FOLDER                       # one experiment, or all below a folder
python -m trainables.alphaqubit.google FOLDER DECODER.pth --rounds 13 --basis X

Sycamore (Zenodo 6804040): surface_code_b{X|Z}_d{d}_r{rounds}_center_{row}_{column}/ with properties.yml, *.b8 and *.01.
Willow (Zenodo 13273331): d{d}_at_q{row}_{column}/{X|Z}/r{rounds}/ with metadata.json, *.b8 and decoding_results/. The
rounds are padded with zeros in some copies and not in others; both are found.

b8: ceil(n/8) bytes per shot, lowest bit first. 01: n characters and a newline per shot. n comes from
circuit_ideal.stim. Nothing in these files is executed or unpickled.

Needed: the description, circuit_ideal.stim, detection_events.b8 and obs_flips_actual, and of a Willow decoder its
predictions. Optional: measurements.b8 with its sweep bits, which the events and flips are checked against; error models
and the noisy circuit, on which matching decodes. What is absent is said.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import stim
import torch

from engines.errors import InputError, command_line
from engines.untrusted import yaml_data
from trainables.alphaqubit import decisions, matching
from trainables.alphaqubit.compare import FAST, binomial
from trainables.alphaqubit.layout import BOTH, Placement, layout_of
from trainables.alphaqubit.model import Decoder

_SYCAMORE = re.compile(r"surface_code_b(?P<basis>[XZ])_d(?P<distance>\d+)_r(?P<rounds>\d+)_center_\d+_\d+")
_WILLOW = re.compile(r"d(?P<distance>\d+)_at_q\d+_\d+/(?P<basis>[XZ])/r(?P<rounds>\d+)")
_PREDICTED = "obs_flips_predicted_by_"
_Source = TypeVar("_Source", stim.Circuit, stim.DetectorErrorModel)
_PROPERTIES, _METADATA = "properties.yml", "metadata.json"


@dataclass(frozen=True, eq=False)
class Recorded:
    """One experiment: N shots of R rounds on S stabilizers.

    source: 'sycamore' or 'willow'. properties: the folder's own description. circuit: as run, without noise, with the
    device's coordinates. noisy: with the noise model that was shipped, None where there is none. flat: detection events
    (N, D) in the circuit's order. events, measurements: (N, R+1, S), see
    :class:`~trainables.alphaqubit.layout.Placement`. label: (N, 1), whether the observable flipped. predictions: (N, 1)
    by the name of the decoder that was shipped with them, dems: error models by file or decoder. absent: optional files
    that are not there, and what that means. Arrays are uint8.
    """

    folder: Path
    source: str
    properties: Mapping[str, Any]
    basis: str
    circuit: stim.Circuit
    noisy: stim.Circuit | None
    placement: Placement
    flat: np.ndarray
    events: np.ndarray
    measurements: np.ndarray
    label: np.ndarray
    predictions: Mapping[str, np.ndarray]
    dems: Mapping[str, stim.DetectorErrorModel]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class _Shots:
    """How many shots the files of a folder hold, and the file that says so."""

    count: int
    said_by: str


def find(
    root: Path, distance: int | None = None, basis: str | None = None, rounds: int | None = None
) -> tuple[Path, ...]:
    """Folders of experiments, root itself or below it, sorted by name, those asked for. InputError for none."""
    if not root.is_dir():
        raise InputError(f"{root} is no folder: give the one that the data set was unpacked into")
    found = []
    for marker in (_PROPERTIES, _METADATA):
        for path in root.rglob(marker):
            named = _named(path.parent)
            wanted = {"distance": distance, "basis": basis, "rounds": rounds}
            if named and all(value is None or named[key] == value for key, value in wanted.items()):
                found.append(path.parent)
    if not found:
        raise InputError(
            f"{root} holds no experiment of distance={distance}, basis={basis}, rounds={rounds}: expected folders "
            "surface_code_bX_d3_r03_center_3_5 (Sycamore) or d3_at_q4_7/X/r13 (Willow)"
        )
    return tuple(sorted(found))


def read(folder: Path) -> Recorded:
    """The experiment in a folder. InputError names the file that is missing, short or disagrees with the others."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: expected one of a Sycamore or Willow experiment")
    willow = not (folder / _PROPERTIES).is_file()
    if willow and not (folder / _METADATA).is_file():
        raise InputError(f"{folder / _METADATA} is missing, and so is {_PROPERTIES}: expected one of the two")
    described = folder / (_METADATA if willow else _PROPERTIES)
    properties = _properties(described)
    wanted = _wanted(folder, described, properties)
    circuit = _circuit(folder / "circuit_ideal.stim")
    try:
        placement = layout_of(circuit, wanted["basis"])
    except InputError as error:
        raise InputError(f"{folder / 'circuit_ideal.stim'}: {error}") from None
    layout = placement.layout
    for name, value in (("distance", layout.distance), ("rounds", placement.rounds)):
        if value != wanted[name]:
            raise InputError(f"{described} says {name}={wanted[name]} but circuit_ideal.stim has {value}: one is wrong")
    if circuit.num_observables != 1:
        raise InputError(f"{folder / 'circuit_ideal.stim'} has {circuit.num_observables} observables: expected 1")
    told = wanted["shots"]
    flat = _b8(folder / "detection_events.b8", circuit.num_detectors, told and _Shots(told, described.name))
    shots = _Shots(len(flat), described.name if told else "detection_events.b8")
    label = _b8(folder / "obs_flips_actual.b8", 1, shots) if willow else _text(folder / "obs_flips_actual.01", 1, shots)
    compared = _compare(folder, circuit, "sweep_bits.b8" if willow else "sweep.b8", flat, label, shots)
    absent = [] if compared else ["measurements.b8, so events and flips are not checked against it"]
    predictions, dems = (_willow if willow else _sycamore)(folder, circuit, shots)
    absent += [
        f"error_model.dem of {name}, so matching does not decode on it"
        for name in predictions
        if willow and name not in dems
    ]
    noisy = folder / ("circuit_noisy_si1000.stim" if willow else "circuit_noisy.stim")
    events = placement.to_grid(flat)
    return Recorded(
        folder=folder,
        source="willow" if willow else "sycamore",
        properties=properties,
        basis=wanted["basis"],
        circuit=circuit,
        noisy=_same_detectors(noisy, _circuit(noisy), circuit) if noisy.is_file() else None,
        placement=placement,
        flat=flat,
        events=events,
        measurements=placement.measurements(events),
        label=label,
        predictions=predictions,
        dems=dems,
        absent=tuple(absent),
    )


def _named(folder: Path) -> dict[str, Any]:
    """distance, basis and rounds by the folder's name, empty where it follows neither scheme."""
    match = _SYCAMORE.fullmatch(folder.name) or _WILLOW.fullmatch("/".join(folder.absolute().parts[-3:]))
    if match is None:
        return {}
    return {"distance": int(match["distance"]), "basis": match["basis"], "rounds": int(match["rounds"])}


def _properties(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml_data(text, str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, InputError) as error:
        raise InputError(f"{path} cannot be read ({str(error).splitlines()[0]}): get the file again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no table of keys and values: get the file again")
    return values


def _wanted(folder: Path, described: Path, properties: Mapping[str, Any]) -> dict[str, Any]:
    """basis, distance, rounds and shots (None where nothing says it), from the description, then the folder's name."""
    wanted = {
        **_named(folder),
        **{key: properties[key] for key in ("basis", "rounds", "distance") if key in properties},
    }
    for key in ("basis", "rounds", "distance"):
        if key not in wanted:
            raise InputError(f"{described} has no key {key!r} and the folder's name does not tell it either")
    shots = wanted["shots"] = properties.get("shots")
    for key in ("rounds", "distance", *(["shots"] if shots is not None else [])):
        if not isinstance(wanted[key], int) or wanted[key] < 1:
            raise InputError(f"{described}: {key}={wanted[key]!r} is no number of 1 or more")
    if wanted["basis"] not in ("X", "Z"):
        raise InputError(f"{described}: basis={wanted['basis']!r} is unknown, expected X or Z")
    return wanted


def _text_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise InputError(f"{path} is missing or cannot be read: get the experiment's folder again") from None


def _circuit(path: Path) -> stim.Circuit:
    try:
        return stim.Circuit(_text_of(path).decode())
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is no stim circuit ({str(error).splitlines()[0]}): get the file again") from None


def _dem(path: Path, circuit: stim.Circuit) -> stim.DetectorErrorModel:
    try:
        dem = stim.DetectorErrorModel(_text_of(path).decode())
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is no error model ({str(error).splitlines()[0]}): get the file again") from None
    return _same_detectors(path, dem, circuit)


def _same_detectors(path: Path, source: _Source, circuit: stim.Circuit) -> _Source:
    """A file's DEM or circuit, if its detectors and observable are those of the circuit that was run."""
    for what in ("detectors", "observables"):
        theirs, ours = (getattr(one, f"num_{what}") for one in (source, circuit))
        if theirs != ours:
            raise InputError(f"{path} has {theirs} {what} but circuit_ideal.stim has {ours}: one is wrong")
    known = circuit.get_detector_coordinates()
    for detector, theirs in source.get_detector_coordinates().items():
        ours, count = known[detector], len(theirs)
        # A detector may list several qubits in one file, and in the other the first or the last of them, or none.
        if not any(
            len(part) == count and np.allclose(part, theirs) for part in (ours[:count], ours[len(ours) - count :])
        ):
            raise InputError(
                f"{path} has detector {detector} at {tuple(theirs)} but circuit_ideal.stim at {tuple(ours)}: one is of "
                "another experiment"
            )
    return source


def _b8(path: Path, bits: int, shots: _Shots | None) -> np.ndarray:
    """(shots, bits) uint8. shots None: as many as there are."""
    content = np.frombuffer(_text_of(path), np.uint8)
    width = -(-bits // 8)
    count = shots.count if shots else len(content) // width
    if len(content) != count * width or count < 1:
        many, source = (shots.count, f", as many as {shots.said_by} has") if shots else ("1 or more", "")
        raise InputError(
            f"{path} has {len(content)} bytes: expected {width} for each of {many} shots of {bits} bits{source}"
        )
    values: np.ndarray = np.unpackbits(content.reshape(count, width), axis=1, bitorder="little")
    if values[:, bits:].any():
        raise InputError(f"{path} has bits beyond the {bits} of a shot: it belongs to another circuit")
    return values[:, :bits]


def _text(path: Path, bits: int, shots: _Shots) -> np.ndarray:
    """(shots, bits) uint8 of a file in format 01."""
    content = np.frombuffer(_text_of(path).replace(b"\r\n", b"\n"), np.uint8)
    if len(content) == shots.count * (bits + 1) - 1:
        content = np.append(content, np.uint8(ord("\n")))
    if len(content) != shots.count * (bits + 1):
        raise InputError(
            f"{path} has {len(content)} characters: expected {bits} and a newline for each of {shots.count} shots, as "
            f"many as {shots.said_by} has"
        )
    lines = content.reshape(shots.count, bits + 1)
    values = lines[:, :bits] - np.uint8(ord("0"))
    if (values > 1).any() or (lines[:, bits] != ord("\n")).any():
        raise InputError(f"{path} is not of format 01: expected lines of {bits} characters 0 or 1")
    return values


def _compare(
    folder: Path, circuit: stim.Circuit, sweep_name: str, flat: np.ndarray, label: np.ndarray, shots: _Shots
) -> bool:
    """Where the raw measurements are there, they must give the events and flips beside them. Whether they are there."""
    path = folder / "measurements.b8"
    if not path.is_file():
        return False
    measured = _b8(path, circuit.num_measurements, shots).astype(bool)
    sweep = None
    if circuit.num_sweep_bits:
        sweep = _b8(folder / sweep_name, circuit.num_sweep_bits, shots).astype(bool)
    converted = circuit.compile_m2d_converter().convert(
        measurements=measured, sweep_bits=sweep, separate_observables=True
    )
    for name, found, given in (("detection_events", converted[0], flat), ("obs_flips_actual", converted[1], label)):
        wrong = int((found != given).any(1).sum())
        if wrong:
            raise InputError(f"{path} disagrees with {name} in {wrong} of {len(flat)} shots: the files are of two runs")
    return True


def _sycamore(
    folder: Path, circuit: stim.Circuit, shots: _Shots
) -> tuple[dict[str, np.ndarray], dict[str, stim.DetectorErrorModel]]:
    predicted = sorted(folder.glob(f"{_PREDICTED}*.01"))
    predictions = {path.stem.removeprefix(_PREDICTED): _text(path, 1, shots) for path in predicted}
    return predictions, {path.stem: _dem(path, circuit) for path in sorted(folder.glob("*.dem"))}


def _willow(
    folder: Path, circuit: stim.Circuit, shots: _Shots
) -> tuple[dict[str, np.ndarray], dict[str, stim.DetectorErrorModel]]:
    predictions, dems = {}, {}
    for path in sorted(folder.glob("decoding_results/*/")):
        if (path / "error_model.dem").is_file():
            dems[path.name] = _dem(path / "error_model.dem", circuit)
        predictions[path.name] = _b8(path / "obs_flips_predicted.b8", 1, shots)
    return predictions, dems


def table(data: Recorded, model: Decoder | None = None) -> str:
    """What is known of an experiment, and a line per decoder with its logical error rate (LER) and 95 % interval.

    Matching on every error model of the folder, or on its noisy circuit; predictions that came with the data; `model`.
    A decoder that cannot decode it has a line that says why.
    """
    shots, placement = len(data.flat), data.placement
    sources: Mapping[str, matching.Source] = data.dems or ({"noisy circuit": data.noisy} if data.noisy else {})
    decoders: dict[str, Callable[[], np.ndarray]] = {
        f"{name} on {where}": partial(matching.decode, name, source, data.flat)
        for where, source in sources.items()
        for name in FAST
    }
    decoders |= {f"{name}, as shipped": partial(np.asarray, value) for name, value in data.predictions.items()}
    if model is not None:
        decoders["the decoder given"] = partial(_decoded, model, data)
    layout = placement.layout
    lines = [
        f"{data.folder.name if data.source == 'sycamore' else '/'.join(data.folder.parts[-3:])}: {data.source}, "
        f"distance {layout.distance}, rounds {placement.rounds}, basis {data.basis}, {shots} shots"
    ]
    lines += [f"  absent: {what}" for what in data.absent]
    if not sources:
        lines.append("  no error model and no noisy circuit: matching cannot decode it")
    config = model.config if model is not None else None
    if config and config["distance"] == layout.distance and config["basis"] not in (data.basis, BOTH):
        lines.append(
            f"  warning: the decoder given is of basis {config['basis']}, and decodes basis {data.basis} by the "
            f"code's symmetry, less well than weights of its own: python sweeps/aq_pretrain.py --set "
            f"basis={data.basis} trains them"
        )
    width = max(map(len, decoders), default=0)
    for name, decode in decoders.items():
        try:
            wrong = int((decode() != data.label).any(1).sum())
        except ValueError as error:  # InputError, and stim's where a circuit has errors that cannot be decomposed
            lines.append(f"  {name:{width}}  cannot decode it: {' '.join(str(error).split())[:200]}")
            continue
        low, high = binomial(wrong, shots)
        lines.append(f"  {name:{width}}  LER {wrong / shots:.5f} [{low:.5f}, {high:.5f}]")
    return "\n".join(lines)


def _decoded(model: Decoder, data: Recorded) -> np.ndarray:
    return decisions.decode(model, decisions.fitted(model, data.placement, _noise(data.circuit)), data.flat)


def _noise(circuit: stim.Circuit) -> stim.DetectorErrorModel:
    """Single-qubit errors at every tick: enough to see where the observable lies, whatever models a folder holds."""
    qubits, noisy = sorted(circuit.get_final_qubit_coordinates() or range(circuit.num_qubits)), stim.Circuit()
    for part in circuit.flattened():
        noisy.append(part)
        if part.name == "TICK":
            noisy.append("DEPOLARIZE1", qubits, 1e-3)
    return noisy.detector_error_model()


@command_line
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainables.alphaqubit.google", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="of an experiment, or one that holds several")
    parser.add_argument("weights", type=Path, nargs="?", help="also decode with the decoder of this file")
    parser.add_argument("--distance", type=int, help="experiments of this distance only")
    parser.add_argument("--basis", choices=("X", "Z"), help="of this basis only")
    parser.add_argument("--rounds", type=int, help="of so many rounds only")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = decisions.read(given.weights).eval() if given.weights else None
    own = any((given.folder / name).is_file() for name in (_PROPERTIES, _METADATA))  # whatever it is called
    for folder in [given.folder] if own else find(given.folder, given.distance, given.basis, given.rounds):
        print(table(read(folder), model), flush=True)


if __name__ == "__main__":
    sys.exit(main())
