import numpy as np
import pymatching
import pytest
import stim

from engines.errors import InputError
from trainables.alphaqubit import circuits
from trainables.alphaqubit.circuits import both_observables_circuit, memory_circuit


def matched(circuit, shots, seed, correlated=False):
    """Which observables PyMatching gets wrong, (shots, K)."""
    dem = circuit.detector_error_model(decompose_errors=True)
    events, flips = circuit.compile_detector_sampler(seed=seed).sample(shots, separate_observables=True)
    graph = pymatching.Matching.from_detector_error_model(dem, enable_correlations=correlated)
    return graph.decode_batch(events, enable_correlations=correlated) != flips


@pytest.mark.parametrize("noise", circuits.NOISES)
@pytest.mark.parametrize("basis", ["X", "Z"])
@pytest.mark.parametrize(("distance", "rounds"), [(3, 1), (3, 2), (5, 4)])
def test_no_fewer_than_distance_errors_flip_the_observable(basis, distance, rounds, noise):
    circuit = memory_circuit(basis, distance, rounds, 0.005, noise)
    assert circuit.num_detectors == (distance**2 - 1) * rounds and circuit.num_observables == 1
    assert len(circuit.shortest_graphlike_error()) == distance
    both = both_observables_circuit(distance, rounds, 0.005, noise)
    assert both.num_detectors == (distance**2 - 1) * (rounds + 1) and both.num_observables == 2
    assert len(both.shortest_graphlike_error()) == distance


def test_uniform_noise_is_stims():
    circuit = memory_circuit("X", 3, 4, 0.01, "uniform")
    assert circuit == stim.Circuit.generated(
        "surface_code:rotated_memory_x",
        distance=3,
        rounds=4,
        after_clifford_depolarization=0.01,
        before_round_data_depolarization=0.01,
        before_measure_flip_probability=0.01,
        after_reset_flip_probability=0.01,
    )


@pytest.mark.parametrize("basis", ["X", "Z"])
@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_si1000_adds_noise_and_nothing_else(basis, rounds):
    noisy = memory_circuit(basis, 3, rounds, 0.004, "si1000").without_noise().flattened()
    ideal = memory_circuit(basis, 3, rounds, 0.004, "uniform").without_noise().flattened()
    assert noisy.num_ticks == ideal.num_ticks and noisy.num_measurements == ideal.num_measurements
    assert noisy.get_detector_coordinates() == ideal.get_detector_coordinates()
    assert noisy.has_flow(stim.Flow("1 -> 1")) and noisy.detector_error_model() == ideal.detector_error_model()


def test_si1000_layer_by_layer():
    """Every qubit meets exactly the noise that its operation has, once in each layer."""
    p = 0.004
    expected = {"H": p / 10, "CX": p, "idle": p / 10, "wait": p / 10 + 2 * p, "R": 2 * p, "RX": 2 * p}
    circuit = memory_circuit("Z", 3, 3, p, "si1000").flattened()
    qubits = set(circuit.get_final_qubit_coordinates())
    layers = [layer.split("\n") for layer in str(circuit).split("TICK")]
    for number, layer in enumerate(layers):
        found, kind = dict.fromkeys(qubits, 0.0), {}
        for instruction in stim.Circuit("\n".join(layer)):
            name, targets = (
                instruction.name,
                [t.value for t in instruction.targets_copy() if not t.is_measurement_record_target],
            )
            if name in ("H", "CX", "R", "MR"):
                kind |= dict.fromkeys(targets, name)
            if name in ("MR", "M"):
                assert instruction.gate_args_copy() == [5 * p]
            if name == "M":
                break
            if name in ("DEPOLARIZE1", "DEPOLARIZE2", "X_ERROR"):
                for target in targets:
                    found[target] += instruction.gate_args_copy()[0]
        slow = "MR" in kind.values()
        for qubit in qubits:
            name = kind.get(qubit, "wait" if slow else "idle")
            assert found[qubit] == pytest.approx(expected["R" if name == "MR" else name]), (number, qubit, name)


KNOWN = {  # (distance, p, correlated): LER per round over 25 rounds of an independent circuit, 1e5 shots
    (3, 0.003, False): 5.2e-3,
    (3, 0.005, False): 1.35e-2,
    (3, 0.005, True): 1.25e-2,
    (5, 0.005, False): 1.00e-2,
    (5, 0.005, True): 7.6e-3,
}


