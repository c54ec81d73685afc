"""One job from its claim to its end: the order of the stages, written once.

Main type: `Pipeline`. It emits events and knows no queue: whoever runs it passes `emit`. Stages are addressed by their
inputs, so running a job again after a crash repeats only what was lost.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import grpc
from google.rpc import status_pb2

from collage.v1 import (
    collage_pb2,
    collage_service_pb2,
    generator_service_pb2,
    generator_service_pb2_grpc,
    inversion_service_pb2,
    inversion_service_pb2_grpc,
    job_pb2,
)
from gateway.jobs import job_id_of
from gateway.planner import Models, Planned, Planner, parse_redo
from services.common import limits, wire
from services.common.blobs import BlobRef, BlobStoreUnavailable
from services.common.collage import Collage, Layer
from services.common.errors import (
    CollageError,
    DeadlinePassed,
    Internal,
    InvalidRequest,
    MissingBlobs,
    NotSupported,
    Overloaded,
    Unavailable,
    from_rpc,
    from_status,
    quote,
)
from services.common.rpc import outgoing
from services.common.telemetry import log

# No picture takes an hour; a stream that lasts longer hangs.
GENERATE_TIMEOUT_S = 3600.0
# Words may wait and learn for as long as they tell of it. A call bounds what a lost one can hold; it is made again, and
# goes on from the checkpoint.
LEARN_TIMEOUT_S = 24 * 3600.0
# Longest silence within a call that learns. A training step of a large model on a CPU takes minutes, and so does
# reading such a model.
LEARN_SILENCE_S = 600.0
# How long a stage that is down or full is tried again before the job is given back to the queue.
PATIENCE_S = 120.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 3.0


class Emit(Protocol):
    """Appends one event to the job's log; an event whose key stands there already is dropped."""

    async def __call__(
        self, event: collage_service_pb2.JobEvent, *, key: str | None = None
    ) -> None:
        """Returns when the event is durable."""
        ...


