"""The settings of the surface-code domain: what is measured, and how a decoder is trained and distilled."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from engines.errors import InputError
from trainables.alphaqubit.config import PARTS, Config
from trainables.alphaqubit.sampler import Experiment
from trainables.config import (
    Count,
    LearningSettings,
    NotNegative,
    Positive,
    PruneSettings,
    QuantSettings,
    Settings,
    TrainingSettings,
    Weight,
    Workload,
    absolute,
)
from trainables.schedules import Schedule

Rate = Annotated[float, Field(gt=0, lt=0.5)]
Depth = Annotated[int, Field(ge=0)]
Dilations = Annotated[tuple[Count, ...], Field(min_length=1)]
SIGNALS = ("beta", "transformer", "rnn", "readout", "fused")  # settings that are the weight of a distillation signal


class DecoderWorkload(Workload):
    """The protocol on which decoders are measured: one experiment and its fixed shots."""

    primary: Literal["ler", "ler_exact"] = "ler"
    distance: int = 3
    rounds: int = 5
    noise: str = "uniform"
    p: float = 0.005
    basis: str = "Z"
    outputs: Literal["observable", "xz", "ixyz"] = "observable"
    sampled_shots: Count = 20
    val_shots: int = Field(20000, ge=2)
    test_shots: int = Field(100000, ge=2)

    @property
    def experiment(self) -> Experiment:
        """What is simulated."""
        return self.at(self.p)

    def at(self, p: float) -> Experiment:
        """The same experiment at another error probability."""
        return Experiment(self.distance, self.rounds, p, self.noise, self.basis, self.outputs)

    @model_validator(mode="after")
    def _simulated(self) -> Self:
        try:
            _ = self.experiment
        except InputError as error:
            raise ValueError(str(error)) from None
        if self.primary == "ler_exact" and (self.distance != 3 or self.outputs != "observable"):
            raise ValueError("primary=ler_exact: the exact decoder is for distance=3 and outputs=observable; use ler")
        return self


class Size(Settings):
    """A size of the decoder; see :class:`~trainables.alphaqubit.config.Config`, whose defaults are the teacher's."""

    dim: Count = Config.dim
    layers: Count = Config.layers
    heads: Count = Config.heads
    key_dim: Count = Config.key_dim
    widening: Count = Config.widening
    conv_channels: Count = Config.conv_channels
    dilations: Dilations = Config.dilations
    dilations_from_5: Dilations | None = None  # for codes of distance 5 and more, where they differ
    bias_dim: Count = Config.bias_dim
    bias_layers: Depth = Config.bias_layers
    embed_layers: Depth = Config.embed_layers
    readout_dim: Count = Config.readout_dim
    readout_layers: Depth = Config.readout_layers


class DecoderSizes(Settings):
    """The named sizes of the decoder, and the one that is built."""

    sizes: dict[str, Size] = {"teacher": Size()}
    size: str = "teacher"

    @field_validator("size")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        sizes = info.data.get("sizes")  # absent where they were refused
        if sizes is not None and value not in sizes:
            raise ValueError(f"expected one of {', '.join(sizes)}")
        return value

    def config(self, distance: int) -> Config:
        """The size that is built, for codes of a distance."""
        data = self.sizes[self.size].model_dump()
        far = data.pop("dilations_from_5")
        return Config(**{**data, "dilations": far if far and distance >= 5 else data["dilations"]})


class DecoderPretrainSettings(LearningSettings):
    """How a decoder is trained from scratch."""

    samples_per_epoch: Count = 102400
    lr: Positive = 6e-3
    mixed_p: tuple[Rate, ...] = Field((0.005, 0.01), min_length=1)
    exact_labels: bool = False
    rounds_weight: NotNegative = 0.0
    next_weight: NotNegative = 0.0


class DecoderFusionSettings(LearningSettings):
    """How the probes that fuse a teacher's logits are trained."""

    teacher: Annotated[str, AfterValidator(absolute)] = "shipped"
    fusion_weights: tuple[float, float, float] = (1, 1, 1)
    epochs: Count = 5
    weight_decay: NotNegative = 1e-4
    train_p: Rate = 0.01

    @field_validator("fusion_weights")
    @classmethod
    def _weights(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) < 0 or sum(value) <= 0:
            raise ValueError(f"weights {list(value)} must be 0 or more, and not all 0")
        return value


class DecoderQuantSettings(QuantSettings):
    """How a decoder is quantized, and trained where rounding loses too much."""

    train_p: Rate = 0.01


class DecoderPruneSettings(PruneSettings):
    """How a decoder is pruned and fine-tuned."""

    heads: NotNegative = 1.0
    hidden: NotNegative = 1.0
    conv: NotNegative = 1.0
    train_p: Rate = 0.01

    GROUPS = PARTS


class DecoderSettings(TrainingSettings):
    """How one student is distilled; the weight of every signal is a number or a schedule, 0 = off."""

    model: Annotated[str, AfterValidator(absolute)] = "scratch"
    fusion: Annotated[str, AfterValidator(absolute)] = "none"
    train_p: Rate = 0.01
    rounds_weight: NotNegative = 0.0
    transformer: Weight = 0.0
    rnn: Weight = 0.0
    readout: Weight = 0.0
    fused: Weight = 0.0

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        on = [name for name in SIGNALS if any(Schedule.from_data(getattr(self, name)).values)]
        if self.alpha == 0 and not on:
            raise ValueError(f"alpha=0 and all of {', '.join(SIGNALS)} 0: nothing to learn from; set one above 0")
        if "fused" in on and self.fusion == "none":
            raise ValueError(
                "fused is on without the probes that fuse: give fusion=cached, which trains them first, or "
                "fusion=PATH, a file of python sweeps/aq_fusion.py"
            )
        return self
