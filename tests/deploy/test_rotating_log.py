"""deploy/rotating_log.py, through which the MLflow server writes its log."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "rotating_log.py"


def test_a_log_of_many_requests_stays_small(tmp_path: Path) -> None:
    lines = [b"request %d " % number + b"x" * 9980 + b"\n" for number in range(2500)]
    lines[-2] = b"\xff no text\n"
    subprocess.run([sys.executable, str(SCRIPT), "server.log"], cwd=tmp_path, input=b"".join(lines), check=True)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"server.log", "server.log.1"} and all(size <= 10_000_000 for size in sizes.values())
    older, newer = ((tmp_path / name).read_bytes().splitlines() for name in ("server.log.1", "server.log"))
    assert newer[-2:] == [rb"\xff no text", lines[-1].strip()]
    assert [line[:12] for line in older + newer][:-2] == [line[:12] for line in lines[-len(older + newer) : -2]]
