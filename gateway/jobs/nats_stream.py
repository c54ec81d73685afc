"""JetStream streams as a queue needs them: compare-and-set, reading back, and following.

Main types: `JetStream`, a connection that repeats its requests while the server is away, and
`Feed`, one ordered consumer of a whole stream. They know no jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar

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

from gateway.jobs import JobsFull, JobsUnavailable
from services.common.telemetry import log

_T = TypeVar("_T")

_EXPECTED_HEADER = "Nats-Expected-Last-Subject-Sequence"
_WRONG_LAST_SEQUENCE = 10071
# The account's or the server's storage is used up; and a stream that could not store, for whatever reason it tells.
_NO_ROOM, _NOT_STORED = frozenset({10023, 10047}), 10077
# Seconds for one request to the server.
REQUEST_S = 2.0
# What the server's limit on a message leaves for headers.
_HEADERS_BYTES = 4096
# Seconds between two signs of life of a consumer, and of silence after which it is taken for lost.
_HEARTBEAT_S = 1.0
_SILENCE_S = 3.0
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


def _is_full(error: APIError) -> bool:
    """Does a limit stand in the way? On a full disk a server answers nothing."""
    is_at_limit = error.err_code == _NOT_STORED and "exceeded" in (error.description or "")
    return error.err_code in _NO_ROOM or is_at_limit


class JetStream:
    """A connection that repeats its requests while the server is away, up to `retry_s`."""

    def __init__(self, client: Client, *, retry_s: float) -> None:
        self.client = client
        self.api = client.jetstream(timeout=REQUEST_S)
        self._retry_s = retry_s

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
                if isinstance(error, APIError) and _is_full(error):
                    raise JobsFull(
                        f"nats has no room ({error.description}): raise its limits, or free space"
                    ) from error
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
                    async with asyncio.timeout(_SILENCE_S):
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
                idle_heartbeat=_HEARTBEAT_S,
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


class Feed:
    """Every message of a stream's subjects in order, without its data, as long as it is open.

    It begins with the last message of each subject. A consumer that is lost with the server is made
    anew behind the last message taken, so that none is missed and none comes twice.
    """

    def __init__(
        self, stream: JetStream, name: str, subject: str, take: Callable[[Msg], None]
    ) -> None:
        self._stream = stream
        self._name = name
        self._subject = subject
        self._take = take
        self._position = 0
        self._grown = asyncio.Event()
        self._lost = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def reached(self, position: int) -> None:
        """Return when everything up to this sequence was taken.

        Raises `JobsUnavailable` where that takes far longer than a consumer that was lost.
        """
        try:
            async with asyncio.timeout(3 * _SILENCE_S):
                while self._position < position:
                    await self._grown.wait()
        except TimeoutError:
            raise JobsUnavailable(f"nats: {self._name} is not delivered") from None

    def restart(self) -> None:
        """The connection was broken: the consumer may be gone."""
        self._lost.set()

    async def close(self) -> None:
        """Takes nothing more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._consume()
            except (*TRANSIENT, nats.errors.Error, APIError) as error:
                log.debug("feed broken", stream=self._name, error=repr(error))
                await asyncio.sleep(0.1)
            except Exception:
                # Whoever waits here would wait for ever.
                log.exception("feed failed", stream=self._name)
                await asyncio.sleep(_HEARTBEAT_S)

    async def _consume(self) -> None:
        """Take messages until the consumer is lost."""
        self._lost.clear()
        heard, taken = time.monotonic(), 0

        async def take(message: Msg) -> None:
            nonlocal heard, taken
            heard = time.monotonic()
            headers = message.headers or {}
            if headers.get("Status") is not None:
                # A heartbeat says what was sent.
                if int(headers.get("Nats-Last-Consumer", taken)) != taken:
                    self._lost.set()
                return
            sequence = message.metadata.sequence
            if self._lost.is_set() or sequence.consumer != taken + 1:
                self._lost.set()
                return
            taken += 1
            self._take(message)
            self._reach(sequence.stream)

        config = api.ConsumerConfig(filter_subject=self._subject, headers_only=True)
        if self._position:
            config.deliver_policy = api.DeliverPolicy.BY_START_SEQUENCE
            config.opt_start_seq = self._position + 1
        else:
            config.deliver_policy = api.DeliverPolicy.LAST_PER_SUBJECT
        last = (await self._stream.api.stream_info(self._name)).state.last_seq
        async with self._stream.consumer(self._name, config, take) as info:
            if not info.num_pending:
                # What was there last may have been removed.
                self._reach(last)
            while not self._lost.is_set() and time.monotonic() - heard < _SILENCE_S:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._lost.wait(), _HEARTBEAT_S)

    def _reach(self, position: int) -> None:
        if position > self._position:
            self._position = position
            grown, self._grown = self._grown, asyncio.Event()
            grown.set()
