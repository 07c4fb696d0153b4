"""The settings of the surface-code domain: what is measured, and how a decoder is trained and distilled."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from engines.errors import InputError
from trainables.alphaqubit.config import PARTS, PRESETS
from trainables.alphaqubit.sampler import Experiment
from trainables.config import Count, PruneSettings, QuantSettings, Settings, TrainingSettings, Workload, absolute
from trainables.schedules import Schedule

Rate = Annotated[float, Field(gt=0, lt=0.5)]
SIGNALS = ("beta", "transformer", "rnn", "readout", "fused")  # settings that are the weight of a distillation signal


def _weights(value: Any) -> Any:
    schedule = Schedule.from_data(value)
    if min(schedule.values) < 0:
        raise ValueError(f"weights {list(schedule.values)} of the schedule must be 0 or more")
    return schedule.to_data()


def _known(size: str) -> str:
    if size not in PRESETS:
        raise ValueError(f"expected one of {', '.join(PRESETS)}")
    return size


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


class DecoderPretrainSettings(Settings):
    """How a decoder is trained from scratch."""

    size: Annotated[str, AfterValidator(_known)] = "teacher"
    epochs: Count = 20
    samples_per_epoch: Count = 102400
    batch_size: Count = 256
    optimizer: Literal["muon", "adamw"] = "adamw"
    lr: float = Field(6e-3, gt=0)
    lr_end: float = Field(0.01, ge=0, le=1)
    lr_warmup: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(1e-5, ge=0)
    train_p: Rate = 0.01
    rounds_weight: float = Field(0.0, ge=0)
    next_weight: float = Field(0.0, ge=0)


class DecoderFusionSettings(Settings):
    """How the probes that fuse a teacher's logits are trained."""

    teacher: Annotated[str, AfterValidator(absolute)] = "shipped"
    fusion_weights: tuple[float, float, float] = (1, 1, 1)
    epochs: Count = 5
    samples_per_epoch: Count = 40960
    batch_size: Count = 256
    optimizer: Literal["muon", "adamw"] = "adamw"
    lr: float = Field(3e-3, gt=0)
    lr_end: float = Field(0.01, ge=0, le=1)
    lr_warmup: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
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

    heads: float = Field(1.0, ge=0)
    hidden: float = Field(1.0, ge=0)
    conv: float = Field(1.0, ge=0)
    train_p: Rate = 0.01

    GROUPS = PARTS


class DecoderSettings(TrainingSettings):
    """How one student is distilled; the weight of every signal is a number or a schedule, 0 = off."""

    model: Annotated[str, AfterValidator(absolute)] = "scratch"
    size: Annotated[str, AfterValidator(_known)] = "student"
    fusion: Annotated[str, AfterValidator(absolute)] = "none"
    train_p: Rate = 0.01
    rounds_weight: float = Field(0.0, ge=0)
    transformer: Any = 0.0
    rnn: Any = 0.0
    readout: Any = 0.0
    fused: Any = 0.0

    @field_validator("transformer", "rnn", "readout", "fused")
    @classmethod
    def _schedules(cls, value: Any) -> Any:
        return _weights(value)

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
