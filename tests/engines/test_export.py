import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from engines.errors import InputError
from engines.export import OPSET, export_onnx, external_files, max_error


class Net(nn.Module):
    """Attention, a tied weight, expm1, and parts that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.proj.weight
        self.norm = nn.LayerNorm(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.adapter = nn.Linear(8, 77)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = self.layer(self.again(self.norm(self.proj(x))))
        outputs = (z, torch.expm1(y * 1e-3))
        return (*outputs, self.adapter(z)) if self.training else outputs


def example() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(1, 5, 8, generator=g), torch.randn(1, 5, 8, generator=g)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net().train()
    # An exporter that compares weights may merge equal ones: make all of them differ.
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def test_file_agrees_with_torch_and_names_layers(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "new" / "net.onnx"
    error = export_onnx(net, example(), path, ["x", "y"], ["z", "e"])
    assert 0 < error < 1e-5
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [o.version for o in model.opset_import if o.domain == ""] == [OPSET]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "y"]
    assert [o.name for o in session.get_outputs()] == ["z", "e"]
    x, y = example()
    z, e = session.run(None, {"x": x.numpy(), "y": y.numpy()})
    np.testing.assert_allclose(z, net.eval()(x, y)[0].detach(), atol=1e-5)
    # expm1 near 0 keeps its relative precision, which exp(x) - 1 in single precision (1e-7 / 1e-3) does not.
    np.testing.assert_allclose(e, np.expm1(y.numpy().astype(np.float64) * 1e-3), rtol=2e-6)
    assert any(node.name.startswith("/layer/self_attn") for node in model.graph.node)
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]


def test_training_only_parts_are_absent(net: Net, tmp_path: Path) -> None:
    export_onnx(net, example(), tmp_path / "net.onnx", ["x", "y"], ["z", "e"])
    graph = onnx.load(str(tmp_path / "net.onnx")).graph
    names = [n.name for n in graph.node] + [t.name for t in graph.initializer]
    assert not [n for n in names if "adapter" in n or "dropout" in n.lower()]
    assert not any(77 in t.dims for t in graph.initializer)
    assert not [n for n in graph.node if n.op_type in ("Dropout", "RandomUniform", "RandomUniformLike")]


def test_modes_come_back_module_by_module(net: Net, tmp_path: Path) -> None:
    net.norm.eval()  # frozen by hand inside a training model
    before = {name: m.training for name, m in net.named_modules()}
    export_onnx(net, example(), tmp_path / "net.onnx", ["x", "y"], ["z", "e"])
    assert {name: m.training for name, m in net.named_modules()} == before
    assert not net.norm.training and net.proj.training


def test_export_is_silent(net: Net, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(net, example(), tmp_path / "net.onnx", ["x", "y"], ["z", "e"])
    assert not caught
    assert capfd.readouterr() == ("", "")


class Unsupported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


def test_unsupported_operator_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="bessel_j0") as caught:
        export_onnx(Unsupported(), (torch.ones(2),), path, ["x"], ["y"])
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")


class Counting(nn.Module):
    """Another answer at each call, as a stand-in for any model that its graph does not describe."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + float(self.calls)


def test_wrong_graph_is_refused_with_both_figures(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(InputError, match=r"net\.onnx: relative error 0\.\d+ .* tolerance=0\.01") as caught:
        export_onnx(Counting(), (torch.zeros(3),), path, ["x"], ["y"], tolerance=0.01)
    assert "\n" not in str(caught.value) and "larger tolerance" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_error_is_the_largest_relative_l2(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * 2, x * self.scale

    x = (torch.tensor([3.0, 4.0]),)
    export_onnx(Two(1.03), x, tmp_path / "a.onnx", ["x"], ["p", "q"])
    assert max_error(Two(1.0), tmp_path / "a.onnx", x, tolerance=0.1) == pytest.approx(0.03, rel=1e-4)
    with pytest.raises(InputError, match="relative error 0.03 "):
        max_error(Two(1.0), tmp_path / "a.onnx", x, tolerance=0.02)
    with pytest.raises(InputError, match="relative error inf"):
        max_error(Two(float("nan")), tmp_path / "a.onnx", x, tolerance=1.0)


def test_names_and_outputs_are_checked(net: Net, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output_names=.*expected 2"):
        export_onnx(net, example(), tmp_path / "net.onnx", ["x", "y"], ["z"])
    with pytest.raises(InputError, match="input_names=.*different"):
        export_onnx(net, example(), tmp_path / "net.onnx", ["x", "x"], ["z", "e"])

    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    with pytest.raises(InputError, match="returned dict"):
        export_onnx(Views(), (torch.ones(1),), tmp_path / "net.onnx", ["x"], ["y"])
    assert not list(tmp_path.iterdir())


def test_unwritable_place_is_one_line(net: Net, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        export_onnx(net, example(), tmp_path / "file" / "net.onnx", ["x", "y"], ["z", "e"])


@pytest.mark.slow
def test_weights_past_two_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    net = nn.Sequential(nn.Linear(4, 20_000), nn.Linear(20_000, 27_000), nn.Linear(27_000, 2))
    (tmp_path / "big.onnx.0123.data").write_text("of an earlier export")
    export_onnx(net, (torch.randn(1, 4),), path, ["x"], ["y"])
    data = external_files(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, *data]) and len(data) == 1
    assert data[0].stat().st_size > 2**31 and path.stat().st_size < 1e6


def test_dust3r_agrees(dust3r_pair: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "pair.onnx"
    images = tuple(torch.rand(1, 3, 64, 64) * 2 - 1 for _ in range(2))
    names = ["pts1", "conf1", "pts2", "conf2"]
    assert export_onnx(dust3r_pair, images, path, ["img1", "img2"], names) < 1e-5
    other = tuple(torch.rand(1, 3, 64, 64) * 2 - 1 for _ in range(2))
    assert max_error(dust3r_pair, path, other) < 1e-5
    assert any("enc_blocks.0/attn" in node.name for node in onnx.load(str(path)).graph.node)
