import numpy as np
import pytest
import stim
import torch

from engines.errors import InputError
from trainables.alphaqubit.circuits import data_line, memory_circuit, with_round_labels
from trainables.alphaqubit.layout import layout_of
from trainables.alphaqubit.sampler import BLOCK, Experiment, Sampler, fixed_shots, shots_hash

EXPERIMENTS = [
    Experiment(3, 4, 0.02),
    Experiment(3, 1, 0.02, basis="X"),
    Experiment(5, 3, 0.01, "si1000", "X"),
    Experiment(3, 2, 0.02, label="xz"),
    Experiment(3, 2, 0.02, "si1000", label="ixyz"),
]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_shapes_and_what_the_layers_hold(experiment):
    sampler = Sampler(experiment, 1)
    batch, layout = sampler.shots(5, 300), sampler.placement.layout
    shape = (300, experiment.rounds + 1, experiment.distance**2 - 1)
    assert all(value.dtype == torch.uint8 and value.is_contiguous() for value in batch.values())
    assert batch["events"].shape == batch["measurements"].shape == shape
    off = torch.from_numpy(~layout.on_basis)
    for name in ("events", "measurements"):
        assert not batch[name][:, -1, off].any() and not batch[name][:, 0, off].any()
    # Events are what changes between two outcomes.
    change = batch["measurements"].clone()
    change[:, 1:] ^= batch["measurements"][:, :-1]
    change[:, -1, off] = 0
    assert torch.equal(change, batch["events"])
    columns = {"observable": 1, "xz": 2, "ixyz": 1}[experiment.label]
    assert batch["label"].shape == (300, columns)
    assert batch["label"].max() <= (3 if experiment.label == "ixyz" else 1) and 0 < batch["label"].float().mean() < 1
    assert ("round_labels" in batch) == (experiment.label == "observable")
    if "round_labels" in batch:
        assert batch["round_labels"].shape == (300, experiment.rounds)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_a_shot_depends_on_its_index_only(experiment):
    whole = Sampler(experiment, 9).shots(0, BLOCK + 200)
    pieces = Sampler(experiment, 9)
    for first, count in [(BLOCK + 10, 20), (0, 7), (BLOCK - 5, 10), (3, 1), (40, 0)]:
        part = pieces.shots(first, count)
        assert all(torch.equal(part[name], value[first : first + count]) for name, value in whole.items())
    index = torch.tensor([BLOCK + 3, 2, BLOCK - 1, 2])
    assert all(torch.equal(pieces.at(index)[name], value[index]) for name, value in whole.items())


def test_seed_split_block_and_noise_draw_other_shots():
    base = Experiment(3, 3, 0.05)
    seen = [
        Sampler(base, 1).shots(0, 64),
        Sampler(base, 2).shots(0, 64),
        Sampler(base, 1, "val").shots(0, 64),
        Sampler(base, 1, "test").shots(0, 64),
        Sampler(base, 1).shots(BLOCK, 64),
        Sampler(Experiment(3, 3, 0.05, basis="X"), 1).shots(0, 64),
        Sampler(Experiment(3, 3, 0.0501), 1).shots(0, 64),
    ]
    assert len({shots_hash({"events": batch["events"]}) for batch in seen}) == len(seen)


def test_two_labels_of_the_same_shots():
    """Class 0..3 is the logical error I, X, Y, Z: X flips the Z observable, Z the X observable, Y both."""
    flips = Sampler(Experiment(3, 3, 0.03, label="xz"), 4).shots(0, 900)
    classes = Sampler(Experiment(3, 3, 0.03, label="ixyz"), 4).shots(0, 900)
    assert torch.equal(flips["events"], classes["events"])
    table = {(0, 0): 0, (0, 1): 1, (1, 1): 2, (1, 0): 3}
    assert [table[tuple(row)] for row in flips["label"].tolist()] == classes["label"][:, 0].tolist()
    assert classes["label"].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("noise", ["uniform", "si1000"])
