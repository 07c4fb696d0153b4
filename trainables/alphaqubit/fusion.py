"""Fused logits: linear probes on a frozen teacher's states, and their mean with the teacher's own readout.

A probe is one linear layer from all stabilizers' states after the last round, (S * D), to the logits. What is fused
is z_fuse = sum over heads of weight x logits. A distillation target only: no probe ever reaches a student.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import InputError
from trainables import checkpoint
from trainables.alphaqubit.losses import FEATURES, label_loss
from trainables.alphaqubit.model import Decoder
from trainables.alphaqubit.settings import DecoderFusionSettings, DecoderSettings, DecoderWorkload
from trainables.checkpoint import model_hash
from trainables.domain import Batch, make_domain
from trainables.gates import paired_drop
from trainables.stream import fresh
from trainables.teacher_cache import locked
from trainables.training import Training

HEADS = (*FEATURES, "readout")


class Probes(nn.Module):
    """One linear probe per kind of state, and the weights with which the heads' logits are fused."""

    def __init__(self, inputs: int, logits: int, weights: Sequence[float], teacher: str = "") -> None:
        """inputs: S * D. logits: K. weights: of the transformer's probe, the rnn's probe and the readout.

        teacher: hash of the decoder whose states they read; another one of the same shape means nothing to them.
        """
        super().__init__()
        if len(weights) != len(HEADS) or min(weights) < 0 or not sum(weights) > 0:
            raise InputError(
                f"fusion weights {list(weights)}: expected {len(HEADS)} numbers of at least 0 for {', '.join(HEADS)}, "
                "not all 0, such as [1, 1, 1]"
            )
        total = sum(weights)
        shares = [w / total for w in weights]
        self.config: dict[str, Any] = {"inputs": inputs, "logits": logits, "weights": shares, "teacher": teacher}
        self.heads = nn.ModuleDict({name: nn.Linear(inputs, logits) for name in FEATURES})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits (N, K) of each of HEADS after the last layer, and 'fused'; features as Decoder.features gives them."""
        found = {name: head(features[name][:, -1].flatten(1)) for name, head in self.heads.items()}
        found["readout"] = features["logits"]
        weights = dict(zip(HEADS, self.config["weights"], strict=True))
        found["fused"] = torch.stack([weights[name] * found[name] for name in HEADS]).sum(0)
        return found


class FusedTeacher(nn.Module):
    """A frozen decoder with probes: answers as the decoder does, and offers 'fused' among its features."""

    def __init__(self, decoder: Decoder, probes: Probes) -> None:
        super().__init__()
        self.decoder, self.probes = decoder, probes
        self.config = {"decoder": decoder.config, "probes": probes.config}

    @property
    def answering(self) -> Decoder:
        """What answers, and so what a student is compared with: the probes only teach."""
        return self.decoder

    def forward(self, events: Tensor, measurements: Tensor) -> Tensor:
        """The decoder's own logits (N, K)."""
        logits: Tensor = self.decoder(events, measurements)
        return logits

    def features(self, events: Tensor, measurements: Tensor) -> dict[str, Tensor]:
        """The decoder's features and 'fused' (N, K)."""
        found = self.decoder.features(events, measurements)
        return {**found, "fused": self.probes(found)["fused"]}


def probes_for(decoder: Decoder, weights: Sequence[float] = (1, 1, 1)) -> Probes:
    """Fresh probes that fit a decoder."""
    inputs = decoder.stabilizers * decoder.config["dim"]
    return Probes(inputs, decoder._config.logits, weights, checkpoint.model_hash(decoder))


def load_probes(path: Path, decoder: Decoder) -> Probes:
    """Probes of a file that :class:`Fuse` left; InputError where they are not of this teacher."""
    if not path.is_file():
        raise InputError(f"fusion={path}: no such file; python sweeps/aq_fusion.py leaves one, aq_probes.pth")
    config, weights = checkpoint.read_model(path)
    if config.get("teacher") != checkpoint.model_hash(decoder):
        raise InputError(f"fusion={path}: probes of another teacher; run python sweeps/aq_fusion.py with this one")
    try:
        with torch.random.fork_rng(devices=[]):
            probes = Probes(**config)
        probes.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"fusion={path}: not a file of probes ({' '.join(str(error).split())[:200]})") from None
    return probes


