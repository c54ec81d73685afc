"""Every message of a stream as it comes, by one ordered consumer.

Main type: `Feed`. It knows no jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import nats.errors
from nats.aio.msg import Msg
from nats.js import api
from nats.js.errors import APIError

from gateway.jobs import JobsUnavailable
from gateway.jobs.nats_stream import HEARTBEAT_S, SILENCE_S, TRANSIENT, JetStream
from services.common.telemetry import log


class Feed:
    """Every message of a stream's subjects in order, without its data, as long as it is open.

    It begins with the last message of each subject. A consumer that is lost with the server is made
    anew behind the last message taken, so that none is missed and none comes twice; so it is when the connection was
    broken.
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
        stream.on_reconnect.append(self._lost.set)
        self._task = asyncio.create_task(self._run())

    async def reached(self, position: int) -> None:
        """Return when everything up to this sequence was taken.

        Raises `JobsUnavailable` where that takes far longer than a consumer that was lost.
        """
        try:
            async with asyncio.timeout(3 * SILENCE_S):
                while self._position < position:
                    await self._grown.wait()
        except TimeoutError:
            raise JobsUnavailable(f"nats: {self._name} is not delivered") from None

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
                await asyncio.sleep(HEARTBEAT_S)

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
            while not self._lost.is_set() and time.monotonic() - heard < SILENCE_S:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._lost.wait(), HEARTBEAT_S)

    def _reach(self, position: int) -> None:
        if position > self._position:
            self._position = position
            grown, self._grown = self._grown, asyncio.Event()
            grown.set()
