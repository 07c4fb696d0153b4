"""What a domain (DUSt3R, a surface-code decoder) implements so that the trainables can stay generic.

A new domain is one class and one line in DOMAINS; nothing else changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from engines.errors import InputError
from engines.policy import QuantPolicy
from trainables.schedules import Schedule

Batch = dict[str, Tensor]
Outputs = dict[str, Tensor]

DOMAINS = {
    "dust3r": "trainables.dust3r.domain:Dust3r",
    "alphaqubit": "trainables.alphaqubit.domain:AlphaQubit",
}


@dataclass(frozen=True)
class Signal:
    """One distillation loss term: its name in the logs, its weight over training, and whether it needs states."""

    name: str
    weight: Schedule
    states: bool = False


class Domain(Protocol):
    """Models, data, losses and metrics of one kind of experiment. Built by :func:`make_domain` in any process."""

    primary: str
    lower_is_better: bool
    group: int  # so many consecutive training samples share work: a batch holds all of them or none
    blocks: tuple[type[nn.Module], ...]  # what activation checkpointing computes again

    @property
    def shipped(self) -> Path:
        """Where the teacher that comes with the package lies, or a new one would."""

    def new_teacher(self) -> nn.Module:
        """The small teacher's architecture with fresh weights, for pretraining."""

    def teacher(self) -> nn.Module:
        """The frozen teacher in eval mode. InputError when the file named in the settings cannot serve."""

    def student(self, inherit: bool) -> nn.Module:
        """A student of the settings' architecture, filled from the teacher or with random weights."""

    def student_id(self) -> str:
        """Changes whenever the inherited student would: teacher, ratios, code, calibration data."""

    def pruned(self, model: nn.Module, share: float) -> nn.Module:
        """`model`, the teacher or an earlier result of this, pruned to `share` of the way, in (0, 1], to the widths
        that the settings ask for: a new model that :meth:`load` reads back. InputError where a layer would be left
        with nothing.
        """

    def widths(self) -> object:
        """The architecture that the settings ask :meth:`pruned` for, before any layer is told from another; InputError
        where a layer would be left with nothing.
        """

    def pruned_id(self) -> str:
        """Changes whenever the results of :meth:`pruned` would: teacher, widths asked for, code, calibration data."""

    def load(self, path: Path) -> nn.Module:
        """A model from a file that :meth:`export` filled. InputError names what is wrong with it."""

    def export(self, model: nn.Module) -> dict[str, Any]:
        """The plain model as data: 'model' (tensors) and 'config' (constructor arguments)."""

    def blank(self, model: nn.Module) -> nn.Module:
        """A plain module of the same architecture, with weights of its own."""

    def data_id(self) -> str:
        """Changes whenever the training samples would: code, seed, size."""

    def split_id(self, split: str) -> str:
        """Changes whenever the metrics of :meth:`evaluate` on a split would, for the same model."""

    def contents(self) -> dict[str, str]:
        """Hashes of the data that settings name, by setting, as far as :meth:`sampled` does not cover them."""

    def samples(self, split: str, indices: Tensor) -> Batch:
        """Samples by index, leading dimension len(indices), in the dtypes in which they are cached."""

    def teacher_outputs(self, teacher: nn.Module, batch: Batch) -> Batch:
        """What distillation needs of the teacher, float16, keys 'teacher_*' (hidden states: 'teacher_state_*')."""

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Outputs and hidden states by name."""

    def task_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The loss against the ground truth."""

    def pretraining_samples(self, indices: Tensor) -> Batch:
        """Fresh training samples for :meth:`pretraining_loss`."""

    def pretraining_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss that the small teacher is trained with."""

    def signals(self) -> list[Signal]:
        """The distillation terms that are on, with their weights."""

    def signal_loss(self, name: str, outputs: Outputs, batch: Batch, adapters: nn.ModuleDict) -> Tensor:
        """One term, unweighted. batch holds the teacher's outputs."""

    def adapters(self) -> nn.ModuleDict:
        """What only training needs between student and teacher states; never exported."""

    def evaluate(self, model: nn.Module, split: str, full: bool = False) -> dict[str, Tensor]:
        """Metrics per sample on a fixed split ('val' or 'test'); full adds the slow ones.

        model: a plain one, or any module that takes :meth:`inputs` and answers as the deployed module does.
        """

    def compare(self, own: dict[str, Tensor], split: str) -> dict[str, float]:
        """More numbers for the record, from metrics that :meth:`evaluate` gave with `full`: how they stand beside other
        methods on the same samples. Empty where there is nothing to compare with.
        """

    def pace(
        self, model: nn.Module, p50_ms: float, device: str, policy: QuantPolicy | None, file: Path | None
    ) -> dict[str, float | str]:
        """Times in the domain's own units, for the record; called alone on the device.

        p50_ms: of one sample at batch 1. policy: of a model that is deployed in INT8, on the CPU. file: the deployed
        ONNX file that was timed, None where torch was.
        """

    def sampled(self) -> dict[str, Any]:
        """The workload's own samples, on which latency is measured, as plain data for its file."""

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The deployed module's inputs for a batch of samples."""

    def deployed(self, model: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, ...]], list[str], list[str]]:
        """The module that is exported and timed, the workload's inputs for it, and names of inputs and outputs."""


def answering(teacher: nn.Module) -> nn.Module:
    """The part of a teacher that answers, by which drops are counted: all of it, unless it says otherwise."""
    part: nn.Module = getattr(teacher, "answering", teacher)
    return part


def make_domain(
    name: str, settings: Mapping[str, Any], params: Mapping[str, Any], seed: int, cache: Path | None = None
) -> Domain:
    """The domain `name` for these settings (flat) with a trial's own parameters on top.

    cache: the folder of what is computed once by content; None where nothing may be written.
    """
    if name not in DOMAINS:
        raise InputError(f"domain {name!r} is unknown, use one of {', '.join(DOMAINS)}")
    module, cls = DOMAINS[name].split(":")
    domain: Domain = getattr(importlib.import_module(module), cls)({**settings, **params}, seed, cache)
    return domain
