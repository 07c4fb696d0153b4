from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engines.export import export_onnx
from engines.fuse import fuse_rotary
from engines.graph import load, save
from engines.runtimes import OnnxRuntime


class Rotary(nn.Module):
    """Rotation of (B, N, heads, axes, 2 halves, quarter), and with `wrong` something that only looks like one."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        angle = torch.rand(6, 1, 2, 1, 4)
        cos, sin = angle.cos(), angle.sin()
        second = cos * 0.5 if wrong == "cos" else cos
        self.register_buffer("cos", torch.cat((cos, second), -2))
        self.register_buffer("sin", torch.cat((sin if wrong == "sin" else -sin, sin), -2))
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., :1, :], x[..., 1:, :]
        order = (first, second) if self.wrong == "order" else (second, first)
        turned = x * self.cos + torch.cat(order, -2) * self.sin
        return turned.sum(-1)


@pytest.mark.parametrize("batch", [1, 3])
def test_rotation_becomes_one_operator(tmp_path: Path, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, 6, 5, 2, 2, 4)
    export_onnx(Rotary(), (x,), tmp_path / "a.onnx", ["x"], ["y"])
    model = load(tmp_path / "a.onnx")
    assert fuse_rotary(model) == 1
    save(model, tmp_path / "b.onnx")
    assert [n.op_type for n in model.graph.node if n.op_type in ("Concat", "Mul", "Add", "RotaryEmbedding")] == [
        "RotaryEmbedding"
    ]
    want, got = (OnnxRuntime(tmp_path / f, "cpu", 1).run((x.numpy(),))[0] for f in ("a.onnx", "b.onnx"))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("wrong", ["cos", "sin", "order"])
def test_lookalikes_are_left_alone(tmp_path: Path, wrong: str) -> None:
    export_onnx(Rotary(wrong), (torch.randn(1, 6, 5, 2, 2, 4),), tmp_path / "a.onnx", ["x"], ["y"])
    model = load(tmp_path / "a.onnx")
    before = model.SerializeToString()
    assert fuse_rotary(model) == 0 and model.SerializeToString() == before


def test_dust3r_positions_are_recognised(tmp_path: Path) -> None:
    model = pytest.importorskip("trainables.dust3r.model")
    sizes = {"enc_embed_dim": 32, "enc_depth": 2, "enc_num_heads": 2, "dec_embed_dim": 32, "dec_depth": 1}
    net = model.from_reference_config(head_type="linear", img_size=(32, 32), dec_num_heads=2, **sizes)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.net.pointmaps(a, b))

    images = tuple(torch.rand(1, 3, 32, 32) for _ in range(2))
    export_onnx(Pair(), images, tmp_path / "a.onnx", ["a", "b"], ["p1", "c1", "p2", "c2"])
    graph = load(tmp_path / "a.onnx")
    # Queries and keys of a self-attention turn together, those of a cross-attention apart.
    assert fuse_rotary(graph) == 2 + 2 * (1 + 2)
    save(graph, tmp_path / "b.onnx")
    arrays = tuple(x.numpy() for x in images)
    want, got = (OnnxRuntime(tmp_path / f, "cpu", 1).run(arrays) for f in ("a.onnx", "b.onnx"))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
