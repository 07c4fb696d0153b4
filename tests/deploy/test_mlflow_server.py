"""deploy/mlflow_server.sh, really started: who gets in, by which host name, and that a second call does nothing."""

import base64
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from engines.errors import InputError
from sweeps.tracking import check_reachable

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "0123456789abcdef"  # of tests/deploy/conftest.py
Serving = Callable[..., AbstractContextManager[tuple[str, dict[str, str]]]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serving: Serving) -> Iterator[str]:
    """Its address; a second call changed nothing, and its files are for its owner alone."""
    place = tmp_path_factory.mktemp("mlflow") / "place"
    with serving(place) as (address, env):
        subprocess.run(
            ["sh", str(ROOT / "deploy" / "mlflow_server.sh"), str(place)], env=env, check=True, stdin=subprocess.DEVNULL
        )  # flock sends it home
        log = (place / "server.log").read_text()
        assert "Address already in use" not in log and PASSWORD not in log
        assert stat.S_IMODE((place / "mlflow.db").stat().st_mode) == 0o600
        yield address


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


def test_a_new_password_counts_from_the_next_start_on(tmp_path: Path, serving: Serving) -> None:
    """MLflow itself takes the password only when it makes the database of logins."""
    place = tmp_path / "place"
    with serving(place):
        pass
    new = "another-0123456789"
    with serving(place, new) as (address, _):
        assert ask(address, PASSWORD) == 401 and ask(address, new) == 200
        assert new not in (place / "server.log").read_text()


def test_a_server_that_cannot_start_says_so_at_once(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "mlflow.db").write_text("no database")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "0" * 64, "MLFLOW_PORT": "0"}
    done = subprocess.run(
        ["sh", str(ROOT / "deploy" / "mlflow_server.sh"), str(place)], env=env, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and "no MLflow server answers" in done.stderr and "not a database" in done.stderr
    assert PASSWORD not in done.stderr
