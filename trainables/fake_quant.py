"""Fake quantization for training (nvidia-modelopt): forward passes see rounded weights and activations."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engines.policy import Choice, QuantPolicy

_QUANTIZER = "_quantizer."


def modules_of(choices: Iterable[Choice], model: nn.Module) -> dict[str, list[str]]:
    """The modules of `model` behind the nodes that a policy makes INT8: module name -> names of its nodes.

    A node /model/enc_blocks.0/attn/qkv/MatMul is the module enc_blocks.0.attn.qkv: the exporter writes the module's
    path and then the operator, below the name that the exported wrapper gives the model.
    """
    known = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm)}
    found: dict[str, list[str]] = {}
    for choice in choices:
        if choice.precision == "int8":
            path = choice.layer.split("/")[:-1]
            names = (".".join(path[start:]) for start in range(len(path)))
            for name in [name for name in names if name in known][:1]:
                found.setdefault(name, []).append(choice.node)
    return found


def insert(model: nn.Module, names: Iterable[str], policy: QuantPolicy, run: Callable[[nn.Module], object]) -> None:
    """Give the named modules fake quantizers with the ranges that `run(model)` shows.

    Weights: symmetric, one scale per output channel; activations: symmetric, one per tensor. As on the engine the
    smallest level is not used. Modules change class in place; names of weights stay.
    """
    import modelopt.torch.quantization as mtq

    for module in model.modules():
        module.__dict__.pop("forward", None)  # a faster forward that would bypass the quantizers
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in names:
        weight: dict[str, Any] = {"num_bits": policy.bits_w, "axis": 0}
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
        entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": policy.bits_a, "axis": None}})
    with _quiet():
        mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, run)


def set_ranges(model: nn.Module, magnitudes: Mapping[str, float]) -> None:
    """Clip the inputs of the named modules at these magnitudes, and weights at their present largest."""
    for name, magnitude in magnitudes.items():
        module: Any = model.get_submodule(name)
        module.input_quantizer.amax = torch.tensor(magnitude)
        if not isinstance(module, nn.LayerNorm):  # whose weights stay in floating point
            largest = module.weight.detach().abs().flatten(1).amax(1)
            module.weight_quantizer.amax = largest.reshape(module.weight_quantizer.amax.shape)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights without the quantizers' ranges: what a model without fake quantization loads."""
    return {name: value for name, value in model.state_dict().items() if _QUANTIZER not in name}


@contextlib.contextmanager
def _quiet() -> Any:
    """modelopt prints what it inserts and warns of libraries that are not needed here."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
