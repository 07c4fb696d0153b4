import copy

import numpy as np
import pytest
import torch
from torch import nn

from engines.export import export_onnx
from engines.runtimes import OnnxRuntime
from trainables import fast_linear

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN linear operator"
)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """The operator itself is the same on every x86 CPU."""
    monkeypatch.setattr(fast_linear, "applies", lambda: True)


def close(a, b):
    """Relative to the largest: sums of products come out in another order."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def run(layer, x, target):
    x = x.clone().requires_grad_(True)
    out = layer(x)
    (out * target).sum().backward()
    return out.detach(), x.grad, [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 5), (1, 1)])
def test_value_and_gradients_agree(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(48, 33, bias=bias)
    fast = copy.deepcopy(plain)
    fast_linear.install(nn.ModuleList([fast]))
    x, target = torch.randn(*shape, 48), torch.randn(*shape, 33)
    expected, found = run(plain, x, target), run(fast, x, target)
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert len(found[2]) == 1 + bias
    for ours, theirs in zip(found[2], expected[2], strict=True):
        close(ours, theirs)


def test_views_and_transposed_inputs():
    torch.manual_seed(0)
    plain = nn.Linear(16, 8)
    fast = copy.deepcopy(plain)
    fast_linear.install(fast)
    x = torch.randn(16, 5, 3).permute(2, 1, 0)
    expanded = torch.ones(1).expand(3, 5, 8)  # the gradient of a sum
    for target in (torch.randn(8, 5, 3).permute(2, 1, 0), expanded):
        expected, found = run(plain, x, target), run(fast, x, target)
        close(found[0], expected[0])
        close(found[1], expected[1])
        plain.zero_grad(), fast.zero_grad()


def test_frozen_weight_and_input_without_gradient():
    torch.manual_seed(0)
    plain = nn.Linear(16, 8)
    plain.weight.requires_grad_(False)
    fast = copy.deepcopy(plain)
    fast_linear.install(fast)
    x, target = torch.randn(4, 6, 16), torch.randn(4, 6, 8)
    expected, found = run(plain, x, target), run(fast, x, target)
    close(found[1], expected[1])
    assert found[2][0] is None
    close(found[2][1], expected[2][1])
    fast.weight.requires_grad_(True)
    fast.zero_grad()
    (fast(x) * target).sum().backward()
    close(fast.weight.grad, torch.einsum("abo,abi->oi", target, x))


def test_gradients_against_differences():
    torch.manual_seed(0)
    fast = nn.Linear(6, 4)
    fast_linear.install(fast)
    x = torch.randn(5, 6, requires_grad=True)
    assert torch.autograd.gradcheck(fast, (x,), eps=1e-2, atol=2e-2, rtol=1e-2)


def test_it_is_really_installed_and_only_on_plain_linear_layers():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Sequential(nn.Linear(4, 4)))
    names = list(model.state_dict())
    fast_linear.install(model)
    assert list(model.state_dict()) == names
    graph = [type(layer(torch.ones(2, 4)).grad_fn).__name__ for layer in (model[0], model[1], model[2][0])]
    assert "_Linear" in graph[0] and "_Linear" in graph[2] and "_Linear" not in graph[1]


def test_other_precisions_take_the_plain_operator_and_inference_records_nothing():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = layer(x)
    double = copy.deepcopy(layer).double()
    fast_linear.install(layer)
    fast_linear.install(double)
    with torch.no_grad():
        close(layer(x), expected)
        assert layer(x).grad_fn is None
    out = double(x.double())
    assert out.dtype == torch.float64 and "_Linear" not in type(out.grad_fn).__name__


def test_exporting_is_unaffected(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    fast = copy.deepcopy(plain)
    fast_linear.install(fast)
    x = torch.randn(2, 8)
    for name, model in (("plain", plain), ("fast", fast)):
        export_onnx(model, (x,), tmp_path / f"{name}.onnx", ["x"], ["y"])
    outputs = []
    for name in ("plain", "fast"):
        runtime = OnnxRuntime(tmp_path / f"{name}.onnx", "cpu", 1)
        outputs.append(runtime.run((x.numpy(),))[0])
        runtime.close()
    assert np.array_equal(*outputs)
    close(torch.from_numpy(outputs[0]), plain(x).detach())


def test_nothing_changes_where_it_does_not_apply(monkeypatch):
    monkeypatch.setattr(fast_linear, "applies", lambda: False)
    layer = nn.Linear(4, 4)
    fast_linear.install(layer)
    assert "forward" not in vars(layer)
