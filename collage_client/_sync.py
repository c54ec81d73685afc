"""The synchronous client: `CollageClient`, a facade that runs `AsyncCollageClient` on a loop of its own.

No logic lives here: every method hands its arguments on and waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from collage.v1 import blob_pb2, collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client._client import AsyncCollageClient, Events, JobResult, Work

T = TypeVar("T")
OnEvent = Callable[[pb.JobEvent], object]


class CollageClient:
    """A connection to one collage service, for programs without an event loop. Close it, or use `with`.

    Methods, arguments and errors are those of `AsyncCollageClient`; `generate`, `redo` and `learn` wait for
    the end of their job and call `on_event` (in the caller's thread) with each event on the way. An interrupt
    while waiting leaves the job running: `cancel` stops it.
    """

    def __init__(self, address: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="collage-client", daemon=True
        )
        self._thread.start()
        self._client = self._wait(self._open(address, credentials))

    @staticmethod
    async def _open(
        address: str, credentials: grpc.ChannelCredentials | None
    ) -> AsyncCollageClient:
        # The channel belongs to the loop it is made in.
        return AsyncCollageClient(address, credentials=credentials)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and ends the loop's thread. Again: nothing."""
        if self._loop.is_closed():
            return
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def plan(
        self,
        collage: collage_pb2.Collage,
        sampling: collage_pb2.Sampling | None = None,
        **options: Any,
    ) -> pb.Plan:
        """See `AsyncCollageClient.plan`."""
        return self._wait(self._client.plan(collage, sampling, **options))

    def generate(
        self,
        collage: collage_pb2.Collage,
        sampling: collage_pb2.Sampling | None = None,
        *,
        on_event: OnEvent = lambda event: None,
        **options: Any,
    ) -> JobResult:
        """Draws the collage; returns the finished job with its pictures. See `AsyncCollageClient.generate`."""
        return self._finish(self._client.generate(collage, sampling, **options), on_event)

    def redo(
        self,
        collage: collage_pb2.Collage,
        parent: bytes,
        layers: Sequence[str],
        sampling: collage_pb2.Sampling | None = None,
        *,
        on_event: OnEvent = lambda event: None,
        **options: Any,
    ) -> JobResult:
        """Draws layers of `parent` again; returns the finished job. See `AsyncCollageClient.redo`."""
        events = self._client.redo(collage, parent, layers, sampling, **options)
        return self._finish(events, on_event)

    def learn(
        self,
        collage: collage_pb2.Collage,
        layers: Sequence[str] = (),
        *,
        on_event: OnEvent = lambda event: None,
        **options: Any,
    ) -> JobResult:
        """Learns words; returns the finished job with the words' names. See `AsyncCollageClient.learn`."""
        return self._finish(self._client.learn(collage, layers, **options), on_event)

    def create_job(self, work: Work, **options: Any) -> pb.Job:
        """See `AsyncCollageClient.create_job`."""
        return self._wait(self._client.create_job(work, **options))

    def watch(self, name: str, **options: Any) -> Iterator[pb.JobEvent]:
        """See `AsyncCollageClient.watch`."""
        return self._each(self._client.watch(name, **options))

    def result(self, name: str, **options: Any) -> JobResult:
        """Waits for a job to end and returns it with its pictures. Options as for `watch`."""
        return self._finish(self._client.watch(name, **options), lambda event: None)

    def job(self, name: str, **options: Any) -> pb.Job:
        """See `AsyncCollageClient.job`."""
        return self._wait(self._client.job(name, **options))

    def cancel(self, name: str, **options: Any) -> pb.Job:
        """See `AsyncCollageClient.cancel`."""
        return self._wait(self._client.cancel(name, **options))

    def jobs(self, limit: int = 20, **options: Any) -> list[pb.Job]:
        """See `AsyncCollageClient.jobs`."""
        return self._wait(self._client.jobs(limit, **options))

    def put(self, data: bytes, **options: Any) -> blob_pb2.BlobRef:
        """See `AsyncCollageClient.put`."""
        return self._wait(self._client.put(data, **options))

    def fetch(self, blob: blob_pb2.BlobRef | str, **options: Any) -> bytes:
        """See `AsyncCollageClient.fetch`."""
        return self._wait(self._client.fetch(blob, **options))

    def models(self, **options: Any) -> list[pb.Model]:
        """See `AsyncCollageClient.models`."""
        return self._wait(self._client.models(**options))

    def words(self, **options: Any) -> list[pb.Word]:
        """See `AsyncCollageClient.words`."""
        return self._wait(self._client.words(**options))

    def word(self, name: str, **options: Any) -> pb.Word:
        """See `AsyncCollageClient.word`."""
        return self._wait(self._client.word(name, **options))

    def import_word(self, text: str, vectors: bytes, **options: Any) -> pb.Word:
        """See `AsyncCollageClient.import_word`."""
        return self._wait(self._client.import_word(text, vectors, **options))

    def delete_word(self, name: str, **options: Any) -> None:
        """See `AsyncCollageClient.delete_word`."""
        self._wait(self._client.delete_word(name, **options))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        # Every coroutine carries its own deadline, so this wait needs no second bound.
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _each(self, events: Events) -> Iterator[pb.JobEvent]:
        async def following() -> pb.JobEvent | None:
            return await anext(events, None)

        try:
            while (event := self._wait(following())) is not None:
                yield event
        finally:
            self._wait(events.aclose())

    def _finish(self, events: Events, on_event: OnEvent) -> JobResult:
        seen = []
        for event in self._each(events):
            on_event(event)
            seen.append(event)
        return self._wait(self._client.result(seen))
