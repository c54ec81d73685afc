"""Asking for a file to be opened or written, in a process that can be ended: `Interchange`.

Only bytes cross, so whoever asks imports no decoder.
"""

from collage.v1 import collage_pb2, collage_service_pb2
from services.common.confined import Confined

FORMS = ("ora", "psd", "zip")
MEDIA_TYPES = {
    "ora": "image/openraster",
    "psd": "image/vnd.adobe.photoshop",
    "zip": "application/zip",
}
# The largest file that is looked at. Pictures of one collage have at most 128 MiB together, and 32 rendered ones three
# times as many.
MAX_FILE_BYTES = 512 * 2**20
# Longest that one file may take; 32 turned layers of 12 megapixels take two minutes on a busy machine.
LIMIT_S = 180.0
# Most memory that a process may take.
MEMORY_BYTES = 3 * 2**30


class Interchange:
    """A process that opens and writes files, started with the first.

    Args:
        processes: how many at once.
        niceness: of each, see nice(2).
    """

    def __init__(self, *, processes: int = 1, niceness: int = 0) -> None:
        self._work = Confined(
            "interchange.work:confined",
            processes=processes,
            limit_s=LIMIT_S,
            memory_bytes=MEMORY_BYTES,
            niceness=niceness,
        )

    async def opened(self, data: bytes) -> tuple[collage_pb2.Collage, list[collage_pb2.Warning]]:
        """The collage of a file, its pictures inline, and what of the file is not in it.

        Raises:
            InvalidRequest: at the place of the file that is wrong or too large, below `file`.
            CollageError: the process does not start, or was ended from outside.
        """
        message, plan = await self._work.run([b"open", data], "file")
        warnings = collage_service_pb2.Plan.FromString(plan).warnings
        return collage_pb2.Collage.FromString(message), list(warnings)

    async def saved(self, collage: collage_pb2.Collage, form: str, result: bytes = b"") -> bytes:
        """A file of a collage.

        Args:
            collage: its pictures inline, of any size; words may be missing.
            form: one of `FORMS`.
            result: the drawn picture, of the canvas' size; none where it is empty.

        Raises:
            InvalidRequest: at the field that no file can be made of.
            CollageError: as above.
        """
        parts = [b"save", form.encode(), collage.SerializeToString(), result]
        (data,) = await self._work.run(parts, "collage")
        return data

    async def close(self) -> None:
        """Ends the process."""
        await self._work.close()
