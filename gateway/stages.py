"""The stages of a job as calls to the services that do them: compose, learn, generate, and the estimate before them.

Main type: `Stages`. A call's errors are told at the caller's fields, its messages as events of the job, and a service
that is down, full or silent is asked again while patience lasts. This module knows neither queue nor order.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc
from google.rpc import status_pb2

from collage.v1 import (
    collage_pb2,
    collage_service_pb2,
    compositor_service_pb2,
    compositor_service_pb2_grpc,
    generator_service_pb2,
    generator_service_pb2_grpc,
    inversion_service_pb2,
    inversion_service_pb2_grpc,
    job_pb2,
)
from services.common import limits
from services.common.blobs import BlobStoreUnavailable
from services.common.errors import (
    TOO_LONG,
    CollageError,
    DataLoss,
    DeadlinePassed,
    Internal,
    InvalidRequest,
    MissingBlobs,
    ModelChanged,
    NotSupported,
    Overloaded,
    Unavailable,
    from_rpc,
    from_status,
)
from services.common.field import Field, Places
from services.common.rpc import bounded, outgoing
from services.common.telemetry import log

# Composing 32 layers at 2048 x 2048 takes seconds, and a network that draws their control pictures takes seconds for
# each. Longer than that, a call is made again, and finds what networks gave; it is shorter than a job's patience with a
# stage, so that a compositor that hangs loses no job.
COMPOSE_TIMEOUT_S = 100.0
ASK_TIMEOUT_S = 15.0
# Words may wait and learn for as long as they tell of it. A call bounds what a lost one can hold; it is made again, and
# goes on from the checkpoint.
LEARN_TIMEOUT_S = 24 * 3600.0
# Longest silence within a call that learns or draws: a part that hangs. A training step of a large model on a CPU takes
# minutes, and so does reading such a model. A drawing has no other limit here: it waits for as long as it takes, and
# the generator ends one that is at work for too long.
SILENCE_S = 600.0
# How long a stage that is down or full is tried again before the job is given back to the queue.
PATIENCE_S = 120.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 3.0

Answer = TypeVar("Answer")


class Emit(Protocol):
    """Appends one event to the job's log; an event whose key stands there already is dropped.

    `queued` is told, not logged, and not waited for: the place at the part that does the work.
    """

    async def __call__(
        self, event: collage_service_pb2.JobEvent, *, key: str | None = None
    ) -> None:
        """Returns when the event is durable."""
        ...


class Stages:
    """What the three services do for a job."""

    def __init__(
        self,
        *,
        compositor: compositor_service_pb2_grpc.CompositorServiceStub,
        inversion: inversion_service_pb2_grpc.InversionServiceStub,
        generator: generator_service_pb2_grpc.GeneratorServiceStub,
    ) -> None:
        self._compositor = compositor
        self._inversion = inversion
        self._generator = generator

    async def compose(
        self, request: compositor_service_pb2.ComposeRequest, field: Field
    ) -> compositor_service_pb2.ComposeResponse:
        """The plate; `field` is where the collage stands in the caller's request.

        Raises:
            CollageError: told at the caller's fields.
        """
        call = self._compositor.Compose(
            request, timeout=bounded(COMPOSE_TIMEOUT_S), metadata=outgoing()
        )
        return await asked(call, {"collage": field["collage"], "redo": field})

    async def cut(
        self, request: compositor_service_pb2.CutRequest
    ) -> compositor_service_pb2.CutResponse:
        """What is cut out of a picture; the fields are the caller's own. Errors as in `compose`."""
        call = self._compositor.Cut(
            request, timeout=bounded(COMPOSE_TIMEOUT_S), metadata=outgoing()
        )
        return await asked(call)

    async def estimate(
        self, request: generator_service_pb2.EstimateRequest, field: Field
    ) -> generator_service_pb2.EstimateResponse:
        """Tokens, cost and warnings; `field` and errors as in `compose`."""
        call = self._generator.Estimate(
            request, timeout=bounded(ASK_TIMEOUT_S), metadata=outgoing()
        )
        return await asked(call, _generator_places(field))

    async def estimate_words(
        self, learning: job_pb2.Learning
    ) -> inversion_service_pb2.EstimateWordsResponse | None:
        """What learning takes; None where nobody can tell, which is no reason to refuse what can wait.

        Raises:
            CollageError: told at the caller's fields.
        """
        call = self._inversion.EstimateWords(
            inversion_service_pb2.EstimateWordsRequest(learn=learning.request),
            timeout=bounded(ASK_TIMEOUT_S),
            metadata=outgoing(),
        )
        try:
            told = await asked(call, _subject_places(learning))
        # An earlier version of the service has no such call.
        except (Unavailable, Overloaded, DeadlinePassed, NotSupported) as error:
            log.info("learning not estimated", message=str(error))
            return None
        return None if told.words and not told.seconds else told

    async def learn(
        self, learning: job_pb2.Learning, emit: Emit
    ) -> dict[str, collage_service_pb2.Word]:
        """Learns words together, in one call, and answers them by layer.

        Each of its messages renews the patience with it.

        Raises:
            CollageError: of the first layer that gets no word, unless such layers are to be skipped.
        """
        patience = Patience()
        words: dict[str, collage_service_pb2.Word] = await patiently(
            lambda: self._learn(learning, emit, patience), patience
        )
        return words

    async def _learn(
        self, learning: job_pb2.Learning, emit: Emit, patience: "Patience"
    ) -> dict[str, collage_service_pb2.Word]:
        """One call.

        Raises:
            Unavailable: it fell silent, or used up its limit while it got on; made again, it goes on.
        """
        request = learning.request
        index_of = dict(
            zip((each.layer for each in request.subjects), learning.layers, strict=True)
        )
        places = _subject_places(learning)
        words: dict[str, collage_service_pb2.Word] = {}
        failed: set[str] = set()

        async def go_without(layer: str, error: CollageError) -> None:
            failed.add(layer)
            warning = collage_pb2.Warning(
                reason="WORD_FAILED",
                field=str(Field("collage")["layers"][index_of[layer]]["appearance"]),
                message=f"drawn without its word: {error.message}",
            )
            await emit(collage_service_pb2.JobEvent(warning=warning), key=f"word-failed-{layer}")

        call = self._inversion.LearnWords(request, timeout=LEARN_TIMEOUT_S, metadata=outgoing())
        try:
            async for answer in _answers(call, silence_s=SILENCE_S):
                patience.renew()
                # Told while the call waits for its turn.
                if not answer.HasField("progress"):
                    continue
                layer = answer.progress.layer
                if answer.HasField("error"):
                    error = _error_of(answer.error).moved(places)
                    if not learning.skips_failed:
                        raise error
                    await go_without(layer, error)
                    continue
                # A word is told once, by whichever attempt.
                key = f"word-{layer}" if answer.HasField("word") else None
                await emit(collage_service_pb2.JobEvent(word=answer.progress), key=key)
                if answer.HasField("word"):
                    words[layer] = answer.word
        except (
            InvalidRequest,
            MissingBlobs,
            DataLoss,
            NotSupported,
            Internal,
            DeadlinePassed,
        ) as error:
            if isinstance(error, DeadlinePassed) and error.reason != TOO_LONG:
                raise Unavailable(str(error), reason="LEARNING_GOES_ON") from error
            told = _still_served(error, request.model).moved(places)
            if not learning.skips_failed or isinstance(told, ModelChanged):
                raise told from error
            for layer in sorted(index_of.keys() - words.keys() - failed, key=index_of.__getitem__):
                await go_without(layer, told)
        return words

    async def generate(
        self, request: generator_service_pb2.GenerateRequest, field: Field, emit: Emit
    ) -> None:
        """Draws, and tells of its turn, steps, previews and pictures; `field` and errors as in `compose`.

        Each of its messages renews the patience with it.
        """
        patience = Patience()
        await patiently(lambda: self._generate(request, field, emit, patience), patience)

    async def _generate(
        self,
        request: generator_service_pb2.GenerateRequest,
        field: Field,
        emit: Emit,
        patience: "Patience",
    ) -> None:
        call = self._generator.Generate(request, metadata=outgoing())
        try:
            async for answer in _latest(_answers(call, silence_s=SILENCE_S)):
                patience.renew()
                kind = answer.WhichOneof("event")
                if kind == "queued":
                    await emit(collage_service_pb2.JobEvent(queued=answer.queued))
                elif kind == "step":
                    await emit(collage_service_pb2.JobEvent(step=answer.step))
                elif kind == "preview":
                    await emit(collage_service_pb2.JobEvent(preview=answer.preview))
                elif kind == "image":
                    await emit(
                        collage_service_pb2.JobEvent(image=answer.image),
                        key=f"image-{answer.image.index}",
                    )
        except InvalidRequest as error:
            told = _still_served(error, request.sampling.model)
            raise told.moved(_generator_places(field)) from error


