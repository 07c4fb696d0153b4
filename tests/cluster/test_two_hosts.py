"""Sweeps over two hosts that are network namespaces: what both need, and what is refused before the first trial."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sweeps.cluster import PACKAGES
from sweeps.journal import SweepState

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[2] / "deploy"))
from faults import at_work, wait
from mlflow_env import environment
from namespaces import PORT, ROOT, Host, joined_hosts, missing

pytestmark = pytest.mark.cluster
TOY = ROOT / "tests" / "sweeps" / "toy_sweep.py"
NAME, SYSTEM = "toy_small_seed42", Path("/usr/bin/python3")
TINY = dict(
    epochs=2, grace=2, samples_per_epoch=256, train_samples=256, val_pairs=16, test_pairs=16, repeats=5, warmup=1,
    scene_steps=5, scene_repeats=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """Alpha, the head, and beta, on which the project's source is nowhere to be found."""
    why = missing()
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("h")
    with joined_hosts(folder) as (alpha, beta):
        for host in (alpha, beta):
            host.mount(folder / "shared", folder / "storage")
        (folder / "empty").mkdir()
        hide(beta)
        alpha.start_ray()
        beta.env["PYTHONPATH"] = ""
        beta.start_ray(alpha, options=["--labels=gpu-memory-gb=16"])
        yield alpha, beta


def hide(host: Host) -> None:
    """The project's packages are empty folders there; the environment, which may lie beside them, stays."""
    for package in PACKAGES:
        host.mount(host.folder.parent / "empty", ROOT / package)


def drive(host: Host, storage: Path, *flags: str, **env: str) -> tuple[int, str, str]:
    command = [sys.executable, str(TOY), "--address", "auto", "--storage", str(storage), *flags]
    done = subprocess.run(host.inside(*command), capture_output=True, text=True, env={**host.env, **env}, timeout=300)
    return done.returncode, done.stdout, done.stderr


def refused(host: Host, storage: Path, *flags: str, **env: str) -> str:
    """The one line; nothing may be left in the storage that was not there."""
    before = sorted(storage.rglob("*"))
    code, out, err = drive(host, storage, *flags, **env)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, out + err
    assert sorted(storage.rglob("*")) == before
    return err


def end(process: subprocess.Popen[bytes]) -> None:
    """What was started inside: its outer process passes no signal on, and a sweep that goes on holds all cores."""
    for one in psutil.Process(process.pid).children(recursive=True):
        one.terminate()
    process.wait()


def outside(hosts: tuple[Host, Host]) -> Path:
    """The storage of both hosts as it is seen from outside of them."""
    return hosts[0].folder.parent / "shared"


def test_k_grid_trains_on_both_hosts(hosts: tuple[Host, Host]) -> None:
    """A trial takes all cores of a host, so that three trials need both. The code travels to beta, which lacks it, and
    so do the shipped teacher and what it answers; what was trained there is measured.
    """
    alpha, storage = hosts[0], hosts[0].folder.parent / "storage"
    command = [sys.executable, str(ROOT / "sweeps" / "k_grid.py"), "--address", "auto", "--storage", str(storage / "k")]
    command += ["--profile", "demo", "--cpus-per-trial", "2", *(f"--set={key}={value}" for key, value in TINY.items())]
    driver, trained_on = alpha.start_process(command, alpha.folder / "k.log"), set[str]()
    end = time.monotonic() + 600
    while driver.poll() is None and time.monotonic() < end:
        trained_on |= {host.name for host in hosts if any(at_work(host))}
        time.sleep(0.2)
    driver.kill()
    assert driver.wait() == 0, (alpha.folder / "k.log").read_text()
    assert trained_on == {"alpha", "beta"}
    folder = outside(hosts) / "k" / "k_grid_demo_seed42"
    assert not list(folder.glob(".hosts-*"))
    trials = SweepState.replay(folder / "journal.jsonl").trials.values()
    found = {trial.task_id: (trial.epoch, trial.record or {}) for trial in trials if trial.role == "trial"}
    assert {task: epoch for task, (epoch, _) in found.items()} == dict.fromkeys(("K-1", "K-2", "K-3"), TINY["epochs"])
    assert all(known["verdict"] in ("pass", "fail") and known["t_pair_p50_ms"] > 0 for _, known in found.values())


