import re

import pytest
import torch

from engines.footprint import flops_G, params_M
from trainables.dust3r.__main__ import main, settings
from trainables.dust3r.config import Config
from trainables.dust3r.describe import cost
from trainables.dust3r.domain import SMALL_TEACHER, Deployed
from trainables.dust3r.model import from_reference_config


def test_parts_add_up_to_the_built_model():
    found = cost(SMALL_TEACHER, (64, 64), 32, False)
    model = from_reference_config(**SMALL_TEACHER).eval()
    assert sum(found.params_M.values()) == pytest.approx(params_M(model), rel=1e-4)  # but the unused mask token
    images = (torch.zeros(1, 3, 64, 64),) * 2
    assert sum(found.flops_G.values()) == pytest.approx(flops_G(Deployed(model), images), rel=1e-9)
    assert 0 < found.recomputed_GB < 0.5 * found.activations_GB
    assert cost(SMALL_TEACHER, (64, 64), 64, False).activations_GB == pytest.approx(2 * found.activations_GB, rel=0.05)
    assert cost(SMALL_TEACHER, (64, 64), 32, True).activations_GB < found.activations_GB


def test_kept_bytes_are_what_autograd_keeps():
    """The same count on real tensors, without the bookkeeping of blocks."""
    model, sizes, held = from_reference_config(**SMALL_TEACHER), {}, []
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    images = (torch.zeros(16, 3, 64, 64), torch.zeros(16, 3, 64, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model.features(*images, symmetric=True)
    assert kept and cost(SMALL_TEACHER, (64, 64), 32, False).activations_GB == pytest.approx(
        sum(sizes.values()) / 1e9, rel=0.02
    )


@pytest.mark.slow
def test_the_released_architecture_has_its_published_size():
    """571 M parameters and 2,566 GFLOP per pair at 512 x 512; ours resizes after a 1x1 convolution and saves some."""
    found = cost(Config().to_data(), (512, 512), 1, True)
    assert sum(found.params_M.values()) == pytest.approx(571.17, abs=0.01)
    assert found.flops_G["encoder"] == pytest.approx(1446, rel=0.01)
    assert sum(found.flops_G.values()) == pytest.approx(2566, rel=0.01)
    assert found.cached_MB == pytest.approx(8.9, abs=0.1)


def test_the_command_prints_a_table_and_names_what_is_wrong(capsys):
    main(["describe", "--profile", "demo", "--set", "shared_head=true"])
    out = capsys.readouterr().out
    assert re.search(r"heads: parameters, M +0.07 +0.03 +0.50", out)
    assert "train_samples=2048" in out and settings("demo", [])["train_samples"] == 2048
    for change, said in (("heads", "expected KEY=VALUE"), ("nosuch=1", "expected KEY=VALUE"), ("heads=2", "heads=2: ")):
        assert main(["describe", "--set", change]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.strip().splitlines()) == 1
