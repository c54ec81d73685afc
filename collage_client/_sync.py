"""The synchronous flavour: `CollageClient` and `Job`, which run their asynchronous twins on a loop of their own.

No logic and no signature is written twice: each method is the twin's, waited for, with the twin's arguments and types.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import grpc

from collage.v1 import collage_service_pb2 as pb
from collage_client._client import JOB_TIMEOUT_S, AsyncCollageClient
from collage_client._job import AsyncJob

A = TypeVar("A")
P = ParamSpec("P")
R = TypeVar("R")


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="collage-client", daemon=True
        )
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        return self._loop.is_closed()

    def wait(self, work: Coroutine[Any, Any, R]) -> R:
        """The outcome of `work`, which carries its own deadline, so that this wait needs no second bound."""
        if self.is_closed:
            work.close()
            raise RuntimeError("this client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


class _Twin(Generic[A]):
    """Something synchronous over its asynchronous twin."""

    _loop: _Loop
    _async: A


def _waited(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[_Twin[A], P], R]:
    """The twin's method, waited for."""

    @functools.wraps(method)
    def wait(self: _Twin[A], /, *args: P.args, **options: P.kwargs) -> R:
        return self._loop.wait(method(self._async, *args, **options))

    return wait


def _followed(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, AsyncJob]],
) -> Callable[Concatenate[_Twin[A], P], Job]:
    """The twin's method, waited for, whose handle becomes a synchronous one."""

    @functools.wraps(method)
    def wait(self: _Twin[A], /, *args: P.args, **options: P.kwargs) -> Job:
        return Job(self._loop, self._loop.wait(method(self._async, *args, **options)))

    return wait


class Job(_Twin[AsyncJob]):
    """A job at the server: `AsyncJob` without `await`.

    An interrupt while waiting leaves the job running: `cancel` stops it.
    """

    def __init__(self, loop: _Loop, job: AsyncJob) -> None:
        self._loop = loop
        self._async = job

    @property
    def name(self) -> str:
        """The job's name, "jobs/..."."""
        return self._async.name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> pb.JobEvent:
        # A coroutine must not end with StopAsyncIteration.
        event = self._loop.wait(self._next())
        if event is None:
            raise StopIteration
        return event

    async def _next(self) -> pb.JobEvent | None:
        return await anext(self._async, None)

    close = _waited(AsyncJob.close)
    result = _waited(AsyncJob.result)
    record = _waited(AsyncJob.record)
    cancel = _waited(AsyncJob.cancel)


class CollageClient(_Twin[AsyncCollageClient]):
    """A connection to one collage service, for programs without an event loop. Close it, or use `with`.

    Methods, arguments, types and errors are those of `AsyncCollageClient`, without `await`; jobs are `Job`.
    """

    def __init__(self, address: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._loop = _Loop()
        self._async = self._loop.wait(self._open(address, credentials))

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
        if not self._loop.is_closed:
            self._loop.wait(self._async.close())
            self._loop.close()

    def watch(self, name: str, *, after_sequence: int = 0, timeout_s: float = JOB_TIMEOUT_S) -> Job:
        """See `AsyncCollageClient.watch`."""
        watched = self._async.watch(name, after_sequence=after_sequence, timeout_s=timeout_s)
        return Job(self._loop, watched)

    plan = _waited(AsyncCollageClient.plan)
    cut_out = _waited(AsyncCollageClient.cut_out)
    generate = _followed(AsyncCollageClient.generate)
    redo = _followed(AsyncCollageClient.redo)
    learn = _followed(AsyncCollageClient.learn)
    create_job = _waited(AsyncCollageClient.create_job)
    job = _waited(AsyncCollageClient.job)
    cancel = _waited(AsyncCollageClient.cancel)
    jobs = _waited(AsyncCollageClient.jobs)
    put = _waited(AsyncCollageClient.put)
    fetch = _waited(AsyncCollageClient.fetch)
    models = _waited(AsyncCollageClient.models)
    cut_out_models = _waited(AsyncCollageClient.cut_out_models)
    words = _waited(AsyncCollageClient.words)
    word = _waited(AsyncCollageClient.word)
    import_word = _waited(AsyncCollageClient.import_word)
    delete_word = _waited(AsyncCollageClient.delete_word)
