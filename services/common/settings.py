"""Settings: one frozen dataclass a process, read once from the environment in its `__main__`.

A field `blobs` of any settings class is read from `COLLAGE_BLOBS`, and so on; the field's default counts when the
variable is not set. A value that does not parse stops the process with a message that names it. This is the
only module that looks at the environment.
"""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from services.common.blobs import BlobStore, FolderBlobStore

PREFIX = "COLLAGE_"

Settings = TypeVar("Settings")


class InvalidSetting(Exception):
    """A variable holds a value its field cannot take."""


def read(kind: type[Settings], environment: Mapping[str, str] | None = None) -> Settings:
    """An instance of the dataclass `kind`, filled from the environment.

    Args:
        kind: a dataclass whose fields are str, int, float, bool or Path, each with a default or required.
        environment: for tests; the process' own when None.

    Raises:
        InvalidSetting: naming the variable, its value and its type.
    """
    source = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        variable = PREFIX + field.name.upper()
        if variable in source:
            values[field.name] = _parse(variable, source[variable], field.type)
    try:
        return kind(**values)
    except TypeError as error:
        raise InvalidSetting(f"{kind.__name__}: {error}") from error


def _parse(variable: str, text: str, kind: Any) -> Any:
    name = kind if isinstance(kind, str) else kind.__name__
    try:
        if name == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return {"str": str, "int": int, "float": float, "Path": Path}[name](text)
    except (KeyError, ValueError) as error:
        raise InvalidSetting(f"{variable}={text!r} is not of type {name}") from error


async def open_blobs(address: str) -> BlobStore:
    """The blob store at an address.

    Args:
        address: `folder:PATH`, or `s3://KEY:SECRET@HOST:PORT/BUCKET` (`s3s://` for TLS).

    Raises:
        InvalidSetting: for any other form.
    """
    # A path is a path: # and ? are characters of it.
    scheme, _, path = address.partition(":")
    if scheme == "folder" and path:
        return FolderBlobStore(Path(path))
    wrong = InvalidSetting(
        "COLLAGE_BLOBS is neither folder:PATH nor s3://KEY:SECRET@HOST:PORT/BUCKET; in KEY and SECRET "
        "what separates is written in percents, / as %2F"
    )
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        # What is wrong with it may be in the secret: it is not told, nor where it was raised.
        raise wrong from None
    bucket = parts.path.strip("/")
    if parts.scheme in ("s3", "s3s") and parts.hostname and parts.username and bucket:
        protocol, standard_port = ("https", 443) if parts.scheme == "s3s" else ("http", 80)
        # The S3 client is imported only by processes that use it.
        from services.common.s3 import S3BlobStore

        return await S3BlobStore.open(
            f"{protocol}://{parts.hostname}:{port or standard_port}",
            access_key=unquote(parts.username),
            secret_key=unquote(parts.password or ""),
            bucket=bucket,
        )
    raise wrong
