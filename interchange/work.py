"""Files opened and saved by their kind: `opened`, `saved`, and `confined` as a process of its own does it.

Whoever wants a file opened asks by `asking`, and imports nothing of this.
"""

from collections.abc import Callable
from typing import Any

from collage.v1 import collage_pb2, collage_service_pb2
from interchange import bounds
from interchange.asking import FORMS
from interchange.bounds import FILE
from services.common.confined import Work
from services.common.errors import InvalidRequest, quote

# What other tools' own files begin with, and what to do about them.
_OTHERS = {
    b"gimp xcf": "a GIMP file; export it as OpenRaster (.ora)",
    b"\x89PNG": "a picture; allowed: layered files, .ora, .psd or .zip",
    b"\xff\xd8\xff": "a picture; allowed: layered files, .ora, .psd or .zip",
}
_KRITA = b"application/x-krita"


def opened(data: bytes) -> tuple[collage_pb2.Collage, list[collage_pb2.Warning]]:
    """The collage of a file, its pictures inline, and what of the file is not in it.

    Raises:
        InvalidRequest: at the place of the file that is wrong or too large, below `file`.
    """
    # The libraries of each kind take time and memory to load.
    from interchange import archive

    if len(data) > bounds.MAX_FILE_BYTES:
        raise InvalidRequest.of(
            FILE, f"has {len(data)} bytes; allowed: at most {bounds.MAX_FILE_BYTES}"
        )
    if data.startswith(b"8BPS"):
        from interchange import psd

        return psd.read(data)
    if data.startswith((archive.SIGNATURE, b"PK\x05\x06")):
        return _of_archive(archive.Archive(data))
    for start, told in _OTHERS.items():
        if data.startswith(start):
            raise InvalidRequest.of(FILE, f"is {told}")
    raise InvalidRequest.of(
        FILE,
        f"begins with {quote(data[:8])}; allowed: OpenRaster (.ora), PSD, or a .zip of a collage",
    )


def saved(collage: collage_pb2.Collage, form: str, result: bytes = b"") -> bytes:
    """A file of a collage with inline pictures.

    Args:
        collage: may be unfinished.
        form: one of `FORMS`.
        result: the drawn picture, of the canvas' size; none where it is empty.

    Raises:
        InvalidRequest: at the field of the collage that no file can be made of.
    """
    if form not in FORMS:
        raise InvalidRequest.of("form", f"is {quote(form)}; allowed: {', '.join(FORMS)}")
    if form == "ora":
        from interchange import ora

        return ora.written(collage, result)
    if form == "psd":
        from interchange import psd

        return psd.written(collage, result)
    from interchange import folder

    return folder.written(collage, result)


def _of_archive(archive: Any) -> tuple[collage_pb2.Collage, list[collage_pb2.Warning]]:
    from interchange import folder, ora

    if ora.STACK in archive:
        return ora.read(archive)
    if ora.MIMETYPE in archive and archive.read(ora.MIMETYPE).strip() == _KRITA:
        raise InvalidRequest.of(FILE, "is a Krita file; export it as OpenRaster (.ora)")
    return folder.read(archive), []


def confined() -> Work:
    """What the process does; the parts are those of `Interchange`."""

    def work(parts: list[bytes], begin: Callable[[str], None]) -> list[bytes]:
        begin(str(FILE))
        if parts[0] == b"open":
            collage, warnings = opened(parts[1])
            plan = collage_service_pb2.Plan(warnings=warnings)
            return [collage.SerializeToString(), plan.SerializeToString()]
        _, form, message, result = parts
        return [saved(collage_pb2.Collage.FromString(message), form.decode(), result)]

    return work
