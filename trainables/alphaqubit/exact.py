"""The exact Bayes decoder of a distance-3 code: P(observable flipped | all detection events), by a forward recursion.

Every error of a detector error model flips detectors of one layer or of two neighbouring ones. So all that the past
says about the future is a distribution over the parities that it leaves in the next layer, 2^8 states, together with
the observables' flips. The flips are carried as characters (sums with signs), which turns their part of the
convolution into a product: K observables need 2^K products of a (shots, 2^8) with a (2^8, 2^8) matrix per layer.
Probabilities are never subtracted but in the signed sums, so float32 is good to about 1e-6 in the result.

It is the physical limit that every decoder can be held against, and by the posterior a lower-variance measure of
their errors, :func:`rb_ler`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import stim
import torch
from torch import Tensor

from engines.errors import InputError
from trainables.alphaqubit.layout import layout_of

STATE_BITS = 8
CHUNK = 1024  # shots at a time: the state of 1024 shots fits into a core's cache

_Errors = tuple[tuple[int, float], ...]


class ExactDecoder:
    """Posterior probabilities of the observables' flips under a circuit or DEM of distance 3, any rounds."""

    def __init__(self, source: stim.Circuit | stim.DetectorErrorModel) -> None:
        dem = source.detector_error_model() if isinstance(source, stim.Circuit) else source
        placement = layout_of(dem)
        counts = np.bincount(placement.layer)
        if counts.max() > STATE_BITS:
            raise InputError(
                f"distance={placement.layout.distance} has 2^{counts.max()} states between rounds: the exact decoder "
                "takes distance 3"
            )
        self.observables = dem.num_observables
        # Each layer's detectors, as columns of the flat events; their place in it is their bit.
        self.columns = [np.flatnonzero(placement.layer == t) for t in range(placement.rounds + 1)]
        bits = [len(columns) for columns in self.columns] + [0]
        groups = _grouped(dem, placement.layer, self.columns)
        self.steps = [_step(groups[t], bits[t], bits[t + 1], self.observables) for t in range(placement.rounds + 1)]

    def posterior(self, events: np.ndarray) -> np.ndarray:
        """(N, 2^K) float64: P(flips | events) for each pattern of flips; bit k of a pattern is observable k.

        events: (N, D) of 0 and 1 in the order of the DEM's detectors.
        """
        expected = sum(map(len, self.columns))
        if events.ndim != 2 or events.shape[1] != expected:
            raise InputError(f"events of shape {tuple(events.shape)}: expected (shots, {expected} detectors)")
        parts = [self._posterior(events[at : at + CHUNK]) for at in range(0, len(events), CHUNK)]
        return np.concatenate(parts) if parts else np.zeros((0, 2**self.observables))

    def flips(self, events: np.ndarray) -> np.ndarray:
        """(N, K) float64: P(observable k flipped | events)."""
        posterior = self.posterior(events)
        patterns = np.arange(2**self.observables)
        flips: np.ndarray = np.stack([posterior[:, patterns >> k & 1 == 1].sum(1) for k in range(self.observables)], 1)
        return flips

    def _posterior(self, events: np.ndarray) -> np.ndarray:
        characters = 2**self.observables
        state = torch.ones(characters, len(events), 1)
        for columns, step in zip(self.columns, self.steps, strict=True):
            seen = torch.from_numpy(events[:, columns].astype(np.int64) @ (1 << np.arange(len(columns))))
            if state.shape[2] == 1:  # nothing has happened yet
                start = torch.zeros(characters, len(events), 2 ** len(columns))
                state = start.scatter_(2, seen.expand(characters, -1)[..., None], 1.0)
            else:
                # What this layer's own errors must add to the parities that the past left in it.
                missing = torch.arange(state.shape[2])[None] ^ seen[:, None]
                state = state.gather(2, missing.expand(characters, -1, -1))
            state = state @ step
            state = state / state[:1].sum(2, keepdim=True)
        signed = state[..., 0].double().numpy()
        posterior: np.ndarray = (_signs(characters) @ signed / characters).clip(0, 1).T
        posterior /= posterior.sum(1, keepdims=True)
        return posterior


def rb_ler(posterior: np.ndarray, decisions: np.ndarray) -> float:
    """Mean posterior probability that a decision is wrong: an estimate of its error rate without counting noise.

    posterior: (N, 2^K) of :meth:`ExactDecoder.posterior`. decisions: (N,) patterns or (N, K) flips, 0 or 1.
    """
    if decisions.ndim == 2:
        decisions = decisions.astype(np.int64) @ (1 << np.arange(decisions.shape[1]))
    right = np.take_along_axis(posterior, decisions.astype(np.int64)[:, None], 1)
    return float(1 - right.mean())


def _signs(characters: int) -> np.ndarray:
    """(characters, characters) of +1 and -1: the parity of the bits that two patterns share."""
    patterns = np.arange(characters)
    shared = patterns[:, None] & patterns[None]
    return 1.0 - 2.0 * (np.array([int(k).bit_count() for k in shared.ravel()]).reshape(shared.shape) % 2)


def _grouped(dem: stim.DetectorErrorModel, layer: np.ndarray, columns: list[np.ndarray]) -> list[_Errors]:
    """Errors by the first layer they touch: (mask, probability), masks of this layer's bits, the next's, the flips.

    Errors of equal masks are merged; one that touches no detector counts to the last layer.
    """
    bit = {int(detector): k for own in columns for k, detector in enumerate(own)}
    groups: list[dict[int, float]] = [{} for _ in columns]
    for instruction in dem.flattened():
        if instruction.type != "error":
            continue
        detectors: set[int] = set()
        flips = 0
        for target in instruction.targets_copy():
            if isinstance(target, int) or target.is_separator():
                continue
            if target.is_relative_detector_id():
                detectors ^= {target.val}
            else:
                flips ^= 1 << target.val
        touched = {int(layer[detector]) for detector in detectors}
        first = min(touched, default=len(columns) - 1)
        if max(touched, default=first) > first + 1:
            raise InputError(f"an error flips detectors of layers {sorted(touched)}: expected neighbouring rounds only")
        own = len(columns[first])
        following = len(columns[first + 1]) if first + 1 < len(columns) else 0
        mask = flips << own + following
        for detector in detectors:
            mask ^= 1 << bit[detector] + (own if layer[detector] > first else 0)
        p, before = instruction.args_copy()[0], groups[first].get(mask, 0.0)
        groups[first][mask] = p + before - 2 * p * before
    return [tuple(sorted(group.items())) for group in groups]


@cache
def _step(errors: _Errors, own: int, following: int, observables: int) -> Tensor:
    """(2^K, 2^own, 2^following) float32: the errors' joint distribution over both layers' parities, by character."""
    table = np.zeros(2 ** (own + following + observables))
    table[0] = 1
    patterns = np.arange(len(table))
    for mask, p in errors:
        table = (1 - p) * table + p * table[patterns ^ mask]
    signed = _signs(2**observables) @ table.reshape(2**observables, -1)
    # The lowest bits are this layer's, so they are the last axis of the table.
    step = signed.reshape(-1, 2**following, 2**own).transpose(0, 2, 1)
    return torch.from_numpy(np.ascontiguousarray(step, dtype=np.float32))
