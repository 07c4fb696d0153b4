"""The settings that a trainable is given: what is measured (workload) and how a model is trained.

Every key with its unit and meaning is explained in ``sweeps/settings/*.yaml``; here are types and limits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from engines.errors import InputError
from engines.policy import QuantPolicy
from trainables.schedules import Schedule

Ratio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Even = Annotated[int, Field(ge=2, multiple_of=2)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


WORDS = ("shipped", "teacher", "scratch", "none", "cached", "rooms")  # what a setting may say in place of a path


def absolute(model: str) -> str:
    """A path as every process finds it: workers of a cluster have another working directory."""
    return model if model in WORDS else str(Path(model).expanduser().absolute())


PAIR_GRAPH = re.compile(r"nearest|complete|(swin|logwin)(-[1-9]\d*)?(-noncyclic)?|oneref(-\d+)?")
PAIR_GRAPHS = "nearest, complete, swin[-K][-noncyclic], logwin[-K][-noncyclic] or oneref[-I]"  # the same, to be read


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values cannot be changed after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def among(cls, values: Mapping[str, Any]) -> Self:
        """These settings from the flat values of several."""
        return cls(**{key: value for key, value in values.items() if key in cls.model_fields})


class Workload(Settings):
    """The fixed measuring protocol, its hash is the workload's identity; every domain adds what it measures on."""

    primary: str
    workload_seed: int = Field(42, ge=0)
    warmup: int = Field(5, ge=0)
    repeats: int = Field(60, ge=5)
    threads: Count = 1
    peers: bool = False