@pytest.mark.parametrize("basis", ["X", "Z"])
def test_round_labels_are_the_pauli_frame(basis, noise):
    """Another simulator, stepped round by round: the data qubits' errors are looked at after each round, and events
    are made of the flips of the measurements. Both must be what the labelled circuit says of the same errors.
    """
    distance, rounds, shots = 3, 4, 400
    circuit = with_round_labels(memory_circuit(basis, distance, rounds, 0.02, noise), basis, distance)
    assert circuit.num_observables == rounds + 1
    simulator = stim.FlipSimulator(batch_size=shots, disable_stabilizer_randomization=True, seed=6)
    line, frames, measured = data_line(basis, distance), [], 0
    opposite = {"Z": (1, 2), "X": (3, 2)}[basis]  # stim's numbers of X, Y and Z: the errors that anticommute
    for instruction in circuit:
        simulator.do(instruction)
        if instruction.name == "OBSERVABLE_INCLUDE" and measured == instruction.gate_args_copy()[0] - 1:
            measured += 1
            paulis = [[pauli[q] in opposite for q in line] for pauli in simulator.peek_pauli_flips()]
            frames.append(np.array(paulis).sum(1) % 2)
    assert len(frames) == rounds
    observables = simulator.get_observable_flips().T
    assert np.array_equal(observables[:, 1:], np.stack(frames, 1)) and observables[:, 1:].any()
    records = simulator.get_measurement_flips().T
    converter = circuit.without_noise().compile_m2d_converter(skip_reference_sample=True)
    events, flips = converter.convert(measurements=np.ascontiguousarray(records), separate_observables=True)
    assert np.array_equal(events, simulator.get_detector_flips().T) and np.array_equal(flips[:, 0], observables[:, 0])


def test_round_labels_do_not_change_the_experiment():
    circuit = memory_circuit("Z", 3, 3, 0.02)
    drawn = with_round_labels(circuit, "Z", 3)
    only = stim.Circuit("\n".join(line for line in str(drawn).split("\n") if " Z1 " not in line))
    assert only == circuit.flattened()
    assert np.array_equal(layout_of(drawn).slot, layout_of(circuit).slot)


def test_the_last_round_label_differs_by_the_readout_only():
    batch = Sampler(Experiment(3, 6, 0.01), 2).shots(0, 4096)
    differ = (batch["round_labels"][:, -1:] ^ batch["label"]).float().mean()
    # Uniform noise: each of three data qubits flips with p when it is measured.
    assert abs(differ - 3 * 0.01 * 0.99**2 - 0.01**3) < 4 * (0.03 / 4096) ** 0.5
    means = batch["round_labels"].float().mean(0)
    assert (means[1:] > means[:-1]).all(), "errors pile up"


def test_test_shots_have_a_hash():
    experiment = Experiment(3, 2, 0.01)
    batch, identity = fixed_shots(experiment, 42, 500)
    assert len(batch["label"]) == 500 and len(identity) == 16
    assert fixed_shots(experiment, 42, 500)[1] == identity == shots_hash(batch)
    others = {fixed_shots(experiment, 42, 499)[1], fixed_shots(experiment, 43, 500)[1]}
    others.add(fixed_shots(Experiment(3, 2, 0.011), 42, 500)[1])
    batch["label"][3] ^= 1
    assert len(others | {identity, shots_hash(batch)}) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Experiment(4, 2, 0.01), "distance=4 is even"),
        (lambda: Experiment(3, 0, 0.01), "rounds=0 is too small"),
        (lambda: Experiment(3, 2, 0.6), "p=0.6 is no error probability"),
        (lambda: Experiment(3, 2, 0.1, "si1000"), "too large for noise=si1000"),
        (lambda: Experiment(3, 2, 0.01, basis="z"), "basis 'z' is unknown"),
        (lambda: Experiment(3, 2, 0.01, label="xyz"), "label 'xyz' is unknown, use one of observable, xz, ixyz"),
        (lambda: Sampler(Experiment(3, 2, 0.01), -1), "seed=-1 is negative"),
        (lambda: Sampler(Experiment(3, 2, 0.01), 1, "dev"), "split 'dev' is unknown"),
        (lambda: Sampler(Experiment(3, 2, 0.01), 1).shots(-2, 5), "shot -2 is negative"),
        (lambda: fixed_shots(Experiment(3, 2, 0.01), 1, 0), "count=0 of test shots"),
    ],
)
def test_bad_values_end_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