def test_the_second_driver_is_told_who_is_the_first(hosts: tuple[Host, Host]) -> None:
    alpha, beta = hosts
    storage = alpha.folder.parent / "storage" / "held"
    command = [sys.executable, str(TOY), "--address", "auto", "--storage", str(storage)]
    first = alpha.start_process(command, alpha.folder / "first.log", TOY_SLEEP="30")
    try:
        lock = outside(hosts) / "held" / NAME / "journal.lock"
        while not (lock.is_file() and lock.read_text()):
            assert first.poll() is None
        # From the other host, which shares nothing with the first but the storage.
        for package in PACKAGES:
            beta.call("umount", str(ROOT / package))
        said = drive(beta, storage, "--address", "10.213.0.1:6379")[2]
        hide(beta)
        assert re.search(r"in use by process \d+ on alpha", said) and said.count("\n") == 1, said
    finally:
        end(first)


def test_more_than_any_host_has_is_refused(hosts: tuple[Host, Host]) -> None:
    storage = hosts[0].folder.parent / "storage"
    assert "--cpus-per-trial 3: no node has so many; the most is 2" in refused(
        hosts[0], storage / "a", "--cpus-per-trial", "3"
    )
    assert "--gpus-per-trial 1: none of 2 nodes has one" in refused(hosts[0], storage / "b", "--gpus-per-trial", "1")
    assert "none of 2 nodes has one" in refused(hosts[0], storage / "c", "--profile", "full")


def test_private_storage_is_refused(hosts: tuple[Host, Host]) -> None:
    """A folder that both have, but each its own."""
    storage = hosts[0].folder.parent / "storage"
    hosts[1].call("umount", str(storage))
    try:
        said = refused(hosts[0], storage / "private")
    finally:
        hosts[1].mount(outside(hosts), storage)
    assert f"host beta cannot use --storage {storage / 'private'}" in said and "mount one folder" in said


def test_storage_that_one_host_may_not_write_is_refused(hosts: tuple[Host, Host]) -> None:
    storage = hosts[0].folder.parent / "storage"
    hosts[1].call("mount", "-o", "remount,bind,ro", str(storage))
    try:
        said = refused(hosts[0], storage / "readonly")
    finally:
        hosts[1].call("mount", "-o", "remount,bind,rw", str(storage))
    assert "host beta cannot use --storage" in said and "Read-only file system" in said