async def asked(call: Awaitable[Answer], places: Places | None = None) -> Answer:
    """The answer of another service, its error as one of ours, told at the caller's places."""
    try:
        return await call
    except grpc.RpcError as error:
        raise from_rpc(error).moved(places or {}) from error


def _generator_places(field: Field) -> Places:
    """Where what the generator is asked with stands in the caller's request."""
    collage = field["collage"]
    return {
        "sampling": field["sampling"],
        "parent": field["parent"],
        **{name: collage[name] for name in ("size", "prompt", "negative_prompt", "layers")},
    }


def _subject_places(learning: job_pb2.Learning) -> Places:
    """Where what is learned stands in the caller's request."""
    field = Field(learning.field)
    layers = field["collage"]["layers"]
    model = (field if learning.field == "learn" else field["sampling"])["model"]
    subjects = {
        f"subjects[{number}]": layers[index] for number, index in enumerate(learning.layers)
    }
    return {"model": model, **subjects}


def _still_served(error: CollageError, model: str) -> CollageError:
    """The error of a part; of a model that is served no more in words for who sent the job when it was."""
    if error.reason != "UNKNOWN_MODEL":
        return error
    return ModelChanged(
        f"model {model}, for which the job was accepted, is served no more", reason="MODEL_GONE"
    )