def seed_of(request_id: str) -> int:
    """The seed of a request that names none: drawn from its id, so that a repeated call repeats it."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) >> 1


class Pipeline:
    """Compose and learn together, then generate."""

    def __init__(
        self,
        *,
        planner: Planner,
        models: Models,
        inversion: inversion_service_pb2_grpc.InversionServiceStub,
        generator: generator_service_pb2_grpc.GeneratorServiceStub,
    ) -> None:
        self._planner = planner
        self._models = models
        self._inversion = inversion
        self._generator = generator

    async def check(self, job: job_pb2.AcceptedJob) -> Planned | Collage:
        """Everything that can be found wrong before the job is queued: the plan, or the collage to learn from.

        Args:
            job: the request as it came, or as it was accepted. Words that it holds are not looked up again.
        """
        request, taken = job.request, {word.name: word for word in job.words}
        seed = seed_of(request.request_id)
        work = request.WhichOneof("work")
        if work == "generate":
            return await self._planner.plan(
                request.generate.collage,
                request.generate.sampling,
                seed=seed,
                root="generate.",
                taken=taken,
            )
        if work == "redo":
            return await self._planner.plan(
                request.redo.collage,
                request.redo.sampling,
                seed=seed,
                root="redo.",
                redo=parse_redo(request.redo),
                taken=taken,
            )
        if work == "learn":
            await self._models.named(request.learn.model, "learn.model")
            collage = wire.parse_collage(request.learn.collage, "learn.collage")
            _learners(collage, request.learn)
            return await self._planner.store(collage, root="learn.")
        raise InvalidRequest.of("work", "is empty; required: generate, redo or learn")

    async def run(
        self, job: job_pb2.AcceptedJob, attempt: int, emit: Emit
    ) -> collage_service_pb2.Done:
        """Does the work of a job and returns its terminal event's content.

        Raises:
            CollageError: what stopped it. Unavailable and Overloaded: worth another attempt later.
        """
        request = job.request
        if request.WhichOneof("work") == "learn":
            return await self._learn_only(request, attempt, emit)
        await emit(_stage("compose", attempt))
        done = collage_service_pb2.Done()
        # Neither needs the other (design section 4): the plate says where things are, a word how one looks.
        async with asyncio.TaskGroup() as group:
            planning = group.create_task(self._plan(job, emit, done))
            learning = group.create_task(self._learn_asked(request, attempt, emit, done))
        planned, words = planning.result(), learning.result()
        await emit(_stage("generate", attempt))
        with _timed(done, "generate"):
            await _patiently(lambda: self._generate(planned, {**planned.vectors(), **words}, emit))
        return done

    async def _plan(
        self,
        job: job_pb2.AcceptedJob,
        emit: Emit,
        done: collage_service_pb2.Done,
    ) -> Planned:
        with _timed(done, "compose"):
            planned: Planned | Collage = await _patiently(lambda: self.check(job))
        assert isinstance(planned, Planned), "a generation or a redo has a plan"
        await emit(
            collage_service_pb2.JobEvent(planned=collage_service_pb2.Planned(plan=planned.plan)),
            key="planned",
        )
        for number, warning in enumerate(planned.plan.warnings):
            await emit(collage_service_pb2.JobEvent(warning=warning), key=f"warning-{number}")
        return planned

    async def _learn_asked(
        self,
        request: collage_service_pb2.CreateJobRequest,
        attempt: int,
        emit: Emit,
        done: collage_service_pb2.Done,
    ) -> dict[str, BlobRef]:
        """The learned word of each layer that asks to learn one, by layer name."""
        root = str(request.WhichOneof("work"))
        work = getattr(request, root)
        collage = wire.parse_collage(work.collage, f"{root}.collage")
        names = {
            layer.name
            for layer in collage.layers
            if layer.visible and layer.appearance is not None and layer.appearance.word is None
        }
        if not names:
            return {}
        await emit(_stage("learn", attempt))
        patience = _Patience()
        with _timed(done, "learn"):
            words: dict[str, BlobRef] = await _patiently(
                lambda: self._learn(
                    job_id_of(request.request_id),
                    work.sampling.model,
                    collage,
                    names,
                    emit,
                    patience,
                    root=root,
                    skips_failed=work.skip_failed_words,
                ),
                patience,
            )
        return words

    async def _learn_only(
        self, request: collage_service_pb2.CreateJobRequest, attempt: int, emit: Emit
    ) -> collage_service_pb2.Done:
        job, work = job_id_of(request.request_id), request.learn
        collage = wire.parse_collage(work.collage, "learn.collage")
        done = collage_service_pb2.Done()
        await emit(_stage("learn", attempt))
        with _timed(done, "learn"):
            names, patience = _learners(collage, work), _Patience()
            await _patiently(
                lambda: self._learn(job, work.model, collage, names, emit, patience, root="learn"),
                patience,
            )
        return done

    async def _learn(
        self,
        job: str,
        model: str,
        collage: Collage,
        names: set[str],
        emit: Emit,
        patience: "_Patience",
        *,
        root: str,
        skips_failed: bool = False,
    ) -> dict[str, BlobRef]:
        """Learns the named layers' words together, in one call; each of its messages renews the patience.

        Raises:
            CollageError: of the first layer that gets no word, unless such layers are to be skipped.
            Unavailable: the call fell silent, or used up its limit while it got on; made again, it goes on.
        """
        words: dict[str, BlobRef] = {}
        indices = [i for i, layer in enumerate(collage.layers) if layer.name in names]
        call = self._inversion.LearnWords(
            inversion_service_pb2.LearnWordsRequest(
                model=(await self._models.named(model, "model")).name,
                subjects=[_subject(collage.layers[index]) for index in indices],
                job=job,
            ),
            timeout=LEARN_TIMEOUT_S,
            metadata=outgoing(),
        )
        fields = {
            f"subjects[{number}]": f"{root}.collage.layers[{index}]"
            for number, index in enumerate(indices)
        }
        index_of = {collage.layers[index].name: index for index in indices}
        failed: set[str] = set()

        async def go_without(layer: str, error: CollageError) -> None:
            failed.add(layer)
            warning = collage_pb2.Warning(
                reason="WORD_FAILED",
                field=f"collage.layers[{index_of[layer]}].appearance",
                message=f"drawn without its word: {error.message}",
            )
            await emit(collage_service_pb2.JobEvent(warning=warning), key=f"word-failed-{layer}")

        try:
            async for answer in _answers(call, silence_s=LEARN_SILENCE_S):
                patience.renew()
                # Told while the call waits for its turn.
                if not answer.HasField("progress"):
                    continue
                layer = answer.progress.layer
                if answer.HasField("error"):
                    error = _in_request(_error_of(answer.error), fields)
                    if not skips_failed:
                        raise error
                    await go_without(layer, error)
                    continue
                # A word is told once, by whichever attempt.
                key = f"word-{layer}" if answer.HasField("word") else None
                await emit(collage_service_pb2.JobEvent(word=answer.progress), key=key)
                if answer.HasField("word"):
                    words[layer] = wire.parse_blob(answer.word.vectors, "word.vectors")
        except DeadlinePassed as error:
            raise Unavailable(str(error), reason="LEARNING_GOES_ON") from error
        except (InvalidRequest, MissingBlobs, NotSupported, Internal) as error:
            told = _in_request(error, fields)
            if not skips_failed:
                raise told from error
            for layer in sorted(names - words.keys() - failed, key=index_of.__getitem__):
                await go_without(layer, told)
        return words

    async def _generate(self, planned: Planned, words: dict[str, BlobRef], emit: Emit) -> None:
        call = self._generator.Generate(
            _generate_request(planned, words), timeout=GENERATE_TIMEOUT_S, metadata=outgoing()
        )
        async for answer in _latest(_answers(call)):
            kind = answer.WhichOneof("event")
            if kind == "step":
                await emit(collage_service_pb2.JobEvent(step=answer.step))
            elif kind == "preview":
                await emit(collage_service_pb2.JobEvent(preview=answer.preview))
            elif kind == "image":
                await emit(
                    collage_service_pb2.JobEvent(image=answer.image),
                    key=f"image-{answer.image.index}",
                )


@contextmanager
def _timed(done: collage_service_pb2.Done, stage: str) -> Iterator[None]:
    """Notes the wall-clock seconds of a stage."""
    start = time.monotonic()
    yield
    done.stage_seconds[stage] = time.monotonic() - start


def _stage(stage: str, attempt: int) -> collage_service_pb2.JobEvent:
    return collage_service_pb2.JobEvent(
        stage_started=collage_service_pb2.StageStarted(stage=stage, attempt=attempt)
    )


def _learners(collage: Collage, work: collage_service_pb2.LearnWork) -> set[str]:
    """The names of the layers to learn."""
    known = [layer.name for layer in collage.layers]
    for index, name in enumerate(work.layers):
        if name not in known:
            raise InvalidRequest.of(
                f"learn.layers[{index}]", f"is {quote(name)}; layers: {', '.join(known)}"
            )
    names = set(work.layers) or {
        layer.name
        for layer in collage.layers
        if layer.appearance is not None and layer.appearance.word is None
    }
    if not names:
        raise InvalidRequest.of(
            "learn.layers", "is empty, and no layer's appearance says learn; required: one layer"
        )
    return names


def _subject(layer: Layer) -> inversion_service_pb2.Subject:
    return inversion_service_pb2.Subject(
        layer=layer.name,
        image=wire.render_picture(layer.image).blob,
        text=layer.text,
        vectors=layer.appearance.vectors if layer.appearance is not None else 1,
    )


def _error_of(message: collage_service_pb2.JobError) -> CollageError:
    """The error that a part told within a stream."""
    return from_status(
        status_pb2.Status(code=message.code, message=message.message, details=message.details)
    )


def _in_request(error: CollageError, fields: Mapping[str, str]) -> CollageError:
    """The error of a part, with the fields of its own request named as the caller's."""

    def renamed(field: str) -> str:
        head, dot, rest = field.partition(".")
        return f"{fields.get(head, head)}{dot}{rest}"

    if isinstance(error, MissingBlobs):
        return MissingBlobs({renamed(field): digest for field, digest in error.missing.items()})
    if isinstance(error, InvalidRequest):
        violations = [replace(each, field=renamed(each.field)) for each in error.violations]
        return InvalidRequest(violations, reason=error.reason)
    return error


