"""deploy/spot_notice.sh asks a metadata service as AWS runs it, and tells Ray once that answers with a notice."""

import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "AQAEAtoken"


class Metadata(BaseHTTPRequestHandler):
    """IMDSv2: a PUT gives a token, without which nothing is told; 404 until there is a notice."""

    asked = 0

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, TOKEN)

    def do_GET(self) -> None:
        Metadata.asked += 1
        known = self.headers["X-aws-ec2-metadata-token"] == TOKEN
        notice = known and self.path == "/latest/meta-data/spot/instance-action" and Metadata.asked > 1
        self.answer(200 if notice else 404 if known else 401, '{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        """Silent."""


def test_ray_is_told_once_there_is_a_notice_and_not_before(tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl here")
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    ray.chmod(0o755)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        where = {"METADATA": f"http://127.0.0.1:{server.server_port}", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        script = ["sh", str(ROOT / "deploy" / "spot_notice.sh")]
        subprocess.run(script, env={**os.environ, **where}, check=True, timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert Metadata.asked == 2
    assert "drain-node --reason DRAIN_NODE_REASON_PREEMPTION" in (tmp_path / "told").read_text()


def test_the_words_for_ray_are_words_that_it_knows() -> None:
    """`ray drain-node` is no public interface of Ray; its options are asked for here."""
    program = str(Path(sys.executable).with_name("ray"))
    help_text = subprocess.run([program, "drain-node", "--help"], capture_output=True, text=True, check=True).stdout
    line = (ROOT / "deploy" / "spot_notice.sh").read_text().splitlines()[-1]
    words = [word for word in line.split() if word.startswith("--") or word.isupper() or word.startswith("DRAIN_")]
    assert len(words) == 4 and all(word in help_text for word in words)
