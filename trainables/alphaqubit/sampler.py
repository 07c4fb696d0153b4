"""Shots of simulated experiments: the same shots for the same seed, whatever the batch or the order of calls.

Shots come in blocks; each block is drawn by a simulator of its own, seeded by a hash of the experiment, the seed, the
split and the block's number. The numbers are stim's: another version of it, or another width of a processor's vector
instructions, draws other shots. That is why fixed shots are identified by a hash of what they are.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np
import stim
import torch
from torch import Tensor

from engines.errors import InputError
from trainables.alphaqubit.circuits import (
    BASES,
    X_OBSERVABLE,
    Z_OBSERVABLE,
    both_observables_circuit,
    check,
    memory_circuit,
    with_round_labels,
)
from trainables.alphaqubit.layout import Placement, layout_of

Batch = dict[str, Tensor]

LABELS = ("observable", "xz", "ixyz")
BLOCK = 1024
# Teachers, the probes on their states, and students each have training shots of their own.
SPLITS = ("pretrain", "probes", "train", "val", "test")
# The logical error that flips (X observable, Z observable): I, Z, X, Y as classes 0, 3, 1, 2.
CLASSES = np.array([[0, 1], [3, 2]], np.uint8)


@dataclass(frozen=True)
class Experiment:
    """What is simulated. basis and round labels belong to memory experiments, label='observable'.

    p: error probability per operation. label: 'observable', or 'xz' and 'ixyz', which keep both observables between
    noiseless ends.
    """

    distance: int
    rounds: int
    p: float
    noise: str = "uniform"
    basis: str = "Z"
    label: str = "observable"

    def __post_init__(self) -> None:
        check(self.distance, self.rounds, self.p, self.noise)
        if self.basis not in BASES:
            raise InputError(f"basis {self.basis!r} is unknown, use X or Z")
        if self.label not in LABELS:
            raise InputError(f"label {self.label!r} is unknown, use one of {', '.join(LABELS)}")

    def circuit(self) -> stim.Circuit:
        """The experiment's circuit, with one observable or two."""
        if self.label == "observable":
            return memory_circuit(self.basis, self.distance, self.rounds, self.p, self.noise)
        return both_observables_circuit(self.distance, self.rounds, self.p, self.noise)


class Sampler:
    """Batches of shots by index. See the module for what decides them.

    A batch holds, for N shots of R rounds and S stabilizers: events, measurements (N, R+1, S) uint8, see
    :class:`~trainables.alphaqubit.layout.Placement`; label uint8, (N, 1) for 'observable', (N, 2) for 'xz' (flip of
    the X observable, of the Z observable), (N, 1) with the logical error I, X, Y, Z as 0..3 for 'ixyz'; and for
    'observable' round_labels (N, R) uint8, the observable's flip after each round in the data qubits' Pauli frame.
    """

    def __init__(self, experiment: Experiment, seed: int, split: str = "train") -> None:
        if split not in SPLITS:
            raise InputError(f"split {split!r} is unknown, use one of {', '.join(SPLITS)}")
        if seed < 0:
            raise InputError(f"seed={seed} is negative, use 0 or more")
        self.experiment, self.seed, self.split = experiment, seed, split
        self.circuit = experiment.circuit()
        self.memory = experiment.label == "observable"
        self._drawn = (
            with_round_labels(self.circuit, experiment.basis, experiment.distance) if self.memory else self.circuit
        )
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @cached_property
    def placement(self) -> Placement:
        """Layout and detectors of the experiment."""
        return layout_of(self.circuit)

    def shots(self, first: int, count: int) -> Batch:
        """Shots first .. first + count - 1."""
        return self.at(torch.arange(first, first + count))

    def at(self, indices: Tensor) -> Batch:
        """Shots by index, (N,) int64, 0 or more, in this order."""
        index = indices.numpy()
        if len(index) and index.min() < 0:
            raise InputError(f"shot {index.min()} is negative, shots count from 0")
        blocks, rows = index // BLOCK, index % BLOCK
        events = np.empty((len(index), self._drawn.num_detectors), np.uint8)
        flips = np.empty((len(index), self._drawn.num_observables), np.uint8)
        for block in np.unique(blocks):
            here = blocks == block
            drawn = self._block(int(block))
            events[here], flips[here] = drawn[0][rows[here]], drawn[1][rows[here]]
        return self._batch(events, flips)

    def _batch(self, events: np.ndarray, flips: np.ndarray) -> Batch:
        grid = self.placement.to_grid(events)
        batch = {"events": grid, "measurements": self.placement.measurements(grid)}
        if self.memory:
            batch |= {"label": flips[:, :1], "round_labels": flips[:, 1:]}
        elif self.experiment.label == "xz":
            batch["label"] = flips[:, [X_OBSERVABLE, Z_OBSERVABLE]]
        else:
            batch["label"] = CLASSES[flips[:, X_OBSERVABLE], flips[:, Z_OBSERVABLE]][:, None]
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Events (BLOCK, D) and observables of one block, both uint8; the last two blocks are kept."""
        if block not in self._blocks:
            # 'xz' and 'ixyz' are two views of the same shots.
            kind = self.experiment.basis if self.memory else "both"
            identity = (*astuple(self.experiment)[:4], kind, self.seed, self.split, block)
            seed = int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:8], "little")
            drawn = self._drawn.compile_detector_sampler(seed=seed).sample(BLOCK, separate_observables=True)
            self._blocks[block] = (drawn[0].view(np.uint8), drawn[1].view(np.uint8))
            while len(self._blocks) > 2:
                self._blocks.popitem(last=False)
        return self._blocks[block]


def fixed_shots(experiment: Experiment, seed: int, count: int, split: str = "test") -> tuple[Batch, str]:
    """The workload's own shots and the hash that identifies them."""
    if count < 1:
        raise InputError(f"count={count} of test shots is too small, use 1 or more")
    batch = Sampler(experiment, seed, split).shots(0, count)
    return batch, shots_hash(batch)


def shots_hash(batch: Batch) -> str:
    """16 hex digits of a batch's names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
