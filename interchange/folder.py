"""A collage folder as a zip: `read` and `written`. What is in it is what `collage_client.files` reads and writes."""

import os
import tempfile
from pathlib import Path, PurePosixPath

from collage.v1 import collage_pb2
from collage_client import InvalidInput, files
from interchange.archive import Archive, packed
from interchange.bounds import FILE, Tally
from interchange.drawing import decoded
from services.common.errors import InvalidRequest, Violation
from services.common.field import Field

# What archivers of one system put beside each file for their own.
_BESIDE = "__MACOSX"
RESULT = "image-0.png"


def read(archive: Archive) -> collage_pb2.Collage:
    """The collage of a zip that holds a `collage.yaml`, at its top or in a folder, and its pictures.

    Changes the current folder, so it is for a process of its own.

    Raises:
        InvalidRequest: at the field of the collage that is wrong, or the entry.
    """
    found = collage_file(archive)
    if not found:
        raise InvalidRequest.of(FILE, f"is a zip without a {files.FILE_NAME}")
    inside = PurePosixPath(found).parent
    with tempfile.TemporaryDirectory(prefix="collage-") as made:
        for name in archive.names:
            path = PurePosixPath(name)
            if _BESIDE not in path.parts and path.is_relative_to(inside):
                # Its parts were looked at: none leads out of here.
                target = Path(made, *path.relative_to(inside).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
        before = Path.cwd()
        os.chdir(made)
        try:
            told = files.load(files.FILE_NAME)
            _weigh(told)
            collage = files.attach(told)
        except InvalidInput as error:
            raise InvalidRequest(
                [
                    Violation(field=each.field or str(FILE), description=each.description)
                    for each in error.field_violations
                ]
            ) from error
        except OSError as error:
            raise InvalidRequest.of(FILE, "holds a name that is a file and a folder") from error
        finally:
            os.chdir(before)
    _check(collage)
    return collage


def collage_file(archive: Archive) -> str:
    """The name of its collage file, the outermost one; "" where there is none."""
    names = [
        name
        for name in archive.names
        if PurePosixPath(name).name == files.FILE_NAME and _BESIDE not in PurePosixPath(name).parts
    ]
    return min(names, key=lambda name: (name.count("/"), name), default="")


def written(collage: collage_pb2.Collage, result: bytes = b"") -> bytes:
    """A zip of the folder that holds a collage with inline pictures, and the drawn picture where there is one.

    Raises:
        InvalidRequest: at the name of a layer that can be no part of a file's name.
    """
    try:
        parts = files.parts(collage)
    except InvalidInput as error:
        raise InvalidRequest(
            [
                Violation(field=each.field, description=each.description)
                for each in error.field_violations
            ]
        ) from error
    return packed({**parts, RESULT: result} if result else parts)


def _weigh(collage: collage_pb2.Collage) -> None:
    """That all pictures that a collage names, each as often as it does, are not too much, before one is read."""
    tally = Tally()
    for field, image in files.pictures(collage):
        if image.WhichOneof("source") == "path" and Path(image.path).is_file():
            tally.hold(field, Path(image.path).stat().st_size)


def _check(collage: collage_pb2.Collage) -> None:
    """That every picture is one."""
    tally = Tally()
    for field, image in files.pictures(collage):
        height, width = decoded(image.data, Field(field)).pixels_HW4.shape[:2]
        tally.add(field, width, height)
