"""Which server lives in a data folder: its lock, its description, and whether it is one that may be used again.

Main types: `Residence`, the folder `.server` of a data folder, and `Resident`, what a server says of itself there. A
server holds `lock` while it lives, so the description of one that was killed is known to be stale; a command holds
`users`, shared, while it uses a server, so an idle one is known too. Nothing heavy is imported: a command looks here
before anything else.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import collage
from local.variables import steering

# Seconds between two looks at a lock that another process holds.
LOOK_S = 0.05
# A server that is told to stop finishes what it can within its drain, and is killed after this.
STOP_S = 20.0
# Whose change makes a server one of other code: everything the servers are made of, and what is installed beside.
_PACKAGES = ("gateway", "local", "services")
# How a folder of sockets begins; a socket's path has to be short, so it is no part of the data folder.
_SOCKETS = "collage-"
# What changes how a network computes, or where models are found.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "OMP_NUM_THREADS")

# "background": left by a command, ends when idle. "serve": somebody's own. "call": ends with its command.
Kind = Literal["background", "serve", "call"]


class Occupied(OSError):
    """Another server lives in the data folder and is not to be disturbed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A running server. `model` as `model_key` gives it; `inputs` maps each file it is made of to what `look` saw."""

    pid: int
    address: str
    kind: Kind
    model: str
    program: list[str]
    started_at: float
    inputs: dict[str, list[int]]

    def serves(self, model: str | None) -> bool:
        """Would one started now for this model be the same: code, files, model (None: any), variables?"""
        return (
            model in (None, self.model)
            and self.program == program()
            and all(look(Path(path)) == seen for path, seen in self.inputs.items())
        )


class Residence:
    """The folder `.server` of a data folder, for its owner only.

    Raises:
        OSError: it cannot be made, or belongs to or is open to somebody else.
    """

    def __init__(self, data: Path) -> None:
        self.data = data.absolute()
        self.folder = self.data / ".server"
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        _check_private(self.folder)
        self._description = self.folder / "server.json"
        self.log = self.folder / "log"
        self._inode = 0

    @staticmethod
    def exists(data: Path) -> bool:
        """Has a server ever lived in this data folder?"""
        return (data / ".server").is_dir()

    @contextmanager
    def _file(self, name: str) -> Iterator[int]:
        """An open file of the folder, which a lock is taken on; the lock goes with it."""
        number = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            yield number
        finally:
            os.close(number)

    def is_occupied(self) -> bool:
        """Does a server live here, whether or not it is ready?"""
        with self._file("lock") as file:
            return not _taken(file, fcntl.LOCK_SH)

    def resident(self) -> Resident | None:
        """The server that lives here and is ready."""
        if not self.is_occupied():
            return None
        try:
            _check_private(self._description)
            return Resident(**json.loads(self._description.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @asynccontextmanager
    async def held(self, *, wait_s: float) -> AsyncIterator[None]:
        """Lives here: for one server at a time. Raises `Occupied` after `wait_s`."""
        with self._file("lock") as file:
            end = time.monotonic() + wait_s
            while not _taken(file, fcntl.LOCK_EX):
                if time.monotonic() > end:
                    raise Occupied(f"a server lives in {self.data} already")
                await asyncio.sleep(LOOK_S)
            self._tidy()
            self._inode = os.fstat(file).st_ino
            try:
                yield
            finally:
                if self.is_home():
                    self._description.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Removes what a server that was killed here left: its description and its sockets."""
        with suppress(OSError, ValueError, KeyError):
            _check_private(self._description)
            address: str = json.loads(self._description.read_text(encoding="utf-8"))["address"]
            sockets = Path(address.removeprefix("unix:")).parent
            if sockets.name.startswith(_SOCKETS) and address.startswith("unix:"):
                _check_private(sockets)
                shutil.rmtree(sockets)
        self._description.unlink(missing_ok=True)

    def is_home(self) -> bool:
        """Is the folder still the one that is held? Somebody may have deleted the data, and made it anew."""
        try:
            return (self.folder / "lock").stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def describe(self, resident: Resident) -> None:
        """Says that the server is ready; within `held`."""
        draft = self._description.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        number = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(asdict(resident), file, indent=1)
        draft.replace(self._description)

    @asynccontextmanager
    async def choosing(self) -> AsyncIterator[None]:
        """While one command looks for a server or starts one, no other does, and none retires."""
        with self._file("choosing") as file:
            # Another process' lock is no event of the loop.
            while not _taken(file, fcntl.LOCK_EX):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            yield

    @contextmanager
    def using(self) -> Iterator[None]:
        """Uses the server that lives here; enter it within `choosing`."""
        with self._file("users") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file)
            try:
                yield
            finally:
                os.utime(file)

    def is_used(self) -> bool:
        """Does a command use the server?"""
        with self._file("users") as file:
            return not _taken(file, fcntl.LOCK_EX)

    def idle_s(self) -> float:
        """Seconds since a command last came or went; 0 while one uses the server."""
        with self._file("users") as file:
            return 0.0 if self.is_used() else max(0.0, time.time() - os.fstat(file).st_mtime)

    def retire(self) -> bool:
        """Takes the description away, unless a command uses the server or is about to; whether it did."""
        with self._file("choosing") as choosing, self._file("users") as users:
            if not (_taken(choosing, fcntl.LOCK_EX) and _taken(users, fcntl.LOCK_EX)):
                return False
            self._description.unlink(missing_ok=True)
            return True

    async def stop(self, resident: Resident) -> None:
        """Has the server end in order, and returns when it is gone; one that does not listen is killed."""
        for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            with suppress(ProcessLookupError):
                os.kill(resident.pid, number)
            end = time.monotonic() + wait_s
            while time.monotonic() < end:
                if not self.is_occupied():
                    return
                await asyncio.sleep(LOOK_S)
        raise Occupied(f"the server in {self.data} (pid {resident.pid}) does not end")


def sockets() -> Path:
    """A new folder for a server's sockets, for its owner only."""
    return Path(tempfile.mkdtemp(prefix=_SOCKETS))


def model_key(model: str) -> str:
    """What --model says, the same from every folder: a path is absolute, hub:... or "" stays."""
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def program() -> list[str]:
    """Which program a server started now would be."""
    variables = [f"{name}={os.environ.get(name, '')}" for name in _VARIABLES]
    return [sys.executable, str(Path(__file__).resolve().parent), *variables, *steering()]


def code() -> list[Path]:
    """The files that a server's behaviour comes from, but for its model's."""
    root = Path(__file__).resolve().parent.parent
    folders = [*(root / name for name in _PACKAGES), *map(Path, collage.__path__)]
    installed = Path(sysconfig.get_path("purelib"))
    return [installed, *(file for folder in folders for file in folder.rglob("*.py"))]


def seen(paths: Iterable[Path]) -> dict[str, list[int]]:
    """What `look` sees of each."""
    return {str(path): look(path) for path in paths}


def look(path: Path) -> list[int]:
    """Size and time of a file's or folder's last change; nothing where it is gone."""
    try:
        state = path.stat()
    except OSError:
        return []
    return [0 if stat.S_ISDIR(state.st_mode) else state.st_size, state.st_mtime_ns]


def _taken(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_private(path: Path) -> None:
    state = path.lstat()
    if state.st_uid != os.getuid() or state.st_mode & 0o077 or stat.S_ISLNK(state.st_mode):
        raise OSError(
            f"{path} belongs to or is open to somebody else; no server is used from there"
        )
