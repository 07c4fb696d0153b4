"""A sweep's artifacts in a bucket, byte by byte: only MLflow's server has its key, and only that key opens it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from sweeps.journal import SweepState

boto3 = pytest.importorskip("boto3", reason="moto[server] is not installed")
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "sweeps" / "toy_sweep.py"
BUCKET, USER = "sweeps-of-a-team", "mlflow"
RIGHTS = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
STRANGER = {"AWS_ACCESS_KEY_ID": "AKIA0123456789STRANGER", "AWS_SECRET_ACCESS_KEY": "nobody's"}
Serving = Callable[[Path], AbstractContextManager[tuple[str, dict[str, str]]]]


def client(service: str, address: str, key: dict[str, str]) -> Any:
    return boto3.client(
        service,
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id=key["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=key["AWS_SECRET_ACCESS_KEY"],
    )


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A store that speaks S3: its address and the one key that opens the bucket; signatures are checked."""
    log = tmp_path / "moto.log"
    # After what is set up here every request must be signed by a user whom the store knows.
    env = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "4"}
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    try:
        end = time.monotonic() + 60
        while "Running on http" not in log.read_text():
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.1)
        address = log.read_text().partition("Running on ")[2].split()[0]
        users = client("iam", address, STRANGER)
        users.create_user(UserName=USER)
        users.put_user_policy(UserName=USER, PolicyName="bucket", PolicyDocument=RIGHTS)
        made = users.create_access_key(UserName=USER)["AccessKey"]
        client("s3", address, STRANGER).create_bucket(Bucket=BUCKET)
        yield address, {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}
    finally:
        process.terminate()
        process.wait(20)


def test_artifacts_of_a_sweep_reach_the_bucket_through_the_server_alone(
    bucket: tuple[str, dict[str, str]], serving: Serving, tmp_path: Path
) -> None:
    store, key = bucket
    with pytest.raises(Exception, match="InvalidAccessKeyId|Forbidden|AccessDenied"):
        client("s3", store, STRANGER).list_objects_v2(Bucket=BUCKET)
    place, storage = tmp_path / "server" / "place", tmp_path / "runs"
    place.mkdir(parents=True)
    settings = {"MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/team", "MLFLOW_S3_ENDPOINT_URL": store, **key}
    (place / "artifacts.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    (place / "artifacts.env").chmod(0o600)
    with serving(place) as (server, env):
        driver = {name: value for name, value in env.items() if not name.startswith(("AWS_", "MLFLOW_S3"))}
        command = [sys.executable, str(TOY), "--storage", str(storage), "--tracking-uri", server]
        # A home of its own: no key of the machine's owner helps, either.
        done = subprocess.run(
            command, capture_output=True, text=True, env={**driver, "HOME": str(tmp_path)}, timeout=400
        )
        assert done.returncode == 0 and "Not all is in MLflow" not in done.stdout, done.stdout + done.stderr
    folder = storage / "toy_small_seed42"
    logged = {folder / path for path in SweepState.replay(folder / "journal.jsonl").files}
    s3 = client("s3", store, key)
    names = [entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert all(name.startswith("team/") for name in names) and not (place / "artifacts").exists()
    held = sorted((Path(name).name, s3.get_object(Bucket=BUCKET, Key=name)["Body"].read()) for name in names)
    assert held == sorted((path.name, path.read_bytes()) for path in logged) and len(held) > 5
    written = [path for path in storage.rglob("*") if path.is_file()] + [place / "server.log"]
    assert not [path for path in written if key["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes()]
