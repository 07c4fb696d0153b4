"""PostgreSQL through the same statements as sqlite, on a real server of its own (skipped without one)."""

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from logged_sweep import forty, log_sweep, three
from mlflow.tracking import MlflowClient
from polars.testing import assert_frame_equal

from analysis import findings
from analysis.readers import ClientStore, SqlStore, open_store
from analysis.store import load, load_all
from trainables.record import InputError

BIN = next((path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None)
if found := shutil.which("initdb"):
    BIN = BIN or Path(found).parent
SERVER = pytest.mark.skipif(
    BIN is None or not find_spec("psycopg"), reason="needs a PostgreSQL server (initdb) and psycopg[binary]"
)
pytestmark = pytest.mark.slow  # MLflow takes a minute to make its tables there


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server below a temporary folder, on a free port of this machine alone, with the sweeps three and forty."""
    assert BIN is not None
    folder = tmp_path_factory.mktemp("postgresql")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = None
    if os.geteuid() == 0:  # the server refuses to run as root
        user = "postgres" if any(entry.pw_name == "postgres" for entry in pwd.getpwall()) else "nobody"
        for place in (folder, *folder.parents[: len(folder.parents) - 2]):
            place.chmod(0o711)
        shutil.chown(folder, user)

    def run(*command: str | Path) -> None:
        subprocess.run(command, check=True, capture_output=True, user=user, cwd=folder)

    data, options = folder / "data", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run(BIN / "initdb", "-D", data, "-U", "slimsweep", "-A", "trust", "-E", "UTF8", "--locale=C")
    run(BIN / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
    try:
        address = f"postgresql+psycopg://slimsweep:unused@127.0.0.1:{port}/postgres"
        MlflowClient(tracking_uri=address).create_experiment("slimsweep", artifact_location=folder.as_uri())
        log_sweep(address, "three", three())
        log_sweep(address, "forty", forty())
        yield address
    finally:
        run(BIN / "pg_ctl", "-D", data, "-m", "immediate", "stop")


@SERVER
@pytest.mark.parametrize("name", ["three", "forty"])
def test_sql_and_client_give_the_same_frames(uri: str, name: str) -> None:
    with open_store(uri) as sql:
        assert isinstance(sql, SqlStore)
        data = load(uri, name)
        mirrored = ClientStore(MlflowClient(tracking_uri=uri), "unreadable")
        runs = list(mirrored.children([data.run_id]))
        assert {run.run_id: run.tags["record"] for run in sql.children([data.run_id])} == {
            run.run_id: run.tags["record"] for run in runs
        }
        keys = ("val_drop", "train_loss")
        assert sorted(map(repr, sql.metrics([data.run_id], keys))) == sorted(
            map(repr, mirrored.metrics([data.run_id], keys))
        )
        assert sorted(sql.params([data.run_id])) == sorted(mirrored.params([data.run_id]))


@SERVER
def test_it_is_what_sqlite_gives(uri: str, tmp_path: Path) -> None:
    local = f"sqlite:///{tmp_path / 'mlflow.db'}"
    log_sweep(local, "three", three())
    own, other = load_all(uri, ["three"]), load_all(local, ["three"])
    columns = [name for name in own.trials.columns if name not in ("run_id", "sweep_run")]
    assert_frame_equal(own.trials.select(columns), other.trials.select(columns))
    assert own.curves["value"].sort().to_list() == other.curves["value"].sort().to_list()
    assert own.settings == other.settings and findings.collect(uri, own) == []


@SERVER
def test_its_connection_cannot_write(uri: str) -> None:
    with pytest.raises(InputError, match="read-only transaction") as caught, open_store(uri) as store:
        assert isinstance(store, SqlStore)
        list(store._ask("delete from tags", ()))
    assert "unused" not in str(caught.value)


@SERVER
def test_bad_addresses_end_with_one_line_without_the_password(uri: str) -> None:
    dead = "postgresql+psycopg://me:secret@127.0.0.1:9/x"
    for address, said in ((dead, "cannot be read"), (uri.replace("/postgres", "/template1"), "not an MLflow 3 store")):
        with pytest.raises(InputError, match=said) as caught:
            load(address, "three")
        assert "secret" not in str(caught.value) and "unused" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_driver_says_what_to_install() -> None:
    with pytest.raises(InputError, match="pip install") as caught:
        load("postgresql+pg8000://me:secret@127.0.0.1:9/x", "three")
    assert "pg8000" in str(caught.value) and "secret" not in str(caught.value)
