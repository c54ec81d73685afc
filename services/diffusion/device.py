"""A device, and the one thread that owns it: which one, its settings, and what is left of it after an error.

Main functions: `find`, `own` and `recover`.
"""

import traceback

import torch

from services.common.errors import DeviceLost
from services.common.weights import ModelError


def find(name: str) -> torch.device:
    """The device of that name; for an empty one the GPU where there is one, else the CPU.

    Raises:
        ModelError: naming the devices of this machine.
    """
    has_gpu = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ModelError(f"device: is {name!r}; this machine has: {', '.join(found)}")
    # "cuda" and "cuda:0" are one device, and one budget.
    return torch.device(device.type, device.index or 0) if device.type == "cuda" else device


def own(threads: int) -> None:
    """Makes the calling thread the one that computes; the settings are its own or the process'.

    Args:
        threads: CPU threads of one operation. Fixed, because sums split over another number of threads round
            differently: with the same number a request gives the same bytes in every process.
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that times are true and a cancel is not overtaken by queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the work failed for want of memory, of the device or of the machine."""
    # On the CPU torch raises a plain RuntimeError with the words of its allocator.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(
        error
    )


def recover(device: torch.device, error: BaseException, *, who: str) -> None:
    """Makes the device ready for the next work after an error: what failed for want of memory may fit in pieces.

    Args:
        device: where the work failed.
        error: how; no longer being handled, for what is holds all that the failed call held.
        who: has lost the device, where it is lost.

    Raises:
        DeviceLost: an illegal access, say, stays with the process: all that it asks of the device from then on fails,
            so the error is no job's own.
    """
    # The tensors of the failed call hang on its frames.
    traceback.clear_frames(error.__traceback__)
    try:
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception as failure:
        raise lost(who) from failure


def lost(who: str) -> DeviceLost:
    """What everybody hears who waits for a device that answers nothing any more."""
    return DeviceLost(f"the {who} has lost its device and starts again")
