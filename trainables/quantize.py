"""Quantize: a Ray trainable that rounds a model to INT8 and, only where that loses too much, trains on.

Epoch 1 is post-training quantization: calibrate, write the INT8 file, validate that very file. A drop within the
budget ends the trial there. Otherwise the following epochs fine-tune: in floating point first, with fake quantization
in the last `qat_share` of them. Those have a learning-rate cycle of their own, and their ranges stand still for the
last `frozen_share` (as networks under fake quantization settle better: Krishnamoorthi 2018, arXiv:1806.08342, section
3.2). SmoothQuant belongs to the rounding of finished weights: it ends where fake quantization begins, as from then on
training itself moves the scales, and what it sees must be what is deployed. Every validation is that of the INT8 file
that the weights of that epoch give, so a curve shows what would be deployed.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.policy import QuantPolicy
from trainables import deploy, fake_quant
from trainables.config import QuantSettings
from trainables.distill import Distill
from trainables.gates import paired_drop
from trainables.training import learning_rate


class Quantize(Distill):
    """All trials of a seed see the same samples in the same order, so that their differences are paired."""

    def build(self) -> None:
        """The model to quantize and its policy; see :class:`trainables.distill.Distill`."""
        super().build()
        self.quant = QuantSettings.among(self.settings)
        self.faked = False

    @property
    def policy(self) -> QuantPolicy:
        """By which the present weights are rounded."""
        return dataclasses.replace(self.quant.policy, smooth=0.0) if self.faked else self.quant.policy

    def _student(self, cache: Path) -> nn.Module:
        return deploy.source(self.domain, self.settings["model"]).train().requires_grad_(True)

    # ------------------------------------------------------------------ the course of a trial
    @property
    def _first_faked(self) -> int:
        """The first epoch with fake quantization; epoch 1 is the rounding of the model as it came."""
        trained: int = self.settings["epochs"] - 1
        return 2 + min(max(trained - 1, 0), math.ceil((1 - self.quant.qat_share) * trained - 0.5))

    def step(self) -> dict[str, Any]:
        """One epoch; a model that rounds within the budget is done after the first."""
        result = super().step()
        if result["epoch"] == 1 and result["val_drop"] <= self.config["budget"]:
            result["done"] = True
        return result

    def start_epoch(self) -> None:
        """Fake quantization, in the last share of the epochs."""
        if self.epoch + 1 >= self._first_faked:
            self._fake(self.epoch + 1)

    def _train(self) -> dict[str, float]:
        return {**(super()._train() if self.epoch else {}), "fake_quant": float(self.faked)}

    def rate(self, step: int, total: int) -> float:
        """Two cycles of warm-up and cosine: one over the epochs in floating point, one over those with rounding."""
        start, end, peak = self.steps_per_epoch, (self._first_faked - 1) * self.steps_per_epoch, self.quant.lr
        if self.faked:
            start, end, peak = end, total, self.quant.qat_lr
        return learning_rate((step - start + 1) / (end - start), peak, self.quant.lr_end, self.quant.lr_warmup)

    def _fake(self, epoch: int) -> None:
        """Fake quantization with the ranges that the policy finds for the present weights, until they are frozen."""
        first = not self.faked
        if first:
            self._insert()
        if first or epoch <= self.settings["epochs"] - math.ceil(self.quant.frozen_share * self.settings["epochs"]):
            clipped = deploy.ranges(self.domain, self._plain(), self.policy, self.folder)
            ranges = {name: max(clipped[node] for node in nodes) for name, nodes in self.nodes.items()}
            fake_quant.set_ranges(self.model, ranges)

    def _insert(self) -> None:
        self.faked = True
        (chosen,) = deploy.choices_of(self.domain, self.model, self.policy)
        self.nodes = fake_quant.modules_of(chosen, self.model)
        fake_quant.insert(self.model, self.nodes, self.policy, self._look)

    @torch.no_grad()
    def _look(self, model: nn.Module) -> None:
        """A pass over a few samples, which gives every range its shape."""
        samples = self.domain.samples("train", torch.arange(deploy.CALIBRATION_BATCH))
        self.domain.forward(model, {name: value.to(self.device) for name, value in samples.items()})

    # ------------------------------------------------------------------ what is validated and kept
    def validate(self) -> dict[str, float]:
        """The drop of the INT8 file against the teacher in floating point."""
        plain = self._plain()
        path = self.folder / "candidate.onnx"
        deploy.export_int8(self.domain, plain, self.policy, path)
        values = self.domain.evaluate(deploy.Engine(path), "val")
        own = values[self.domain.primary]
        fall = paired_drop(own.numpy(), self.reference.numpy(), self.domain.lower_is_better, seed=self.seed)
        drops = {"val_drop": fall.value, "val_drop_lo": fall.lo, "val_drop_hi": fall.hi}
        return {**drops, "val_quality": float(own.mean()), **{f"val_{k}": float(v.mean()) for k, v in values.items()}}

    def _plain(self) -> nn.Module:
        """The present weights in a model without quantizers, on the CPU."""
        model = self.domain.blank(self.model)
        model.load_state_dict({name: value.cpu() for name, value in fake_quant.plain_state(self.model).items()})
        return model.eval()

    def exported(self) -> dict[str, Any]:
        """The plain weights, the policy that rounds them, and where they come from."""
        route = "PTQ" if self.epoch == 1 else "QAT" if self.faked else "FP fine-tuning"
        origin = {"params": dict(self.config["params"]), "seed": self.seed, "epoch": self.epoch, "route": route}
        return {**self.domain.export(self._plain()), "quantization": self.policy.to_data(), "origin": origin}

    def _restore(self, state: dict[str, Any]) -> None:
        if state["epoch"] + (state["part"]["taken"] > 0) >= self._first_faked:
            self._insert()  # the state holds the quantizers' ranges
        super()._restore(state)


class Round(Quantize):
    """Post-training quantization alone."""

    def step(self) -> dict[str, Any]:
        """The one epoch."""
        return {**super().step(), "done": True}
