"""Circuits of the rotated surface code: memory experiments, and both observables at once between noiseless ends.

Two noise models. `uniform`: the four arguments of stim's generated circuits, all p. `si1000`: superconducting-inspired
noise (Gidney, Newman, McEwen, "Benchmarking the planar honeycomb code", 2022) on the same gates: two-qubit gates p,
one-qubit gates p/10, reset 2p, measurement flips 5p, an idle qubit p/10 per layer and 2p more where others are
measured or reset. stim's own generator cannot give it: it has no noise on idle qubits but once a round.
"""

from __future__ import annotations

from collections.abc import Iterator

import stim

from engines.errors import InputError

NOISES = ("uniform", "si1000")
BASES = ("X", "Z")
X_OBSERVABLE, Z_OBSERVABLE = 0, 1  # of both_observables_circuit
_MEASURE = ("M", "MX", "MR")
_RESET = ("R", "RX", "MR")
_ANNOTATIONS = ("DETECTOR", "OBSERVABLE_INCLUDE", "QUBIT_COORDS", "SHIFT_COORDS")
_SI1000_LIMIT = 0.1  # a measurement flips with probability 5p


def check(distance: int, rounds: int, p: float, noise: str) -> None:
    """InputError where no circuit of these exists."""
    if distance < 3:
        raise InputError(f"distance={distance} is too small, use an odd distance of 3 or more")
    if distance % 2 == 0:
        raise InputError(f"distance={distance} is even, use an odd distance such as {distance + 1}")
    if rounds < 1:
        raise InputError(f"rounds={rounds} is too small, use 1 or more")
    if noise not in NOISES:
        raise InputError(f"noise {noise!r} is unknown, use one of {', '.join(NOISES)}")
    if not 0 < p < 0.5:
        raise InputError(f"p={p:g} is no error probability of a code, use one between 0 and 0.5, such as 0.005")
    if noise == "si1000" and p >= _SI1000_LIMIT:
        raise InputError(f"p={p:g} is too large for noise=si1000, whose measurements flip with 5p: use p < 0.1")


def memory_circuit(basis: str, distance: int, rounds: int, p: float, noise: str = "uniform") -> stim.Circuit:
    """A memory experiment of stim's rotated surface code: `rounds` rounds, then all data qubits are measured.

    basis: 'X' or 'Z', of the observable that is kept. Observable 0 is the line of data qubits next to the origin: Z
    along the row y = 1, X along the column x = 1. p: error probability per operation, see the module.
    """
    check(distance, rounds, p, noise)
    if basis not in BASES:
        raise InputError(f"basis {basis!r} is unknown, use X or Z")
    task = f"surface_code:rotated_memory_{basis.lower()}"
    if noise == "uniform":
        return stim.Circuit.generated(
            task,
            distance=distance,
            rounds=rounds,
            after_clifford_depolarization=p,
            before_round_data_depolarization=p,
            before_measure_flip_probability=p,
            after_reset_flip_probability=p,
        )
    ideal = stim.Circuit.generated(task, distance=distance, rounds=rounds)
    return _si1000(ideal, p, frozenset(ideal.get_final_qubit_coordinates()))


def both_observables_circuit(distance: int, rounds: int, p: float, noise: str = "uniform") -> stim.Circuit:
    """`rounds` noisy rounds between two noiseless measurements of all stabilizers; both observables in every shot.

    Observable X_OBSERVABLE is X along the column x = 1, Z_OBSERVABLE is Z along the row y = 1: Pauli products at both
    ends. They are no measurements: stim's converter from measurements to detection events would give zeros for them,
    so sample with a detector sampler. Detectors: layers t = 0..rounds of all stabilizers. The noiseless ends make
    errors rarer than in :func:`memory_circuit`: the two are not to be compared.
    """
    check(distance, rounds, p, noise)
    body = next(part.body_copy() for part in memory_circuit("Z", distance, 3, p, noise) if part.name == "REPEAT")
    places = body_coordinates(distance)
    index = {place: qubit for qubit, place in places.items()}
    checks = [stim.target_combined_paulis(_stabilizer(index, place)) for place in _checks(places)]
    circuit = stim.Circuit()
    for qubit, place in places.items():
        circuit.append("QUBIT_COORDS", [qubit], place)
    lines = (
        [stim.target_x(index[1, y]) for y in range(1, 2 * distance, 2)],
        [stim.target_z(index[x, 1]) for x in range(1, 2 * distance, 2)],
    )
    ends = stim.Circuit()
    for number, line in enumerate(lines):
        ends.append("OBSERVABLE_INCLUDE", line, number)
    products = stim.Circuit()
    products.append("MPP", [target for product in checks for target in product])
    circuit += ends + products
    circuit.append("SHIFT_COORDS", [], [0, 0, -1])  # each round shifts by one before its detectors
    circuit.append(stim.CircuitRepeatBlock(rounds, body))
    circuit.append("TICK", [])
    circuit += products
    circuit.append("SHIFT_COORDS", [], [0, 0, 1])
    count = len(checks)
    for k, place in enumerate(_checks(places)):
        circuit.append("DETECTOR", [stim.target_rec(k - count), stim.target_rec(k - 2 * count)], [*place, 0])
    return circuit + ends


