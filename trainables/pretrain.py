"""Pretrain: a Ray trainable that trains a domain's small teacher from scratch on fresh samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trainables.domain import Batch, make_domain
from trainables.gates import drop
from trainables.stream import fresh
from trainables.training import Training


class Pretrain(Training):
    """Every epoch draws scenes never seen before; each scene is used in both directions of its pair."""

    def build(self) -> None:
        """The teacher's architecture with fresh weights."""
        self.domain = make_domain(self.config["domain"], self.settings, self.config["params"], self.seed)
        model = self.domain.new_teacher()
        self.model, self.trained = model, nn.ModuleList([model])

    @property
    def lower_is_better(self) -> bool:
        """As the domain's primary metric."""
        return self.domain.lower_is_better

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Fresh samples, drawn by a thread ahead of their use; of a scene both directions count."""
        groups = self.settings["batch_size"] // self.domain.group
        first = (epoch - 1) * self.steps_per_epoch * groups
        return fresh(
            lambda scenes: self.domain.pretraining_samples(self.gang.share(scenes)), first, self.steps_per_epoch, groups
        )

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The domain's loss of a teacher."""
        return self.domain.pretraining_loss(self.model, batch), {}

    def validate(self) -> dict[str, float]:
        """Means over the validation pairs."""
        values = self.domain.evaluate(self.model, "val")
        means = {f"val_{name}": float(value.mean()) for name, value in values.items()}
        quality = means[f"val_{self.domain.primary}"]
        # There is no teacher to fall behind: a rise above its own best shows divergence, and nothing else stops it.
        best = quality if math.isnan(self.best) else self.best
        fall = drop(quality, best, self.domain.lower_is_better) if math.isfinite(quality) else math.nan
        return {"val_drop": fall, "val_quality": quality, **means}

    def exported(self) -> dict[str, Any]:
        """The plain model and its constructor's arguments."""
        return self.domain.export(self.model)