def test_another_version_of_a_requirement_is_named(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    found = importlib.metadata.distribution("stim")
    metadata = next(Path(str(file.locate())) for file in found.files or [] if file.name == "METADATA")
    other = tmp_path / "METADATA"
    other.write_text(re.sub(r"(?m)^Version: .*$", "Version: 1.2.3", metadata.read_text()))
    hosts[1].mount(other, metadata)
    try:
        said = refused(hosts[0], hosts[0].folder.parent / "storage" / "versions")
    finally:
        hosts[1].call("umount", str(metadata))
    assert f"host beta: stim is 1.2.3 there, {found.version} here" in said and "constraints.txt" in said


def test_a_driver_of_another_ray_is_named(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    import ray

    other = tmp_path / "_version.py"
    other.write_text('version = "2.59.0"\ncommit = "none"\n')
    swap = f'mount --bind {other} {Path(ray.__file__).with_name("_version.py")} && exec "$@"'
    storage = hosts[0].folder.parent / "storage" / "ray"
    command = [sys.executable, str(TOY), "--address", "auto", "--storage", str(storage)]
    inside = hosts[0].inside("unshare", "--mount", "sh", "-c", swap, "sh", *command)
    done = subprocess.run(inside, capture_output=True, text=True, env=hosts[0].env, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "2.59.0" in done.stderr and ray.__version__ in done.stderr
    assert not (outside(hosts) / "ray" / NAME).exists()


def test_another_project_on_a_host_is_named(hosts: tuple[Host, Host]) -> None:
    """Ray keeps what it brought to a host. There somebody changes a file of it, in place of an old or damaged copy."""
    alpha, beta = hosts
    storage = alpha.folder.parent / "storage" / "project"
    assert drive(alpha, storage / "first")[0] == 0
    (kept,) = [path for path in beta.folder.rglob("py_modules_files/*/sweeps/k_grid.py")]
    text = kept.read_text()
    kept.write_text(f"{text}# another\n")
    try:
        said = refused(alpha, storage)
    finally:
        kept.write_text(text)
    assert re.search(r"host beta: the project is \w{12} there, \w{12} here; install the same there", said)


def test_another_python_is_named(hosts: tuple[Host, Host]) -> None:
    """The system's own, with the same libraries: Ray lets no such host in, and a driver of it is told both."""
    said = subprocess.run([SYSTEM, "--version"], capture_output=True, text=True).stdout if SYSTEM.is_file() else "none"
    there, here = said.split()[-1], platform.python_version()
    if there == here or there.rpartition(".")[0] != here.rpartition(".")[0]:
        pytest.skip(f"the libraries here need another Python {here.rpartition('.')[0]}; {SYSTEM} is {there}")
    alpha, beta = hosts
    libraries = str(importlib.metadata.distribution("ray").locate_file(""))
    join = [str(SYSTEM), "-m", "ray.scripts.scripts", "start", "--block", f"--address={alpha.address}:{PORT}"]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        beta.call("env", f"PYTHONPATH={libraries}", *join)
    assert all(f"Python: {version}" in caught.value.stderr for version in (here, there)), caught.value.stderr
    command = [str(SYSTEM), str(TOY), "--address", "auto", "--storage", str(alpha.folder.parent / "storage" / "python")]
    env = {**alpha.env, "PYTHONPATH": f"{libraries}:{ROOT}"}
    done = subprocess.run(alpha.inside(*command), capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(f"Python: {version}" in done.stderr for version in (here, there)), done.stderr
    assert not (outside(hosts) / "python" / NAME).exists()


@pytest.mark.slow
def test_artifacts_reach_a_bucket_on_another_host(hosts: tuple[Host, Host]) -> None:
    """The store, which speaks S3, is on beta, the MLflow server on alpha, the storage of the sweep a folder of both."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    alpha, beta = hosts
    store, place = f"http://{beta.address}:5555", alpha.folder / "server"
    moto = beta.start_process(
        [sys.executable, "-m", "moto.server", "-H", beta.address, "-p", "5555"], beta.folder / "moto.log"
    )
    key = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    bucket = f"import boto3, hashlib; s3 = boto3.client('s3', endpoint_url='{store}'); "
    wait("the bucket", lambda: not python(alpha, f"{bucket}s3.create_bucket(Bucket='sweeps')", **key).returncode, moto)
    place.mkdir()
    wanted = {"MLFLOW_ARTIFACTS_DESTINATION": "s3://sweeps/team", "MLFLOW_S3_ENDPOINT_URL": store, **key}
    (place / "artifacts.env").write_text("".join(f"{name}={value}\n" for name, value in wanted.items()))
    (place / "artifacts.env").chmod(0o600)
    login = environment("0123456789abcdef") | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    start = ["sh", str(ROOT / "deploy" / "mlflow_server.sh"), str(place)]
    served = alpha.start_process(start, place / "start.log", **login)
    assert served.wait(200) == 0, (place / "start.log").read_text()
    storage = alpha.folder.parent / "storage" / "bucket"
    code, out, err = drive(
        alpha, storage, "--tracking-uri", "http://127.0.0.1:5000", **login, TOY_TRIALS="steady", TOY_SLEEP="1"
    )
    assert code == 0 and "Not all is in MLflow" not in out, out + err
    folder = outside(hosts) / "bucket" / NAME
    assert {path.read_text() for path in folder.glob("trials/*/host")} == {"alpha", "beta"}
    read = "[print(e['Key'], hashlib.sha256(s3.get_object(Bucket='sweeps', Key=e['Key'])['Body'].read()).hexdigest()) "
    listed = python(beta, f"{bucket}{read}for e in s3.list_objects_v2(Bucket='sweeps')['Contents']]", **key).stdout
    held = sorted((Path(line.split()[0]).name, line.split()[1]) for line in listed.splitlines())
    logged = {folder / path for path in SweepState.replay(folder / "journal.jsonl").files}
    assert held == sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in logged)
    assert len(held) > 5 and not (place / "artifacts").exists()
    end(moto)


def python(host: Host, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = host.inside(sys.executable, "-c", code)
    return subprocess.run(command, capture_output=True, text=True, env={**host.env, **env}, timeout=60)
