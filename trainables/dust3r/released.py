"""Checkpoints of the published model, in both forms in which they are handed out; nothing in them is ever run.

A .pth holds 'args', an argparse.Namespace whose `model` is a Python call written as a string, and 'model', the state
dict. The hub's form is a folder with config.json (the constructor's arguments, infinities bare) and model.safetensors,
which lacks one name of each pair of tied tensors. The string is parsed, its arguments may be literals and infinities
alone; widths and depths are those of the weights, and an argument that says otherwise is refused.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import InputError
from trainables import checkpoint
from trainables.dust3r.config import Config
from trainables.dust3r.model import DUSt3R

_HEAD_WIDTH = 64  # channels per head of every published model, where no argument says it
# What the shapes say better (mlp_ratio), what training alone needs, and what the docstring of `read` says is replaced.
_IGNORED = {"mlp_ratio", "freeze", "landscape_only", "patch_embed_cls"}
_STATED = ("output_mode", "head_type", "depth_mode", "conf_mode", "pos_embed", "img_size", "hooks")
_SHAPES = ("patch_size", "enc_embed_dim", "enc_depth", "dec_embed_dim", "dec_depth")
_TIED = re.compile(r"(downstream_head[12]\.dpt\.scratch\.)layer_rn\.([0-3])\.weight")
_NAMED = 5  # keys of a kind that an error spells out


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and float32 weights of a DUSt3R checkpoint: published .pth, hub folder, or slimsweep's own.

    The model takes images of any orientation one at a time, as the published `inference` does: patch_embed_cls and
    landscape_only, which serve mixed training batches, are replaced. Raises InputError that names the file.
    """
    if path.is_dir():
        arguments, weights = _read_hub(path / "config.json", path / "model.safetensors")
    elif path.suffix == ".safetensors":
        return checkpoint.read_model(path)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = checkpoint.load(path, "model")
        if not isinstance(content.get("args"), argparse.Namespace):
            return checkpoint.config_and_weights(path, content)
        arguments, weights = _arguments(path, content["args"]), _tensors(path, content.get("model"))
    config = _config(path, arguments, weights)
    _check(path, config, weights)
    return config.to_data(), weights


def _read_hub(config: Path, weights: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (config, weights):
        if not file.is_file():
            raise InputError(
                f"model {file} does not exist: the hub's form is a folder of config.json, model.safetensors"
            )
    try:
        arguments = json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{config}: not JSON ({error}); download it again") from None
    if not isinstance(arguments, dict):
        raise InputError(f"{config}: expected a mapping of constructor arguments, found {type(arguments).__name__}")
    try:
        return arguments, _tensors(weights, load_file(weights))
    except (OSError, SafetensorError) as error:
        raise InputError(f"model {weights} cannot be read ({error}); it is missing or truncated") from None


def _tensors(path: Path, weights: Any) -> dict[str, Tensor]:
    """The state dict in float32, each tied tensor under both of its names."""
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path}: 'model' is no state dict of tensors; expected the published checkpoint's")
    if odd := [str(key) for key, value in weights.items() if not _whole(value)]:
        raise InputError(f"{path}: not stored in full: {_listed(odd)}; save the file again with plain tensors")
    found = {str(key): value.float() for key, value in weights.items()}
    for key in list(found):
        if match := _TIED.fullmatch(key):
            found.setdefault(f"{match[1]}layer{int(match[2]) + 1}_rn.weight", found[key])
        elif match := re.fullmatch(r"(downstream_head[12]\.dpt\.scratch\.)layer([1-4])_rn\.weight", key):
            found.setdefault(f"{match[1]}layer_rn.{int(match[2]) - 1}.weight", found[key])
    return found


def _whole(value: Tensor) -> bool:
    """Whether every number of a tensor is stored: a few bytes can claim any shape."""
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _arguments(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of the call that `args.model` spells. Nothing is evaluated."""
    text = getattr(args, "model", None)
    if not isinstance(text, str):
        raise InputError(f"{path}: args.model={text!r} is not a string such as 'AsymmetricCroCo3DStereo(...)'")
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"{path}: args.model={_short(text)} is not a constructor call") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise InputError(f"{path}: args.model={_short(text)} is not a call with keyword arguments alone")
    try:
        return {_keyword(word): _literal(word.value) for word in call.keywords}
    except ValueError as error:
        raise InputError(f"{path}: args.model holds {error}; expected literals and inf alone") from None


def _keyword(word: ast.keyword) -> str:
    if word.arg is None:
        raise ValueError(f"**{_short(ast.unparse(word.value))}")
    return word.arg


def _literal(node: ast.expr) -> Any:
    """A number, string, None, boolean, infinity, or a tuple or list of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | bool | None):
        return node.value
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(item) for item in node.elts)
    raise ValueError(_short(ast.unparse(node)))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")