def _error_of(message: collage_service_pb2.JobError) -> CollageError:
    """The error that a part told within a stream."""
    return from_status(
        status_pb2.Status(code=message.code, message=message.message, details=message.details)
    )


async def _answers(call: Any, *, silence_s: float | None = None) -> AsyncIterator[Any]:
    """A stream's messages; its error as one of ours; its end when the reader goes away.

    Raises:
        Unavailable: no message came for `silence_s`.
    """
    answers = aiter(call)
    try:
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    answer = await anext(answers)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                told = f"a part of the system tells nothing for {silence_s:g} s"
                raise Unavailable(told, reason="SILENT") from error
            yield answer
    except grpc.RpcError as error:
        raise from_rpc(error) from error
    finally:
        call.cancel()


async def _latest(answers: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The same messages, without steps and previews that later ones have overtaken while the log was slow."""
    waiting: list[Any] = []
    news = asyncio.Event()

    async def collect() -> None:
        async for answer in answers:
            if waiting and answer.HasField("step") and waiting[-1].HasField("step"):
                waiting.pop()
            if answer.HasField("preview"):
                previews = [one for one in waiting if one.HasField("preview")]
                if len(previews) >= limits.MAX_IMAGES:
                    waiting.remove(previews[0])
            waiting.append(answer)
            news.set()

    collector = asyncio.create_task(collect())
    collector.add_done_callback(lambda _: news.set())
    try:
        while True:
            await news.wait()
            news.clear()
            while waiting:
                yield waiting.pop(0)
            if collector.done() and not waiting:
                collector.result()
                return
    finally:
        collector.cancel()
        await asyncio.gather(collector, return_exceptions=True)


class Patience:
    """How long a stage that is down, full or silent is tried again, and after what pause: PATIENCE_S in all."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """The stage gets on: what befalls it now is another matter."""
        self.end_s = time.monotonic() + PATIENCE_S
        self.pause_s = FIRST_PAUSE_S

    def take(self, least_s: float) -> float | None:
        """The next pause, at least so long; None where patience is at its end."""
        wait_s = max(self.pause_s, least_s)
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        return wait_s if time.monotonic() + wait_s <= self.end_s else None


async def patiently(attempt: Callable[[], Awaitable[Any]], patience: Patience | None = None) -> Any:
    """Tries again while a part is down, full or silent, with growing pauses, until patience is at its end."""
    patience = patience or Patience()
    while True:
        try:
            return await attempt()
        except (Unavailable, Overloaded, DeadlinePassed, BlobStoreUnavailable) as error:
            # Of the work's own limit: again it would take as long.
            if isinstance(error, DeadlinePassed) and error.reason == TOO_LONG:
                raise
            wait_s = patience.take(getattr(error, "retry_after_s", 0.0))
            if wait_s is None:
                # A job has no deadline of its own: one that passed bounded a call to a part that hangs or waits for
                # storage, and may answer another time: the job is given back.
                if isinstance(error, DeadlinePassed):
                    raise Unavailable(str(error), reason="SILENT") from error
                raise
            log.info("stage tried again", message=str(error), wait_s=wait_s)
            await asyncio.sleep(wait_s)
