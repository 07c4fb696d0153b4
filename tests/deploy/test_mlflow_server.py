"""deploy/mlflow_server.sh, really started: who gets in, by which host name, and that a second call does nothing."""

import base64
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.errors import InputError
from sweeps.tracking import check_reachable

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "0123456789abcdef"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; the password is that of deploy/mlflow_env.py."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    folder = tmp_path_factory.mktemp("mlflow")
    (folder / "password").write_text(PASSWORD)
    made = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "mlflow_env.py"), str(folder / "password")],
        **{"capture_output": True, "text": True, "check": True},
    ).stdout
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    env = {**os.environ, **dict(line.split("=", 1) for line in made.split()), "MLFLOW_PORT": str(port)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    place = folder / "place"
    command = ["sh", str(ROOT / "deploy" / "mlflow_server.sh"), str(place)]
    subprocess.run(command, env=env, check=True, start_new_session=True, stdin=subprocess.DEVNULL)
    group = 0
    try:
        end = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < end, (place / "server.log").read_text()
                time.sleep(0.3)
        holders = subprocess.run(["fuser", str(place / "server.lock")], capture_output=True, text=True).stdout.split()
        group = os.getpgid(int(holders[0]))
        subprocess.run(command, env=env, check=True, stdin=subprocess.DEVNULL)  # a second call: flock sends it home
        time.sleep(1)
        assert "Address already in use" not in (place / "server.log").read_text()
        assert (
            stat.S_IMODE((place / "mlflow.db").stat().st_mode) == 0o600
            and PASSWORD not in (place / "server.log").read_text()
        )
        yield f"http://127.0.0.1:{port}"
    finally:
        if group:
            os.killpg(group, signal.SIGKILL)


def ask(server: str, password: str | None, host: str | None = None) -> int:
    """The status of a request for the experiments."""
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/experiments/search?max_results=1")
    if password:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"admin:{password}".encode()).decode())
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_password_opens_it(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(server, None) == 401 and ask(server, "fedcba9876543210") == 401 and ask(server, PASSWORD) == 200
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="refuses the login .*MLFLOW_TRACKING_PASSWORD"):
        check_reachable(server, 60)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    check_reachable(server, 60)


def test_a_page_of_another_site_does_not_reach_it(server: str) -> None:
    """DNS rebinding: the browser asks with the foreign name, even where it has the password."""
    assert ask(server, PASSWORD, host="evil.example") == 403
