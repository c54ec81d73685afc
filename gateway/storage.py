"""Whether what the gateway keeps things in can take more, and what is said of it where it cannot.

Main type: `Storage`. It looks at the stores again and again, says once when one fails and once when it works again, and
has health say so. This module knows no job.
"""

import asyncio
from collections.abc import Awaitable, Callable

from gateway.jobs import Jobs, JobsError, JobsFull, JobsUnavailable, JobsUnusable
from services.common.blobs import BlobStore, BlobStoreError
from services.common.errors import CollageError, Unavailable, storage_full
from services.common.telemetry import log

# Seconds between two looks.
LOOK_S = 5.0


class Storage:
    """The stores of one gateway. `tell` hears after each look whether all of them work."""

    def __init__(
        self, blobs: BlobStore, jobs: Jobs, *, tell: Callable[[bool], Awaitable[None]]
    ) -> None:
        self._looks = {"blobs": blobs.ready, "jobs": jobs.ready}
        self._tell = tell
        self._failing: dict[str, str] = {}

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        while True:
            for name, look in self._looks.items():
                await self._look(name, look)
            await self._tell(not self._failing)
            await asyncio.sleep(LOOK_S)

    async def _look(self, name: str, look: Callable[[], Awaitable[None]]) -> None:
        try:
            await look()
        except (BlobStoreError, JobsError) as error:
            # What a server says of itself may differ from one time to the next, and mean the same.
            kind = type(error).__name__
            if self._failing.get(name) != kind:
                log.error("storage fails", store=name, message=str(error))
            self._failing[name] = kind
        else:
            if self._failing.pop(name, None) is not None:
                log.info("storage works again", store=name)


def storage_error(error: JobsUnavailable) -> CollageError:
    """What a caller is told when the queue's storage fails; what to do stands in the log, with its paths."""
    if isinstance(error, JobsFull):
        return storage_full("job storage")
    if isinstance(error, JobsUnusable):
        return Unavailable(
            "the job storage is damaged, gone or closed to the server, whose log says what its operator can do",
            reason="JOBS_UNUSABLE",
        )
    return Unavailable("the job storage fails or does not answer", reason="STORAGE_UNAVAILABLE")