def _generate_request(
    planned: Planned, words: dict[str, BlobRef]
) -> generator_service_pb2.GenerateRequest:
    request = generator_service_pb2.GenerateRequest(
        plate=wire.render_blob(planned.plate),
        prompt=planned.bound.text,
        negative_prompt=planned.collage.negative_prompt,
        sampling=wire.render_sampling(planned.sampling),
    )
    for layer, plan in zip(planned.collage.layers, planned.plan.layers, strict=True):
        control = generator_service_pb2.LayerControl(
            name=layer.name,
            text_start=plan.text_start,
            text_end=plan.text_end,
            attract=plan.attract,
            repel=plan.repel,
            seed=layer.seed,
            structures=[
                generator_service_pb2.StructureControl(
                    kind=structure.kind,
                    scale=structure.scale,
                    start=structure.start,
                    end=structure.end,
                    emphasis=structure.emphasis,
                )
                for structure in layer.structure
            ],
        )
        if layer.name in words:
            assert layer.appearance is not None, "only such a layer has a word"
            control.word.CopyFrom(wire.render_blob(words[layer.name]))
            control.word_weight = layer.appearance.weight
        request.layers.append(control)
    if planned.redo is not None:
        request.parent.CopyFrom(wire.render_blob(planned.redo.parent))
    return request


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


class _Patience:
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


async def _patiently(
    attempt: Callable[[], Awaitable[Any]], patience: _Patience | None = None
) -> Any:
    """Tries again while a part is down, full or silent, with growing pauses, until patience is at its end."""
    patience = patience or _Patience()
    while True:
        began = time.monotonic()
        try:
            return await attempt()
        # A job has no deadline of its own: one that passed bounded a call to a part that waits for storage.
        except (Unavailable, Overloaded, DeadlinePassed, BlobStoreUnavailable) as error:
            wait_s = patience.take(getattr(error, "retry_after_s", 0.0))
            if wait_s is None:
                # A part that fell silent may speak again: the job is given back. One that worked for the whole of a
                # call's long limit would do so again.
                if isinstance(error, DeadlinePassed) and time.monotonic() - began < PATIENCE_S:
                    raise Unavailable(str(error), reason="SILENT") from error
                raise
            log.info("stage tried again", message=str(error), wait_s=wait_s)
            await asyncio.sleep(wait_s)
