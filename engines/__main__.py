"""Look into an ONNX file, and build an engine of it.

python -m engines explain FILE.onnx     what is quantized, what is kept in floating point, and why
python -m engines profile FILE.onnx     where ONNX Runtime spends its time on the CPU
python -m engines build FILE.qdq.onnx ENGINE.trt    a TensorRT engine of an export, for the GPU of this machine
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from engines.errors import InputError
from engines.explain import annotation, explain
from engines.latency import environment
from engines.operators import by_operator, profile
from engines.tensorrt_build import build_engine, load_tensorrt
from engines.tensorrt_manifest import AHEAD_OF_TIME


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("explain", help="what is quantized, what is kept, and why")
    command.add_argument("file", type=Path)
    command = commands.add_parser("profile", help="time per operator in ONNX Runtime")
    command.add_argument("file", type=Path)
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=20, help="timed runs (default: %(default)s)")
    command.add_argument("--top", type=int, default=12, help="slowest nodes to list (default: %(default)s)")
    command = commands.add_parser("build", help="a TensorRT engine, for the GPU of this machine where there is one")
    command.add_argument("file", type=Path, help="explicit-QDQ ONNX, as a sweep leaves it (*.qdq.onnx)")
    command.add_argument("engine", type=Path, help="where the engine goes; its manifest lies beside it")
    command.add_argument("--workload", default="", help="hash of the workload that it is to be measured by")
    given = parser.parse_args(arguments)
    try:
        if given.command == "explain":
            print(explain(given.file))
        elif given.command == "build":
            print(_build(given.file, given.engine, given.workload))
        else:
            print(_profile(given.file, given.threads, given.rounds, given.top))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough; what Python would still flush at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _profile(path: Path, threads: int, rounds: int, top: int) -> str:
    where = environment()
    nodes = profile(path, rounds, threads)
    total = sum(node.us for node in nodes)
    lines = [
        f"{path}: {total / 1000:.2f} ms in {len(nodes)} nodes, medians of {rounds} runs, threads={threads}, "
        f"isa={where['isa']}, load={where['load_1m']}",
        f"{'operator':28} {'nodes':>6} {'us':>9} {'share':>6}",
    ]
    lines += [f"{op:28} {count:6} {us:9.0f} {us / total:6.1%}" for op, count, us in by_operator(nodes)]
    lines.append(f"slowest {top} nodes:")
    slowest = sorted(nodes, key=lambda node: -node.us)[:top]
    lines += [f"{node.us:9.0f} us  {node.op:24} {node.node}" for node in slowest]
    return "\n".join(lines)


def _build(path: Path, engine: Path, workload: str) -> str:
    found = annotation(path)
    if found is None:
        raise InputError(f"{path}: no quantization record in it; give a file that a sweep left as *.qdq.onnx")
    policy, chosen = found
    made = build_engine(load_tensorrt(), path, engine, workload, chosen, policy=policy)
    precision = made["precision"]
    where = "ahead of time" if made["device"] == AHEAD_OF_TIME else f"for {made['device']}"
    return (
        f"{engine}: {made['label']}, built by {made['tensorrt']} {made['version']} {where} in {made['build_s']} s for "
        f"compute capability {' or '.join(made['capabilities'])}; {made['engine_MB']:.1f} MB; "
        f"{100 * precision['int8_share']:.0f} % of the products in INT8, "
        f"{len(precision['keep_list_violations'])} layers against the keep-list"
    )


if __name__ == "__main__":
    sys.exit(main())
