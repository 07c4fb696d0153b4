"""Small models, as modules and files, handed out as fixtures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engines.export import export_onnx


class Block(nn.Module):
    """One of each eligible kind: convolution, MatMul, Gemm, attention, LayerNorm, Softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.norm1 = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.norm2 = nn.LayerNorm(16)
        self.fc1 = nn.Linear(16, 64)
        self.fc2 = nn.Linear(64, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).view(1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 16, 16))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        out: torch.Tensor = self.head(x.mean(1))
        return out


@pytest.fixture(scope="session")
def block_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = Block()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    export_onnx(net, (torch.zeros(1, 3, 16, 16),), path, ["image"], ["logits"])
    return path


@pytest.fixture(scope="session")
def feeds() -> list[tuple[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(1, 3, 16, 16)).astype(np.float32),) for _ in range(8)]


@pytest.fixture
def dust3r_pair() -> nn.Module:
    """Two images (B, 3, 64, 64) -> pts1, conf1, pts2, conf2: 6 encoder layers of width 128, 4 decoder layers of 96."""
    model = pytest.importorskip("trainables.dust3r.model")
    torch.manual_seed(0)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.from_reference_config(
                **{"head_type": "linear", "img_size": (64, 64), "patch_size": 8},
                **{"enc_embed_dim": 128, "enc_depth": 6, "enc_num_heads": 4},
                **{"dec_embed_dim": 96, "dec_depth": 4, "dec_num_heads": 4},
            )

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.net.pointmaps(a, b))

    return Pair()
