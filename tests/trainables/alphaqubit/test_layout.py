import numpy as np
import pytest
import stim

from engines.errors import InputError
from trainables.alphaqubit.circuits import both_observables_circuit, memory_circuit
from trainables.alphaqubit.layout import grid_cells, layout_of, rotated


def moved(circuit, change):
    """The circuit with the coordinates of its detectors changed by a function of (x, y, t)."""
    result = stim.Circuit()
    table = circuit.get_detector_coordinates()
    seen = 0
    for part in circuit.flattened():
        if part.name == "DETECTOR":
            result.append("DETECTOR", part.targets_copy(), change(*table[seen]))
            seen += 1
        else:
            result.append(part)
    return result


def device(x, y, t):
    """Row and column of a device on which the code is turned by 45 degrees."""
    return [(x + y) / 2 + 4, (x - y) / 2 + 7, t]


@pytest.mark.parametrize("basis", ["X", "Z"])
@pytest.mark.parametrize(("distance", "rounds"), [(3, 1), (3, 2), (3, 5), (5, 1), (5, 3), (7, 2)])
def test_generated_circuits_and_their_error_models(basis, distance, rounds):
    circuit = memory_circuit(basis, distance, rounds, 0.01)
    for source in (circuit, circuit.detector_error_model(), circuit.detector_error_model(decompose_errors=True)):
        found = layout_of(source, basis)
        assert (found.layout.distance, found.layout.basis, found.rounds) == (distance, basis, rounds)
        assert found.layout.cells.shape == (distance**2 - 1, 2) and found.layout.cells.dtype == np.int64
        assert 2 * found.layout.on_basis.sum() == distance**2 - 1
        for k, (x, y, t) in circuit.get_detector_coordinates().items():
            assert found.layout.cells[found.slot[k]].tolist() == [y / 2, x / 2] and found.layer[k] == t


def test_data_qubits_touch_the_cells_of_their_stabilizers():
    """A bit flip on data qubit (i, j) shows in the Z stabilizers among its four cells, and nowhere else."""
    circuit = memory_circuit("Z", 5, 2, 0.01).without_noise()
    found = layout_of(circuit)
    index = {tuple(place): q for q, place in circuit.get_final_qubit_coordinates().items()}
    for i, j in [(0, 0), (0, 3), (2, 2), (4, 4), (3, 0)]:
        simulator = stim.FlipSimulator(batch_size=1, disable_stabilizer_randomization=True)
        text = str(circuit.flattened()).split("TICK")
        simulator.do(stim.Circuit(text[0]))
        simulator.do(stim.Circuit(f"X_ERROR(1) {index[2 * j + 1, 2 * i + 1]}"))
        simulator.do(stim.Circuit("TICK".join(text[1:])))
        flips = found.to_grid(simulator.get_detector_flips().T)[0, 0]
        shown = {tuple(cell) for cell in found.layout.cells[flips == 1].tolist()}
        around = {(i + a, j + b) for a in (0, 1) for b in (0, 1)}
        assert shown == {c for c in around if sum(c) % 2 == 0 and c in set(map(tuple, grid_cells(5).tolist()))}


@pytest.mark.parametrize("symmetry", range(8))
@pytest.mark.parametrize(("basis", "rounds"), [("X", 3), ("Z", 3), ("Z", 1)])
def test_devices_of_any_orientation_share_one_layout(symmetry, basis, rounds):
    circuit = memory_circuit(basis, 3, rounds, 0.01)

    def change(x, y, t):
        if symmetry & 1:
            x = 6 - x
        if symmetry & 2:
            y = 6 - y
        if symmetry & 4:
            x, y = y, x
        return device(x, y, t)

    turned = moved(circuit, change)
    expected = layout_of(circuit)
    for source in (turned, turned.detector_error_model()):
        found = layout_of(source, basis)
        assert found.rounds == rounds and found.layout.basis == basis
        assert np.array_equal(found.layout.cells, expected.layout.cells)
        assert np.array_equal(found.layout.on_basis, expected.layout.on_basis)
        free = layout_of(source).layout
        assert free.basis in "XZ" and free.on_basis.sum() == expected.layout.on_basis.sum()
    # Neighbours stay neighbours: detectors that one error flips lie at most one cell apart.
    for error in turned.detector_error_model().flattened():
        ids = [t.val for t in error.targets_copy() if t.is_relative_detector_id()] if error.type == "error" else []
        cells = found.layout.cells[found.slot[ids]] if ids else np.zeros((1, 2))
        assert np.ptp(cells, axis=0).max() <= 2


