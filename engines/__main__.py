"""Look into an ONNX file.

python -m engines explain FILE.onnx     what is quantized, what is kept in floating point, and why
python -m engines profile FILE.onnx     where ONNX Runtime spends its time on the CPU
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from engines.errors import InputError
from engines.explain import explain
from engines.latency import environment
from engines.operators import by_operator, profile


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
    given = parser.parse_args(arguments)
    try:
        if given.command == "explain":
            print(explain(given.file))
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


if __name__ == "__main__":
    sys.exit(main())
