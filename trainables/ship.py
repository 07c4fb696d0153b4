"""Turn a pretrained teacher into package data: float16 safetensors and a card that says where it comes from.

    python -m trainables.ship runs/pretrain_small_seed0

reads the folder that sweeps/pretrain.py or sweeps/aq_pretrain.py left and writes the domain's shipped teacher and its
card, a .json beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engines.errors import InputError, command_line
from trainables import checkpoint
from trainables.domain import make_domain

LIMIT_MB = 10.0


def ship(folder: Path, target: Path | None = None, note: str = "") -> dict[str, Any]:
    """Write `target`, by default where the domain expects it, and its card, which is returned.

    The card's metrics are those of the float16 file as it is loaded, on the validation and test samples of the sweep's
    workload. Raises InputError for a folder that holds no pretrained teacher and for weights above LIMIT_MB.
    """
    run, weights = _found(folder / "files")
    trial, settings = run["trials"][0], run["sweep"]["settings"]
    content, curve = checkpoint.load(weights, "teacher"), trial["curve"]
    tensors = {name: value.half().contiguous() for name, value in content["model"].items()}
    size = sum(value.numel() * 2 for value in tensors.values()) / 1e6
    if size > LIMIT_MB:
        raise InputError(f"{weights}: {size:.1f} MB as float16, the package takes at most {LIMIT_MB:g} MB")
    domain = make_domain(run["sweep"]["domain"], settings, {}, settings["seed"])
    target = target or domain.shipped
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata={"config": json.dumps(content["config"])})
    target.chmod(0o644)  # a package is for everyone
    model = domain.load(target).eval()
    splits = {split: domain.evaluate(model, split, full=True) for split in ("val", "test")}
    card = {
        "command": _command(run["sweep"]["command"]),
        "note": note,
        "seed": settings["seed"],
        "epochs": len(curve),
        "samples": len(curve) * settings["samples_per_epoch"],
        "cpu_hours": round(sum(row["cpu_s"] for row in curve) / 3600, 2),
        "settings": settings,
        "parameters": sum(value.numel() for value in model.parameters()),
        "dtype": "float16 in the file, float32 in use",
        "metrics": {
            split: {name: round(float(value.mean()), 5) for name, value in found.items()}
            for split, found in splits.items()
        },
        "beside": {name: round(value, 5) for name, value in domain.compare(splits["test"], "test").items()},
        "curve": [round(row[f"val_{domain.primary}"], 4) for row in curve],
    }
    target.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def _command(line: str) -> str:
    """The command without what is of one machine: its interpreter's and its storage's place."""
    words = shlex.split(line)
    kept = [word for before, word in zip(["", *words], words, strict=False)
            if "--storage" not in (word, before) and not word.startswith("--storage=")]  # fmt: skip
    return shlex.join([Path(kept[0]).name, *kept[1:]])


def _found(files: Path) -> tuple[dict[str, Any], Path]:
    """The log and the weights of a pretraining sweep."""
    logs, weights = sorted(files.glob("*pretrain_log.json")), sorted(files.glob("teacher*.pth"))
    if len(logs) != 1 or len(weights) != 1:
        raise InputError(
            f"{files}: holds {len(logs)} pretraining logs and {len(weights)} teachers; give the folder of a finished "
            "python sweeps/pretrain.py or sweeps/aq_pretrain.py"
        )
    return json.loads(logs[0].read_text()), weights[0]


@command_line
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    parser.add_argument("--note", default="", help="a sentence for the card")
    given = parser.parse_args(arguments)
    try:
        card = ship(given.folder, note=given.note)
    except OSError as error:
        raise InputError(str(error)) from None
    print(json.dumps({**card["metrics"], "beside": card["beside"]}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
