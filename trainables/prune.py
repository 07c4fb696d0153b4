"""Prune: a Ray trainable that makes the teacher itself narrower and fine-tunes what is left, generic over a Domain.

Trained like a student (see distill.py): on the task, and on the teacher's outputs where beta is not 0. With several
steps the model loses its heads and channels bit by bit over the first half of the epochs and recovers in between.
Whatever is validated or saved on the way has its final width, so that all epochs of a trial compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from trainables.config import PruneSettings
from trainables.distill import Distill
from trainables.teacher_cache import pruned


class Prune(Distill):
    """The model of epoch e is a function of the state after epoch e - 1 alone: resumed equals uninterrupted."""

    def _student(self, cache: Path) -> nn.Module:
        """The teacher after the first step, or the model of the state that is about to be restored."""
        self.pruning = PruneSettings.among(self.settings)
        self.narrow: tuple[int, nn.Module] | None = None
        state = self.folder / "state.pt"
        return self.domain.load(state) if state.exists() else pruned(cache, self.domain, self.pruning.steps)

    def start_epoch(self) -> None:
        """The pruning step that is due."""
        due = self.pruning.step_epochs
        if self.epoch in due[1:]:
            share = (due.index(self.epoch) + 1) / len(due)
            self.model = self.domain.pruned(self.model, share)
            self.trained = nn.ModuleList([self.model, self.heads])
            self.ready()  # momenta of channels that are gone mean nothing

    def candidate(self) -> nn.Module:
        """The model at its final width; before the last step a copy that is pruned as far as that at once."""
        if self.epoch > self.pruning.step_epochs[-1]:
            return self.model
        if self.narrow is None or self.narrow[0] != self.epoch:
            self.narrow = self.epoch, self.domain.pruned(self.model, 1.0)
        return self.narrow[1]

    def _state(self) -> dict[str, Any]:
        """Also how to build the present model: its widths change from step to step."""
        return {**super()._state(), **self.domain.export(self.model)}
