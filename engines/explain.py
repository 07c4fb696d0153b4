"""What is quantized in a file and why: written into it by every export, read back in plain words."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import helper

from engines.errors import InputError
from engines.graph import load
from engines.policy import FAMILIES, Choice, QuantPolicy, choices

_KEY = "slimsweep.quantization"
_TITLES = {"int8": "quantized", "kept": "kept in floating point"}


def annotate(model: onnx.ModelProto, policy: QuantPolicy, chosen: Iterable[Choice]) -> None:
    """Put the policy and every eligible node's precision and reason into the model's metadata, in place."""
    rows = [dataclasses.asdict(c) for c in chosen if c.kind is not None]
    entries = {p.key: p.value for p in model.metadata_props}
    entries[_KEY] = json.dumps({"policy": policy.to_data(), "choices": rows})
    helper.set_model_props(model, entries)


def annotation(path: str | Path) -> tuple[QuantPolicy, list[Choice]] | None:
    """The policy and choices in the file, None where it has none. InputError for an unreadable file."""
    model = load(path, weights=False)
    for prop in model.metadata_props:
        if prop.key == _KEY:
            try:
                data = json.loads(prop.value)
                return QuantPolicy.from_data(data["policy"]), [Choice(**row) for row in data["choices"]]
            except (ValueError, KeyError, TypeError) as problem:
                raise InputError(f"{path}: its quantization record cannot be read ({problem}); export again") from None
    return None


def explain(path: str | Path) -> str:
    """Text: the policy, then per layer what is quantized, kept, and why; for an FP32 file what could be."""
    found = annotation(path)
    if found is None:
        chosen = choices(load(path, weights=False), QuantPolicy(keep=()))
        lines = [f"{path}: single precision, nothing is quantized; eligible are:"]
        return "\n".join(lines + _table([dataclasses.replace(c, precision="kept") for c in chosen if c.kind]))
    policy, chosen = found
    settings = ", ".join(f"{key}={value}" for key, value in policy.to_data().items())
    counts = Counter(c.precision for c in chosen)
    lines = [f"{path}: {counts['int8']} layers quantized, {counts['kept']} kept", f"policy: {settings}"]
    for precision, title in _TITLES.items():
        part = [c for c in chosen if c.precision == precision]
        if part:
            lines += [f"{title} ({len(part)}):", *_table(part)]
    return "\n".join(lines)


def _table(chosen: list[Choice]) -> list[str]:
    width = max((len(c.layer) for c in chosen), default=0)
    return [f"  {c.layer:{width}}  {c.why or (FAMILIES[c.kind] if c.kind else '')}" for c in chosen]
