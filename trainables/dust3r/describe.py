"""What a teacher and its student cost at a profile's scale, without weights, data or memory (torch's fake tensors)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engines.footprint import flops_G, params_M
from trainables.config import DistillSettings, WorkloadSettings
from trainables.dust3r.domain import STATES, Dust3r
from trainables.dust3r.inherit import student_config
from trainables.dust3r.model import DUSt3R, from_reference_config

PARTS = {
    "encoder": ("patch_embed", "enc_blocks", "enc_norm"),
    "decoders": ("decoder_embed", "dec_blocks", "dec_blocks2", "dec_norm"),
    "heads": ("downstream_head1", "downstream_head2"),
}


@dataclass(frozen=True)
class Cost:
    """Of one architecture at one image size.

    params_M, flops_G: by part; FLOPs of one pair, a multiply-add as 2. activations_GB: what one training pass keeps
    for its backward pass; recomputed_GB: the same with activation checkpointing (blocks' inputs, one block's inside).
    cached_MB, states_MB: of one directed pair in the teacher's cache, without and with hidden states.
    """

    params_M: dict[str, float]
    flops_G: dict[str, float]
    activations_GB: float
    recomputed_GB: float
    cached_MB: float
    states_MB: float


class _Call(nn.Module):
    """A function of a model's as a module."""

    def __init__(self, model: nn.Module, function: Callable[..., object]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def cost(config: Mapping[str, Any], size: tuple[int, int], pairs: int, bfloat16: bool) -> Cost:
    """config: of :class:`DUSt3R`; size: (H, W) in pixels; pairs: directed ones in a training pass; bfloat16: autocast.

    Activations are those of attention as one kernel, as training uses it, each pair's images encoded once for both
    directions.
    """
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = from_reference_config(**config)
        one = (torch.empty(1, 3, *size), torch.empty(1, 3, *size))

        def streams(a: Tensor, b: Tensor) -> object:
            return model.decode(model.encode(a), size, model.encode(b), size)

        encoder = flops_G(_Call(model, lambda a, b: model.encode(torch.cat((a, b)))), one)
        streams_G, whole = flops_G(_Call(model, streams), one), flops_G(_Call(model, model.pointmaps), one)
        flops = {"encoder": encoder, "decoders": streams_G - encoder, "heads": whole - streams_G}
        params = {
            part: params_M(nn.ModuleList([model.get_submodule(name) for name in names]))
            for part, names in PARTS.items()
        }
        images = (torch.empty(max(1, pairs // 2), 3, *size), torch.empty(max(1, pairs // 2), 3, *size))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), _kept(model) as kept:
            points, states = model.features(*images, symmetric=pairs > 1)
        shared = sum(state[:1].numel() for name, state in states.items() if name in STATES)
        plain = 2 * 3 * size[0] * size[1] + 2 * (2 * 3 * size[0] * size[1] + sum(part[:1].numel() for part in points))
        outside, inputs, inside = kept["outside"][0], kept["inputs"][0], kept["inside"]
        return Cost(
            params, flops, (outside + sum(inside)) / 1e9, (outside + inputs + max(inside)) / 1e9,
            plain / 1e6, (plain + 2 * shared) / 1e6,
        )  # fmt: skip


@contextmanager
def _kept(model: DUSt3R) -> Iterator[dict[str, list[int]]]:
    """Bytes that a forward pass keeps for the backward: 'outside' of all blocks, 'inside' each, blocks' 'inputs'."""
    kept: dict[str, list[int]] = {"outside": [0], "inputs": [0], "inside": []}
    seen = {weight.untyped_storage()._cdata for weight in model.parameters()}
    held: list[Tensor] = []  # so that no storage is freed and its number used again
    place = kept["outside"]

    def keep(tensor: Tensor, into: list[int]) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            held.append(tensor)
            into[-1] += storage.nbytes()
        return tensor

    def entered(block: nn.Module, inputs: tuple[object, ...]) -> None:
        nonlocal place
        stream = inputs[0]
        assert isinstance(stream, Tensor)
        kept["inputs"][0] += stream.numel() * stream.element_size()
        kept["inside"].append(0)
        place = kept["inside"]

    def left(*_: object) -> None:
        nonlocal place
        place = kept["outside"]

    blocks = [module for module in model.modules() if isinstance(module, Dust3r.blocks)]
    hooks = [one for block in blocks for one in (block.register_forward_pre_hook(entered),
                                                 block.register_forward_hook(left))]  # fmt: skip
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: keep(tensor, place), lambda tensor: tensor):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()


def describe(teacher: Mapping[str, Any], workload: WorkloadSettings, distill: DistillSettings) -> str:
    """A table of the teacher and of the student that the settings ask for."""
    d, size = distill, workload.height_width
    student = student_config(dict(teacher), d.depth, d.heads, d.ffn, d.dec_depth, d.head, d.shared_head)
    piece, bfloat16 = d.batch_size // d.accumulate, d.precision == "bfloat16"
    costs = [cost(config, size, piece, bfloat16) for config in (teacher, student)]
    lines = [f"{workload.image_size} pixels, {piece} directed pairs in a pass, {d.precision}", ""]
    lines.append(f"{'':34}{'teacher':>12}{'student':>12}{'student / teacher':>20}")
    for part in (*PARTS, "all"):
        rows = ("parameters, M", "params_M"), ("GFLOP of a pair", "flops_G")
        for what, field in rows:
            found = [getattr(one, field) for one in costs]
            values = [sum(own.values()) if part == "all" else own[part] for own in found]
            lines.append(_row(f"{part}: {what}", values))
    lines.append(_row("activations of a pass, GB", [one.activations_GB for one in costs]))
    lines.append(_row("with checkpointing: true, GB", [one.recomputed_GB for one in costs]))
    per_pair = costs[0].states_MB if d.gamma else costs[0].cached_MB
    lines += ["", f"Teacher's outputs: {per_pair:.2f} MB per directed pair, "
                  f"{per_pair * d.train_samples / 1000:.1f} GB for train_samples={d.train_samples}"]  # fmt: skip
    return "\n".join(lines)


def _row(what: str, values: list[float]) -> str:
    return f"{what:34}{values[0]:12.2f}{values[1]:12.2f}{values[1] / values[0]:20.2f}"
