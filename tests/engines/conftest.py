"""A small DUSt3R of two images, handed out as a fixture."""

import pytest
import torch
from torch import nn


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
