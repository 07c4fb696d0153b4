"""What a model costs besides time: parameters, FLOPs, bytes on disk, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engines.errors import InputError
from engines.export import external_files
from engines.runtimes import check_device, eval_mode


def params_M(model: torch.nn.Module) -> float:
    """Parameters in millions, each tied tensor once (one Parameter used twice, or two that share memory)."""
    counted: dict[object, int] = {}
    for p in model.parameters():
        # A storage has an identity without memory too (meta device, fake tensors).
        counted[p.untyped_storage()._cdata, p.storage_offset(), p.shape, p.stride()] = p.numel()
    return sum(counted.values()) / 1e6


def flops_G(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> float:
    """GFLOP of one forward pass in eval mode on `example`, a multiply-add as 2.

    Counted are matrix products and convolutions, attention's two products included; element-wise work,
    norms, softmax and interpolation are not. Works on the meta device too (no memory, no time).
    """
    counter = FlopCounterMode(display=False, custom_mapping=_VECTOR_PRODUCTS)
    with eval_mode(model), torch.no_grad(), _decomposed_kernels(), counter:
        model(*example)
    return counter.get_total_flops() / 1e9


def size_MB(path: str | Path) -> float:
    """Size on disk in 10^6 bytes, an .onnx file with its external data. InputError if a file is missing."""
    files = [Path(path)]
    if not files[0].is_file():
        raise InputError(f"{path}: no such file; expected a saved model")
    if files[0].suffix == ".onnx":
        files += external_files(path)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{path} refers to {missing[0]}, which is missing; export the model again")
    return sum(file.stat().st_size for file in files) / 1e6


def peak_ram_GB(call: Callable[[], object]) -> float | None:
    """Growth of this process's resident memory during `call`, at its peak, in 10^9 bytes.

    The kernel's own high-water mark (VmHWM, reset before the call), so that no short peak is missed; exact
    to a few MB. What is resident already does not count: a `call` that loads the model and runs it measures
    weights, runtime and activations; a `call` that runs a loaded one measures what a run adds. The first
    use of a library adds its code
    pages: run it once before. None where the kernel does not let the mark be reset (no Linux /proc).
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # Freed memory that the allocator still holds would be reused and hide what the call takes.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident_bytes("VmRSS")
    call()
    return max(0, _resident_bytes("VmHWM") - before) / 1e9


def peak_vram_GB(call: Callable[[], object], device: str = "cuda") -> float:
    """Growth of the used memory of a CUDA device during `call`, at its peak, in 10^9 bytes, for any runtime.

    The larger of the device's used memory (sampled every millisecond; all processes, so the device must be
    held alone) and the exact peak of torch's own allocator. As for `peak_ram_GB`, let `call` load the model
    to include weights.

    Raises:
        InputError: `device` is no CUDA device or not available.
    """
    if not device.startswith("cuda"):
        raise InputError(f"device={device!r}: expected cuda or cuda:N")
    check_device(device)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    reserved = torch.cuda.memory_reserved(device)
    with _sampled_maximum(lambda: _used_vram(device)) as seen:
        call()
        torch.cuda.synchronize(device)
    own = torch.cuda.max_memory_reserved(device) - reserved
    return max(own, max(seen) - seen[0]) / 1e9


def _dot_flops(a: torch.Size, b: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Matrix (m, k) or vector (k,) times vector (k,): one multiply-add per entry of the left side."""
    return 2 * a.numel()


_VECTOR_PRODUCTS: dict[Any, Any] = {
    torch.ops.aten.mv: _dot_flops,
    torch.ops.aten.dot: _dot_flops,
    torch.ops.aten.vdot: _dot_flops,
}


@contextlib.contextmanager
def _decomposed_kernels() -> Iterator[None]:
    """Make attention and recurrent layers run as the plain products that the counter knows.

    Left alone, torch's counter reports 0 for attention on the CPU (its flash kernel is not in the table),
    for the fused transformer layer of eval mode and for the oneDNN LSTM.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    mkldnn: Any = torch.backends.mkldnn
    try:
        with warnings.catch_warnings(), sdpa_kernel([SDPBackend.MATH]):
            warnings.simplefilter("ignore")  # mkldnn.flags touches a setting of Intel GPUs
            with mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {field}")


def _used_vram(device: str) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return total - free


@contextlib.contextmanager
def _sampled_maximum(read: Callable[[], int]) -> Iterator[list[int]]:
    """A list of two numbers: `read()` at the start and the largest seen until the end of the block."""
    start = read()
    seen = [start, start]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            seen[1] = max(seen[1], read())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen[1] = max(seen[1], read())
