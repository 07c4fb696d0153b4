import numpy as np
import pytest
import stim

from engines.errors import InputError
from trainables.alphaqubit.circuits import both_observables_circuit, memory_circuit
from trainables.alphaqubit.exact import ExactDecoder, rb_ler
from trainables.alphaqubit.matching import decode
from trainables.alphaqubit.metrics import expected_calibration_error


def enumerated(circuit, events):
    """Posterior from the table of all events and flips: every error of the model is added to it, one by one."""
    dem = circuit.detector_error_model()
    detectors, observables = dem.num_detectors, dem.num_observables
    table, index = np.zeros(2 ** (detectors + observables)), np.arange(2 ** (detectors + observables))
    table[0] = 1
    for error in dem.flattened():
        if error.type == "error":
            mask = 0
            for target in error.targets_copy():
                mask ^= 1 << (target.val if target.is_relative_detector_id() else detectors + target.val)
            p = error.args_copy()[0]
            table = (1 - p) * table + p * table[index ^ mask]
    joint = table.reshape(2**observables, -1)[:, events.astype(np.int64) @ (1 << np.arange(detectors))]
    return (joint / joint.sum(0)).T


def shots(circuit, count, seed=3):
    return circuit.compile_detector_sampler(seed=seed).sample(count, separate_observables=True)


@pytest.mark.parametrize(
    "circuit",
    [
        memory_circuit("Z", 3, 2, 0.01),
        memory_circuit("X", 3, 2, 0.05),
        memory_circuit("Z", 3, 2, 0.005, "si1000"),
        memory_circuit("Z", 3, 1, 0.02),
        both_observables_circuit(3, 1, 0.02),
    ],
    ids=["Z", "X", "si1000", "one round", "both"],
)
def test_against_full_enumeration(circuit):
    events, _ = shots(circuit, 3000)
    events = np.concatenate([events, np.random.default_rng(0).random((500, events.shape[1])) < 0.5])
    expected, found = enumerated(circuit, events), ExactDecoder(circuit).posterior(events)
    assert found.shape == (3500, 2**circuit.num_observables) and found.dtype == np.float64
    assert np.abs(found - expected).max() < 5e-6
    sure = np.abs(np.diff(np.sort(expected, 1)[:, -2:], axis=1)[:, 0]) > 1e-5
    assert np.array_equal(found.argmax(1)[sure], expected.argmax(1)[sure]) and sure.mean() > 0.99


def test_layout_order_of_the_detectors_does_not_matter():
    """A DEM with its detectors renamed and its errors decomposed gives the same answers."""
    circuit = memory_circuit("Z", 3, 3, 0.01)
    dem = circuit.detector_error_model(decompose_errors=True).flattened()
    order = np.random.default_rng(1).permutation(dem.num_detectors)
    renamed = stim.DetectorErrorModel()
    for part in dem:
        targets = [
            stim.target_relative_detector_id(int(order[t.val]))
            if not isinstance(t, int) and t.is_relative_detector_id()
            else t
            for t in part.targets_copy()
        ]
        renamed.append(part.type, part.args_copy(), targets)
    events, _ = shots(circuit, 200)
    moved = np.empty_like(events)
    moved[:, order] = events
    assert np.allclose(ExactDecoder(renamed).flips(moved), ExactDecoder(circuit).flips(events), atol=2e-6)


def test_calibrated_and_the_floor_at_five_rounds():
    """p=.01: exact .07668, matching 1.191 x as much, correlated 1.158 x (4e5 shots; here within four standard errors).

    The probabilities are calibrated: the log-loss and the counted error rate are what the posterior itself expects.
    """
    circuit = memory_circuit("Z", 3, 5, 0.01)
    events, label = shots(circuit, 20480, 8)
    decoder = ExactDecoder(circuit)
    posterior = decoder.posterior(events)
    best, truth = posterior.argmax(1), label[:, 0].astype(int)
    floor, n = rb_ler(posterior, best), len(truth)
    spread = (1 - posterior.max(1)).std() / n**0.5
    assert floor == pytest.approx(0.07668, abs=4 * spread)
    assert (best != truth).mean() == pytest.approx(floor, abs=4 * (floor / n) ** 0.5)
    entropy = -(posterior * np.log(posterior.clip(1e-12))).sum(1)
    loss = -np.log(posterior[np.arange(n), truth].clip(1e-12))
    assert loss.mean() == pytest.approx(entropy.mean(), abs=4 * loss.std() / n**0.5)
    # No further from the flips than from flips that are drawn from the posterior itself: 1 in 100 by chance.
    draw = np.random.default_rng(0)
    chance = [expected_calibration_error(posterior[:, 1], draw.random(n) < posterior[:, 1]) for _ in range(99)]
    assert expected_calibration_error(posterior[:, 1], label[:, 0]) <= max(chance)
    for name, ratio in (("pymatching", 1.191), ("pymatching_correlated", 1.158)):
        found = rb_ler(posterior, decode(name, circuit, events))
        assert found > floor and found / floor == pytest.approx(ratio, abs=0.02)


def test_reduced_variance_error_rate():
    posterior = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    assert rb_ler(posterior, np.array([0, 0, 1])) == pytest.approx((0.1 + 0.8 + 0.5) / 3)
    assert rb_ler(posterior, np.array([[0], [0], [1]], np.uint8)) == pytest.approx((0.1 + 0.8 + 0.5) / 3)
    four = np.array([[0.1, 0.2, 0.3, 0.4]])
    assert rb_ler(four, np.array([[1, 0]])) == pytest.approx(0.8), "pattern 1 flips observable 0"


def test_flips_are_the_sums_of_the_patterns():
    circuit = both_observables_circuit(3, 3, 0.02)
    events, flips = shots(circuit, 4096)
    decoder = ExactDecoder(circuit)
    posterior = decoder.posterior(events)
    assert np.allclose(posterior.sum(1), 1)
    assert np.allclose(decoder.flips(events), np.stack([posterior[:, [1, 3]].sum(1), posterior[:, [2, 3]].sum(1)], 1))
    wrong = posterior.argmax(1) != flips @ [1, 2]
    expected = 1 - posterior.max(1).mean()
    assert wrong.mean() == pytest.approx(expected, abs=4 * (expected / 4096) ** 0.5)
    matched = decode("pymatching", circuit, events)
    assert rb_ler(posterior, matched) > expected


def test_no_shots():
    decoder = ExactDecoder(memory_circuit("Z", 3, 2, 0.01))
    assert decoder.posterior(np.zeros((0, 16), bool)).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExactDecoder(memory_circuit("Z", 5, 2, 0.01)), r"distance=5 has 2\^24 states between rounds"),
        (
            lambda: ExactDecoder(memory_circuit("Z", 3, 2, 0.01)).posterior(np.zeros((4, 15))),
            r"events of shape \(4, 15\)",
        ),
        (lambda: ExactDecoder(stim.DetectorErrorModel("error(0.1) D0 L0")), "detector 0 has coordinates"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_errors_over_three_rounds_are_refused():
    dem = memory_circuit("Z", 3, 3, 0.01).detector_error_model()
    dem.append(
        "error", 0.1, [stim.target_relative_detector_id(0), stim.target_relative_detector_id(dem.num_detectors - 1)]
    )
    with pytest.raises(InputError, match=r"an error flips detectors of layers \[0, 3\]"):
        ExactDecoder(dem)
