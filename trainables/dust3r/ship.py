"""Turn a pretrained teacher into package data: float16 safetensors and a card that says where it comes from.

    python -m trainables.dust3r.ship runs/pretrain_small_seed0

reads the folder that sweeps/pretrain.py left and writes trainables/dust3r/weights/teacher_small.{safetensors,json}.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engines.errors import InputError
from trainables import checkpoint
from trainables.dust3r.domain import SHIPPED, Dust3r

LIMIT_MB = 10.0


def ship(weights: Path, log: Path, target: Path = SHIPPED, note: str = "") -> dict[str, Any]:
    """Write `target` and its card (.json beside it) from a best.pth and pretrain_log.json; the card is returned.

    The card's metrics are those of the float16 file as it is loaded, on 512 validation and 2,048 test pairs.
    Raises InputError for unreadable files or weights above LIMIT_MB.
    """
    content = checkpoint.load(weights, "teacher")
    run = json.loads(log.read_text())
    trial = run["trials"][0]
    settings, curve = run["sweep"]["settings"], trial["curve"]
    tensors = {name: value.half().contiguous() for name, value in content["model"].items()}
    size = sum(value.numel() * 2 for value in tensors.values()) / 1e6
    if size > LIMIT_MB:
        raise InputError(f"{weights}: {size:.1f} MB as float16, the package takes at most {LIMIT_MB:g} MB")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata={"config": json.dumps(content["config"])})
    domain = Dust3r({"workload_seed": 42}, seed=0)
    model = domain.load(target).eval()
    splits = {split: domain.evaluate(model, split, full=True) for split in ("val", "test")}
    card = {
        "command": run["sweep"]["command"],
        "note": note,
        "seed": settings["seed"],
        "epochs": len(curve),
        "pairs": len(curve) * settings["samples_per_epoch"],
        "scenes": len(curve) * settings["samples_per_epoch"] // 2,
        "cpu_hours": round(sum(row["cpu_s"] for row in curve) / 3600, 2),
        "settings": settings,
        "parameters": sum(value.numel() for value in model.parameters()),
        "dtype": "float16 in the file, float32 in use",
        "metrics": {
            split: {name: round(float(value.mean()), 5) for name, value in found.items()}
            for split, found in splits.items()
        },
        "mean_depth_map_absrel": round(mean_depth_map(domain), 4),
        "curve": [round(row["val_absrel"], 4) for row in curve],
    }
    target.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def mean_depth_map(domain: Dust3r) -> float:
    """AbsRel on the test split of predicting the validation split's mean depth map: what no model must do worse."""
    depths = {
        split: torch.cat([batch["points"][:, 0, ..., 2] for batch in domain.fixed_pairs(split)])
        for split in ("val", "test")
    }
    guess, true = depths["val"].mean(0).flatten(), depths["test"].flatten(1)
    scaled = guess * (true.median(1).values / guess.median())[:, None]
    return float(((scaled - true).abs() / true).mean())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    parser.add_argument("--note", default="", help="a sentence for the card")
    given = parser.parse_args()
    files = given.folder / "files"
    try:
        card = ship(files / "teacher_small.pth", files / "pretrain_log.json", note=given.note)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(card["metrics"], indent=1))


if __name__ == "__main__":
    main()
