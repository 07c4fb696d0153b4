"""A teacher's file that cannot be used ends in one line, before any trial."""

from pathlib import Path

import pytest
import torch

from engines.errors import InputError
from sweeps.settings import DISTILL, WORKLOAD, resolve
from trainables import evaluate


@pytest.mark.parametrize("kind", ["missing", "truncated", "other"])
def test_a_teacher_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}.pth"
    if kind != "missing":
        torch.save({"model": {"weight": torch.zeros(1000)}, "config": {"width": 7}}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    values = dict(resolve([WORKLOAD, DISTILL], "demo", {"teacher": str(path)}).values)
    job = {"domain": "dust3r", "settings": values, "seed": 1, "trains": True}
    with pytest.raises(InputError) as raised:
        evaluate.prepare({**job, "work_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")})
    assert path.name in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()