def _config(path: Path, arguments: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Config:
    """The architecture: widths and depths from the weights' shapes, the rest from the arguments."""
    known = {*_STATED, *_SHAPES, *_IGNORED, "enc_num_heads", "dec_num_heads"}
    if unknown := sorted(arguments.keys() - known):
        raise InputError(f"{path}: unknown arguments {unknown} of the model, known are {sorted(known)}")
    try:
        shapes = _from_shapes(weights)
    except KeyError as error:
        raise InputError(f"{path}: lacks {error.args[0]}: not a DUSt3R checkpoint") from None
    said = {key: arguments[key] for key in _SHAPES if key in arguments}
    if "head_type" in arguments:
        said["head_type"] = arguments["head_type"]
    if wrong := [
        f"{key}={value} but the weights have {shapes[key]}" for key, value in said.items() if value != shapes[key]
    ]:
        raise InputError(f"{path}: " + "; ".join(wrong))
    heads = {
        f"{side}_num_heads": arguments.get(f"{side}_num_heads", max(1, shapes[f"{side}_embed_dim"] // _HEAD_WIDTH))
        for side in ("enc", "dec")
    }
    stated = {key: arguments[key] for key in _STATED if key in arguments}
    try:
        return Config(**{**shapes, **heads, **stated})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in {**heads, **stated}.items())
        raise InputError(
            f"{path}: an argument of the model is of another kind than expected ({error}): {given}"
        ) from None


def _from_shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every argument that the shapes decide. KeyError for a name without which there is no telling."""

    def depth(stack: str) -> int:
        layers = {int(key.split(".")[1]) for key in weights if re.match(rf"{stack}\.\d{{1,3}}\.", key)}
        return max(layers, default=-1) + 1  # one name must not ask for a million layers: longer numbers are extra keys

    def shape(name: str, rank: int) -> torch.Size:
        if name not in weights or weights[name].ndim != rank:
            raise KeyError(f"{name} of {rank} dimensions")
        return weights[name].shape

    patch, decoder = shape("patch_embed.proj.weight", 4), shape("decoder_embed.weight", 2)
    found: dict[str, Any] = {
        "patch_size": patch[-1],
        "enc_embed_dim": patch[0],
        "enc_depth": depth("enc_blocks"),
        "dec_embed_dim": decoder[0],
        "dec_depth": depth("dec_blocks"),
        "enc_mlp_hidden": shape("enc_blocks.0.mlp.fc1.weight", 2)[0],
        "dec_mlp_hidden": shape("dec_blocks.0.mlp.fc1.weight", 2)[0],
        "head_type": "linear",
    }
    head = "downstream_head1.dpt."
    if any(key.startswith(head) for key in weights):
        posts = (shape(f"{head}act_postprocess.{i}.0.weight", 4)[0] for i in range(4))
        found |= {"head_type": "dpt", "layer_dims": tuple(posts)}
        found["feature_dim"] = shape(f"{head}scratch.refinenet1.out_conv.weight", 4)[0]
        found["last_dim"] = shape(f"{head}head.2.weight", 4)[0]
    elif "downstream_head1.proj.weight" not in weights:
        raise KeyError("downstream_head1.proj.weight and downstream_head1.dpt.*")
    return found


def _check(path: Path, config: Config, weights: Mapping[str, Tensor]) -> None:
    """InputError that lists what the architecture misses, does not know, or has in another shape."""
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in DUSt3R(config).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "mis-shaped": [
            f"{key} {found[key]} instead of {shape}"
            for key, shape in sorted(expected.items())
            if found.get(key, shape) != shape
        ],
    }
    said = [f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
    if said:
        raise InputError(f"{path}: weights and architecture differ, " + "; ".join(said))


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more
