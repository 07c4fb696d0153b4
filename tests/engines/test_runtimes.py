import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engines.errors import InputError
from engines.export import export_onnx
from engines.runtimes import OnnxRuntime, Runtime, TorchRuntime, check_device


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.dropout = nn.Dropout(0.5)
        self.threads_seen = 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.threads_seen = torch.get_num_threads()
        y = self.dropout(self.linear(x))
        return y, y.argmax(-1)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def onnx_file(net: Net, tmp_path: Path) -> Path:
    export_onnx(net, (torch.zeros(3, 6),), tmp_path / "net.onnx", ["x"], ["y", "best"])
    return tmp_path / "net.onnx"


def inputs(seed: int = 0) -> tuple[np.ndarray]:
    return (np.random.default_rng(seed).normal(size=(3, 6)).astype(np.float32),)


def test_both_runtimes_compute_the_same(net: Net, onnx_file: Path) -> None:
    runtimes: list[Runtime] = [TorchRuntime(net, "cpu", 1), OnnxRuntime(onnx_file, "cpu", 1)]
    x = inputs()
    weight, bias = (p.detach().numpy() for p in (net.linear.weight, net.linear.bias))
    for runtime in runtimes:
        y, best = runtime.run(x)
        np.testing.assert_allclose(y, x[0] @ weight.T + bias, rtol=1e-5, atol=1e-6)
        assert best.dtype == np.int64 and runtime.device == "cpu"
        runtime.close()
    assert [r.name for r in runtimes] == ["torch", "onnxruntime"]


def test_bound_arrays_are_read_and_written_in_place(onnx_file: Path) -> None:
    runtime = OnnxRuntime(onnx_file, "cpu", 1)
    x, y, best = inputs()[0], np.zeros((3, 4), np.float32), np.zeros(3, np.int64)
    call = runtime.bind((x,), (y, best))
    for seed in (1, 2):
        x[:] = inputs(seed)[0]
        call()
        for own, expected in zip((y, best), runtime.run((x,)), strict=True):
            np.testing.assert_array_equal(own, expected)
    for sides, said in (
        (((x,), (y,)), "takes 2 outputs, got 1"),
        (((x,), (y[:2], best)), r"output 'y' is float32\[2, 4\], expected .*\[3, 4\]"),
        (((x,), (y, best.astype(np.int32))), "output 'best' is int32"),
        (((np.asfortranarray(x),), (y, best)), "input 'x' is not C-contiguous"),
    ):
        with pytest.raises(InputError, match=said):
            runtime.bind(*sides)


def test_torch_threads_hold_for_the_call_only(net: Net) -> None:
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        TorchRuntime(net, "cpu", threads).run(inputs())
        assert net.threads_seen == threads
        assert torch.get_num_threads() == before


def test_torch_takes_any_array_and_gives_modes_back(net: Net) -> None:
    net.train()
    runtime = TorchRuntime(net, "cpu", 1)
    x = inputs()[0]
    want = runtime.run((x,))[0]
    frozen = x.copy()
    frozen.setflags(write=False)
    for same in (frozen, np.asfortranarray(x), x[::-1].copy()[::-1]):
        np.testing.assert_array_equal(runtime.run((same,))[0], want)
    runtime.close()
    assert net.training and net.dropout.training


def test_model_can_be_trained_after_it_cached_a_tensor_in_a_run() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.table: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.table is None:
                self.table = torch.arange(3.0)
            return x * self.scale * self.table

    net = Caching()
    TorchRuntime(net, "cpu", 1).run((np.ones(3, np.float32),))
    net(torch.ones(3)).sum().backward()
    assert net.scale.grad is not None and net.scale.grad.tolist() == [0.0, 1.0, 2.0]


_COUNT_THREADS = """
import os, sys
from engines.runtimes import OnnxRuntime
import numpy as np
before = len(os.listdir("/proc/self/task"))
runtime = OnnxRuntime(sys.argv[1], "cpu", int(sys.argv[2]))
runtime.run((np.zeros((3, 6), np.float32),))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_onnxruntime_starts_no_more_threads_than_asked(onnx_file: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for threads in (1, 3):
        command = [sys.executable, "-c", _COUNT_THREADS, str(onnx_file), str(threads)]
        out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
        assert int(out) == threads - 1  # the calling thread works too


@pytest.mark.parametrize("content", [None, b"", b"not a model", "half"])
def test_missing_or_corrupt_file_is_one_line(onnx_file: Path, content: object, capfd: object) -> None:
    path = onnx_file.parent / "bad.onnx"
    whole = onnx_file.read_bytes()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else bytes(content))  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"bad\.onnx.*export") as caught:
        OnnxRuntime(path, "cpu", 1)
    assert "\n" not in str(caught.value)
    assert isinstance(capfd, pytest.CaptureFixture) and capfd.readouterr() == ("", "")


def test_wrong_inputs_name_both_sides(onnx_file: Path) -> None:
    runtime = OnnxRuntime(onnx_file, "cpu", 1)
    for bad in (np.zeros((2, 6), np.float32), np.zeros((3, 6)), np.zeros(6, np.float32)):
        with pytest.raises(InputError, match=r"input 'x' is .*expected float32\[3, 6\]"):
            runtime.run((bad,))
    with pytest.raises(InputError, match="takes 1 inputs, got 2"):
        runtime.run(inputs() * 2)
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        runtime.run(inputs())


@pytest.mark.parametrize("device", ["cuda:99", "cuda:", "cuda:x", "tpu", "cpu:0", ""])
def test_unavailable_device_is_one_line(net: Net, onnx_file: Path, device: str) -> None:
    for make in (lambda: TorchRuntime(net, device, 1), lambda: OnnxRuntime(onnx_file, device, 1)):
        with pytest.raises(InputError, match="device=") as caught:
            make()
        assert "\n" not in str(caught.value)


def test_threads_must_be_positive(net: Net, onnx_file: Path) -> None:
    with pytest.raises(InputError, match="threads=0"):
        TorchRuntime(net, "cpu", 0)
    with pytest.raises(InputError, match="threads=0"):
        OnnxRuntime(onnx_file, "cpu", 0)


@pytest.mark.gpu
def test_cuda_agrees_with_cpu(net: Net, onnx_file: Path) -> None:
    check_device("cuda")
    want = TorchRuntime(net, "cpu", 1).run(inputs())[0]
    for runtime in (TorchRuntime(net, "cuda", 1), OnnxRuntime(onnx_file, "cuda", 1)):
        np.testing.assert_allclose(runtime.run(inputs())[0], want, rtol=1e-2, atol=1e-3)
