"""The runtimes that a latency is set beside answer as torch does, or say why they are not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engines import openvino_peer, peers
from engines.export import export_onnx


@pytest.fixture
def model(tmp_path: Path) -> tuple[nn.Module, Path, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    example = (torch.randn(1, 8),)
    export_onnx(module, example, tmp_path / "m.onnx", ["x"], ["y"])
    return module, tmp_path / "m.onnx", example


def test_every_peer_agrees_with_torch(model: tuple[nn.Module, Path, tuple[torch.Tensor, ...]]) -> None:
    module, path, example = model
    found, left_out = peers.runtimes(module, path, example, "cpu", 1)
    with torch.no_grad():
        expected = module(*example).numpy()
    assert ("openvino" in found) == openvino_peer.installed()
    assert ("compile" in found) != any("torch.compile left out" in line for line in left_out)
    assert found, "neither is here"
    for runtime in found.values():
        assert np.allclose(runtime.run(tuple(x.numpy() for x in example))[0], expected, atol=1e-5)
        runtime.close()


def test_a_backend_that_cannot_compile_is_left_out_with_its_reason(
    model: tuple[nn.Module, Path, tuple[torch.Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path, example = model

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda _: Broken())
    found, left_out = peers.runtimes(module, path, example, "cpu", 1)
    assert "compile" not in found and left_out == ["torch.compile left out (no compiler)"]
    for runtime in found.values():
        runtime.close()
