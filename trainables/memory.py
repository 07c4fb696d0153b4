"""A trial that needs more memory than there is says so, with what it had at its peak."""

import contextlib
import resource
from collections.abc import Iterator

import torch


class OutOfMemoryError(RuntimeError):
    """Named like torch's and Ray's own: whatever ends in it is recorded as `out_of_memory`."""


@contextlib.contextmanager
def named(device: torch.device) -> Iterator[None]:
    """Turns whatever an allocation of this process raises into an OutOfMemoryError that names the peak."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "main memory"
        if device.type == "cuda":
            peak, where = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_name(device)
        help_ = "a smaller batch_size, more pieces (accumulate) or checkpointing=true take less"
        raise OutOfMemoryError(f"out of memory: {peak / 1e9:.2f} GB of {where} at the peak; {help_}") from error
