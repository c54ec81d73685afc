"""Server processes of the production shape on one machine: how to start, probe and stop them.

Main type: `Process`. The commands of NATS and SeaweedFS stand here; a probe does the server's real
work, because an open port says little. It knows nothing of what the servers are used for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

# Seconds between two looks at a starting or stopping process.
_POLL_S = 0.05
# Seconds for one try of a probe.
_PROBE_S = 10.0
_LOG_TAIL_BYTES = 2000
# What `free_port` answered: a port is not in use before its server has started.
_given: set[int] = set()


class ProcessFailed(Exception):
    """The process ended while it was starting, or did not become ready in time."""


class Process:
    """One child process in a group of its own, its output appended to a log file.

    It can be started again after it ended, on the same data.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        """`environment`: all of its variables, None for this process' own. `inherited`: open files it keeps."""
        self.name = name
        self.log = log
        self._command = tuple(command)
        self._environment = environment
        self._inherited = tuple(inherited)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """The process was started and has not ended."""
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        """The id of the latest child; 0 before the first."""
        return 0 if self._child is None else self._child.pid

    @property
    def ending(self) -> str:
        """How it ended: `exit status 1`, `SIGKILL`; empty while it runs or before it was started."""
        code = None if self._child is None else self._child.poll()
        if code is None:
            return ""
        return f"exit status {code}" if code >= 0 else signal.Signals(-code).name

    async def start(self, probe: Callable[[], Awaitable[None]], *, timeout_s: float = 60.0) -> None:
        """Start and wait until `probe` returns without an error; raises `ProcessFailed`."""
        assert not self.is_running, f"{self.name} runs already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(
            os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab"
        ) as log:
            # One of an earlier version was everybody's to read.
            os.fchmod(log.fileno(), 0o600)
            self._child = subprocess.Popen(  # noqa: ASYNC220 # fork and exec only, no wait
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=self._inherited,
                start_new_session=True,
            )
        try:
            await self._wait_ready(probe, time.monotonic() + timeout_s)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End it at once, as a crash would (SIGKILL to the whole group)."""
        if self._child is not None:
            self._signal(signal.SIGKILL)
            self._child.wait()

    async def terminate(self, *, grace_s: float = 10.0) -> None:
        """Ask it to end (SIGTERM), and kill it when it has not done so in `grace_s`."""
        if self.is_running:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            # A child's end is no event of the loop.
            while self.is_running and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    async def _wait_ready(self, probe: Callable[[], Awaitable[None]], deadline: float) -> None:
        while True:
            try:
                await asyncio.wait_for(probe(), _PROBE_S)
                return
            except Exception as error:
                if not self.is_running:
                    raise ProcessFailed(f"{self.name} ended: {self._last_words()}") from error
                if time.monotonic() > deadline:
                    raise ProcessFailed(
                        f"{self.name} is not ready ({error}): {self._last_words()}"
                    ) from error
            await asyncio.sleep(_POLL_S)

    def _last_words(self) -> str:
        return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")


def free_port() -> int:
    """A loopback port nobody uses right now, and another one with every call.

    It lies below the ports that outgoing connections are given: so no connection takes it while its server is away,
    and no client that knocks meanwhile is connected to itself.
    """
    for _ in range(1000):
        port = random.randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise OSError("no free port from 10000 to 32767")


def program(name: str) -> str:
    """The path of a program beside this Python or on PATH; raises FileNotFoundError."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"no program {name!r}: install the extra 'local'")
    return found


def nats_command(data: Path, *, port: int, more: str = "") -> tuple[str, ...]:
    """A NATS server with JetStream on loopback that flushes every write to disk before it answers.

    `more`: lines of its configuration.
    """
    settings = _folder(data) / "nats.conf"
    write_private(
        settings,
        f"listen: 127.0.0.1:{port}\n"
        f"jetstream {{ store_dir: {json.dumps(str(data))}, sync_interval: always }}\n{more}",
    )
    return (program("nats-server"), "-c", str(settings))


async def probe_nats(url: str) -> None:
    """Return when the server at this address stores a message and hands it back."""
    import nats
    from nats.js.api import StorageType

    async def quiet(_: Exception) -> None:
        """The caller hears of a failure through the exception."""

    client = await nats.connect(
        url, error_cb=quiet, connect_timeout=2, allow_reconnect=False, reconnect_time_wait=_POLL_S
    )
    try:
        jetstream = client.jetstream(timeout=0.5)
        await jetstream.add_stream(
            name="probe", subjects=["probe"], storage=StorageType.FILE, max_msgs=1
        )
        stored = await jetstream.publish("probe", b"ready")
        found = await jetstream.get_msg("probe", stored.seq)
        if found.data != b"ready":
            raise ConnectionError("the NATS server handed back something else")
    finally:
        await client.close()


def seaweed_command(
    data: Path, *, port: int, access_key: str, secret_key: str, other_ports: Sequence[int]
) -> tuple[str, ...]:
    """A SeaweedFS server that speaks S3 on loopback.

    `other_ports`: eleven free ports for what its parts say to one another. It wants `seaweed_keys` in its environment:
    without, its filer and volumes hand out by HTTP what S3 asks credentials for.
    """
    identities = _folder(data) / "s3.json"
    identity = {
        "name": "collage",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write_private(identities, json.dumps({"identities": [identity]}))
    internal = (
        *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
        *("filer.port", "filer.port.grpc", "s3.port.grpc", "admin.port", "admin.port.grpc"),
        *("debug.port", "s3.debug.port"),
    )
    return (
        *(program("weed"), "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}"),
        *(f"-s3.port={port}", f"-s3.config={identities}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"),
        # On by default, and it calls home.
        "-master.telemetry=false",
        # The default of 10 s is how long a restart would wait to elect the only candidate.
        "-master.electionTimeout=1s",
        *(f"-{name}={each}" for name, each in zip(internal, other_ports, strict=True)),
    )


def seaweed_keys(secret: str) -> dict[str, str]:
    """Variables that have SeaweedFS' filer and volumes answer over HTTP only who signs with keys made from a secret."""
    names = ("JWT_SIGNING", "JWT_SIGNING_READ", "JWT_FILER_SIGNING", "JWT_FILER_SIGNING_READ")
    return {
        f"WEED_{name}_KEY": hmac.digest(secret.encode(), name.encode(), "sha256").hex()
        for name in names
    }


def _folder(data: Path) -> Path:
    """A server's folder, for its owner only, whatever modes the server gives its files."""
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    data.chmod(0o700)
    return data


def write_private(file: Path, text: str) -> None:
    """Writes a file that its owner alone may read, also where there was another."""
    draft = file.with_name(f"{file.name}.draft")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_text(text)
    draft.replace(file)
