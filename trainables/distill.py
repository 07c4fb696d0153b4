"""Distill: a Ray trainable that trains a student on the task and on its teacher's outputs, generic over a Domain.

L = alpha L_task + sum over signals of weight(progress) x L_signal. Teacher outputs come from a cache that all trials
share; adapters exist in training only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainables.domain import Batch, make_domain
from trainables.gates import paired_drop
from trainables.teacher_cache import TeacherCache, inherited, teacher_metrics
from trainables.training import Training


class Distill(Training):
    """All trials of a seed see the same samples in the same order, so that their differences are paired."""

    def build(self) -> None:
        """The student as the trial's parameters say, its signals and the shared cache."""
        params = self.config["params"]
        self.settings = {**self.settings, **params}
        cache = Path(self.config["cache_dir"])
        make = partial(make_domain, self.config["domain"], self.config["settings"], params, self.seed, cache)
        self.domain = make()
        self.signals = self.domain.signals()
        states = any(signal.states for signal in self.signals)
        self.cache = TeacherCache(cache, make, self.settings["train_samples"], states)
        self.reference = teacher_metrics(cache, self.domain, "val", full=False)[self.domain.primary]
        self.model = self._student(cache)
        self.heads = self.domain.adapters() if states else nn.ModuleDict()
        self.trained = nn.ModuleList([self.model, self.heads])

    def _student(self, cache: Path) -> nn.Module:
        """The student to start from; a state that is about to be restored needs no inheritance."""
        if self.settings.get("init") != "inherit" or (self.folder / "state.pt").exists():
            return self.domain.student(inherit=False)
        return inherited(cache, self.domain)

    @property
    def lower_is_better(self) -> bool:
        """As the domain's primary metric."""
        return self.domain.lower_is_better

    def batches(self, epoch: int) -> Iterator[Batch]:
        """A shuffled pass over the cache after the other, cut into epochs; samples of a group stay together."""
        group = self.domain.group
        size, count = self.settings["batch_size"] // group, self.cache.count // group
        first = (epoch - 1) * self.steps_per_epoch * size
        stream = torch.arange(first, first + self.steps_per_epoch * size)
        order = {int(p): self._shuffled(int(p), count) for p in torch.unique(stream // count)}
        picked = torch.stack([order[int(i) // count][int(i) % count] for i in stream])
        for groups in torch.split(picked, size):
            own = self.gang.share(groups)
            yield self.cache.rows((group * own[:, None] + torch.arange(group)).flatten())

    def _shuffled(self, turn: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return torch.randperm(count, generator=generator)

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and each unweighted part."""
        outputs = self.domain.forward(self.model, batch)
        parts = {"task": self.domain.task_loss(outputs, batch)}
        total = self.settings["alpha"] * parts["task"]
        for signal in self.signals:
            parts[signal.name] = self.domain.signal_loss(signal.name, outputs, batch, self.heads)
            total = total + signal.weight.value(progress) * parts[signal.name]
        return total, parts

    def validate(self) -> dict[str, float]:
        """Mean metrics over the validation samples; the drop of the primary one against the teacher, with interval."""
        values = self.domain.evaluate(self.candidate(), "val")
        own = values[self.domain.primary]
        fall = paired_drop(own.numpy(), self.reference.numpy(), self.domain.lower_is_better, seed=self.seed)
        drops = {"val_drop": fall.value, "val_drop_lo": fall.lo, "val_drop_hi": fall.hi}
        means = {f"val_{name}": float(value.mean()) for name, value in values.items()}
        return {**drops, "val_quality": float(own.mean()), **means}

    def exported(self) -> dict[str, Any]:
        """The plain student and where it comes from; no adapter."""
        origin = {"params": dict(self.config["params"]), "seed": self.seed, "epoch": self.epoch}
        return {**self.domain.export(self.candidate()), "origin": origin}

    def candidate(self) -> nn.Module:
        """The model that is validated and saved."""
        return self.model
