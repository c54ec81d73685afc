"""Memory that was freed, given back to the machine: `give_back`.

glibc keeps what large messages leave behind, in pieces, for good; a server that was flooded once would look as large
ever after.
"""

import asyncio
import ctypes
import os
import time
from pathlib import Path

# How often it is looked at, seconds, and how much above the least it has been is worth giving back what is free.
EVERY_S = 10.0
WORTH_BYTES = 64 * 2**20
# Nothing can be allocated meanwhile, for tenths of a second: it is put off while the loop computes for more than this
# part of its time, but not more often than that.
QUIET = 0.1
AT_LATEST = 6

trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


async def give_back() -> None:
    """Goes on until it is cancelled; on systems without glibc or /proc there is nothing to do."""
    try:
        least_bytes = resident_bytes()
    except OSError:
        return
    put_off = 0
    while True:
        computed_s = time.thread_time()
        await asyncio.sleep(EVERY_S)
        is_quiet = time.thread_time() - computed_s < QUIET * EVERY_S
        if resident_bytes() <= least_bytes + WORTH_BYTES:
            put_off = 0
        elif is_quiet or put_off + 1 >= AT_LATEST:
            await asyncio.to_thread(trim, 0)
            put_off = 0
        else:
            put_off += 1
        least_bytes = min(least_bytes, resident_bytes())


def resident_bytes() -> int:
    """What this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
