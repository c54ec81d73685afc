"""How much memory this machine lets a process have: `machine_bytes`. It knows no model."""

import os
from pathlib import Path

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