def body_coordinates(distance: int) -> dict[int, tuple[int, int]]:
    """(x, y) of stim's qubits of a distance-d code: odd ones are data qubits, even ones measure stabilizers."""
    ideal = stim.Circuit.generated("surface_code:rotated_memory_z", distance=distance, rounds=1)
    return {qubit: (int(x), int(y)) for qubit, (x, y) in ideal.get_final_qubit_coordinates().items()}


def data_line(basis: str, distance: int) -> list[int]:
    """The qubits of observable 0 of :func:`memory_circuit`."""
    index = {place: qubit for qubit, place in body_coordinates(distance).items()}
    return [index[(1, k) if basis == "X" else (k, 1)] for k in range(1, 2 * distance, 2)]


def with_round_labels(circuit: stim.Circuit, basis: str, distance: int) -> stim.Circuit:
    """The memory experiment, flattened, with observables 1..R: the flip of observable 0 right after each round.

    An observable of Pauli terms that stands at one place only reads the Pauli frame there, with no noise and without
    touching the state, and so the rounds' labels come from the same shots as the events.
    """
    pauli = stim.target_x if basis == "X" else stim.target_z
    line = [pauli(qubit) for qubit in data_line(basis, distance)]
    labelled, rounds, due = stim.Circuit(), 0, False
    for instruction in circuit.flattened():
        if due and instruction.name == "DETECTOR":
            rounds, due = rounds + 1, False
            labelled.append("OBSERVABLE_INCLUDE", line, rounds)
        due = due or instruction.name == "MR"
        labelled.append(instruction)
    return labelled


def _checks(places: dict[int, tuple[int, int]]) -> list[tuple[int, int]]:
    """(x, y) of the stabilizers in the order in which a round measures them."""
    return [place for qubit, place in sorted(places.items()) if place[0] % 2 == 0]


def _stabilizer(index: dict[tuple[int, int], int], place: tuple[int, int]) -> list[stim.GateTarget]:
    """The Pauli product of the stabilizer measured at (x, y)."""
    x, y = place
    pauli = stim.target_x if (x + y) // 2 % 2 else stim.target_z
    around = [(x + i, y + j) for i in (-1, 1) for j in (-1, 1)]
    return [pauli(index[neighbour]) for neighbour in around if neighbour in index]


def _moments(circuit: stim.Circuit) -> Iterator[list[stim.CircuitInstruction | stim.CircuitRepeatBlock]]:
    """The circuit's layers: parts between TICKs. REPEAT blocks and the data qubits' measurement stand alone."""
    moment: list[stim.CircuitInstruction | stim.CircuitRepeatBlock] = []
    for instruction in circuit:
        if isinstance(instruction, stim.CircuitRepeatBlock):
            yield moment
            yield [instruction]
            moment = []
        elif instruction.name == "TICK" or instruction.name in ("M", "MX"):
            yield moment
            moment = [instruction]
        else:
            moment.append(instruction)
    yield moment


def _si1000(ideal: stim.Circuit, p: float, qubits: frozenset[int]) -> stim.Circuit:
    noisy = stim.Circuit()
    for moment in _moments(ideal):
        if len(moment) == 1 and isinstance(moment[0], stim.CircuitRepeatBlock):
            block = moment[0]
            noisy.append(stim.CircuitRepeatBlock(block.repeat_count, _si1000(block.body_copy(), p, qubits)))
        else:
            noisy += _si1000_layer([part for part in moment if isinstance(part, stim.CircuitInstruction)], p, qubits)
    return noisy


def _si1000_layer(moment: list[stim.CircuitInstruction], p: float, qubits: frozenset[int]) -> stim.Circuit:
    """One layer with its noise: gates first, what they and waiting do to the qubits next, annotations last.

    Measuring and resetting an ancilla (MR) is one layer, as in the generated circuits.
    """
    gates, after, annotations = stim.Circuit(), stim.Circuit(), stim.Circuit()
    busy: set[int] = set()
    slow = False
    for part in moment:
        name, targets = part.name, part.targets_copy()
        if name in _ANNOTATIONS:
            annotations.append(part)
            continue
        gates.append(name, targets, 5 * p if name in _MEASURE else ())
        if name == "TICK":
            continue
        busy |= {target.value for target in targets}
        slow = slow or name in _MEASURE or name in _RESET
        if name in _RESET:
            after.append("Z_ERROR" if name == "RX" else "X_ERROR", targets, 2 * p)
        elif name == "H":
            after.append("DEPOLARIZE1", targets, p / 10)
        elif name == "CX":
            after.append("DEPOLARIZE2", targets, p)
    idle = sorted(qubits - busy)
    if busy and idle:
        after.append("DEPOLARIZE1", idle, p / 10)
        if slow:
            after.append("DEPOLARIZE1", idle, 2 * p)
    return gates + after + annotations
