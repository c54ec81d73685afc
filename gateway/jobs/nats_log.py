"""`NatsLog`: an append-only log per job on NATS JetStream, written by compare-and-set.

One file-backed stream, one subject per job. Every entry carries the whole changing state of its job
and is stored only right behind the entry its writer had read (expected last sequence of the
subject): the newest entry is the state, every change is one write, and nobody overwrites what he
has not seen.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nats.aio.msg import Msg
from nats.js import api

from gateway.jobs import Event, JobState
from gateway.jobs.nats_stream import JetStream

_ENTRY_HEADER = "Collage-Entry"
# Entries asked for at once.
_PAGE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One log entry: what it is, and the state of its job from here on.

    `kind`: event (has a payload; the terminal one is final), or claimed, extended, released, placed,
    cancel. `sequence` counts the events up to this one. `write` tells a writer whose answer was lost
    that the entry is its own. `number` is the job's place in the request stream, 0 where its writer
    did not know it. A terminal event's message holds the job's result behind the first
    `payload_bytes`.
    """

    kind: str = ""
    write: str = ""
    at: float = 0.0
    sequence: int = 0
    key: str | None = None
    state: JobState = JobState.QUEUED
    attempt: int = 0
    lost: int = 0
    token: str = ""
    # Given back, to be given to nobody for so long.
    rest_s: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    cancel_requested: bool = False
    ahead: int | None = None
    number: int = 0
    payload_bytes: int | None = None

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

    def then_end(self, state: JobState, **changes: Any) -> Entry:
        """The terminal event."""
        end: dict[str, Any] = {"token": "", "ahead": None, "finished_at": time.time()}
        return self.then("event", sequence=self.sequence + 1, state=state, **(end | changes))

    def dump(self) -> Mapping[str, str]:
        """As headers."""
        fields = dataclasses.asdict(self) | {"state": self.state.value}
        return {_ENTRY_HEADER: json.dumps(fields)}

    @classmethod
    def load(cls, headers: Mapping[str, str] | None) -> Entry:
        """The reverse of `dump`; fields of a later version are left out."""
        assert headers is not None, "an entry stands in its headers"
        told = json.loads(headers[_ENTRY_HEADER])
        known = {
            each.name: told[each.name] for each in dataclasses.fields(cls) if each.name in told
        }
        return cls(**(known | {"state": JobState(known["state"])}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """An entry as the stream holds it.

    `position` is its sequence in the stream, 0 before any; `time` when it was stored, by the stream's
    clock, 0 where that was not read.
    """

    entry: Entry = Entry()
    payload: bytes = b""
    result: bytes = b""
    position: int = 0
    time: float = 0.0

    @property
    def event(self) -> Event:
        """The event that it is."""
        final = self.entry.state if self.entry.state.is_final else None
        return Event(
            sequence=self.entry.sequence, at=self.entry.at, payload=self.payload, final=final
        )


class NatsLog:
    """The logs of all jobs of one queue; `name` begins its stream and its subjects."""

    def __init__(self, stream: JetStream, *, name: str) -> None:
        self._stream = stream
        self._name = name
        self.stream_name = f"{name}-logs"
        self.all_subjects = f"{name}.logs.*"

    async def newest(self, job_id: str) -> Logged:
        """The job's last entry; the first of all entries' default where it has none."""
        message = await self._stream.find(self.stream_name, subject=self._subject(job_id))
        return Logged() if message is None else _stored(message)

    async def at(self, position: int) -> Logged | None:
        """The entry at this place of the stream."""
        message = await self._stream.find(self.stream_name, seq=position)
        return None if message is None else _stored(message)

    async def now(self) -> float:
        """The time by which entries are stamped."""
        return await self._stream.now(self.stream_name)

    async def entries(
        self, job_id: str, *, behind: int = 0, headers_only: bool = False
    ) -> Sequence[Logged]:
        """The job's entries behind a position, up to 256; none at the end."""
        messages = await self._stream.scan(
            self.stream_name,
            self._subject(job_id),
            start=behind + 1,
            limit=_PAGE,
            headers_only=headers_only,
        )
        return [_delivered(message) for message in messages]

    async def keys(self, job_id: str) -> dict[str, int]:
        """The keyed events of a job's log, by key."""
        found: dict[str, int] = {}
        behind = 0
        while page := await self.entries(job_id, behind=behind, headers_only=True):
            behind = page[-1].position
            found |= {each.entry.key: each.entry.sequence for each in page if each.entry.key}
        return found

    async def position(self, job_id: str, sequence: int) -> int:
        """The place of the last entry up to the event of this number: a search, not a read."""
        if sequence == 0:
            return 0
        low, high = 0, await self._stream.last(self.stream_name)
        # At `low` the log is not past the event; behind `high` it is, or at its end.
        while low < high:
            middle = (low + high + 1) // 2
            logged = await self.next(job_id, middle - 1)
            if logged is not None and logged.entry.sequence <= sequence:
                low = max(logged.position, middle)
            else:
                high = middle - 1
        return low

    async def next(self, job_id: str, position: int) -> Logged | None:
        """The job's first entry behind this position."""
        message = await self._stream.find(
            self.stream_name, seq=position + 1, subject=self._subject(job_id), next=True
        )
        return None if message is None else _stored(message)

    async def write(
        self,
        job_id: str,
        entry: Entry,
        *,
        behind: Logged,
        payload: bytes = b"",
        result: bytes = b"",
    ) -> Logged | None:
        """Store an entry right behind that one; None where another was first.

        `payload` and `result` go with an event only.
        """
        if entry.kind != "event":
            payload = result = b""
        if result:
            entry = dataclasses.replace(entry, payload_bytes=len(payload))
        position = await self._stream.store(
            self._subject(job_id),
            payload + result,
            headers=entry.dump(),
            behind=behind.position,
        )
        if position is None:
            # Another process wrote first, or an earlier try of ours whose answer was lost.
            found = await self.next(job_id, behind.position)
            if found is None or found.entry.write != entry.write:
                return None
            position = found.position
        return Logged(entry=entry, payload=payload, result=result, position=position)

    async def advance(
        self,
        job_id: str,
        step: Callable[[Entry], Entry | None],
        payload: bytes = b"",
        *,
        result: bytes = b"",
        known: Logged | None = None,
    ) -> Logged:
        """Write what `step` makes of the newest entry, right behind it; None writes nothing.

        Answers the entry written, or the newest. `known` saves a look where the caller wrote the
        newest entry itself, as far as it knows.
        """
        newest = known or await self.newest(job_id)
        while (entry := step(newest.entry)) is not None:
            written = await self.write(job_id, entry, behind=newest, payload=payload, result=result)
            if written is not None:
                return written
            newest = await self.newest(job_id)
        return newest

    def _subject(self, job_id: str) -> str:
        return f"{self._name}.logs.{job_id}"


def _stored(message: api.RawStreamMsg) -> Logged:
    time_s = message.time.timestamp() if message.time else 0.0
    return _logged(message.headers, message.data or b"", message.seq or 0, time_s)


def _delivered(message: Msg) -> Logged:
    metadata = message.metadata
    return _logged(
        message.headers, message.data, metadata.sequence.stream, metadata.timestamp.timestamp()
    )


def _logged(headers: Mapping[str, str] | None, data: bytes, position: int, time_s: float) -> Logged:
    entry = Entry.load(headers)
    end = len(data) if entry.payload_bytes is None else entry.payload_bytes
    return Logged(
        entry=entry, payload=data[:end], result=data[end:], position=position, time=time_s
    )
