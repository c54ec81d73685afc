"""JetStream streams as a queue needs them: compare-and-set, reading back, and following.

Main type: `JetStream`, a connection that repeats its requests while the server is away. It knows no
jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api
from nats.js.errors import (
    APIError,
    BadRequestError,
    NoStreamResponseError,
    NotFoundError,
    ServerError,
    ServiceUnavailableError,
)

from gateway.jobs import JobsUnavailable
from services.common.telemetry import log

_T = TypeVar("_T")

_EXPECTED_HEADER = "Nats-Expected-Last-Subject-Sequence"
_WRONG_LAST_SEQUENCE = 10071
# Seconds for one request to the server.
REQUEST_S = 2.0
# What the server's limit on a message leaves for headers.
_HEADERS_BYTES = 4096
# Seconds between two signs of life of a consumer, and of silence after which it is taken for lost.
HEARTBEAT_S = 1.0
SILENCE_S = 3.0
# Seconds after which the server drops a consumer that nobody listens to.
_UNHEARD_S = 10.0
# What may have another outcome when the server is back.
TRANSIENT = (
    # Also every kind of TimeoutError.
    OSError,
    nats.errors.NoRespondersError,
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.StaleConnectionError,
    nats.errors.OutboundBufferLimitError,
    NoStreamResponseError,
    ServerError,
    ServiceUnavailableError,
)


class JetStream:
    """A connection that repeats its requests while the server is away, up to `retry_s`."""

    def __init__(self, client: Client, *, retry_s: float) -> None:
        self.client = client
        self.api = client.jetstream(timeout=REQUEST_S)
        self._retry_s = retry_s
        # Told when the connection was broken and is there again.
        self.on_reconnect: list[Callable[[], None]] = []

    @classmethod
    async def connect(cls, url: str, *, retry_s: float) -> JetStream:
        """Connect within `retry_s`, and again for ever. Raises `JobsUnavailable`."""
        streams: list[JetStream] = []

        async def on_error(error: Exception) -> None:
            # The client tells of every failed try to connect again.
            log.debug("nats error", error=repr(error))

        async def on_disconnect() -> None:
            if not client.is_closed:
                log.warning("nats connection lost")

        async def on_reconnect() -> None:
            log.warning("nats connected again")
            for stream in streams:
                for tell in stream.on_reconnect:
                    tell()

        try:
            client = await asyncio.wait_for(
                nats.connect(
                    url,
                    error_cb=on_error,
                    disconnected_cb=on_disconnect,
                    reconnected_cb=on_reconnect,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,
                    connect_timeout=2,
                    ping_interval=10,
                ),
                retry_s,
            )
        except (OSError, nats.errors.Error) as error:
            raise JobsUnavailable(f"nats: no connection ({type(error).__name__})") from error
        streams.append(cls(client, retry_s=retry_s))
        return streams[0]

    async def close(self) -> None:
        """Sends what is on its way out, acknowledgements among it, and closes the connection."""
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await asyncio.wait_for(self.client.flush(), REQUEST_S)
        await self.client.close()

    @property
    def limit_bytes(self) -> int:
        """What a message may hold beside its headers."""
        return int(self.client.max_payload) - _HEADERS_BYTES

    async def ask(self, request: Callable[[], Awaitable[_T]]) -> _T:
        """The answer to a request that may be sent more than once; raises `JobsUnavailable`."""
        deadline = time.monotonic() + self._retry_s
        while True:
            try:
                return await request()
            except TRANSIENT as error:
                if self.client.is_closed or time.monotonic() > deadline:
                    raise JobsUnavailable(f"nats: {error}") from error
                await asyncio.sleep(0.1)

    async def create_stream(self, name: str, subject: str, *, replicas: int) -> None:
        """Make a file-backed stream unless it is there."""
        config = api.StreamConfig(
            name=name, subjects=[subject], storage=api.StorageType.FILE, num_replicas=replicas
        )
        try:
            await self.ask(lambda: self.api.stream_info(name))
        except NotFoundError:
            await self.ask(lambda: self.api.add_stream(config))

    async def last(self, stream: str) -> int:
        """The sequence of the stream's last message."""
        info = await self.ask(lambda: self.api.stream_info(stream))
        return int(info.state.last_seq)

    async def now(self, stream: str) -> float:
        """The time by which the stream's messages are stamped, unix seconds."""
        answer = await self.ask(
            lambda: self.client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=REQUEST_S)
        )
        return datetime.fromisoformat(json.loads(answer.data)["ts"]).timestamp()

    async def find(self, stream: str, **which: Any) -> api.RawStreamMsg | None:
        """A stored message: `subject` (its last), `seq`, or `seq`, `subject` and `next`."""
        try:
            return await self.ask(lambda: self.api.get_msg(stream, **which))
        except NotFoundError:
            return None

    async def store(
        self, subject: str, payload: bytes, *, headers: Mapping[str, str], behind: int
    ) -> int | None:
        """Store where `behind` is the sequence of the subject's last message (0: it has none).

        Answers the new sequence; None where another message is the last, which may be this very one
        after a lost answer. Raises ValueError for a payload above the server's limit.
        """
        if len(payload) > self.limit_bytes:
            raise ValueError(
                f"payload has {len(payload)} bytes, the queue takes {self.limit_bytes}"
            )
        sent = {**headers, _EXPECTED_HEADER: str(behind)}
        try:
            stored = await self.ask(lambda: self.api.publish(subject, payload, headers=sent))
        except BadRequestError as error:
            if error.err_code != _WRONG_LAST_SEQUENCE:
                raise
            return None
        return int(stored.seq)

    async def scan(
        self, stream: str, subject: str, *, start: int, limit: int, headers_only: bool = False
    ) -> list[Msg]:
        """The stored messages of a subject from a sequence on, up to `limit`, in one go."""

        async def scan() -> list[Msg]:
            found: list[Msg] = []
            news = asyncio.Event()

            async def take(message: Msg) -> None:
                if (message.headers or {}).get("Status") is None:
                    found.append(message)
                    news.set()

            config = api.ConsumerConfig(
                deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=max(start, 1),
                filter_subject=subject,
                headers_only=headers_only,
            )
            async with self.consumer(stream, config, take) as info:
                while info.num_pending and len(found) < limit:
                    async with asyncio.timeout(SILENCE_S):
                        await news.wait()
                    news.clear()
                    if found[-1].metadata.num_pending == 0:
                        break
            return found[:limit]

        return await self.ask(scan)

    @contextlib.asynccontextmanager
    async def consumer(
        self, stream: str, config: api.ConsumerConfig, take: Callable[[Msg], Awaitable[None]]
    ) -> AsyncIterator[api.ConsumerInfo]:
        """A consumer without acknowledgements that pushes to `take` while the context is entered."""
        inbox = self.client.new_inbox()
        subscription = await self.client.subscribe(inbox, cb=take, pending_bytes_limit=0)
        consumer = ""
        try:
            info = await self.api.add_consumer(
                stream,
                config,
                deliver_subject=inbox,
                ack_policy=api.AckPolicy.NONE,
                mem_storage=True,
                num_replicas=1,
                idle_heartbeat=HEARTBEAT_S,
                inactive_threshold=_UNHEARD_S,
            )
            consumer = info.name
            yield info
        finally:
            with contextlib.suppress(*TRANSIENT, nats.errors.Error, APIError):
                await subscription.unsubscribe()
                if consumer:
                    # Not waited for: one that is forgotten goes by itself.
                    await self.client.publish(f"$JS.API.CONSUMER.DELETE.{stream}.{consumer}")
