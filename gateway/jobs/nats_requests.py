"""The requests on NATS: one message each in a file-backed stream, created once ever.

Main type: `Requests`. A request and the newest entry of its job's log are the job's record.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping

from nats.aio.msg import Msg
from nats.js import api

from gateway.jobs import JobMissing, JobRecord
from gateway.jobs.nats_log import Entry, Logged, NatsLog
from gateway.jobs.nats_stream import JetStream

_HEADER = "Collage-Request"
_JOB_ID = re.compile(r"job-[0-9a-f]{32}")
# Requests under way at once when many jobs are looked at.
_PARALLEL = 32


class Requests:
    """Those of one queue; `name` begins its stream and its subjects."""

    def __init__(self, stream: JetStream, log: NatsLog, *, name: str) -> None:
        self._stream = stream
        self._log = log
        self._name = name
        self.stream_name = f"{name}-requests"
        self.all_subjects = f"{name}.requests.*"

    async def add(self, job_id: str, request_id: str, body: bytes) -> None:
        """See to it that the job is there, by this or by a racing call. ValueError: too large."""
        head = json.dumps({"request_id": request_id, "created_at": time.time()})
        await self._stream.store(self._subject(job_id), body, headers={_HEADER: head}, behind=0)

    async def find(self, job_id: str) -> tuple[api.RawStreamMsg, Logged]:
        """The job's request and its newest entry. Raises `JobMissing`."""
        if not _JOB_ID.fullmatch(job_id):
            raise JobMissing(job_id)
        request, newest = await asyncio.gather(
            self._stream.find(self.stream_name, subject=self._subject(job_id)),
            self._log.newest(job_id),
        )
        if request is None:
            raise JobMissing(job_id)
        return request, newest

    async def last(self) -> int:
        """The number of the last one."""
        return await self._stream.last(self.stream_name)

    async def count(self) -> int:
        """How many there are."""
        info = await self._stream.ask(lambda: self._stream.api.stream_info(self.stream_name))
        return int(info.state.messages)

    async def page(self, page_size: int, page_token: str) -> tuple[tuple[JobRecord, ...], str]:
        """See `Jobs.list`. A token is the number of the last job listed."""
        if page_token and not page_token.isdecimal():
            raise ValueError(f"page_token is {page_token[:40]!r}, must be one that list answered")
        info = await self._stream.ask(lambda: self._stream.api.stream_info(self.stream_name))
        state = info.state
        end = min(int(page_token), state.last_seq + 1) if page_token else state.last_seq + 1
        start = max(end - page_size, state.first_seq, 1)
        turn = asyncio.Semaphore(_PARALLEL)

        async def record(number: int) -> JobRecord | None:
            async with turn:
                request = await self._stream.find(self.stream_name, seq=number)
                if request is None:
                    return None
                newest = await self._log.newest(job_id_of_subject(request.subject or ""))
                return record_of(request, newest.entry, newest.result)

        found = await asyncio.gather(*(record(each) for each in range(end - 1, start - 1, -1)))
        records = tuple(each for each in found if each is not None)
        return records, str(start) if start > max(state.first_seq, 1) else ""

    def _subject(self, job_id: str) -> str:
        return f"{self._name}.requests.{job_id}"


def job_id_of_subject(subject: str) -> str:
    """The job that a message is of, whichever stream holds it."""
    return subject.rsplit(".", 1)[1]


def record_of(message: Msg | api.RawStreamMsg, newest: Entry, result: bytes = b"") -> JobRecord:
    """A request and the newest entry of its job's log as the record they are."""
    headers: Mapping[str, str] = message.headers or {}
    head = json.loads(headers[_HEADER])
    return JobRecord(
        id=job_id_of_subject(message.subject or ""),
        request_id=head["request_id"],
        state=newest.state,
        attempt=newest.attempt,
        lost=newest.lost,
        created_at=head["created_at"],
        started_at=newest.started_at,
        finished_at=newest.finished_at,
        body=message.data or b"",
        result=result,
        cancel_requested=newest.cancel_requested,
        ahead=newest.ahead,
    )
