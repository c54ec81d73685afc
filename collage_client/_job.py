"""A job that a caller follows: `AsyncJob`, and `JobResult`, what it ended with.

A handle holds no events: it goes through them once, notes what the result needs, and takes a broken stream up after the
last event it gave.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from collage.v1 import collage_service_pb2 as pb
from collage_client._calls import TERMINAL_EVENTS, Calls, Span
from collage_client._errors import error_of_job

# Seconds. A call that runs no model answers within this or not at all.
CALL_TIMEOUT_S = 60.0

Events = AsyncGenerator[pb.JobEvent, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """A finished job: its record, its pictures as PNG bytes in order of index, what it learned, its timings.

    `words` maps layer names to word names; `stage_seconds` stage names to wall-clock seconds.
    """

    job: pb.Job
    images: tuple[bytes, ...]
    words: dict[str, str]
    stage_seconds: dict[str, float]


class AsyncJob:
    """A job at the server. It goes on whether or not anybody follows it; `cancel` stops it.

    `name` is the job's ("jobs/..."). Iterating gives its events, each once, over broken streams; leaving the loop early
    and iterating again goes on after the last one given. As a context manager it stops listening at the end.
    """

    def __init__(self, calls: Calls, name: str, span: Span, *, after_sequence: int = 0) -> None:
        self.name = name
        self._calls = calls
        self._span = span
        self._after_sequence = after_sequence
        self._first: pb.JobEvent | None = None
        self._events: Events | None = None
        self._words: dict[str, str] = {}
        self._end: pb.JobEvent | None = None
        self._result: JobResult | None = None

    @classmethod
    async def of(cls, calls: Calls, events: Events, span: Span) -> AsyncJob:
        """The job that a stream tells of, once its first event names it."""
        first = await anext(events)
        job = cls(calls, first.job, span)
        job._first, job._events = first, events
        return job

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pb.JobEvent:
        if self._end is not None:
            raise StopAsyncIteration
        event, self._first = self._first, None
        if event is None:
            event = await self._next()
        self._after_sequence = max(self._after_sequence, event.sequence)
        kind = event.WhichOneof("kind")
        if kind == "word" and event.word.word:
            self._words[event.word.layer] = event.word.word
        elif kind in TERMINAL_EVENTS:
            self._end = event
        return event

    async def close(self) -> None:
        """Stops listening. The job goes on, unless it was created to be cancelled on disconnect."""
        events, self._events = self._events, None
        if events is not None:
            await events.aclose()

    async def result(self) -> JobResult:
        """Waits for the end; the record, the pictures and what was learned. Asked again, it answers the same.

        Raises:
            JobFailed: the job failed or was cancelled.
        """
        if self._result is None:
            async for _ in self:
                pass
            end = self._end
            assert end is not None, "iteration ends with the terminal event"
            match end.WhichOneof("kind"):
                case "failed":
                    raise error_of_job(self.name, end.failed)
                case "cancelled":
                    raise error_of_job(self.name, end.cancelled)
            record = await self.record()
            images = [
                await self._calls.fetch(image.blob.sha256, Span(CALL_TIMEOUT_S))
                for image in record.images
            ]
            self._result = JobResult(
                job=record,
                images=tuple(images),
                words=self._words,
                stage_seconds=dict(end.done.stage_seconds),
            )
        return self._result

    async def record(self, *, timeout_s: float = CALL_TIMEOUT_S) -> pb.Job:
        """The job's present state."""
        request = pb.GetJobRequest(name=self.name)
        record: pb.Job = (await self._calls.call("GetJob", request, Span(timeout_s))).job
        return record

    async def cancel(self, *, timeout_s: float = CALL_TIMEOUT_S) -> pb.Job:
        """Stops exactly this job; a finished one stays as it is."""
        request = pb.CancelJobRequest(name=self.name)
        record: pb.Job = (await self._calls.call("CancelJob", request, Span(timeout_s))).job
        return record

    async def _next(self) -> pb.JobEvent:
        if self._events is None:
            self._events = self._calls.follow(
                self._span, name=self.name, after_sequence=self._after_sequence
            )
        try:
            return await anext(self._events)
        except BaseException:
            # The stream is used up; who asks again goes on where it broke.
            self._events = None
            raise
