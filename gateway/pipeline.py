"""One job from its claim to its end: the order of the stages, written once.

Main type: `Pipeline`. It does what was accepted and asks nobody what that is today: settings, model, plan and words
stand in the job. Stages are addressed by their inputs, so that running a job again after a crash repeats only what was
lost. It emits events and knows no queue: whoever runs it passes `emit`.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from collage.v1 import blob_pb2, collage_service_pb2, generator_service_pb2, job_pb2
from gateway.stages import Emit, Stages, patiently
from services.common.errors import DataLoss, MissingBlobs, NotSupported
from services.common.field import Field
from services.common.telemetry import log


class Pipeline:
    """Compose and learn together, then generate."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    async def run(
        self, job: job_pb2.AcceptedJob, attempt: int, emit: Emit
    ) -> collage_service_pb2.Done:
        """Does the work of a job and returns its terminal event's content.

        Raises:
            CollageError: what stopped it. Unavailable and Overloaded: worth another attempt later.
        """
        done = collage_service_pb2.Done()
        match job.WhichOneof("work"):
            case "drawing":
                await self._draw(job.drawing, attempt, emit, done)
            case "learning":
                await self._learn(job.learning, attempt, emit, done)
            case _:
                raise NotSupported(
                    "the job was accepted by another version of this server; send it again",
                    reason="ACCEPTED_ELSEWHERE",
                )
        return done

    async def _draw(
        self,
        drawing: job_pb2.Drawing,
        attempt: int,
        emit: Emit,
        done: collage_service_pb2.Done,
    ) -> None:
        field = Field(drawing.field)
        await emit(_stage("compose", attempt))
        await _tell(drawing.plan, emit)
        lost_before: set[str] = set()
        while True:
            # Neither needs the other (design section 4): the plate says where things are, a word how one looks.
            async with asyncio.TaskGroup() as group:
                composing = group.create_task(self._compose(drawing, field, done))
                learning = group.create_task(self._learn(drawing.learning, attempt, emit, done))
            plate, words = composing.result(), learning.result()
            request = _with(drawing.generate, plate, words)
            await emit(_stage("generate", attempt))
            try:
                with _timed(done, "generate"):
                    await self._stages.generate(request, field, emit)
            except (DataLoss, MissingBlobs) as error:
                # What a stage made is made again, once; what a caller brought cannot be.
                made = {plate.sha256, *(word.vectors.sha256 for word in words.values())}
                lost = _lost(error)
                if not lost or not lost <= made - lost_before:
                    raise
                lost_before |= lost
                log.warning("made again what was lost", message=error.message)
            else:
                return

    async def _compose(
        self, drawing: job_pb2.Drawing, field: Field, done: collage_service_pb2.Done
    ) -> blob_pb2.BlobRef:
        """The plate: found by its inputs, or made again where it was lost."""
        with _timed(done, "compose"):
            answer = await patiently(lambda: self._stages.compose(drawing.compose, field))
        plate: blob_pb2.BlobRef = answer.plate
        return plate

    async def _learn(
        self,
        learning: job_pb2.Learning,
        attempt: int,
        emit: Emit,
        done: collage_service_pb2.Done,
    ) -> dict[str, collage_service_pb2.Word]:
        """The learned word of each layer that asks to learn one, by layer name."""
        if not learning.request.subjects:
            return {}
        await emit(_stage("learn", attempt))
        with _timed(done, "learn"):
            return await self._stages.learn(learning, emit)


def _lost(error: DataLoss | MissingBlobs) -> set[str]:
    """The digests of what a stage could not read."""
    if isinstance(error, MissingBlobs):
        return set(error.missing.values())
    return {error.metadata["sha256"]} if "sha256" in error.metadata else set()


def _with(
    request: generator_service_pb2.GenerateRequest,
    plate: blob_pb2.BlobRef,
    words: dict[str, collage_service_pb2.Word],
) -> generator_service_pb2.GenerateRequest:
    """The accepted request with what the stages before gave; a layer whose word failed goes without."""
    complete = generator_service_pb2.GenerateRequest()
    complete.CopyFrom(request)
    complete.plate.CopyFrom(plate)
    for layer in complete.layers:
        if layer.plan.name in words:
            layer.word.CopyFrom(words[layer.plan.name].vectors)
        elif not layer.HasField("word"):
            layer.word_weight = 0
    return complete


async def _tell(plan: collage_service_pb2.Plan, emit: Emit) -> None:
    """The plan and its warnings, once in a job's life."""
    planned = collage_service_pb2.Planned(plan=plan)
    await emit(collage_service_pb2.JobEvent(planned=planned), key="planned")
    for number, warning in enumerate(plan.warnings):
        await emit(collage_service_pb2.JobEvent(warning=warning), key=f"warning-{number}")


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
