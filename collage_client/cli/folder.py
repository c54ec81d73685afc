"""A folder that the command writes, and its list of what it wrote there.

Main type: `Folder`. The list, `.collage.json`, marks the folder as ours: what it does not name is somebody else's,
neither deleted nor written over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from collage_client import InvalidInput, _disk

MARK = ".collage.json"
# Every name that results may have: a file of such a name that is not in the list would be written over.
_OURS = re.compile(
    r"image-\d+\.png|(composite|sheet)\.png|(result|plan|sweep)\.json|collage\.yaml"
    r"|background\.\w+|masks/[^/]+\.png|layers/[^/]+"
)


class Folder:
    """One results folder.

    Args:
        path: made where absent.

    Raises:
        InvalidInput: it is a file, holds other things than results, or holds a file of a result's name that no result
            of ours wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise _refused(f"{path} is not a folder")
        for inner in ("masks", "layers"):
            if (path / inner).is_symlink():
                raise _refused(
                    f"{path / inner} leads elsewhere: results are written into {path} alone"
                )
        listed = self._listed()
        self._names = listed or []
        if listed is None:
            if path.is_dir() and any(path.iterdir()):
                raise _refused(
                    f"{path} holds other things than results (it has no {MARK}); name a new or an empty folder"
                )
        else:
            foreign = [name for name in self._present() if name not in self._names]
            if foreign:
                raise _refused(
                    f"{path / foreign[0]} is not of an earlier result and would be written over; move it away"
                )
        path.mkdir(parents=True, exist_ok=True)
        self._keep()

    def clear(self) -> None:
        """Deletes what was written here before, so that the folder tells of one job only."""
        for name in self._names:
            (self.path / name).unlink(missing_ok=True)
        self._names = []
        self._keep()

    def write(self, name: str, data: bytes) -> Path:
        """Writes one file, its name first into the list: what a crash leaves behind is ours still."""
        if name not in self._names:
            self._names.append(name)
            self._keep()
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
        return target

    def _keep(self) -> None:
        mark = self.path / MARK
        draft = mark.with_suffix(".draft")
        # Written through a link it would be another file.
        draft.unlink(missing_ok=True)
        draft.write_text(json.dumps({"written_by": "collage", "files": self._names}, indent=1))
        draft.replace(mark)

    def _listed(self) -> list[str] | None:
        """The names in the list; None where there is none. Only names that a result may have count."""
        mark = self.path / MARK
        if not mark.exists():
            return None
        try:
            names = json.loads(_disk.text(mark))["files"]
            return [name for name in names if _OURS.fullmatch(name)]
        except (_disk.Unreadable, RecursionError, ValueError, KeyError, TypeError) as error:
            raise _refused(f"{mark} cannot be read ({error}); name another folder") from error

    def _present(self) -> Iterator[str]:
        """The files here whose names a result may have."""
        for pattern in ("*", "masks/*", "layers/*"):
            for path in sorted(self.path.glob(pattern)):
                name = path.relative_to(self.path).as_posix()
                if not path.is_dir() and _OURS.fullmatch(name):
                    yield name


def _refused(text: str) -> InvalidInput:
    return InvalidInput.in_field("--out", text, reason="FILE")
