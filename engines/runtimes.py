"""Runtimes: one interface, `run(arrays) -> arrays`, over torch and ONNX Runtime.

Host arrays go in and come out, so a timed call includes the copies to and from a GPU, for every runtime
alike, and has finished when it returns. A further engine is a class with the four members of `Runtime`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from engines.errors import InputError

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]

NUMPY_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class Runtime(Protocol):
    """A loaded model that can be run. `name` and `device` go into the record's `engine` and `device`."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    def run(self, inputs: Arrays) -> Arrays: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, then give every submodule its own earlier mode back.

    `model.train(was_training)` would not do: it also wakes submodules that were frozen in eval mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def as_tensors(outputs: object, model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """The outputs of `model` as a tuple of tensors. Raises InputError for anything but tensors."""
    parts = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    wrong = [type(part).__name__ for part in parts if not isinstance(part, torch.Tensor)]
    if wrong or not parts:
        raise InputError(
            f"{type(model).__name__} returned {', '.join(wrong) or 'nothing'}; an engine needs a tensor or a "
            "tuple of tensors: wrap the model in a module that returns those"
        )
    return tuple(parts)


def check_device(device: str) -> str:
    """Return `device` ("cpu", "cuda" or "cuda:N") if torch can use it here, else raise InputError."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cpu" and index) or (":" in device and not index.isdigit()):
        raise InputError(f"device={device!r}: expected cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise InputError(f"device={device!r} is not available: torch sees {count} CUDA devices; use device='cpu'")
    return device


def check_threads(threads: int) -> int:
    """Return `threads`, or raise InputError below 1."""
    if threads < 1:
        raise InputError(f"threads={threads}: expected at least 1; give the number of CPU cores to use")
    return threads


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run torch with so many intra-op threads, and give it back its own number."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchRuntime:
    """Eager torch. Holds `model` on `device` in eval mode until `close()`, which gives its modes back.

    Args:
        model: takes tensors, returns a tensor or a tuple of tensors; it is moved to `device` and stays there.
        device: "cpu", "cuda" or "cuda:N".
        threads: intra-op CPU threads, in force during a call only; torch's own setting is back after it.
    """

    name = "torch"

    def __init__(self, model: torch.nn.Module, device: str, threads: int) -> None:
        self.device = check_device(device)
        self.threads = check_threads(threads)
        self._model = model.to(self.device)
        self._mode = contextlib.ExitStack()
        self._mode.enter_context(eval_mode(self._model))

    def run(self, inputs: Arrays) -> Arrays:
        """Run the model on host arrays of its own dtypes; returns host arrays."""
        # Not inference_mode: tensors that a model caches (position tables) must stay usable in training.
        with torch_threads(self.threads), torch.no_grad():
            tensors = [torch.from_numpy(np.require(x, requirements=["C", "W"])).to(self.device) for x in inputs]
            outputs = as_tensors(self._model(*tensors), self._model)
            return tuple(y.cpu().numpy() for y in outputs)

    def close(self) -> None:
        self._mode.close()


class OnnxRuntime:
    """ONNX Runtime, sequential execution with `threads` intra-op threads.

    Args:
        path: an .onnx file (with its external data beside it, if it has any).
        device: "cpu", or "cuda"/"cuda:N" where the installed onnxruntime has its CUDA provider. An
        unavailable device
            is an InputError, never a silent run on the CPU.
        threads: intra-op CPU threads of the session, the calling thread included.
    """

    name = "onnxruntime"

    def __init__(self, path: str | Path, device: str, threads: int) -> None:
        self.device = device
        self.threads = check_threads(threads)
        provider, settings = self._provider(device)
        if not Path(path).is_file():
            raise InputError(f"{path}: no such ONNX file; export the model there first")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # failures come back as exceptions, once
        # Threads that spin on after a run steal the cores of whatever is timed next: without this line an
        # interleaved torch run took 2.5 times as long on two cores. Spinning within a run stays on.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: onnxruntime cannot load it ({reason}); export the model again") from error
        if session.get_providers()[0] != provider:
            raise InputError(f"device={device!r} is not available: onnxruntime could not start {provider}; use 'cpu'")
        self._session: ort.InferenceSession | None = session
        self._sides = {
            side: [(one.name, one.shape, NUMPY_DTYPES.get(one.type)) for one in nodes]
            for side, nodes in (("input", session.get_inputs()), ("output", session.get_outputs()))
        }
        self._path = path

    @staticmethod
    def _provider(device: str) -> tuple[str, dict[str, str]]:
        kind, _, index = device.partition(":")
        if device == "cpu":
            return "CPUExecutionProvider", {}
        if kind != "cuda" or (":" in device and not index.isdigit()):
            raise InputError(f"device={device!r}: expected cpu, cuda or cuda:N")
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise InputError(
                f"device={device!r} is not available: this onnxruntime has no CUDA provider; "
                "install onnxruntime-gpu or use device='cpu'"
            )
        return "CUDAExecutionProvider", {"device_id": index or "0"}

    def run(self, inputs: Arrays) -> Arrays:
        """Run the model on host arrays. InputError unless number, shapes and dtypes are those of the file."""
        return tuple(np.asarray(y) for y in self._open().run(None, self._named("input", inputs)))

    def bind(self, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        """A call that reads `inputs` and writes `outputs` in place, on the CPU: no copy and no check per call.

        C-contiguous arrays of the file's shapes and dtypes, else InputError; none may be on both sides.
        """
        session = self._open()
        binding = session.io_binding()
        for side, arrays in (("input", inputs), ("output", outputs)):
            bind = getattr(binding, f"bind_{side}")
            for name, array in self._named(side, arrays).items():
                if not array.flags.c_contiguous:
                    raise InputError(f"{self._path}: {side} {name!r} is not C-contiguous: give numpy.ascontiguousarray")
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        call = partial(session.run_with_iobinding, binding)
        call.arrays = (inputs, outputs)  # type: ignore[attr-defined]  # ONNX Runtime holds their addresses alone
        return call

    def _open(self) -> ort.InferenceSession:
        if self._session is None:
            raise RuntimeError(f"{self._path}: this runtime is closed")
        return self._session

    def _named(self, side: str, arrays: Arrays) -> dict[str, Array]:
        """The arrays by the names of the file's inputs or outputs, whose shapes and dtypes they must have."""
        expected = self._sides[side]
        if len(arrays) != len(expected):
            raise InputError(f"{self._path} takes {len(expected)} {side}s, got {len(arrays)}")
        named = {}
        for array, (name, shape, dtype) in zip(arrays, expected, strict=True):
            same = len(shape) == array.ndim and all(
                not isinstance(want, int) or want == got for want, got in zip(shape, array.shape, strict=True)
            )
            if not same or (dtype is not None and array.dtype != dtype):
                raise InputError(
                    f"{self._path}: {side} {name!r} is {array.dtype}{list(array.shape)}, expected "
                    f"{np.dtype(dtype) if dtype else 'its type'}{list(shape)}; the exported shapes are fixed"
                )
            named[name] = array
        return named

    def close(self) -> None:
        """Release the session's memory and threads."""
        self._session = None
