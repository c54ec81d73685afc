"""The door as a server in this process: `serving`, for as long as a context is entered."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from door.application import application
from interchange.asking import Interchange
from services.common.rpc import connect

# Connections at once; more are refused.
MAX_CONNECTIONS = 2048
# Where a server that listens on every address is found on this machine.
_HERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
# Seconds in which the head of a request has to come.
HEAD_S = 15.0
# Seconds for exchanges under way to end before they are cut off: streams do not end by themselves.
DRAIN_S = 2
# Files opened or written at once, each by a process that may take 3 GiB.
_OPENERS = 2
# Of these processes: what draws comes first.
_NICENESS = 5


class _Connection(H11Protocol):
    """Is closed when the head of a request does not come in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._looking = self.loop.call_later(HEAD_S, self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._looking.cancel()
        super().connection_lost(exc)

    def _look(self, before: object) -> None:
        """`before`: the last request that had come when it was looked last."""
        if self.conn.their_state is h11.IDLE and self.cycle is before:
            self.transport.close()
            return
        self._looking = self.loop.call_later(HEAD_S, self._look, self.cycle)


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs this process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(
    address: str,
    *,
    gateway: str,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
    start: Callable[[], dict[str, Any] | None] = lambda: None,
) -> AsyncIterator[str]:
    """The door's own address, `http://HOST:PORT`.

    Args:
        address: host:port to listen on; port 0 takes a free one.
        gateway: address of the gateway behind it, as `connect` takes it.
        hosts: see `door.origins.Guard`, as `origins`.
        origins: see there.
        start: see `application`.

    Raises:
        OSError: nobody can listen there.
        InvalidOrigin: see `Guard`.
    """
    host, _, port = address.rpartition(":")
    async with connect(gateway, passes_on=True) as channel:
        interchange = Interchange(processes=_OPENERS, niceness=_NICENESS)
        door = application(
            channel,
            bound=host,
            hosts=hosts,
            origins=origins,
            start=start,
            interchange=interchange,
        )
        listening = _listening(host, int(port), address)
        url = f"http://{_HERE.get(host, host)}:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            door,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=DRAIN_S,
        )
        server = _Server(config)
        running = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield url
        finally:
            server.should_exit = True
            await running
            await interchange.close()
            listening.close()


def _listening(host: str, port: int, address: str) -> socket.socket:
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        return socket.create_server((name, port), family=family, backlog=256)
    except OSError as error:
        raise OSError(
            f"the door cannot listen on {address}: {error.strerror or error}; --http HOST:PORT names another place"
        ) from error
