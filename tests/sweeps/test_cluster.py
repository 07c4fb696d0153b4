"""--address against a real `ray start --head` with a token, and every way in which it cannot work."""

import ipaddress
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from engines.errors import InputError
from sweeps import cluster
from sweeps.hours import trained
from sweeps.journal import SweepState

TOY = Path(__file__).with_name("toy_sweep.py")
NAME = "toy_small_seed42"
RAY = str(Path(sys.executable).with_name("ray"))
FIXED = (6379, 8265, 10001, 52365)  # what Ray takes unless told otherwise


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address; one of version 4 in the clothes of version 6 as what it is."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def drive(storage: Path, address: str, env: dict[str, str]) -> tuple[int, str, str]:
    command = [sys.executable, str(TOY), "--storage", str(storage), "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head with token authentication on free ports: its address and the environment of those who may
    join.
    """
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    # A home of its own, so that `auto` finds this head and nothing of the machine's owner is touched.
    temp = Path("/tmp") / f"ray-test-{os.getpid()}"
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_worker_niceness": "0",
    }
    env |= {"RAY_TMPDIR": str(temp), "RAY_USAGE_STATS_ENABLED": "0", "RAY_metrics_report_interval_ms": "1000"}
    port, manager, nodes, agent, metrics = free_ports(5)
    env["EXPORTER"] = f"http://127.0.0.1:{metrics}/metrics"  # for the tests alone
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
    ]
    command += [
        f"--object-manager-port={manager}",
        f"--node-manager-port={nodes}",
        "--include-dashboard=false",
    ]
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--temp-dir={temp}"]
    log = (token.parent / "head.log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        end = time.monotonic() + 90
        while "Ray runtime started" not in (token.parent / "head.log").read_text():
            assert time.monotonic() < end and process.poll() is None, (token.parent / "head.log").read_text()
            time.sleep(0.3)
        yield f"127.0.0.1:{port}", env
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs([*children, psutil.Process(process.pid)], timeout=20)
        for one in alive:
            one.kill()
        log.close()
        shutil.rmtree(temp, ignore_errors=True)


def test_address_auto_runs_a_whole_sweep_on_a_cluster_with_a_token(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, env = head
    # From a folder that is not the project's: the code must travel to the workers by itself.
    code, out, err = drive(tmp_path, "auto", {**env, "RAY_ADDRESS": address})
    assert code == 0, err
    state = SweepState.replay(tmp_path / "toy_small_seed42" / "journal.jsonl")
    assert [(t.record or {}).get("verdict") for t in state.trials.values()] == ["n/a", "pass", "fail"]
    assert "T_good_run1" in out


@pytest.mark.parametrize("joined", [False, True])
def test_a_trial_without_an_accelerator_sees_none(joined: bool, head: tuple[str, dict[str, str]]) -> None:
    """Ray, left to itself, lets a task that asked for no accelerator have them all."""
    address, env = head
    code = f"""if True:
        import os, ray
        from sweeps.cluster import Wanted, connect
        with connect(Wanted({address if joined else None!r})):
            seen = ray.remote(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
            print(repr(ray.get(seen.remote())))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**env, "CUDA_VISIBLE_DEVICES": "0,1", "PYTHONPATH": str(TOY.parents[2])},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["''"], done.stdout + done.stderr


def test_a_host_that_died_a_moment_ago_is_no_obstacle(tmp_path: Path) -> None:
    """The list of hosts is older than the death of one of them."""
    code = f"""if True:
        from dataclasses import replace
        from pathlib import Path
        from sweeps.cluster import Wanted, connect
        with connect(Wanted(None)):
            from sweeps import hosts
            [living] = hosts.nodes()
            gone = replace(living, node_id="0" * 56, host="gone")
            broken = replace(living, node_id="1" * 56, host="broken")
            for lists in ([[living, gone], [living]], [[living, broken], [living, broken]]):
                hosts.nodes = iter(lists).__next__
                try:
                    print(hosts.check(Path({str(tmp_path)!r})))
                except ValueError as error:
                    print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=TOY.parents[2])
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("{'Python': "), done.stdout + done.stderr
    assert second.startswith("host broken cannot run the project"), done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_sweep_on_this_machine_alone_disturbs_no_cluster_and_is_not_disturbed(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """All ports of a local Ray are free ones that it finds: a running head, whatever its ports, is no obstacle."""
    _, env = head
    done = subprocess.run(
        [sys.executable, str(TOY), "--storage", str(tmp_path)], capture_output=True, text=True, timeout=240, env=env
    )
    assert done.returncode == 0 and "T_good_run1" in done.stdout, done.stderr


def scraped(exporter: str) -> dict[str, float]:
    """What the exporter says of sweeps: `name{kind}`, without the labels that all have, and its number."""
    found = {}
    with urllib.request.urlopen(exporter, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("ray_slimsweep_"):
                name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
                said = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                assert said["sweep"] == NAME, line
                kind = [said[key] for key in ("verdict", "cause", "unit", "le") if key in said]
                found[f"{name.removeprefix('ray_slimsweep_')}{kind}"] = float(value)
    return found


def looks(exporter: str, command: list[str], env: dict[str, str]) -> list[dict[str, float]]:
    """What the exporter says while the sweep runs; of gauges that vanish a while after its end, no more than that."""
    seen = []
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    end = time.monotonic() + 240
    while driver.poll() is None:
        assert time.monotonic() < end
        seen.append(scraped(exporter))
        time.sleep(0.2)
    assert driver.returncode == 0
    return [look for look in seen if "trials_running[]" in look]


def test_prometheus_sees_what_the_journal_says(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, env = head[0], {**head[1], "TOY_SLEEP": "1"}
    command = [sys.executable, str(TOY), "--storage", str(tmp_path), "--address", address]
    seen = looks(env["EXPORTER"], command, env)
    last = seen[-1]
    state = SweepState.replay(tmp_path / NAME / "journal.jsonl")
    trials = [trial for trial in state.trials.values() if trial.role == "trial"]
    epochs = sum(len(trial.results) for trial in trials)
    assert max(look["trials_running[]"] for look in seen) == 2 and last["trials_running[]"] == 0
    assert all(look.keys() <= later.keys() for look, later in pairwise(seen)), "a number that was there is gone"
    verdicts = Counter((trial.record or {})["verdict"] for trial in trials)
    causes = Counter(trial.stop[1] for trial in trials if trial.stop)
    assert {name: n for name, n in last.items() if "finished" in name} == {
        f"trials_finished['{verdict}']": n for verdict, n in verdicts.items()
    }
    assert {name: n for name, n in last.items() if "stopped" in name} == {
        f"trials_stopped['{cause}']": n for cause, n in causes.items()
    }
    assert last["epochs_total[]"] == epochs == last["report_to_decision_seconds_count[]"] > 4
    assert last["report_to_decision_seconds_bucket['10.0']"] == epochs, "a report waited for longer than ten seconds"
    assert last["best_drop[]"] == pytest.approx(min(trial.best_drop for trial in trials))
    assert last["training_hours['CPU']"] == pytest.approx(sum(trained(trial) for trial in trials))
    again = looks(env["EXPORTER"], [*command, "--resume"], env)[-1]
    assert again == pytest.approx(last), "a resumed sweep counts what was done before"


def test_a_local_sweep_listens_on_the_loopback_alone_and_keeps_its_secrets(tmp_path: Path) -> None:
    """It asks for its token; and that, and MLflow's password, stand in no file, no log and no process list."""
    env = {**os.environ, "TOY_SLEEP": "1", "TOY_EPOCHS": "60"} | {"RAY_AUTH_MODE": "disabled"}
    env |= {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "hush-0123456789"}
    env.pop("RAY_AUTH_TOKEN", None)
    command = [sys.executable, str(TOY), "--storage", str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        journal = tmp_path / "toy_small_seed42" / "journal.jsonl"
        end = time.monotonic() + 120
        while not (journal.is_file() and '"result"' in journal.read_text()):
            assert time.monotonic() < end and driver.poll() is None
            time.sleep(0.3)
        family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        assert any("gcs_server" in process.name() for process in family)
        ports = {}
        for process in family:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    assert address_of(connection.laddr.ip).is_loopback, (process.cmdline(), connection.laddr)
                    assert connection.laddr.port not in FIXED, "a real head on this machine would find it taken"
                    ports[process.name()] = connection.laddr.port
        assert len(ports) >= 3
        join = f"from ray._raylet import GcsClient; print(GcsClient('127.0.0.1:{ports['gcs_server']}').cluster_id)"
        command = [sys.executable, "-c", join]
        stranger = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        assert stranger.stdout
        said = stranger.stdout.readline()  # the client asks on and on, and says each time why it may not
        stranger.kill()
        stranger.wait()
        assert "InvalidAuthToken" in said, said
        gcs = next(process for process in family if "gcs_server" in process.name())
        secrets = [gcs.environ()["RAY_AUTH_TOKEN"], "hush-0123456789"]
        lines = [" ".join(process.cmdline()) for process in family]
        assert not [line for line in lines for secret in secrets if secret in line]
        assert any("sweeps.mlflow_writer" in line for line in lines)
        assert not [line for line in lines if "mlflow.db" in line], "an address, which may hold a password, is public"
        logs = next(Path(word.partition("=")[2]) for word in gcs.cmdline() if word.startswith("--log_dir="))
    finally:
        driver.terminate()
        driver.wait(60)
    written = [path for place in (tmp_path, logs) for path in place.rglob("*") if path.is_file()]
    assert {"journal.jsonl", "mlflow.db", "tracking.log"} <= {path.name for path in written} and len(written) > 10
    assert not [(path, secret) for path in written for secret in secrets if secret.encode() in path.read_bytes()]


def test_a_driver_without_the_right_token_is_told_what_to_do(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, env = head
    wrong = tmp_path / "token"
    wrong.write_text("fedcba9876543210fedcba9876543210")
    wrong.chmod(0o600)
    code, out, err = drive(tmp_path / "runs", address, {**env, "RAY_AUTH_TOKEN_PATH": str(wrong)})
    assert code == 2 and err.startswith("error: --address") and "token" in err, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in out
    assert not (tmp_path / "runs" / "toy_small_seed42").exists()


def test_bad_addresses_end_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    port = free_ports(1)[0]
    for address, said in {
        f"127.0.0.1:{port}": "no Ray cluster answers",
        "somewhere": "expected `auto` or HOST:PORT",
        "host:99999": "expected `auto` or HOST:PORT",
        "ray://host:10001": "expected `auto` or HOST:PORT",
    }.items():
        with pytest.raises(InputError) as caught, cluster.connect(cluster.Wanted(address)):
            pass
        assert said in str(caught.value) and address in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_empty_or_open_token_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    joining = cluster.Wanted("auto")
    with pytest.raises(InputError, match="no cluster token in .*ray get-auth-token"), cluster.connect(joining):
        pass
    (tmp_path / "none").write_text("\n")
    with pytest.raises(InputError, match="is empty"), cluster.connect(cluster.Wanted("auto")):
        pass
    (tmp_path / "none").write_text("0123456789abcdef")
    (tmp_path / "none").chmod(0o640)
    with pytest.raises(InputError, match=r"others may read .*\(mode 640\); `chmod 600"), cluster.connect(joining):
        pass


def test_auto_without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Ray's own search for a cluster looks at every process of the machine, so the test asks for its answer alone.
    error = cluster._explained("auto", ConnectionError("Could not find any running Ray instance.\nMore."))
    assert str(error).startswith("--address auto: no Ray cluster found (Could not find any running Ray instance")
    assert "ray start --head" in str(error) and "\n" not in str(error)
    (tmp_path / "token").write_text("0123456789abcdef")
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(InputError, match="no Ray cluster answers"), cluster.connect(cluster.Wanted("auto")):
        pass
