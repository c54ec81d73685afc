"""Collages in files of other tools: `collage` reads the one that a command names, `convert` makes one of another.

OpenRaster, PSD and zips are opened in a process that can be ended, by what the extra `files` installs; a collage file
and its folder need nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from collage.v1 import collage_pb2
from collage_client import CollageError, InvalidInput, _disk, files
from collage_client._errors import FieldViolation
from collage_client.cli import results, server
from collage_client.cli.folder import Folder

# What such files begin with: archives, an archive of nothing, PSD.
_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"8BPS")
_FORMS = {".ora": "ora", ".psd": "psd", ".zip": "zip"}
# As much as is opened.
_MAX_FILE_BYTES = 512 * 2**20


async def collage(args: argparse.Namespace) -> collage_pb2.Collage:
    """The collage that `args.path` names, its pictures inline; what of a file is not in it is noted."""
    found, warnings = await _opened(args.path, args.allow)
    for warning in warnings:
        args.output.note(f"{warning.field}: {warning.message} [{warning.reason}]")
    return _fitted(found, args)


async def convert(args: argparse.Namespace) -> None:
    """Makes a file or a folder of a collage."""
    suffix = args.out.suffix.lower()
    form = _FORMS.get(suffix)
    if form is None and suffix and not args.out.is_dir():
        known = ", ".join(_FORMS)
        raise _refused("TO", f"{args.out} ends in {suffix}; allowed: {known}, or a folder's name")
    if form is not None and args.out.exists() and not args.force:
        raise _refused("TO", f"{args.out} exists; --force writes over it")
    found, warnings = await _opened(args.path, args.allow)
    # What was drawn at another size shows another canvas.
    picture = _result(args.path, args.image) if form and not args.size else b""
    found = _fitted(found, args)
    if form is None:
        folder = Folder(args.out)
        folder.clear()
        written = [folder.write(name, data) for name, data in files.parts(found).items()][-1]
    else:
        async with _interchange() as interchange:
            _write(args.out, await interchange.saved(found, form, picture))
        written = args.out
    for warning in warnings:
        args.output.note(f"{warning.field}: {warning.message} [{warning.reason}]")
    args.output.tell(
        str(written),
        {
            "file": str(written),
            "layers": [layer.name for layer in found.layers],
            "warnings": [
                {"reason": each.reason, "field": each.field, "message": each.message}
                for each in warnings
            ],
        },
    )


def _fitted(found: collage_pb2.Collage, args: argparse.Namespace) -> collage_pb2.Collage:
    size = getattr(args, "size", None)
    return files.fit(found, *size) if size else found


async def _opened(
    path: Path, allow: list[Path]
) -> tuple[collage_pb2.Collage, list[collage_pb2.Warning]]:
    if not _is_foreign(path):
        return files.attach(files.load(path, allow=allow)), []
    try:
        data = _disk.read(path, _MAX_FILE_BYTES)
    except _disk.Unreadable as error:
        raise _refused(str(path), str(error)) from error
    async with _interchange() as interchange:
        found: tuple[collage_pb2.Collage, list[collage_pb2.Warning]] = await interchange.opened(
            data
        )
        return found


def _is_foreign(path: Path) -> bool:
    try:
        return path.is_file() and _disk.read(path, 2**40, only_bytes=4).startswith(_STARTS)
    except _disk.Unreadable:
        return False


def _result(path: Path, index: int | None) -> bytes:
    """The picture drawn of a collage in a results folder; nothing where the folder holds none."""
    folder = path if path.is_dir() else path.parent
    is_result = (folder / results.RESULT_NAME).is_file() and not _is_foreign(path)
    if index is None and not is_result:
        return b""
    try:
        return _disk.picture(folder / f"image-{index or 0}.png", [folder])
    except _disk.Unreadable as error:
        raise _refused("--image", str(error)) from error


def _write(target: Path, data: bytes) -> None:
    """Whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as draft:
        try:
            draft.write(data)
            draft.close()
            Path(draft.name).chmod(0o644)
            Path(draft.name).replace(target)
        except BaseException:
            Path(draft.name).unlink(missing_ok=True)
            raise


@asynccontextmanager
async def _interchange() -> AsyncIterator[Any]:
    """What opens and writes files, its errors told as the client's."""
    try:
        server.enter()
        from interchange.asking import Interchange
        from services.common import errors
    except ModuleNotFoundError as error:
        raise _not_installed(error.name or "interchange") from error
    if importlib.util.find_spec("psd_tools") is None:
        raise _not_installed("psd_tools")
    interchange = Interchange()
    try:
        yield interchange
    except errors.InvalidRequest as error:
        raise InvalidInput(
            error.message,
            code=grpc.StatusCode.INVALID_ARGUMENT,
            reason="FILE",
            field_violations=tuple(
                FieldViolation(field=each.field, description=each.description)
                for each in error.violations
            ),
        ) from error
    except errors.CollageError as error:
        raise CollageError(
            error.message, code=grpc.StatusCode.UNAVAILABLE, reason=error.reason
        ) from error
    finally:
        await interchange.close()


def _not_installed(name: str) -> CollageError:
    return CollageError(
        f"no OpenRaster, PSD or zip file can be opened here, {name} is not installed: install "
        "collage-diffusion[files]",
        code=grpc.StatusCode.UNAVAILABLE,
        reason="NOT_INSTALLED",
    )


def _refused(field: str, text: str) -> InvalidInput:
    return InvalidInput.in_field(field, text, reason="FILE")
