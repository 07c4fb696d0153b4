"""Speed of INT8 against torch, ONNX Runtime and OpenVINO in single precision, interleaved in one run.

    python benchmarks/int8.py                              # the shipped teacher, one and two threads
    python benchmarks/int8.py --models small mid --repeats 15
    python benchmarks/int8.py --compile                    # torch.compile too: minutes to compile

teacher: the shipped model, 64 px; small: 6 M parameters, 128 px; mid: 39 M, 224 px (both with rotary positions and
random weights, so that their errors say little). The last column is the relative error against torch.
Close other programs first: on a busy machine several threads of one program wait for each other.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines import openvino_peer
from engines.errors import InputError
from engines.export import export_onnx
from engines.fuse import fuse_rotary
from engines.graph import load, save
from engines.latency import environment, interleaved
from engines.policy import QuantPolicy
from engines.quantize import post_training
from engines.runtimes import Array, Arrays, OnnxRuntime, Runtime, TorchRuntime
from trainables.dust3r.domain import Deployed, Dust3r
from trainables.dust3r.model import from_reference_config

CALIBRATION = 8
KEEP = ("layernorm", "softmax", "attention", "conv")
ROTARY: dict[str, Any] = {
    "head_type": "linear",
    "pos_embed": "RoPE100",
    "patch_size": 16,
    "enc_depth": 6,
    "dec_depth": 4,
}
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "img_size": (128, 128),
        "enc_embed_dim": 192,
        "enc_num_heads": 6,
        "dec_embed_dim": 144,
        "dec_num_heads": 4,
    },
    "mid": {"img_size": (224, 224), "enc_embed_dim": 512, "enc_num_heads": 8, "dec_embed_dim": 384, "dec_num_heads": 6},
}


def build(name: str) -> tuple[torch.nn.Module, list[Arrays]]:
    """The deployed model and calibration inputs, of which the first are also the timed ones."""
    torch.manual_seed(0)
    if name == "teacher":
        domain = Dust3r({"workload_seed": 42}, seed=0)
        images = domain.samples("train", 2 * torch.arange(CALIBRATION))["image"].float() / 127.5 - 1
        return domain.deployed(domain.teacher())[0], [(p[:1].numpy(), p[1:].numpy()) for p in images]
    config = ROTARY | SIZES[name]
    net = from_reference_config(**config).eval().requires_grad_(False)
    images = torch.rand(CALIBRATION, 2, 3, *config["img_size"]) * 2 - 1
    return Deployed(net), [(p[:1].numpy(), p[1:].numpy()) for p in images]


def files(model: torch.nn.Module, feeds: list[Arrays], folder: Path) -> dict[str, Path]:
    """All ONNX files, by what they are called in the table."""
    found = {name: folder / f"{name.replace(' ', '_')}.onnx" for name in ("ort fp32", "ort fp32 rotary")}
    plain = found["ort fp32"]
    example = tuple(torch.from_numpy(x) for x in feeds[0])
    export_onnx(model, example, plain, ["img1", "img2"], ["pts1", "conf1", "pts2", "conf2"])
    graph = load(plain)
    if fuse_rotary(graph):
        save(graph, found["ort fp32 rotary"])
    else:
        del found["ort fp32 rotary"]
    for mode in ("static", "dynamic"):
        found[f"int8 {mode}"] = folder / f"{mode}.onnx"
        policy = QuantPolicy(keep=KEEP, mode=mode, calibration=CALIBRATION)
        post_training(plain, found[f"int8 {mode}"], policy, feeds)
    return found


def error(actual: Arrays, expected: Arrays) -> float:
    """Largest relative error over the outputs, L2."""

    def one(a: Array, e: Array) -> float:
        return float(np.linalg.norm(a - e) / np.linalg.norm(e))

    return max(one(a, e) for a, e in zip(actual, expected, strict=True))


def measure(name: str, threads: list[int], repeats: int, compiled: bool) -> None:
    """Print one table per number of threads."""
    model, feeds = build(name)
    with tempfile.TemporaryDirectory() as folder:
        paths = files(model, feeds, Path(folder))
        for count in threads:
            runtimes: dict[str, Runtime] = {"torch": TorchRuntime(model, "cpu", count)}
            if compiled:
                fast: Any = torch.compile(model)
                runtimes["torch.compile"] = TorchRuntime(fast, "cpu", count)
            runtimes |= {label: OnnxRuntime(path, "cpu", count) for label, path in paths.items()}
            if openvino_peer.installed():
                runtimes["openvino fp32"] = openvino_peer.OpenVino(paths["ort fp32"], count)
            where = environment()
            outputs = {label: runtime.run(feeds[0]) for label, runtime in runtimes.items()}
            calls: dict[str, Callable[[], object]] = {
                label: lambda runtime=runtime: runtime.run(feeds[0])  # type: ignore[misc]
                for label, runtime in runtimes.items()
            }
            by_torch = interleaved(calls, "torch", 3, repeats, 0)
            fp32 = by_torch["ort fp32"]
            print(f"\n{name}, threads={count}, isa={where['isa']}, cores={where['cores']}, load={where['load_1m']}")
            print(f"{'engine':16} {'p50 ms':>8} {'95 % interval':>16} {'x torch':>18} {'x ort fp32':>10} {'error':>8}")
            for label, got in by_torch.items():
                ratio = f"{got.ratio:.2f} [{got.ratio_lo:.2f}, {got.ratio_hi:.2f}]"
                interval = f"{got.p50_lo:.2f} .. {got.p50_hi:.2f}"
                row = f"{label:16} {got.p50_ms:8.2f} {interval:>16} {ratio:>18} {fp32.p50_ms / got.p50_ms:10.2f}"
                print(f"{row} {error(outputs[label], outputs['torch']):8.1e}", flush=True)
            for runtime in runtimes.values():
                runtime.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["teacher", *SIZES]
    parser.add_argument("--models", nargs="+", choices=names, default=["teacher"], help="default: %(default)s")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=40, help="timed rounds (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    given = parser.parse_args()
    try:
        for name in given.models:
            measure(name, given.threads, given.repeats, given.compile)
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
