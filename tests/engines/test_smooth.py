from pathlib import Path

import numpy as np
import torch
from torch import nn

from engines.calibrate import channel_maxima
from engines.export import export_onnx
from engines.graph import load, save
from engines.policy import QuantPolicy, choices
from engines.quantize import post_training
from engines.runtimes import OnnxRuntime
from engines.smooth import norms, smooth

Feeds = list[tuple[np.ndarray]]


class Outliers(nn.Module):
    """A LayerNorm with a few very loud channels, used twice with its weights, and one that something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.left, self.right, self.last = nn.Linear(32, 16), nn.Linear(32, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.norm.weight[::11] *= 40
            self.norm.weight[5] = self.norm.bias[5] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = self.norm(torch.tanh(self.right(y))) + 1
        out: torch.Tensor = self.left(y).sum() + self.last(z)
        return out


def make(folder: Path) -> tuple[Path, Feeds]:
    torch.manual_seed(0)
    path = folder / "net.onnx"
    export_onnx(Outliers(), (torch.zeros(1, 4, 32),), path, ["x"], ["y"])
    rng = np.random.default_rng(0)
    return path, [(rng.normal(size=(1, 4, 32)).astype(np.float32),) for _ in range(16)]


def test_function_stays_and_loud_channels_are_balanced(tmp_path: Path) -> None:
    path, feeds = make(tmp_path)
    model = load(path)
    chosen = choices(model, QuantPolicy())
    (name,) = norms(model, chosen)  # the second use feeds an Add
    before = channel_maxima(path, feeds, [name], 16)
    assert smooth(model, chosen, before, 0.5) == 1
    save(model, tmp_path / "smooth.onnx")
    for x in feeds:
        a, b = (OnnxRuntime(p, "cpu", 1).run(x)[0] for p in (path, tmp_path / "smooth.onnx"))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    after = channel_maxima(tmp_path / "smooth.onnx", feeds, [name], 16)[name]
    live = before[name] > 0
    assert after[live].max() / np.median(after[live]) < 0.3 * before[name].max() / np.median(before[name][live])


def test_smoothing_lowers_the_error_of_int8(tmp_path: Path) -> None:
    path, feeds = make(tmp_path)
    errors = []
    for strength in (0.0, 0.5):
        policy = QuantPolicy(smooth=strength, calibration=16)
        report = post_training(path, tmp_path / "q.onnx", policy, feeds)
        assert report.smoothed == (1 if strength else 0)
        pairs = [[OnnxRuntime(p, "cpu", 1).run(x)[0] for p in (path, tmp_path / "q.onnx")] for x in feeds]
        errors.append(np.mean([np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in pairs]))
    assert errors[1] < 0.8 * errors[0]


def test_kept_layers_are_left_alone(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    assert norms(load(path), choices(load(path), QuantPolicy(keep=("left/*",)))) == []