class WorkloadSettings(Workload):
    """DUSt3R's protocol."""

    data: Annotated[str, AfterValidator(absolute)] = "rooms"
    image_size: str = "64x64"
    sampled_pairs: Count = 20
    pair_graph: str = "nearest"
    neighbours: Count = 4
    views_per_scene: int = Field(8, ge=2)
    scene_views: int = Field(8, ge=2)
    scene_steps: Count = 100
    scene_repeats: int = Field(3, ge=2)
    val_pairs: int = Field(512, ge=2)
    test_pairs: int = Field(2048, ge=2)
    primary: Literal["absrel", "chamfer", "rmse", "delta1"] = "absrel"

    @field_validator("image_size")
    @classmethod
    def _size(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", value):
            raise ValueError("expected WIDTHxHEIGHT in pixels, e.g. 64x64")
        return value

    @field_validator("pair_graph")
    @classmethod
    def _kind(cls, value: str) -> str:
        if not PAIR_GRAPH.fullmatch(value):
            raise ValueError(f"expected {PAIR_GRAPHS}")
        return value

    @property
    def height_width(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        width, height = (int(part) for part in self.image_size.split("x"))
        return height, width

    @model_validator(mode="after")
    def _graph(self) -> WorkloadSettings:
        if self.neighbours >= self.views_per_scene:
            raise ValueError(
                f"neighbours={self.neighbours} must be smaller than views_per_scene={self.views_per_scene}"
            )
        return self


def _weight(value: Any) -> Any:
    schedule = Schedule.from_data(value)
    if min(schedule.values) < 0:
        raise ValueError(f"weights {list(schedule.values)} of the schedule must be 0 or more")
    return schedule.to_data()


Weight = Annotated[Any, AfterValidator(_weight)]  # of a loss term: a number or a schedule


class LearningSettings(Settings):
    """How long anything is trained, by which optimiser, and in how much memory."""

    epochs: Count = 20
    samples_per_epoch: Count = 40960
    batch_size: Count = 256
    optimizer: Literal["muon", "adamw"] = "adamw"
    lr: Positive = 3e-3
    lr_end: float = Field(0.01, ge=0, le=1)
    lr_warmup: float = Field(0.03, ge=0, lt=1)
    weight_decay: NotNegative = 1e-5
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: Count = 1
    checkpointing: bool = False

    @model_validator(mode="after")
    def _pieces(self) -> Self:
        # Both directions of a pair of images stay together.
        if self.batch_size % self.accumulate or (self.accumulate > 1 and self.batch_size // self.accumulate % 2):
            raise ValueError(
                f"accumulate={self.accumulate} must cut batch_size={self.batch_size} into equal pieces of an even size"
            )
        return self


class TrainingSettings(LearningSettings):
    """How a model is trained on the task and on its teacher's outputs; a trial overrides the keys that it searches."""

    teacher: Annotated[str, AfterValidator(absolute)] = "shipped"
    epochs: Count = 30
    samples_per_epoch: Count = 1536
    train_samples: Count = 20480
    batch_size: Even = 32  # both directions of a pair of images
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: Positive = 2e-3
    weight_decay: NotNegative = 0.01
    alpha: NotNegative = 1.0
    T: Positive = 3.0
    beta: Weight = 0.5
    grace: Count = 3
    patience: Count = 3
    eta: int = Field(3, ge=2)
    min_peers: Count = 4

    @model_validator(mode="after")
    def _batches(self) -> Self:
        for name in ("samples_per_epoch", "train_samples"):
            if getattr(self, name) < self.batch_size:
                raise ValueError(f"batch_size={self.batch_size} is larger than {name}={getattr(self, name)}")
        return self


class DistillSettings(TrainingSettings):
    """How one student is made from the teacher."""

    gamma: NotNegative = 0.0
    depth: Ratio = 0.7
    dec_depth: Ratio | None = None
    heads: Ratio = 0.7
    ffn: Ratio = 0.7
    head: Ratio = 1.0
    shared_head: bool = False
    init: Literal["inherit", "scratch"] = "inherit"


Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]


class QuantSettings(TrainingSettings):
    """How a model is quantized: the policy of engines/policy.py, and the training where rounding loses too much."""

    model: Annotated[str, AfterValidator(absolute)] = "teacher"
    bits_w: int = 8
    bits_a: int = 8
    keep: Patterns = ("layernorm", "softmax", "attention", "conv")
    calibration: Count = 512
    method: str = "minmax"
    mode: str = "static"
    smooth: float = 0.0
    reduce_range: bool | None = None
    skip_slower: bool = False
    qat_share: Ratio = 1 / 3
    qat_lr: Positive = 2e-4
    frozen_share: float = Field(0.15, ge=0, le=1)

    @property
    def policy(self) -> QuantPolicy:
        """The part that both exports obey."""
        return QuantPolicy(**{field.name: getattr(self, field.name) for field in fields(QuantPolicy)})

    @model_validator(mode="after")
    def _policy(self) -> Self:
        try:
            _ = self.policy
        except InputError as error:
            raise ValueError(str(error)) from None
        if self.calibration > self.train_samples:
            raise ValueError(
                f"calibration={self.calibration} needs as many distinct training samples, found train_samples="
                f"{self.train_samples}: lower the one or raise the other"
            )
        return self


class Dust3rQuantSettings(QuantSettings):
    """DUSt3R's: training may also follow the teacher's hidden states."""

    gamma: NotNegative = 0.0


class PruneSettings(TrainingSettings):
    """How the teacher is pruned and fine-tuned; a trial overrides the keys that it searches.

    A domain adds a factor for each of its GROUPS: what it multiplies rho by is the share of the group that leaves.
    """

    epochs: Count = 12
    lr: Positive = 1e-4
    rho: float = Field(0.3, gt=0, lt=1)
    steps: Count = 1

    GROUPS: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _pruning(self) -> Self:
        for group, ratio in self.channel_ratios.items():
            if ratio >= 1:
                raise ValueError(
                    f"rho={self.rho:g} x {group}={getattr(self, group):g} removes all there is: lower either below "
                    f"a product of 1"
                )
        if self.steps > 1 and 2 * self.steps > self.epochs:
            raise ValueError(
                f"steps={self.steps} need at least {2 * self.steps} epochs, found epochs={self.epochs}: "
                "the last step falls before half of the training"
            )
        return self

    @property
    def channel_ratios(self) -> dict[str, float]:
        """Share of the channels to remove, by group."""
        return {group: self.rho * float(getattr(self, group)) for group in self.GROUPS}

    @property
    def step_epochs(self) -> list[int]:
        """Epochs, counted from 0, before which a pruning step takes place; spread over the first half."""
        return [step * self.epochs // (2 * self.steps) for step in range(self.steps)]


class Dust3rPruneSettings(PruneSettings):
    """DUSt3R's groups, and where in a group what leaves is taken from."""

    enc_heads: NotNegative = 1.0
    enc_ffn: NotNegative = 1.0
    dec_heads: NotNegative = 1.0
    dec_ffn: NotNegative = 1.0
    residual: NotNegative = 0.0
    ratios: Literal["uniform", "sensitivity"] = "uniform"

    GROUPS = ("enc_heads", "enc_ffn", "dec_heads", "dec_ffn", "residual")


class PretrainSettings(LearningSettings):
    """How a small teacher is trained from scratch."""

    epochs: Count = 48
    samples_per_epoch: Count = 4096
    batch_size: Even = 32
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: Positive = 2e-3
    weight_decay: NotNegative = 0.05
