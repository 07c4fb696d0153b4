"""The surface-code decoder as a Domain: what generic trainables need to know about shots and their logical flips."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import stim
import torch
from torch import Tensor, nn

from engines.errors import InputError
from engines.export import export_onnx
from engines.latency import measure
from engines.policy import QuantPolicy
from engines.quantize import post_training
from engines.runtimes import OnnxRuntime
from trainables import least_squares
from trainables.alphaqubit import circuits, compare, decisions, exact, layout, losses, matching, sampler
from trainables.alphaqubit import prune as pruning
from trainables.alphaqubit.config import Config
from trainables.alphaqubit.deployed import Deployed
from trainables.alphaqubit.fusion import FusedTeacher, cached_probes, load_probes
from trainables.alphaqubit.layout import BOTH
from trainables.alphaqubit.mixture import Mixture
from trainables.alphaqubit.model import Decoder, Layer, build, without_training_heads
from trainables.alphaqubit.prune import narrowed, partway, prune
from trainables.alphaqubit.sampler import Sampler, fixed_shots
from trainables.alphaqubit.settings import (
    SIGNALS,
    DecoderPretrainSettings,
    DecoderPruneSettings,
    DecoderSettings,
    DecoderSizes,
    DecoderWorkload,
)
from trainables.checkpoint import model_hash
from trainables.domain import Batch, Outputs, Signal
from trainables.schedules import Schedule

BATCH = 1024  # of the throughput
FIT_SHOTS = 1024  # on which a pruned decoder is fitted to what it was cut from
FEATURES = ("readout", *losses.FEATURES)
_NAMES = {"beta": "final"}  # a signal's name in the losses, where its weight's setting has another
# What is cached depends on this code and on stim's random numbers.
_CODE = "".join(map(inspect.getsource, (circuits, layout, sampler, exact, matching))) + stim.__version__

_PRUNING = "".join(map(inspect.getsource, (pruning, least_squares)))


def _digest(*identity: object) -> str:
    return hashlib.sha256(json.dumps([_CODE, *identity], default=str).encode()).hexdigest()[:16]


class AlphaQubit:
    """Memory experiments of the rotated surface code; error rate of the predicted logical flips."""

    group = 1
    blocks = (Layer,)
    lower_is_better = True

    def __init__(self, settings: Mapping[str, Any], seed: int, cache: Path | None = None) -> None:
        self.workload = DecoderWorkload.among(settings)
        self.distill = DecoderSettings.among(settings)
        self.pretrain = DecoderPretrainSettings.among(settings)
        self.sizes = DecoderSizes.among(settings)
        self._settings, self.seed, self.primary, self._cache = settings, seed, self.workload.primary, cache
        for p in {self.distill.train_p, *self.pretrain.mixed_p}:
            self.workload.at(p)  # InputError where the noise has no such circuit
        rounds_weight = self.distill.rounds_weight or self.pretrain.rounds_weight
        if rounds_weight and self.workload.outputs != "observable":
            raise InputError(
                f"rounds_weight={rounds_weight:g} with outputs={self.workload.outputs}: the flips after every round "
                "are known for outputs=observable only; --set rounds_weight=0"
            )

    # ------------------------------------------------------------------ models
    @property
    def _experiment(self) -> dict[str, Any]:
        """What a decoder's config says of the experiment that it is for."""
        w = self.workload
        basis = w.basis if w.outputs == "observable" else BOTH
        return {"distance": w.distance, "basis": basis, "outputs": w.outputs}

    @property
    def _size(self) -> Config:
        return self.sizes.config(self.workload.distance)

    def _build(self, next_stabilizer: bool = False) -> Decoder:
        return build(**{**self._size.to_data(), "next_stabilizer": next_stabilizer, **self._experiment})

    @property
    def shipped(self) -> Path:
        """The package's teacher for the workload's distance."""
        return decisions.shipped(self.workload.distance)

    def new_teacher(self) -> Decoder:
        """A decoder of the settings' size with fresh weights from the present random state."""
        return self._build(next_stabilizer=self.pretrain.next_weight > 0)

    def teacher(self) -> nn.Module:
        """The shipped teacher or the one of the settings, frozen; with fusing probes where the settings want them.

        Probes of fusion=cached are trained here unless the cache has them; without a cache the teacher stands for them.
        """
        path = self.shipped if self.distill.teacher == "shipped" else Path(self.distill.teacher)
        if path == self.shipped and not path.exists():
            d = self.workload.distance
            others = ", ".join(sorted(one.stem.removeprefix("teacher_d") for one in path.parent.glob("*.safetensors")))
            raise InputError(
                f"teacher 'shipped': none of distance {d} comes with the package (of {others}); give "
                f"--set teacher=FILE, one of python sweeps/aq_pretrain.py --set distance={d}"
            )
        model = self.load(path)
        self._check(model, f"teacher {self.distill.teacher!r}")
        frozen = model.eval().requires_grad_(False)
        if self.distill.fusion == "none" or (self.distill.fusion == "cached" and self._cache is None):
            return frozen
        path = Path(self.distill.fusion)
        if self._cache and self.distill.fusion == "cached":
            path = cached_probes(self._cache, frozen, self.workload, self.distill)
        return FusedTeacher(frozen, load_probes(path, frozen)).eval().requires_grad_(False)

    def _check(self, model: Decoder, what: str) -> None:
        """InputError where a decoder is of another experiment."""
        for key, ours in self._experiment.items():
            theirs = model.config[key]
            if theirs != ours:
                # No setting says basis=XZ: it is what the outputs xz and ixyz have.
                name = "outputs" if BOTH in (theirs, ours) else key
                raise InputError(
                    f"{what} is of {key}={theirs}, the workload of {key}={ours}: give a decoder of the same "
                    f"experiment or --set {name}={model.config[name]}"
                )

    def student(self, inherit: bool) -> Decoder:
        """A student of the settings' size with fresh weights, or with those of the checkpoint it goes on from."""
        fresh = self._build()
        if self.distill.model == "scratch":
            return fresh
        model = self.load(Path(self.distill.model))
        if model.config != fresh.config:
            other = {k: (v, fresh.config[k]) for k, v in model.config.items() if v != fresh.config[k]}
            said = ", ".join(f"{key}={theirs} instead of {ours}" for key, (theirs, ours) in other.items())
            raise InputError(f"model={self.distill.model} is of another shape than size={self.sizes.size}: {said}")
        return model

    def student_id(self) -> str:
        """Students are not cut from their teacher: nothing is kept for them."""
        return _digest(self._size)

    def pruned(self, model: nn.Module, share: float) -> Decoder:
        """Pruned to `share` of the way to the settings' widths, and refitted to what it was on training shots."""
        teacher = self.teacher()
        assert isinstance(model, Decoder) and isinstance(teacher, Decoder)
        shots = self.samples("train", torch.arange(FIT_SHOTS))
        target = partway(teacher._config, self.widths(), share)
        return prune(without_training_heads(model), target, *self.inputs(shots))

    def widths(self) -> Config:
        """The teacher's architecture narrowed by the settings' ratios, which all layers share."""
        teacher = self.teacher()
        assert isinstance(teacher, Decoder)
        return narrowed(teacher._config, DecoderPruneSettings.among(self._settings).channel_ratios)

    def pruned_id(self) -> str:
        """Hash of the teacher's weights, the ratios, the pruning code and the training shots."""
        ratios = DecoderPruneSettings.among(self._settings).channel_ratios
        return _digest(_PRUNING, model_hash(self.teacher()), self.data_id(), ratios, FIT_SHOTS)

    def load(self, path: Path) -> Decoder:
        """A decoder from a .pth that slimsweep wrote or from .safetensors with its config in the header."""
        return decisions.read(path)

    def blank(self, model: nn.Module) -> Decoder:
        """The same architecture with weights of its own."""
        assert isinstance(model, Decoder)
        with torch.random.fork_rng(devices=[]):
            return build(**model.config)

    def export(self, model: nn.Module) -> dict[str, Any]:
        """Tensors and constructor arguments of the plain decoder, without a head that only training needs."""
        assert isinstance(model, Decoder)
        plain = without_training_heads(model)
        return {"model": plain.state_dict(), "config": plain.config}

    # ------------------------------------------------------------------ data
    def data_id(self) -> str:
        """Hash of the code, the seed and the training experiment."""
        return _digest("samples", self.seed, self.workload.at(self.distill.train_p))

    def split_id(self, split: str) -> str:
        """Hash of the code, the split's shots and the primary metric."""
        w = self.workload
        return _digest(split, w.experiment, self._count(split), w.workload_seed, self.primary)

    def _count(self, split: str) -> int:
        return self.workload.test_shots if split == "test" else self.workload.val_shots

    @cached_property
    def _training(self) -> dict[str, Sampler]:
        experiment = self.workload.at(self.distill.train_p)
        return {split: Sampler(experiment, self.seed, split) for split in ("train", "probes")}

    def contents(self) -> dict[str, str]:
        """None: shots are simulated."""
        return {}

    def samples(self, split: str, indices: Tensor) -> Batch:
        """Shots by index, see :class:`trainables.alphaqubit.sampler.Sampler`; of training at its own noise."""
        if split in self._training:
            return self._training[split].at(indices)
        return Sampler(self.workload.experiment, self.workload.workload_seed, split).at(indices)

    def pretraining_samples(self, indices: Tensor) -> Batch:
        """Shots of a teacher's training by index, see :class:`trainables.alphaqubit.mixture.Mixture`."""
        return self._mixture.at(indices)

    @cached_property
    def _mixture(self) -> Mixture:
        experiments = [self.workload.at(p) for p in self.pretrain.mixed_p]
        return Mixture(experiments, self.seed, self.pretrain.exact_labels and self._has_exact)

    def sampled(self) -> dict[str, Any]:
        """The hash of the test shots, of which the first ones are those that are timed."""
        w = self.workload
        return {"test_shots_hash": fixed_shots(w.experiment, w.workload_seed, w.test_shots)[1]}

    # ------------------------------------------------------------------ forward and losses
    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """'logits', and the intermediate representations where a loss asks for them."""
        on = {signal.name for signal in self.signals()}
        rich = on & {*FEATURES} or self.distill.rounds_weight or self.pretrain.next_weight
        assert isinstance(model, Decoder | FusedTeacher)
        if not rich:
            return {"logits": model(*self.inputs(batch))}
        return model.features(*self.inputs(batch))

    def teacher_outputs(self, teacher: nn.Module, batch: Batch) -> Batch:
        """Logits of the last layer, of every layer, and fused ones where there are probes; hidden states; float16."""
        with torch.no_grad():
            assert isinstance(teacher, Decoder | FusedTeacher)
            found = teacher.features(*self.inputs(batch))
        logits: tuple[str, ...] = ("logits", "readout", "fused")
        kept = {name: found[name] for name in logits if name in found}
        kept |= {f"state_{name}": found[name] for name in losses.FEATURES}
        return {f"teacher_{name}": value.half() for name, value in kept.items()}

    def task_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Cross entropy with the logical flips, and of the intermediate readouts with the flips of their round."""
        return self._task(outputs, batch, self.distill.rounds_weight)

    def _task(self, outputs: Outputs, batch: Batch, rounds_weight: float) -> Tensor:
        rounds = batch.get("round_labels")
        return losses.task_loss(outputs, batch["label"], self.workload.outputs, rounds, rounds_weight)

    def pretraining_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task loss, and the next layer's events where their weight is not 0."""
        outputs, settings = self.forward(model, batch), self.pretrain
        loss = self._task(outputs, batch, settings.rounds_weight)
        if settings.next_weight:
            loss = loss + settings.next_weight * losses.next_stabilizer_loss(outputs, batch["events"])
        return loss

    def signals(self) -> list[Signal]:
        """The signals whose weight is not zero."""
        terms = [(name, Schedule.from_data(getattr(self.distill, name))) for name in SIGNALS]
        return [
            Signal(_NAMES.get(name, name), weight, states=name in losses.FEATURES)
            for name, weight in terms
            if any(weight.values)
        ]

    def signal_loss(self, name: str, outputs: Outputs, batch: Batch, adapters: nn.ModuleDict) -> Tensor:
        """One term, unweighted; see :mod:`trainables.alphaqubit.losses`."""
        theirs = {key.removeprefix("teacher_").removeprefix("state_"): v.float() for key, v in batch.items()
                  if key.startswith("teacher_")}  # fmt: skip
        return losses.signal_loss(name, theirs, outputs, self.distill.T, self.workload.outputs, adapters)

    def adapters(self) -> nn.ModuleDict:
        """A linear map per feature signal where teacher and student differ in width."""
        teacher = self.teacher()
        wide = teacher.decoder if isinstance(teacher, FusedTeacher) else teacher
        assert isinstance(wide, Decoder)
        on = [signal.name for signal in self.signals()]
        return losses.adapters(wide._config, self._size, on)

    # ------------------------------------------------------------------ evaluation
    def evaluate(self, model: nn.Module, split: str, full: bool = False) -> dict[str, Tensor]:
        """Per shot, (shots,) float32: 'ler' 1 where any flip is predicted wrongly; 'nll' its cross entropy in nats.

        With the exact decoder, that is at distance 3 and one observable, `full` and primary=ler_exact add 'ler_exact',
        the posterior probability that the decision is wrong.
        """
        shots = self._fixed(split)
        logits = decisions.logits(model, shots["events"], shots["measurements"])
        label = shots["label"]
        if self.workload.outputs == "ixyz":
            wrong = logits.argmax(1) != label[:, 0]
            nll = nn.functional.cross_entropy(logits, label[:, 0].long(), reduction="none")
        else:
            wrong = ((logits > 0) != label.bool()).any(1)
            nll = nn.functional.binary_cross_entropy_with_logits(logits, label.float(), reduction="none").sum(1)
        found = {"ler": wrong.float(), "nll": nll}
        if self.primary == "ler_exact" or (full and self._has_exact):
            flipped = torch.from_numpy(self._posterior(split)).float()
            found["ler_exact"] = torch.where(logits[:, 0] > 0, 1 - flipped, flipped)
        return found

    def chance(self, split: str) -> float:
        """The error rate of the best constant answer on a fixed split."""
        label = self._fixed(split)["label"].numpy()
        return 1 - float(np.unique(label, axis=0, return_counts=True)[1].max()) / len(label)

    def compare(self, own: dict[str, Tensor], split: str) -> dict[str, float]:
        """Error rates beside those of other decoders on the same shots; see :mod:`trainables.alphaqubit.compare`."""
        limit = None
        if self._has_exact:
            flipped = self._posterior(split)
            limit = np.minimum(flipped, 1 - flipped)
        return compare.measures(own, self.workload.experiment, self._fixed(split), limit, self.workload.workload_seed)

    def pace(
        self, model: nn.Module, p50_ms: float, device: str, policy: QuantPolicy | None, file: Path | None
    ) -> dict[str, float | str]:
        """Microseconds per shot and per layer of detectors at batch 1, and at batch BATCH in ONNX Runtime; those of
        matching per shot at batch 1.
        """
        w = self.workload
        found: dict[str, float | str] = {"us_per_shot": 1000 * p50_ms, "us_per_round": 1000 * p50_ms / (w.rounds + 1)}
        singles = Sampler(w.experiment, w.workload_seed, "test").shots(0, w.sampled_shots)
        found |= compare.pace(w.experiment, singles, w.warmup, w.repeats, w.workload_seed)
        batch = self.inputs(Sampler(w.experiment, w.workload_seed, "test").shots(0, BATCH))
        module, _, names_in, names_out = self.deployed(model)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "batch.onnx"
            export_onnx(module.cpu(), batch, path, names_in, names_out)
            arrays = tuple(tensor.numpy() for tensor in batch)
            if policy:
                post_training(path, path, dataclasses.replace(policy, calibration=1), [arrays])
            try:
                engine = OnnxRuntime(path, device, w.threads)
            except InputError:  # this onnxruntime has no CUDA
                return found
            times = measure({"batch": lambda: engine.run(arrays)}, 1, max(5, w.repeats // 6), w.workload_seed)["batch"]
            engine.close()
        shot = 1000 * float(np.median(times)) / BATCH
        return {**found, f"us_per_shot_{BATCH}": shot, f"us_per_round_{BATCH}": shot / (w.rounds + 1)}

    @property
    def _has_exact(self) -> bool:
        return self.workload.distance == 3 and self.workload.outputs == "observable"

    def _fixed(self, split: str) -> Batch:
        w = self.workload
        return _shots(w.experiment, w.workload_seed, self._count(split), split)

    def _posterior(self, split: str) -> np.ndarray:
        """P(flipped) (shots,) of the exact decoder."""
        w = self.workload
        key = (w.experiment, w.workload_seed, self._count(split), split)
        if key not in _POSTERIORS:
            circuit = w.experiment.circuit()
            flat = layout.layout_of(circuit).to_flat(self._fixed(split)["events"].numpy())
            _POSTERIORS.clear()
            _POSTERIORS[key] = exact.ExactDecoder(circuit).flips(flat)[:, 0]
        return _POSTERIORS[key]

    def deployed(self, model: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, ...]], list[str], list[str]]:
        """Events and measurements (1, R + 1, S) int32 in, logits out; the inputs are the first test shots, batch 1."""
        w = self.workload
        batch = Sampler(w.experiment, w.workload_seed, "test").shots(0, w.sampled_shots)
        singles = zip(*(torch.split(tensor, 1) for tensor in self.inputs(batch)), strict=True)
        plain = model.decoder if isinstance(model, FusedTeacher) else model
        assert isinstance(plain, Decoder)
        return Deployed(without_training_heads(plain)).eval(), list(singles), ["events", "measurements"], ["logits"]

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Events and measurements (N, R + 1, S) int32."""
        return batch["events"].int(), batch["measurements"].int()


_SHOTS: dict[object, Batch] = {}
_POSTERIORS: dict[object, np.ndarray] = {}


def _shots(experiment: sampler.Experiment, seed: int, count: int, split: str) -> Batch:
    """The fixed shots of a split, drawn once per process."""
    key = (experiment, seed, count, split)
    if key not in _SHOTS:
        _SHOTS[key] = fixed_shots(experiment, seed, count, split)[0]
    return _SHOTS[key]
