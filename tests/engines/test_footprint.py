from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engines.errors import InputError
from engines.export import export_onnx
from engines.footprint import flops_G, params_M, peak_ram_GB, peak_vram_GB, size_MB


def test_tied_parameters_count_once() -> None:
    tied = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10))
    assert params_M(tied) == pytest.approx(220e-6)  # buffers are not parameters
    tied[1].weight = tied[0].weight
    assert params_M(tied) == pytest.approx(120e-6)
    tied[1].weight = nn.Parameter(tied[0].weight.data)  # two Parameters, one memory
    assert params_M(tied) == pytest.approx(120e-6)
    tied[1].weight = nn.Parameter(tied[0].weight.data.clone())
    assert params_M(tied) == pytest.approx(220e-6)
    assert params_M(tied.to("meta")) == pytest.approx(220e-6)


class Attention(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)


class Product(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.rule, a, b)


class MatrixVector(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b) @ torch.ones(a.shape[0])


# (module, shapes of its inputs, multiply-adds by hand)
CASES = {
    "linear": (nn.Linear(8, 16), [(5, 8)], 5 * 8 * 16),
    "conv": (nn.Conv2d(3, 8, 4, 4), [(1, 3, 8, 8)], 4 * 8 * 3 * 16),
    "conv_transpose": (nn.ConvTranspose2d(3, 8, 2, 2), [(1, 3, 8, 8)], 64 * 3 * 8 * 4),
    "attention": (Attention(), [(2, 4, 16, 32)], 2 * (2 * 4 * 16 * 16 * 32)),
    "multihead": (
        nn.MultiheadAttention(32, 4, batch_first=True),
        [(2, 7, 32)] * 3,
        14 * 32 * 128 + 2 * 98 * 32,
    ),
    "encoder_layer": (
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
        [(2, 7, 32)],
        14 * 32 * 128 + 2 * 98 * 32 + 2 * 14 * 32 * 64,
    ),
    "lstm": (nn.LSTM(8, 16, batch_first=True), [(2, 5, 8)], 2 * 5 * 4 * 16 * (8 + 16)),
    "gru": (nn.GRU(8, 16, batch_first=True), [(2, 5, 8)], 2 * 5 * 3 * 16 * (8 + 16)),
    "einsum": (Product("bij,bkj->bik"), [(2, 7, 32), (2, 5, 32)], 2 * 7 * 5 * 32),
    "matrix_vector": (MatrixVector(), [(7, 32), (32, 7)], 7 * 32 * 7 + 7 * 7),
}


@pytest.mark.parametrize("case", CASES)
def test_flops_by_hand(case: str) -> None:
    module, shapes, macs = CASES[case]
    module.train()
    assert flops_G(module, tuple(torch.randn(s) for s in shapes)) * 1e9 == pytest.approx(2 * macs)
    assert module.training


def test_flops_on_the_meta_device() -> None:
    with torch.device("meta"):
        net, x = nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True), torch.empty(1, 1024, 1024)
    macs = 1024 * 1024 * (4 * 1024 + 2 * 4096) + 2 * 1024 * 1024 * 1024
    assert flops_G(net, (x,)) == pytest.approx(2e-9 * macs)


def test_settings_come_back() -> None:
    flops_G(Attention(), (torch.randn(1, 1, 2, 4),))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.mkldnn.is_available()
    assert torch._C._get_mkldnn_enabled()


def test_size_counts_external_data(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(nn.Linear(100, 100), (torch.zeros(1, 100),), path, ["x"], ["y"])
    assert size_MB(path) == path.stat().st_size / 1e6 > 0.04
    onnx.save_model(onnx.load(str(path)), str(path), save_as_external_data=True, location="w.data", size_threshold=0)
    data = tmp_path / "w.data"
    assert size_MB(path) == (path.stat().st_size + data.stat().st_size) / 1e6 > 0.04
    data.unlink()
    with pytest.raises(InputError, match=r"w\.data, which is missing"):
        size_MB(path)


def test_size_of_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        size_MB(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"\xff\xff not a model")
    with pytest.raises(InputError, match="not a readable ONNX"):
        size_MB(tmp_path / "a.onnx")
    (tmp_path / "b.pth").write_bytes(b"x" * 3000)
    assert size_MB(tmp_path / "b.pth") == 0.003


def test_peak_ram_sees_what_is_freed_before_the_end() -> None:
    def spike(megabytes: int) -> None:
        np.ones(megabytes * 125_000)
        np.ones(125_000)

    peaks = [peak_ram_GB(lambda n=n: spike(n)) for n in (0, 100, 300, 100)]
    if None in peaks:
        pytest.skip("this kernel does not reset the high-water mark")
    # 10 MB covers the kernel's coarse counters and other threads of the test process.
    assert peaks == pytest.approx([0.001, 0.1, 0.3, 0.1], abs=0.010)


def test_peak_vram_needs_a_cuda_device() -> None:
    with pytest.raises(InputError, match="device='cpu'"):
        peak_vram_GB(lambda: None, "cpu")
    with pytest.raises(InputError, match="device='cuda:99' is not available"):
        peak_vram_GB(lambda: None, "cuda:99")


@pytest.mark.gpu
def test_peak_vram_sees_what_is_freed_before_the_end() -> None:
    torch.zeros(1, device="cuda")
    peak = peak_vram_GB(lambda: torch.zeros(125_000_000, device="cuda").sum().item())
    assert peak == pytest.approx(0.5, abs=0.03)


def test_published_size_of_dust3r() -> None:
    model = pytest.importorskip("trainables.dust3r.model")
    with torch.device("meta"):
        net = model.from_reference_config()
    assert params_M(net) == pytest.approx(571.17, abs=0.01)


def test_flops_of_dust3r_by_hand(dust3r_pair: nn.Module) -> None:
    n, enc, dec = 64, 128, 96  # tokens per view, widths
    patches = n * 3 * 8 * 8 * enc
    encoder = 6 * (n * enc * enc * (3 + 1 + 8) + 2 * n * n * enc)
    # A decoder block has two attentions (self and cross) of four projections each, and the feed-forward.
    decoder = 4 * (n * dec * dec * (4 + 4 + 8) + 2 * 2 * n * n * dec)
    head = n * dec * 4 * 8 * 8
    macs = 2 * (patches + encoder + n * enc * dec + decoder + head)
    image = torch.zeros(1, 3, 64, 64)
    assert flops_G(dust3r_pair, (image, image)) * 1e9 == pytest.approx(2 * macs)
