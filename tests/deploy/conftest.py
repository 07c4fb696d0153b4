"""deploy/mlflow_server.sh, really started."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "0123456789abcdef"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def _serving(place: Path, password: str = PASSWORD) -> Iterator[tuple[str, dict[str, str]]]:
    (place.parent / "password").write_text(password)
    made = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "mlflow_env.py"), str(place.parent / "password")],
        **{"capture_output": True, "text": True, "check": True},
    ).stdout
    port = free_port()
    env = {**os.environ, **dict(line.split("=", 1) for line in made.split()), "MLFLOW_PORT": str(port)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = ["sh", str(ROOT / "deploy" / "mlflow_server.sh"), str(place)]
    subprocess.run(command, env=env, check=True, start_new_session=True, stdin=subprocess.DEVNULL)
    group = 0
    try:
        holders = subprocess.run(["fuser", str(place / "server.lock")], capture_output=True, text=True).stdout.split()
        group = os.getpgid(int(holders[0]))
        yield f"http://127.0.0.1:{port}", env
    finally:
        if group:
            os.killpg(group, signal.SIGKILL)


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[tuple[str, dict[str, str]]]]:
    """Start the server in a folder: its address, and the environment of those who may write to it. A second argument
    is the password."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    return _serving