@pytest.mark.parametrize("shots", [2048, pytest.param(65536, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_si1000_against_known_error_rates(case, shots):
    """Within four standard errors of both."""
    distance, p, correlated = case
    ler = matched(memory_circuit("Z", distance, 25, p, "si1000"), shots, 5, correlated).mean()
    slope = (1 - 2 * ler) ** (1 / 25 - 1) / 25  # d eps / d E
    error = slope * np.sqrt(ler * (1 - ler) * (1 / shots + 1e-5))
    per_round = (1 - (1 - 2 * ler) ** (1 / 25)) / 2
    assert per_round == pytest.approx(KNOWN[case], abs=4 * error)


def test_si1000_differs_from_uniform():
    assert matched(memory_circuit("Z", 3, 5, 0.005, "si1000"), 20480, 3).mean() > 1.5 * (
        matched(memory_circuit("Z", 3, 5, 0.005, "uniform"), 20480, 3).mean()
    )


def test_both_observables_against_known_error_rates():
    """d=3, 3 rounds, p=.005: PyMatching fails in one or both observables in 2.35 %, in both in .10 % of the shots."""
    wrong = matched(both_observables_circuit(3, 3, 0.005), 40960, 2)
    assert wrong.any(1).mean() == pytest.approx(0.0235, abs=4 * np.sqrt(0.0235 / 40960))
    assert wrong.all(1).mean() == pytest.approx(0.001, abs=4 * np.sqrt(0.001 / 40960))


@pytest.mark.parametrize("noise", circuits.NOISES)
def test_both_observables_agree_with_a_reference_qubit(noise):
    """The same shots with a noiseless qubit that holds the logical qubit's partner: the observables are then
    measurements, X_L X_ref and Z_L Z_ref at both ends, and the error model is the same.
    """
    circuit = both_observables_circuit(3, 2, 0.005, noise)
    text, ref = str(circuit), 99
    start = "OBSERVABLE_INCLUDE(0) X1 X8 X15\nOBSERVABLE_INCLUDE(1) Z1 Z3 Z5"
    assert text.count(start) == 2
    bell = f"MPP X1*X8*X15*X{ref} Z1*Z3*Z5*Z{ref}"
    text = text.replace(start, bell, 1).replace(start, bell)
    # Measurements: 2 + 8 in front, 8 in each of 2 rounds, 8 + 2 behind.
    text += "\nOBSERVABLE_INCLUDE(0) rec[-2] rec[-36]\nOBSERVABLE_INCLUDE(1) rec[-1] rec[-35]"
    other = stim.Circuit(text)
    assert other.num_measurements == 36
    assert other.detector_error_model().approx_equals(circuit.detector_error_model(), atol=1e-12)


def test_observables_of_both_are_those_of_the_memories():
    places = circuits.body_coordinates(3)
    assert [places[q] for q in circuits.data_line("Z", 3)] == [(1, 1), (3, 1), (5, 1)]
    assert [places[q] for q in circuits.data_line("X", 3)] == [(1, 1), (1, 3), (1, 5)]
    for basis in "XZ":
        memory = memory_circuit(basis, 5, 2, 0.01).flattened()
        measured = [t.value for t in next(i for i in reversed(memory) if i.name in ("M", "MX")).targets_copy()]
        include = next(i for i in memory if i.name == "OBSERVABLE_INCLUDE").targets_copy()
        assert sorted(measured[t.value] for t in include) == sorted(circuits.data_line(basis, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": 4}, "distance=4 is even"),
        ({"distance": 1}, "distance=1 is too small"),
        ({"distance": -3}, "distance=-3 is too small"),
        ({"rounds": 0}, "rounds=0 is too small"),
        ({"p": 0.0}, "p=0 is no error probability"),
        ({"p": 0.5}, "p=0.5 is no error probability"),
        ({"p": -0.1}, "p=-0.1 is no error probability"),
        ({"p": float("nan")}, "p=nan is no error probability"),
        ({"p": 0.1, "noise": "si1000"}, "p=0.1 is too large for noise=si1000"),
        ({"noise": "SD6"}, "noise 'SD6' is unknown, use one of uniform, si1000"),
        ({"basis": "Y"}, "basis 'Y' is unknown, use X or Z"),
    ],
)
def test_bad_values_end_in_one_line(change, message):
    values = {"basis": "Z", "distance": 3, "rounds": 2, "p": 0.01, "noise": "uniform"} | change
    with pytest.raises(InputError, match=message) as caught:
        memory_circuit(**values)
    assert "\n" not in str(caught.value)
    if "basis" not in change:
        with pytest.raises(InputError, match=message):
            both_observables_circuit(**{key: value for key, value in values.items() if key != "basis"})
