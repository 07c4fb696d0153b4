"""DUSt3R as a Domain: what the generic trainables need to know about two images and their 3D points."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import InputError
from engines.policy import QuantPolicy
from trainables import fast_linear, least_squares
from trainables.checkpoint import model_hash
from trainables.config import DistillSettings, Dust3rPruneSettings, WorkloadSettings
from trainables.domain import Batch, Outputs, Signal
from trainables.dust3r import (
    blocks,
    dpt,
    frames,
    geometry,
    losses,
    metrics,
    narrow,
    pairs,
    recordings,
    released,
    rooms,
    scene,
    sources,
)
from trainables.dust3r import inherit as inheritance
from trainables.dust3r import model as model_code
from trainables.dust3r import prune as pruning
from trainables.dust3r.config import Config
from trainables.dust3r.model import DUSt3R, from_reference_config
from trainables.dust3r.sources import source
from trainables.schedules import Schedule

SHIPPED = Path(__file__).parent / "weights" / "teacher_small.safetensors"
SMALL_TEACHER: dict[str, Any] = {
    "output_mode": "pts3d",
    "depth_mode": ("exp", -math.inf, math.inf),
    "conf_mode": ("exp", 1.0, math.inf),
    "pos_embed": "cosine",
    "patch_embed_cls": "PatchEmbedDust3R",
    "landscape_only": False,
    "img_size": (64, 64),
    "patch_size": 8,
    "enc_embed_dim": 160,
    "enc_depth": 6,
    "enc_num_heads": 5,
    "dec_embed_dim": 128,
    "dec_depth": 4,
    "dec_num_heads": 4,
    "head_type": "linear",
}
CALIBRATION_PAIRS = 256  # of a student's inheritance; pruning takes half of them at each of its steps
SENSITIVITY_PAIRS = 32
TEACHER_BATCH = 64  # pairs at a time: more do not fit a core's cache
STATES = ("enc1", "enc2", "dec1", "dec2")
# What is cached depends on this code. Read at import: an edit during a sweep must not change its identities.
_DATA = (rooms, frames, recordings, sources, pairs)
_MODULES = (*_DATA, geometry, metrics, losses, blocks, dpt, model_code, inheritance, least_squares, narrow, pruning)
_CODE = "".join(map(inspect.getsource, (*_MODULES, sys.modules[__name__])))


def _digest(*identity: object) -> str:
    """16 hex digits of the code and of plain data."""
    return hashlib.sha256(json.dumps([_CODE, *identity]).encode()).hexdigest()[:16]


class Dust3r:
    """Pairs of images, confidence-weighted pointmap regression, AbsRel after one median scale per pair."""

    shipped = SHIPPED
    group = 2  # both directions of a pair of images
    blocks = (blocks.EncoderBlock, blocks.DecoderBlock)

    def __init__(self, settings: Mapping[str, Any], seed: int, cache: Path | None = None) -> None:
        """cache: not needed here, the teacher is a file."""
        self.workload = WorkloadSettings.among(settings)
        self.distill = DistillSettings.among(settings)
        self._settings, self.seed = settings, seed
        self.primary = self.workload.primary
        self.lower_is_better = metrics.LOWER_IS_BETTER[self.primary]
        self.source = source(self.workload, seed, self.distill.train_samples // self.group)
        self._fixed: dict[str, list[Batch]] = {}

    # ------------------------------------------------------------------ models
    def new_teacher(self) -> DUSt3R:
        """The small teacher's architecture, with fresh weights from the present random state."""
        return from_reference_config(**{**SMALL_TEACHER, "img_size": self.workload.height_width})

    def teacher(self) -> DUSt3R:
        """The shipped teacher or the one of the settings, frozen."""
        model = self.load(SHIPPED if self.distill.teacher == "shipped" else Path(self.distill.teacher))
        size = tuple(model.config["img_size"])
        if model.config["pos_embed"] == "cosine" and size != self.workload.height_width:
            raise InputError(
                f"image_size={self.workload.image_size}: teacher {self.distill.teacher!r} takes "
                f"{size[1]}x{size[0]} images; give a teacher of that size with --set teacher=PATH"
            )
        if any(side % model.config["patch_size"] for side in self.workload.height_width):
            raise InputError(
                f"image_size={self.workload.image_size}: teacher {self.distill.teacher!r} takes multiples of "
                f"{model.config['patch_size']} pixels, its patch, both ways"
            )
        return model.eval().requires_grad_(False)

    def student(self, inherit: bool) -> DUSt3R:
        """A student of the settings' depth, heads and FFN ratios; with `inherit` filled from the teacher."""
        teacher = self.teacher()
        d = self.distill
        student = from_reference_config(
            **inheritance.student_config(teacher.config, d.depth, d.heads, d.ffn, d.dec_depth, d.head, d.shared_head)
        )
        if inherit:
            inheritance.inherit(teacher, student, self._calibration(CALIBRATION_PAIRS))
        return student

    def student_id(self) -> str:
        """Hash of the teacher's weights, the ratios, the inheriting code and the calibration pairs."""
        d = self.distill
        return _digest(
            model_hash(self.teacher()),
            (d.depth, d.dec_depth, d.heads, d.ffn, d.head, d.shared_head),
            self.data_id(),
            CALIBRATION_PAIRS,
        )

    def pruned(self, model: nn.Module, share: float) -> DUSt3R:
        """Pruned by L1 norm to `share` of the way to the settings' widths, then refitted to what it was."""
        assert isinstance(model, DUSt3R)
        teacher = Config(**self.teacher().config)
        target = narrow.partway(teacher, self._narrowed, share)
        pruned, kept = pruning.prune(model, target)
        fast_linear.install(model)
        fast_linear.install(pruned)
        pruning.refit(model, pruned, kept, self._calibration(CALIBRATION_PAIRS // 2))
        return pruned

    def widths(self) -> Config:
        """The teacher's architecture narrowed by the settings' ratios, each alike in all layers of its group."""
        ratios = Dust3rPruneSettings.among(self._settings).channel_ratios
        return narrow.narrowed(Config(**self.teacher().config), ratios)

    def pruned_id(self) -> str:
        """Hash of the teacher's weights, the ratios, the pruning code and the calibration pairs."""
        asked = Dust3rPruneSettings.among(self._settings)
        return _digest(model_hash(self.teacher()), self.data_id(), asked.channel_ratios, asked.ratios, self.distill.T)

    @cached_property
    def _narrowed(self) -> Config:
        """The widths that the settings ask for."""
        teacher, asked = self.teacher(), Dust3rPruneSettings.among(self._settings)
        if asked.ratios == "uniform":
            return self.widths()
        fast_linear.install(teacher)
        batch = self.samples("train", 2 * torch.arange(SENSITIVITY_PAIRS))  # each of a scene of its own
        batch |= self.teacher_outputs(teacher, batch)

        def moved(model: DUSt3R) -> float:
            return float(self.signal_loss("kl", self.forward(model, batch), batch, nn.ModuleDict()))

        costs = pruning.sensitivities(teacher, asked.rho, moved)
        return narrow.narrowed(Config(**teacher.config), asked.channel_ratios, costs)

    def _calibration(self, count: int) -> Tensor:
        """Training pairs (count, 2, 3, H, W) in [-1, 1], on which a narrower model is fitted to a wider one."""
        return self.samples("train", torch.arange(count))["image"].float() / 127.5 - 1

    def load(self, path: Path) -> DUSt3R:
        """A model from a file that slimsweep wrote (.pth; .safetensors with its config) or a published checkpoint."""
        config, weights = released.read(path)
        try:
            with torch.device("meta"):  # no time and no random numbers for weights that are replaced
                model = from_reference_config(**config)
            model.load_state_dict(weights, assign=True)
        except (RuntimeError, TypeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: not a DUSt3R model of this architecture ({reason})") from None
        return model

    def blank(self, model: nn.Module) -> DUSt3R:
        """The same architecture with weights of its own."""
        assert isinstance(model, DUSt3R)
        with torch.random.fork_rng(devices=[]):
            return from_reference_config(**model.config)

    def export(self, model: nn.Module) -> dict[str, Any]:
        """Tensors and constructor arguments of the plain model."""
        assert isinstance(model, DUSt3R)
        return {"model": model.state_dict(), "config": model.config}

    # ------------------------------------------------------------------ data
    def data_id(self) -> str:
        """Hash of the code, the seed, the image size and the training frames."""
        return _digest("samples", self.seed, self.workload.image_size, self.source.identity("train"))

    def split_id(self, split: str) -> str:
        """Hash of the code, the split, its frames and the protocol."""
        w = self.workload
        count = w.test_pairs if split == "test" else w.val_pairs
        return _digest(split, count, w.workload_seed, w.image_size, self.primary, self.source.identity(split))

    def contents(self) -> dict[str, str]:
        """The training frames of recordings; the workload lists the others."""
        return {"data": self.source.identity("train")} if self.workload.data != "rooms" else {}

    def samples(self, split: str, indices: Tensor) -> Batch:
        """Directed pairs: index 2 s and 2 s + 1 are pair s seen both ways.

        image (B, 2, 3, H, W) uint8; points (B, 2, H, W, 3) float16, metres in the first camera's frame, NaN = unknown.
        """
        scenes, where = torch.unique(indices // 2, return_inverse=True)
        both = self.both_ways(self.scene_pairs(split, scenes))
        rows = 2 * where + indices % 2
        return {"image": both["image"][rows], "points": both["points"][rows].half()}

    def scene_pairs(self, split: str, scenes: Tensor) -> Batch:
        """Pairs by index, see trainables/dust3r/sources.py."""
        return self.source.pairs(split, scenes)

    def pretraining_samples(self, indices: Tensor) -> Batch:
        """Training scenes by index, for :meth:`pretraining_loss`."""
        return self.scene_pairs("train", indices)

    def both_ways(self, batch: Batch) -> Batch:
        """Each pair followed by itself with its views swapped, points in the new first camera's frame."""
        rotation, centre = batch["pose"][:, :3, :3], batch["pose"][:, :3, 3]
        local = torch.einsum("bvhwi,bij->bvhwj", batch["points"] - centre[:, None, None, None], rotation)
        return {
            "image": _alternating(torch.cat([batch["image"], batch["image"].flip(1)])),
            "points": _alternating(torch.cat([batch["points"], local.flip(1)])),
        }

    # ------------------------------------------------------------------ forward and losses
    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Pointmaps and hidden states by name.

        Where every second pair is the one before with its views swapped, each image is encoded once.
        """
        assert isinstance(model, DUSt3R)
        forth, back = batch["image"][0::2], batch["image"][1::2]
        symmetric = torch.equal(forth.flip(1), back)
        first, second = self.inputs({"image": forth} if symmetric else batch)
        (pts1, conf1, pts2, conf2), states = model.features(first, second, symmetric=symmetric)
        outputs = {"pts1": pts1, "conf1": conf1, "pts2": pts2, "conf2": conf2, **states}
        return {name: _alternating(value) for name, value in outputs.items()} if symmetric else outputs

    def teacher_outputs(self, teacher: nn.Module, batch: Batch) -> Batch:
        """Normalised pointmaps, confidences and hidden states of the teacher, float16."""
        with torch.no_grad():
            parts = [self.forward(teacher, {"image": part}) for part in torch.split(batch["image"], TEACHER_BATCH)]
        out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        pts1, pts2 = _normalised(out)
        kept = {"pts1": pts1, "pts2": pts2, "conf1": out["conf1"], "conf2": out["conf2"]}
        kept |= {f"state_{name}": out[name] for name in STATES}
        # Confidences are exponentials: what half precision cannot hold becomes its largest number, not infinity.
        most = torch.finfo(torch.float16).max
        return {f"teacher_{name}": value.clamp(-most, most).half() for name, value in kept.items()}

    def task_loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Confidence-weighted regression of jointly normalised pointmaps (DUSt3R's ConfLoss over Regr3D)."""
        true1, true2 = batch["points"][:, 0].float(), batch["points"][:, 1].float()
        known1, known2 = metrics.known(true1), metrics.known(true2)
        return losses.confidence_loss(
            outputs["pts1"], outputs["conf1"], outputs["pts2"], outputs["conf2"], true1, true2, known1, known2
        )

    def pretraining_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task loss over both directions of each pair; `batch` is of :meth:`scene_pairs`."""
        both = self.both_ways(batch)
        return self.task_loss(self.forward(model, both), both)

    def signals(self) -> list[Signal]:
        """`kl` with weight beta and `feature` with weight gamma, where their weights are not zero."""
        d = self.distill
        terms = [
            Signal("kl", Schedule.from_data(d.beta)),
            Signal("feature", Schedule.from_data(d.gamma), states=True),
        ]
        return [term for term in terms if any(term.weight.values)]

    def signal_loss(self, name: str, outputs: Outputs, batch: Batch, adapters: nn.ModuleDict) -> Tensor:
        """`kl`: Laplace KL of both views at temperature T; `feature`: mean squared distance of adapted states."""
        if name == "feature":
            errors = [
                (adapters[s[:3]](outputs[s]) - batch[f"teacher_state_{s}"].float()).square().mean() for s in STATES
            ]
            return torch.stack(errors).mean()
        pts1, pts2 = _normalised(outputs)
        student = ((pts1, outputs["conf1"]), (pts2, outputs["conf2"]))
        parts = [
            losses.laplace_kl(
                batch[f"teacher_pts{v}"].float(), batch[f"teacher_conf{v}"].float(), pts, conf, self.distill.T
            )
            for v, (pts, conf) in enumerate(student, start=1)
        ]
        return torch.stack(parts).sum()

    def adapters(self) -> nn.ModuleDict:
        """One linear map for encoder and one for decoder states, starting as the identity."""
        config = self.teacher().config
        maps = {"enc": nn.Linear(config["enc_embed_dim"], config["enc_embed_dim"])}
        maps["dec"] = nn.Linear(config["dec_embed_dim"], config["dec_embed_dim"])
        for layer in maps.values():
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        return nn.ModuleDict(maps)

    # ------------------------------------------------------------------ evaluation
    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str, full: bool = False) -> dict[str, Tensor]:
        """Every pair's metrics, (pairs,) each, on a fixed split; `full` adds clouds and poses, which are slow."""
        parts: list[dict[str, Tensor]] = []
        full = full or self.primary == "chamfer"
        predict = model.pointmaps if isinstance(model, DUSt3R) else model
        device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
        for pairs_ in self.fixed_pairs(split):
            batch = {name: value.to(device) for name, value in pairs_.items()}
            pts1, _, pts2, conf2 = predict(*self.inputs(batch))
            true = batch["points"]
            found = metrics.per_pair(pts1, pts2, true[:, 0], true[:, 1], clouds=full)
            if full:
                found |= metrics.pose_errors(pts2, conf2, batch["intrinsics"][:, 1], batch["pose"])
            parts.append(found)
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def fixed_pairs(self, split: str) -> list[Batch]:
        """The pairs of a fixed split (see :meth:`scene_pairs`), rendered once per process, 32 to a batch."""
        if split not in self._fixed:
            count = self.workload.test_pairs if split == "test" else self.workload.val_pairs
            self._fixed[split] = [self.scene_pairs(split, scenes) for scenes in torch.split(torch.arange(count), 32)]
        return self._fixed[split]

    def compare(self, own: dict[str, Tensor], split: str) -> dict[str, float]:
        """The metrics' intervals, and AbsRel of the validation split's mean depth map: what no model must do worse."""
        depths = {
            name: torch.cat([batch["points"][:, 0, ..., 2] for batch in self.fixed_pairs(name)])
            for name in ("val", split)
        }
        guess, true = depths["val"].nanmean(0).flatten(), depths[split].flatten(1)
        scaled, _ = metrics.aligned(guess.nan_to_num(float(guess.nanmedian())).expand_as(true), true)
        bound = float(((scaled - true).abs() / true).nanmean())
        return {**metrics.intervals(own, self.workload.workload_seed), "absrel_mean_depth_map": bound}

    def pace(
        self, model: nn.Module, p50_ms: float, device: str, policy: QuantPolicy | None, file: Path | None
    ) -> dict[str, float | str]:
        """Seconds per scene, see :func:`trainables.dust3r.scene.pace`."""
        assert isinstance(model, DUSt3R)
        return scene.pace(model, file, self.source.scene(), self.workload, "cpu" if policy else device)

    def sampled(self) -> dict[str, Any]:
        """The sampled edges of the test scenes' pair graphs, the scene that is timed, and frames that were recorded."""
        return self.source.sampled()

    def deployed(self, model: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, ...]], list[str], list[str]]:
        """Two images in, pointmaps and confidences out; the inputs are the workload's sampled pairs, batch 1."""
        assert isinstance(model, DUSt3R)
        inputs = [self.inputs({"image": pair[None]}) for pair in self.source.images()]
        return Deployed(model).eval(), inputs, ["img1", "img2"], ["pts1", "conf1", "pts2", "conf2"]

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Both views (B, 3, H, W) in [-1, 1]."""
        image = batch["image"].float() / 127.5 - 1
        return image[:, 0], image[:, 1]


class Deployed(nn.Module):
    """The model as it is used: two images (B, 3, H, W) in [-1, 1] -> pts1, conf1, pts2, conf2."""

    def __init__(self, model: DUSt3R) -> None:
        super().__init__()
        self.model = model

    def forward(self, img1: Tensor, img2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pointmaps in the first camera's frame."""
        return self.model.pointmaps(img1, img2)


def _alternating(both: Tensor) -> Tensor:
    """(2B, ...), B pairs followed by the same ones swapped -> each pair followed by itself swapped."""
    return torch.stack(both.chunk(2), dim=1).flatten(0, 1)


def _normalised(outputs: Outputs) -> tuple[Tensor, Tensor]:
    valid = torch.ones(outputs["pts1"].shape[:3], dtype=torch.bool, device=outputs["pts1"].device)
    pts1, pts2, _ = losses.normalise_pointmaps(outputs["pts1"], outputs["pts2"], valid, valid)
    return pts1, pts2
