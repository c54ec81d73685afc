"""`NatsLog`: an append-only log per job on NATS JetStream, written by compare-and-set.

One file-backed stream, one subject per job. Every entry carries the whole changing state of its job
and is stored only right behind the entry its writer had read (expected last sequence of the
subject): the newest entry is the state, every change is one write, and nobody overwrites what he
has not seen. Wake-up calls between processes are plain messages and may be lost: everyone who waits
also looks by himself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api
from nats.js.errors import (
    BadRequestError,
    NoStreamResponseError,
    NotFoundError,
    ServerError,
    ServiceUnavailableError,
)

from gateway.jobs import JobState, JobsUnavailable

_T = TypeVar("_T")

_ENTRY_HEADER = "Collage-Entry"
_EXPECTED_HEADER = "Nats-Expected-Last-Subject-Sequence"
_WRONG_LAST_SEQUENCE = 10071
# Seconds for one request to the server.
REQUEST_S = 2.0
# Seconds between two looks of someone who waits and hears no wake-up call.
_POLL_S = 0.5
# What the server's limit on a message leaves for headers.
_HEADERS_BYTES = 4096
# Entries asked for at once when all jobs are counted.
_FETCHED = 500
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One log entry: what it is, and the state of its job from here on.

    `kind`: event (has a payload; the terminal one is final), or claimed, extended, released, cancel.
    `sequence` counts the events up to this one. `write` tells a writer whose answer was lost that
    the entry is its own.
    """

    kind: str = ""
    write: str = ""
    at: float = 0.0
    sequence: int = 0
    key: str | None = None
    state: JobState = JobState.QUEUED
    attempt: int = 0
    token: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    cancel_requested: bool = False

    def then(self, kind: str, **changes: Any) -> Entry:
        """The entry behind this one."""
        fresh: dict[str, Any] = {
            "kind": kind,
            "write": uuid.uuid4().hex,
            "at": time.time(),
            "key": None,
        }
        return dataclasses.replace(self, **(fresh | changes))

    def then_event(self, key: str | None) -> Entry:
        """One more event."""
        return self.then("event", sequence=self.sequence + 1, key=key)

    def then_end(self, state: JobState) -> Entry:
        """The terminal event."""
        return self.then(
            "event", sequence=self.sequence + 1, state=state, token="", finished_at=time.time()
        )

    def dump(self) -> str:
        """As text for a header."""
        return json.dumps(dataclasses.asdict(self) | {"state": self.state.value})

    @classmethod
    def load(cls, text: str) -> Entry:
        """The reverse of `dump`."""
        fields = json.loads(text)
        return cls(**(fields | {"state": JobState(fields["state"])}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """An entry as the stream holds it. `position` is its sequence in the stream, 0 before any."""

    entry: Entry = Entry()
    payload: bytes = b""
    position: int = 0


class JetStream:
    """A connection that repeats its requests while the server is away, up to `retry_s`."""

    def __init__(self, client: Client, *, retry_s: float) -> None:
        self.client = client
        self.api = client.jetstream(timeout=REQUEST_S)
        self._retry_s = retry_s

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
        limit_bytes = self.client.max_payload - _HEADERS_BYTES
        if len(payload) > limit_bytes:
            raise ValueError(f"payload has {len(payload)} bytes, the queue takes {limit_bytes}")
        sent = {**headers, _EXPECTED_HEADER: str(behind)}
        try:
            stored = await self.ask(lambda: self.api.publish(subject, payload, headers=sent))
        except BadRequestError as error:
            if error.err_code != _WRONG_LAST_SEQUENCE:
                raise
            return None
        return int(stored.seq)


class NatsLog:
    """The logs of all jobs of one queue; `name` begins its stream and its subjects."""

    def __init__(self, stream: JetStream, *, name: str) -> None:
        self._stream = stream
        self._name = name
        # Held by whoever waits, so that a job nobody watches leaves nothing here.
        self._ticks: weakref.WeakValueDictionary[str, asyncio.Event] = weakref.WeakValueDictionary()

    async def open(self, *, replicas: int) -> None:
        """Create the stream where absent and listen for wake-up calls."""
        await self._stream.create_stream(self._logs, self._subject("*"), replicas=replicas)
        await self._stream.client.subscribe(f"{self._name}.bell.*", cb=self._on_bell)

    async def newest(self, job_id: str) -> Logged:
        """The job's last entry; the first of all entries' default where it has none."""
        message = await self._stream.find(self._logs, subject=self._subject(job_id))
        return Logged() if message is None else _logged(message)

    async def follow(self, job_id: str, *, live: bool) -> AsyncIterator[Logged]:
        """Every entry from the first; with `live` without end, else up to the newest there is."""
        position = 0
        while True:
            tick = self.tick(job_id)
            logged = await self._next(job_id, position)
            if logged is not None:
                position = logged.position
                yield logged
            elif live:
                await self.wait(tick)
            else:
                return

    async def advance(
        self,
        job_id: str,
        step: Callable[[Entry], Entry | None],
        payload: bytes = b"",
        *,
        known: Logged | None = None,
    ) -> Logged:
        """Write what `step` makes of the newest entry, right behind it; None writes nothing.

        Answers the entry written, or the newest. `payload` goes with an event only. `known` saves a
        look where the caller wrote the newest entry itself, as far as it knows.
        """
        newest = known or await self.newest(job_id)
        while (entry := step(newest.entry)) is not None:
            data = payload if entry.kind == "event" else b""
            headers = {_ENTRY_HEADER: entry.dump()}
            position = await self._stream.store(
                self._subject(job_id), data, headers=headers, behind=newest.position
            )
            if position is None:
                # Another process wrote first, or an earlier try of ours whose answer was lost.
                behind = await self._next(job_id, newest.position)
                if behind is not None and behind.entry.write == entry.write:
                    position = behind.position
            if position is not None:
                await self._ring(job_id)
                return Logged(entry=entry, payload=data, position=position)
            newest = await self.newest(job_id)
        return newest

    async def states(self) -> dict[JobState, int]:
        """How many jobs that have a log are in each state."""
        counted = dict.fromkeys(JobState, 0)
        newest = await self._stream.api.pull_subscribe(
            self._subject("*"),
            stream=self._logs,
            config=api.ConsumerConfig(
                deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
                ack_policy=api.AckPolicy.NONE,
                headers_only=True,
                mem_storage=True,
                inactive_threshold=10.0,
            ),
        )
        try:
            left = (await newest.consumer_info()).num_pending
            while left > 0:
                messages = await newest.fetch(min(left, _FETCHED), timeout=REQUEST_S)
                for message in messages:
                    counted[Entry.load(message.headers[_ENTRY_HEADER]).state] += 1
                left -= len(messages)
        finally:
            await newest.unsubscribe()
        return counted

    async def ready(self) -> None:
        """Ask for the stream once; raises what the client raises."""
        await self._stream.api.stream_info(self._logs)

    def tick(self, job_id: str) -> asyncio.Event:
        """What is set when the job's log grows next. Take it before looking at the log."""
        return self._ticks.setdefault(job_id, asyncio.Event())

    async def wait(self, tick: asyncio.Event) -> None:
        """Return when the tick is set, or when it is time to look without."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(tick.wait(), _POLL_S)

    @property
    def _logs(self) -> str:
        return f"{self._name}-logs"

    def _subject(self, job_id: str) -> str:
        return f"{self._name}.logs.{job_id}"

    async def _next(self, job_id: str, position: int) -> Logged | None:
        """The job's first entry behind this position."""
        message = await self._stream.find(
            self._logs, seq=position + 1, subject=self._subject(job_id), next=True
        )
        return None if message is None else _logged(message)

    async def _ring(self, job_id: str) -> None:
        self._wake(job_id)
        with contextlib.suppress(nats.errors.Error):
            await self._stream.client.publish(f"{self._name}.bell.{job_id}")

    async def _on_bell(self, message: Msg) -> None:
        self._wake(message.subject.rsplit(".", 1)[1])

    def _wake(self, job_id: str) -> None:
        if (tick := self._ticks.pop(job_id, None)) is not None:
            tick.set()


def _logged(message: api.RawStreamMsg) -> Logged:
    entry = Entry.load(message.headers[_ENTRY_HEADER])
    return Logged(entry=entry, payload=message.data or b"", position=message.seq)
