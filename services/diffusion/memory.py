"""How much memory a process may have, `machine_bytes` and `device_bytes`; and handing it back, `give_back`."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import torch

# A container's limit, where there is one (cgroup 2).
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def machine_bytes() -> int:
    """The machine's memory, or the container's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_CONTAINER_LIMIT.read_text()))
    # No such file, or "max": no limit of its own.
    except (OSError, ValueError):
        return machine


def device_bytes(device: torch.device) -> int:
    """The memory of a device; of the CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_bytes()


def give_back() -> None:
    """Hands what is free in this process to the system: its own memory, and that of its GPUs."""
    # Networks hold on to themselves through their hooks.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps freed pieces for itself; other libraries have no such call and give back more readily.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
