"""The shots that a teacher learns from: of several error rates in turn, and with the best labels that there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainables.alphaqubit.exact import ExactDecoder
from trainables.alphaqubit.sampler import BLOCK, Batch, Experiment, Sampler


class Mixture:
    """Shots by index, block by block of the next experiment; they differ in p alone.

    exact: 'label' (N, K) float32 is the flips' probability by the exact decoder, given the shot's events: what the
    flips of many such shots would come to on average, without their noise. Distance 3 only. Otherwise the flips.
    """

    def __init__(self, experiments: Sequence[Experiment], seed: int, exact: bool) -> None:
        self._samplers = [Sampler(experiment, seed, "pretrain") for experiment in experiments]
        self._exact = [ExactDecoder(one.circuit) for one in self._samplers] if exact else []

    def at(self, indices: Tensor) -> Batch:
        """Shots by index, (N,) int64, see :class:`~trainables.alphaqubit.sampler.Sampler`."""
        which = indices // BLOCK % len(self._samplers)
        batch: Batch = {}
        for k, sampler in enumerate(self._samplers):
            rows = which == k
            own = sampler.at(indices[rows])
            if self._exact:
                flat = sampler.placement.to_flat(own["events"].numpy())
                own["label"] = torch.from_numpy(self._exact[k].flips(flat)).float()
            for name, value in own.items():
                batch.setdefault(name, value.new_empty(len(indices), *value.shape[1:]))[rows] = value
        return batch