def cached_probes(folder: Path, decoder: Decoder, workload: DecoderWorkload, distill: DecoderSettings) -> Path:
    """Probes as sweeps/aq_fusion.py trains them, once by content (teacher, shots, settings); a file in `folder`.

    In one pass over shots of a seed of their own, no more than the students get.
    """
    fit = DecoderFusionSettings.among({"teacher": distill.teacher, "train_p": distill.train_p})
    shots = min(fit.epochs * fit.samples_per_epoch, distill.train_samples)
    fit = fit.model_copy(update={"epochs": 1, "samples_per_epoch": shots})
    settings = {**workload.model_dump(mode="json"), **fit.model_dump(mode="json")}
    seed = workload.workload_seed
    domain = make_domain("alphaqubit", settings, {}, seed)
    how = fit.model_dump(mode="json", exclude={"teacher"})
    content = [model_hash(decoder), domain.data_id(), domain.split_id("val"), how]
    path = folder / f"probes_{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}.pth"
    with locked(folder / "probes.lock"):
        if not path.exists():
            before = checkpoint.rng_states()
            with TemporaryDirectory(dir=folder, prefix=".probes.") as state:
                job = {"domain": "alphaqubit", "params": {}, "settings": settings, "seed": seed, "state_dir": state}
                Fuse(job).step()
                os.replace(Path(state) / "best.pth", path)
            checkpoint.restore_rng(before)
    return path


class Fuse(Training):
    """Trains the probes on a frozen teacher's states of fresh shots; the teacher stays as it is."""

    lower_is_better = True

    def build(self) -> None:
        """The teacher and fresh probes."""
        self.domain = make_domain(self.config["domain"], self.settings, self.config["params"], self.seed)
        teacher = self.domain.teacher()
        assert isinstance(teacher, Decoder)
        self.teacher = teacher
        self.model = self.probes = probes_for(teacher, {**self.settings, **self.config["params"]}["fusion_weights"])
        self.trained = nn.ModuleList([self.model])
        self.reference: Tensor | None = None

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Shots never seen before, drawn by a thread ahead of their use."""
        size = self.settings["batch_size"]
        first = (epoch - 1) * self.steps_per_epoch * size
        return fresh(
            lambda shots: self.domain.samples("probes", self.gang.share(shots)), first, self.steps_per_epoch, size
        )

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross entropies of the probes, each on its own."""
        with torch.no_grad():
            features = self.teacher.to(self.device).features(*self.domain.inputs(batch))
        found, outputs = self.model(features), str(self.settings["outputs"])
        parts = {name: label_loss(found[name], batch["label"], outputs) for name in FEATURES}
        return torch.stack(list(parts.values())).sum(), parts

    def validate(self) -> dict[str, float]:
        """Error rate of every head and of the fusion, and the fusion's drop against the teacher's own readout."""
        rates = {name: self.domain.evaluate(Head(self.teacher, self.probes, name), "val") for name in (*HEADS, "fused")}
        own, base = rates["fused"]["ler"], rates["readout"]["ler"]
        fall = paired_drop(own.numpy(), base.numpy(), True, seed=self.seed)
        drops = {"val_drop": fall.value, "val_drop_lo": fall.lo, "val_drop_hi": fall.hi}
        return {**drops, "val_quality": float(rates["fused"]["nll"].mean()),
                **{f"ler_{name}": float(found["ler"].mean()) for name, found in rates.items()}}  # fmt: skip

    def exported(self) -> dict[str, Any]:
        """The probes as a module of their own."""
        return {"model": self.model.state_dict(), "config": self.model.config}


class Head(nn.Module):
    """One head's logits, of HEADS or 'fused', behind the call of a decoder."""

    def __init__(self, teacher: Decoder, probes: Probes, name: str) -> None:
        super().__init__()
        self._teacher, self._probes, self._name = teacher, probes, name

    def forward(self, events: Tensor, measurements: Tensor) -> Tensor:
        """Logits (N, K)."""
        with torch.no_grad():
            found: dict[str, Tensor] = self._probes(self._teacher.features(events, measurements))
        return found[self._name]
