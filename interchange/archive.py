"""A zip file within bounds: `Archive` to read a stranger's, `packed` to write one.

What an archive says of its entries is checked before any is unpacked, and none unpacks to more than it says.
"""

import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO

from interchange import bounds
from interchange.bounds import FILE, entry
from services.common.errors import InvalidRequest
from services.common.field import Field

SIGNATURE = b"PK\x03\x04"
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _LOCATOR_BYTES, _COMMENT_BYTES = 22, 20, 65_535
_ENCRYPTED = 0x1
# The first that a zip can tell, so that equal contents give equal bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


class Archive:
    """The entries of a zip file, by name.

    Raises:
        InvalidRequest: it is damaged, or holds what no such file of ours or of a known tool holds.
    """

    def __init__(self, data: bytes) -> None:
        _check_directory(data)
        try:
            self._zip = zipfile.ZipFile(BytesIO(data))
            infos = self._zip.infolist()
        # Of a damaged archive Python's reader documents BadZipFile, and raises more.
        except Exception as error:
            raise InvalidRequest.of(FILE, f"is a damaged zip file ({error})") from error
        if len(infos) > bounds.MAX_ENTRIES:
            raise InvalidRequest.of(
                FILE, f"has {len(infos)} entries; allowed: at most {bounds.MAX_ENTRIES}"
            )
        self._infos: dict[str, zipfile.ZipInfo] = {}
        total = 0
        # Some writers of OpenRaster begin names with a slash. Nothing of such a file is ever written to a disk.
        is_stack = any(info.filename == "stack.xml" for info in infos)
        for info in infos:
            name = info.orig_filename.removeprefix("/") if is_stack else info.orig_filename
            _check_name(name, entry(info.orig_filename))
            if name in self._infos:
                raise InvalidRequest.of(entry(name), "stands twice in the archive; allowed: once")
            self._infos[name] = info
            if not info.is_dir():
                _check_size(info)
                total += info.file_size
        if total > bounds.MAX_UNPACKED_BYTES:
            raise InvalidRequest.of(
                FILE,
                f"unpacks to {total} bytes; allowed: at most {bounds.MAX_UNPACKED_BYTES}",
            )

    @property
    def names(self) -> list[str]:
        """Of all files in it, in its order."""
        return [name for name, info in self._infos.items() if not info.is_dir()]

    def __contains__(self, name: str) -> bool:
        return name in self._infos and not self._infos[name].is_dir()

    def read(self, name: str, *, limit_bytes: int = bounds.MAX_ENTRY_BYTES) -> bytes:
        """The bytes of one entry.

        Raises:
            InvalidRequest: there is none of that name, it is larger than that, or it is damaged.
        """
        if name not in self:
            raise InvalidRequest.of(entry(name), "is not in the archive, which refers to it")
        info = self._infos[name]
        if info.file_size > limit_bytes:
            raise InvalidRequest.of(
                entry(name), f"has {info.file_size} bytes; allowed: at most {limit_bytes}"
            )
        try:
            with self._zip.open(info) as opened:
                data = opened.read(info.file_size)
                # Its checksum is looked at where it ends.
                if opened.read(1) or len(data) != info.file_size:
                    raise zipfile.BadZipFile("another length than the archive says")
        # As above; zlib's own errors are among them.
        except Exception as error:
            raise InvalidRequest.of(entry(name), f"cannot be unpacked ({error})") from error
        return data


def packed(entries: Mapping[str, bytes]) -> bytes:
    """A zip file of these entries in their order; equal entries give equal bytes.

    What does not become smaller is stored as it is, and so is the first entry, which tells the kind of file.
    """
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for number, (name, data) in enumerate(entries.items()):
            info = zipfile.ZipInfo(name, _DATE)
            is_text = number > 0 and name.endswith((".xml", ".yaml", ".json"))
            info.compress_type = zipfile.ZIP_DEFLATED if is_text else zipfile.ZIP_STORED
            info.external_attr = 0o644 << 16
            opened.writestr(info, data)
    return file.getvalue()


def _check_directory(data: bytes) -> None:
    """Python makes an object of each entry in the list, so its length is looked at first."""
    at = data.rfind(_END, max(0, len(data) - _END_BYTES - _COMMENT_BYTES))
    if at < 0 or at + _END_BYTES > len(data):
        raise InvalidRequest.of(FILE, "is a zip file without its list of entries: cut short")
    size_bytes = struct.unpack_from("<I", data, at + 12)[0]
    if data[at - _LOCATOR_BYTES : at - _LOCATOR_BYTES + 4] == _LOCATOR_64:
        # The same for archives of more than 4 GiB, which some writers make of smaller ones too.
        far = struct.unpack_from("<Q", data, at - _LOCATOR_BYTES + 8)[0]
        if data[far : far + 4] == _END_64 and far + 48 <= len(data):
            size_bytes = struct.unpack_from("<Q", data, far + 40)[0]
    if size_bytes > bounds.MAX_DIRECTORY_BYTES:
        raise InvalidRequest.of(
            FILE,
            f"has a list of entries of {size_bytes} bytes; allowed: at most {bounds.MAX_DIRECTORY_BYTES}",
        )


def _check_name(name: str, field: Field) -> None:
    parts = name.removesuffix("/").split("/")
    if len(name) > bounds.MAX_NAME_CHARACTERS:
        raise InvalidRequest.of(
            field,
            f"has a name of {len(name)} characters; allowed: at most {bounds.MAX_NAME_CHARACTERS}",
        )
    if not all(parts) or {"..", "."} & {*parts} or not name.isprintable() or {*"\\:"} & {*name}:
        raise InvalidRequest.of(
            field, "is no name of a file within the archive, such as data/1.png"
        )


def _check_size(info: zipfile.ZipInfo) -> None:
    field = entry(info.filename)
    if info.flag_bits & _ENCRYPTED:
        raise InvalidRequest.of(field, "is encrypted; allowed: entries without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidRequest.of(
            field, f"is packed by method {info.compress_type}; allowed: 0 (stored), 8 (deflated)"
        )
    if info.file_size > bounds.MAX_ENTRY_BYTES:
        raise InvalidRequest.of(
            field, f"unpacks to {info.file_size} bytes; allowed: at most {bounds.MAX_ENTRY_BYTES}"
        )
    ratio = info.file_size / max(info.compress_size, 1)
    if info.file_size > bounds.RATIO_FROM_BYTES and ratio > bounds.MAX_RATIO:
        raise InvalidRequest.of(
            field,
            f"unpacks to {ratio:.0f} times its size; allowed: at most {bounds.MAX_RATIO} times",
        )