def test_both_observables():
    found = layout_of(both_observables_circuit(3, 4, 0.01).detector_error_model())
    assert found.layout.basis == "XZ" and found.layout.on_basis.all() and found.rounds == 4


def test_several_triples_per_detector():
    circuit = memory_circuit("X", 3, 2, 0.01)
    last = moved(circuit, lambda x, y, t: [1.5, 0, 0, *device(x, y, t)])
    first = moved(circuit, lambda x, y, t: [*device(x, y, t), 0.5, 0, 0])
    assert np.array_equal(layout_of(last, "X").slot, layout_of(first, "X").slot)


def test_events_to_the_grid_and_back():
    circuit = memory_circuit("Z", 3, 3, 0.05)
    found = layout_of(circuit)
    flat = circuit.compile_detector_sampler(seed=1).sample(50)
    grid = found.to_grid(flat)
    assert grid.shape == (50, 4, 8) and grid.dtype == np.uint8 and grid.sum() == flat.sum()
    assert np.array_equal(found.to_flat(grid), flat)
    assert not grid[:, [0, 3]][:, :, ~found.layout.on_basis].any()
    with pytest.raises(InputError, match=r"events of shape \(50, 23\): expected \(shots, 24 detectors\)"):
        found.to_grid(flat[:, 1:])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (stim.Circuit("M 0"), "no detectors found"),
        (stim.Circuit("M 0\nDETECTOR rec[-1]"), r"detector 0 has coordinates \(\)"),
        (stim.Circuit("M 0\nDETECTOR(1, 2) rec[-1]"), r"detector 0 has coordinates \(1.0, 2.0\)"),
        (stim.Circuit("M 0\nDETECTOR(1, 2, 0) rec[-1]"), "coordinates of 1 detectors at 1 places in 1 layers"),
        (
            stim.Circuit.generated("surface_code:unrotated_memory_z", distance=3, rounds=3),
            "match no rotated surface code",
        ),
        (stim.Circuit.generated("repetition_code:memory", distance=5, rounds=3), "detector 0 has coordinates"),
        (stim.Circuit.generated("surface_code:rotated_memory_z", distance=4, rounds=3), "of odd distance"),
        (stim.Circuit.generated("surface_code:rotated_memory_z", distance=2, rounds=3), "of odd distance"),
        (moved(memory_circuit("Z", 3, 3, 0.01), lambda x, y, t: [x, y, t if x else t + 1]), "match no rotated"),
        (moved(memory_circuit("Z", 3, 3, 0.01), lambda x, y, t: [x, y + (x == 2), t]), "match no rotated"),
        (moved(memory_circuit("Z", 3, 3, 0.01), lambda x, y, t: [x, y, 0]), "match no rotated"),
        (moved(memory_circuit("Z", 3, 3, 0.01), lambda x, y, t: [x, y, t / 2]), "match no rotated"),
    ],
)
def test_other_coordinates_end_in_one_line(source, message):
    for kind in (source, source.detector_error_model()):
        with pytest.raises(InputError, match=message) as caught:
            layout_of(kind)
        assert "\n" not in str(caught.value)


def test_a_basis_that_the_circuit_is_not_of():
    with pytest.raises(InputError, match="basis=X but the detectors are of basis Z"):
        layout_of(memory_circuit("Z", 3, 2, 0.01), "X")
    with pytest.raises(InputError, match="basis 'Y' is unknown"):
        layout_of(memory_circuit("Z", 3, 2, 0.01), "Y")


