"""The observable's line is found whatever a circuit reads out and however it lies; decisions follow it."""

import numpy as np
import pytest
import stim

from engines.errors import InputError
from trainables.alphaqubit import decisions
from trainables.alphaqubit.circuits import both_observables_circuit, memory_circuit
from trainables.alphaqubit.layout import layout_of
from trainables.alphaqubit.lines import observable_lines

BASES = [(basis, noise) for basis in "ZX" for noise in ("uniform", "si1000")]


def reading(circuit, chosen):
    """The circuit with its observable on the data qubits at which `chosen(x, y)` holds."""
    flat, result, places = circuit.flattened(), stim.Circuit(), circuit.get_final_qubit_coordinates()
    last = [part for part in flat if part.name in ("M", "MX")][-1]
    data = [target.value for target in last.targets_copy()]
    for part in flat:
        if part.name == "OBSERVABLE_INCLUDE":
            records = [k - len(data) for k, qubit in enumerate(data) if chosen(*places[qubit])]
            result.append("OBSERVABLE_INCLUDE", [stim.target_rec(k) for k in records], 0)
        else:
            result.append(part)
    return result


def turned(circuit, symmetry):
    """The detectors' places reflected and exchanged; on a device that is how its code may lie."""
    result, table, seen, most = stim.Circuit(), circuit.get_detector_coordinates(), 0, 6
    for part in circuit.flattened():
        if part.name == "DETECTOR":
            x, y, t = table[seen]
            x, y = (most - x if symmetry & 1 else x), (most - y if symmetry & 2 else y)
            x, y = (y, x) if symmetry & 4 else (x, y)
            result.append("DETECTOR", part.targets_copy(), [(x + y) / 2 + 3, (x - y) / 2 + 5, t])
            seen += 1
        else:
            result.append(part)
    return result


@pytest.mark.parametrize(("basis", "noise"), BASES)
@pytest.mark.parametrize("distance", [3, 5])
def test_the_line_is_found(basis, noise, distance):
    circuit = memory_circuit(basis, distance, 3, 0.01, noise)
    for k in range(distance):
        moved = reading(circuit, lambda x, y, k=k: (y if basis == "Z" else x) == 2 * k + 1)
        dem = moved.detector_error_model()
        assert observable_lines(dem, layout_of(dem)) == [k]
        if basis == "X":
            assert observable_lines(dem, layout_of(dem).exchanged()) == [k], "columns turn into rows"


@pytest.mark.parametrize("noise", ["uniform", "si1000"])
def test_both_observables_have_a_line(noise):
    dem = both_observables_circuit(5, 3, 0.01, noise).detector_error_model()
    assert observable_lines(dem, layout_of(dem)) == [0, 0]


def test_what_is_no_line_is_refused():
    bent = {(5, 1), (1, 3), (3, 3)}  # the first row around a stabilizer: as good an observable, and no row
    dem = reading(memory_circuit("Z", 3, 3, 0.01), lambda x, y: (x, y) in bent).detector_error_model()
    with pytest.raises(InputError, match="observable 0 is no row of data qubits"):
        observable_lines(dem, layout_of(dem))
    empty = memory_circuit("Z", 3, 3, 0.01).without_noise()
    with pytest.raises(InputError, match="observable 0 is no row"):
        observable_lines(empty.detector_error_model(), layout_of(empty))


@pytest.mark.parametrize("distance", [3, 5])
def test_every_line_is_decoded_as_well(distance):
    """By the shipped teachers: plain matching has .088 and .060 here, the wrong line up to .5."""
    circuit = memory_circuit("Z", distance, 5, 0.01)
    model = decisions.read(decisions.shipped(distance)).eval()
    for k in range(distance):
        moved = reading(circuit, lambda x, y, k=k: y == 2 * k + 1)
        events, flips = moved.compile_detector_sampler(seed=k).sample(1500, separate_observables=True)
        fit = decisions.fitted(model, layout_of(moved), moved.detector_error_model())
        assert (decisions.decode(model, fit, events.astype(np.uint8)) != flips).mean() < 0.11


@pytest.mark.parametrize("basis", ["Z", "X"])
def test_devices_of_any_orientation_are_decoded_as_well(basis):
    circuit = memory_circuit(basis, 3, 5, 0.005)
    model = decisions.read(decisions.SHIPPED).eval()
    for symmetry in range(8):
        device = turned(circuit, symmetry)
        events, flips = device.compile_detector_sampler(seed=symmetry).sample(1500, separate_observables=True)
        fit = decisions.fitted(model, layout_of(device, basis), device.detector_error_model())
        assert (decisions.decode(model, fit, events.astype(np.uint8)) != flips).mean() < 0.06
