"""Run a TensorRT engine behind the interface of `engines.runtimes.Runtime`. Needs a CUDA device."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.errors import InputError
from engines.runtimes import Array, Arrays, check_device
from engines.tensorrt_build import load_tensorrt, present_device
from engines.tensorrt_manifest import check_manifest


class TensorRTRuntime:
    """A loaded engine with its own stream, device buffers and pinned host buffers.

    `run` copies in, executes, copies out and waits; `gpu_ms` is then the time of the execution alone, by CUDA
    events. With `cuda_graph` the execution is captured once and replayed, which saves the launches' time.

    Args:
        path: an engine of `compile_int8` or `build_engine`, with its manifest beside it.
        device: "cuda" or "cuda:N".
        workload_hash: refuse an engine that was built for another workload; None = any.
        cuda_graph: capture the execution.

    Raises:
        InputError: no CUDA device here, or an engine of elsewhere (see `check_manifest`).
    """

    name = "tensorrt"

    def __init__(
        self, path: str | Path, device: str = "cuda", workload_hash: str | None = None, cuda_graph: bool = False
    ) -> None:
        trt = load_tensorrt()
        if device.partition(":")[0] != "cuda":
            raise InputError(f"device={device!r}: a TensorRT engine runs on cuda or cuda:N")
        index = int(check_device(device).partition(":")[2] or 0)
        self.manifest = check_manifest(path, trt, present_device(index), workload_hash)
        self.device = device
        self.gpu_ms = float("nan")
        self._path = Path(path)
        self._log = trt.Logger(trt.Logger.ERROR)
        with torch.cuda.device(index):
            # Held as long as the engine: TensorRT does not keep its runtime alive.
            self._runtime = trt.Runtime(self._log)
            engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
            if engine is None:
                raise InputError(f"{path}: {trt.__name__} cannot load it; build the engine again here")
            self._engine: Any = engine
            self._context: Any = engine.create_execution_context()
            self._stream = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            is_input = {n: engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names}
            self._inputs = [n for n in names if is_input[n]]
            self._outputs = [n for n in names if not is_input[n]]
            self._host: dict[str, torch.Tensor] = {}
            self._buffers: dict[str, torch.Tensor] = {}
            for name in names:
                dtype = torch.from_numpy(np.empty(0, trt.nptype(engine.get_tensor_dtype(name)))).dtype
                shape = tuple(engine.get_tensor_shape(name))
                self._host[name] = torch.empty(shape, dtype=dtype, pin_memory=True)
                self._buffers[name] = torch.zeros(shape, dtype=dtype, device=f"cuda:{index}")
                self._context.set_tensor_address(name, self._buffers[name].data_ptr())
            # The buffers were filled on torch's own stream.
            torch.cuda.synchronize(index)
            self._graph = self._captured() if cuda_graph else None

    def run(self, inputs: Arrays) -> Arrays:
        """Run the engine on host arrays. InputError unless number, shapes and dtypes are those of the engine."""
        if self._context is None:
            raise RuntimeError(f"{self._path}: this runtime is closed")
        if len(inputs) != len(self._inputs):
            raise InputError(f"{self._path} takes {len(self._inputs)} inputs, got {len(inputs)}")
        for name, array in zip(self._inputs, inputs, strict=True):
            self._fill(name, array)
        start, end = self._events
        with torch.cuda.stream(self._stream):
            for name in self._inputs:
                self._buffers[name].copy_(self._host[name], non_blocking=True)
            start.record(self._stream)
            if self._graph is not None:
                self._graph.replay()
            else:
                self._execute()
            end.record(self._stream)
            for name in self._outputs:
                self._host[name].copy_(self._buffers[name], non_blocking=True)
        self._stream.synchronize()
        self.gpu_ms = start.elapsed_time(end)
        # Copies: the pinned buffers are written again by the next call.
        return tuple(self._host[name].numpy().copy() for name in self._outputs)

    def close(self) -> None:
        """Release the engine's memory."""
        # The order of creation, backwards: TensorRT wants contexts gone before their engine.
        self._graph = None
        self._context = self._engine = self._runtime = None
        self._buffers.clear()
        self._host.clear()

    def _fill(self, name: str, array: Array) -> None:
        host = self._host[name].numpy()
        if array.shape != host.shape or array.dtype != host.dtype:
            raise InputError(
                f"{self._path}: input {name!r} is {array.dtype}{list(array.shape)}, expected "
                f"{host.dtype}{list(host.shape)}; an engine's shapes are fixed"
            )
        np.copyto(host, array)

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError(f"{self._path}: TensorRT could not start the execution")

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The execution as a CUDA graph; TensorRT asks for one run before it is captured."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.cuda.stream(self._stream))
            self._execute()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            stack.enter_context(torch.cuda.graph(graph, stream=self._stream))
            self._execute()
        return graph