@pytest.mark.parametrize("basis", ["X", "Z"])
@pytest.mark.parametrize("distance", [3, 5, 7])
def test_stabilizers_lie_where_stim_puts_its_detectors(distance, basis):
    circuit = stim.Circuit.generated(f"surface_code:rotated_memory_{basis.lower()}", distance=distance, rounds=3)
    x, y, t = np.array(list(circuit.get_detector_coordinates().values())).T
    layout = rotated(distance, basis)
    for cells, seen in ((layout.cells, t == 1), (layout.cells[layout.on_basis], t == 0)):
        assert cells.tolist() == sorted((np.stack((y, x), axis=1)[seen] // 2).tolist())
    assert layout.cells.dtype == np.int64 and len(layout.cells) == distance**2 - 1


@pytest.mark.parametrize(
    ("distance", "basis", "named"), [(4, "Z", "distance=4"), (1, "Z", "=1"), (3, "z", "basis='z'")]
)
def test_what_is_no_such_code_is_named(distance, basis, named):
    with pytest.raises(InputError, match=named):
        rotated(distance, basis)


def support(cell, distance):
    """Data qubits (row, column) around a cell of the grid."""
    i, j = cell
    return {(a, b) for a in (i - 1, i) for b in (j - 1, j) if 0 <= a < distance and 0 <= b < distance}


@pytest.mark.parametrize("distance", [3, 5])
def test_the_quarter_turn_takes_supports_and_the_observable_of_x_to_those_of_z(distance):
    placement = layout_of(memory_circuit("X", distance, 2, 0.01))
    turned = placement.exchanged()
    assert turned.layout.basis == "Z" and np.array_equal(turned.layer, placement.layer)
    for old, new in zip(placement.slot, turned.slot, strict=True):
        here, there = placement.layout.cells[old], turned.layout.cells[new]
        moved_qubits = {(b, distance - 1 - a) for a, b in support(here, distance)}
        assert moved_qubits == support(there, distance) and (here.sum() + there.sum()) % 2 == 1
    assert {(b, distance - 1 - a) for a, b in ((k, 0) for k in range(distance))} == {(0, k) for k in range(distance)}
    again = turned.exchanged().exchanged().exchanged()
    assert np.array_equal(again.slot, placement.slot) and again.layout.basis == "X"


@pytest.mark.parametrize("noise", ["uniform", "si1000"])
def test_the_turned_experiment_has_nearly_the_errors_of_the_other_basis(noise):
    """What the two error models have in common agrees on the observable, and is most of what can happen.

    They are not the same: another number of errors, which no renaming of detectors could change.
    """
    found = {}
    for basis in "ZX":
        circuit = memory_circuit(basis, 3, 4, 0.005, noise)
        placement = layout_of(circuit)
        found[basis] = errors(circuit, placement if basis == "Z" else placement.exchanged())
    assert sum(map(len, found["Z"].values())) != sum(map(len, found["X"].values()))
    common = found["Z"].keys() & found["X"].keys()
    assert all(found["Z"][key].keys() == found["X"][key].keys() for key in common)
    for model in found.values():
        total = sum(sum(one.values()) for one in model.values())
        assert sum(sum(model[key].values()) for key in common) > 0.75 * total


def errors(circuit, placement):
    """Probabilities of the circuit's errors by where they show, and whether they flip the observable."""
    found = {}
    for error in circuit.detector_error_model().flattened():
        if error.type == "error":
            targets = error.targets_copy()
            shown = [t.val for t in targets if t.is_relative_detector_id()]
            key = frozenset((int(placement.layer[k]), int(placement.slot[k])) for k in shown)
            flips = any(t.is_logical_observable_id() for t in targets)
            rates = found.setdefault(key, {})
            rates[flips] = rates.get(flips, 0.0) + error.args_copy()[0]
    return found
