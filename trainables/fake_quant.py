"""Fake quantization for training (nvidia-modelopt): forward passes see rounded weights and activations."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from engines.policy import Choice, QuantPolicy
from trainables.product import Product

_QUANTIZER = "_quantizer."
_WEIGHTED = nn.Linear | nn.Conv2d  # whose weights are parameters of their own


def modules_of(choices: Iterable[Choice], model: nn.Module) -> dict[str, list[str]]:
    """The modules of `model` behind the nodes that a policy makes INT8: module name -> names of its nodes.

    A node /model/enc_blocks.0/attn/qkv/MatMul is the module enc_blocks.0.attn.qkv: the exporter writes the module's
    path and then the operator, below the name that the exported wrapper gives the model; a ModuleDict is not in the
    path. A module that runs several times (in each round of a decoder) is numbered from its second time on:
    .../attn/qkv_1/MatMul.
    """
    modules = dict(model.named_modules())
    known = {}
    for name, module in modules.items():
        if isinstance(module, _WEIGHTED | nn.LayerNorm | Product):
            parts = name.split(".")
            above = [modules[".".join(parts[: i + 1])] for i in range(len(parts))]
            known[".".join(p for p, m in zip(parts, above, strict=True) if not isinstance(m, nn.ModuleDict))] = name
    found: dict[str, list[str]] = {}
    for choice in choices:
        if choice.precision == "int8":
            path = choice.layer.split("/")[:-1]
            first = [re.sub(r"_\d+$", "", part) for part in path]
            names = [".".join(parts[start:]) for parts in (path, first) for start in range(len(path))]
            for name in [known[name] for name in names if name in known][:1]:
                found.setdefault(name, []).append(choice.node)
    return found


def insert(model: nn.Module, names: Iterable[str], policy: QuantPolicy, run: Callable[[nn.Module], object]) -> None:
    """Give the named modules fake quantizers with the ranges that `run(model)` shows.

    Weights: symmetric, one scale per output channel; activations: symmetric, one per tensor. As on the engine the
    smallest level is not used. Modules change class in place; names of weights stay. A Product's weight has the range
    that it has in each forward pass.
    """
    import modelopt.torch.quantization as mtq

    _teach_products()
    for module in model.modules():
        module.__dict__.pop("forward", None)  # a faster forward that would bypass the quantizers
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in names:
        weight: dict[str, Any] = {"num_bits": policy.bits_w, "axis": 0}
        if isinstance(model.get_submodule(name), Product):
            weight["type"] = "dynamic"
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
        entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": policy.bits_a, "axis": None}})
    with _quiet():
        mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, run)


def set_ranges(model: nn.Module, magnitudes: Mapping[str, float]) -> None:
    """Clip the inputs of the named modules at these magnitudes, and weights at their present largest."""
    for name, magnitude in magnitudes.items():
        module: Any = model.get_submodule(name)
        weighted = isinstance(module, _WEIGHTED)
        module.input_quantizer.amax = torch.tensor(magnitude)
        if weighted:
            largest = module.weight.detach().abs().flatten(1).amax(1)
            module.weight_quantizer.amax = largest.reshape(module.weight_quantizer.amax.shape)


@cache
def _teach_products() -> None:
    """Let modelopt convert Product: its input and its weight are arguments."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer

    class QuantProduct(QuantModule):  # type: ignore[misc]
        def _setup(self) -> None:
            self.input_quantizer, self.weight_quantizer = TensorQuantizer(), TensorQuantizer()

        def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            result: Tensor = super().forward(self.input_quantizer(x), self.weight_quantizer(weight), bias)
            return result

    mtq.register(Product, QuantProduct)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights without the quantizers' ranges: what a model without fake quantization loads."""
    return {name: value for name, value in model.state_dict().items() if _QUANTIZER not in name}


@contextlib.contextmanager
def _quiet() -> Any:
    """modelopt prints what it inserts and warns of libraries that are not needed here."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
