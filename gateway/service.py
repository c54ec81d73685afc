"""The public face: `CollageService`. Each method parses, calls and renders; the work is elsewhere.

Main type: `CollageServicer`. It knows the contract, the queue and the storage, and no stage.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from collage.v1 import (
    collage_service_pb2,
    collage_service_pb2_grpc,
    inversion_service_pb2,
    inversion_service_pb2_grpc,
    job_pb2,
)
from gateway.jobs import (
    Ahead,
    Event,
    JobMissing,
    JobRecord,
    Jobs,
    JobState,
    JobsUnavailable,
    QueueFull,
    RequestReused,
    job_id_of,
)
from gateway.models import Models
from gateway.outcome import Outcome
from gateway.plan import Planner
from gateway.request import digest_of, parse, parse_generate, request_id_of, seed_of
from gateway.stages import ASK_TIMEOUT_S, asked
from gateway.storage import storage_error
from gateway.uploads import Blobs
from gateway.words import Words
from gateway.worker import cancelled_event
from services.common import wire
from services.common.blobs import BlobStore, blob_key
from services.common.errors import (
    InvalidRequest,
    MissingBlobs,
    NotFound,
    Overloaded,
    Unavailable,
    quote,
)
from services.common.field import Field
from services.common.rpc import bounded, outgoing
from services.common.telemetry import log

DEFAULT_PAGE, LARGEST_PAGE = 20, 100
# How long an address handed out for a picture works.
DOWNLOAD_URL_S = 3600

_STATES = {
    JobState.QUEUED: collage_service_pb2.JOB_STATE_QUEUED,
    JobState.RUNNING: collage_service_pb2.JOB_STATE_RUNNING,
    JobState.DONE: collage_service_pb2.JOB_STATE_DONE,
    JobState.FAILED: collage_service_pb2.JOB_STATE_FAILED,
    JobState.CANCELLED: collage_service_pb2.JOB_STATE_CANCELLED,
}

Item = TypeVar("Item")


class CollageServicer(collage_service_pb2_grpc.CollageServiceServicer):
    """Answers programs; see `collage_service.proto` for each call's promise."""

    def __init__(
        self,
        *,
        store: BlobStore,
        jobs: Jobs,
        words: Words,
        planner: Planner,
        models: Models,
        inversion: inversion_service_pb2_grpc.InversionServiceStub,
    ) -> None:
        self._store = store
        self._blobs = Blobs(store)
        self._words = words
        self._inversion = inversion
        self._jobs = jobs
        self._planner = planner
        self._models = models
        # Streams at whose end a job is cancelled, and cancels that must outlive the stream whose end asked for them.
        self._owed: dict[object, str] = {}
        self._cancels: set[asyncio.Task[Any]] = set()

    async def PlanCollage(
        self, request: collage_service_pb2.PlanCollageRequest, context: Any
    ) -> collage_service_pb2.PlanCollageResponse:
        """Validates and composes; runs no model."""
        request_id = request_id_of("")
        work = collage_service_pb2.GenerateWork(collage=request.collage, sampling=request.sampling)
        generate = await parse_generate(work, self._models, field=Field(), seed=seed_of(request_id))
        drawing = await self._planner.plan(generate, request_id=request_id)
        return collage_service_pb2.PlanCollageResponse(plan=drawing.plan)

    async def CutOut(
        self, request: collage_service_pb2.CutOutRequest, context: Any
    ) -> collage_service_pb2.CutOutResponse:
        """The object of a photograph, as a blob."""
        found = await self._planner.cut(
            wire.parse_picture(request.image, Field("image")), request.model, request.points
        )
        answer = collage_service_pb2.CutOutResponse(model=found.model)
        answer.image.blob.CopyFrom(found.image)
        return answer

    async def CreateJob(
        self, request: collage_service_pb2.CreateJobRequest, context: Any
    ) -> collage_service_pb2.CreateJobResponse:
        """Checks everything that can be checked, then queues."""
        record = await self._submit(request)
        return collage_service_pb2.CreateJobResponse(job=render_job(record))

    async def GetJob(
        self, request: collage_service_pb2.GetJobRequest, context: Any
    ) -> collage_service_pb2.GetJobResponse:
        """The record, with plan, pictures and error: those of a finished job are in it."""
        record = await self._record(request.name)
        outcome = Outcome(record.result)
        # A job that ended without its worker has no result, and one under way has none yet.
        if not record.result:
            try:
                async for event in self._jobs.events(record.id, live=False):
                    message = collage_service_pb2.JobEvent.FromString(event.payload)
                    outcome.add(message, event.sequence)
            except JobsUnavailable as error:
                raise storage_error(error) from error
        job = render_job(record)
        job.MergeFrom(outcome.job)
        for image in job.images:
            await self._sign(image)
        return collage_service_pb2.GetJobResponse(job=job)

    async def ListJobs(
        self, request: collage_service_pb2.ListJobsRequest, context: Any
    ) -> collage_service_pb2.ListJobsResponse:
        """Newest first."""
        size = _page_size(request.page_size)
        try:
            records, token = await self._jobs.list(page_size=size, page_token=request.page_token)
        except ValueError:
            raise _bad_token(request.page_token) from None
        except JobsUnavailable as error:
            raise storage_error(error) from error
        return collage_service_pb2.ListJobsResponse(
            jobs=map(render_job, records), next_page_token=token
        )

    async def CancelJob(
        self, request: collage_service_pb2.CancelJobRequest, context: Any
    ) -> collage_service_pb2.CancelJobResponse:
        """Cancels this job and no other."""
        record = await self._record(request.name)
        try:
            record = await self._jobs.cancel(
                record.id, payload=cancelled_event().SerializeToString()
            )
        except JobsUnavailable as error:
            raise storage_error(error) from error
        return collage_service_pb2.CancelJobResponse(job=render_job(record))

    async def WatchJob(
        self, request: collage_service_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[collage_service_pb2.WatchJobResponse]:
        """The log after a sequence number, then live."""
        if request.after_sequence < 0:
            raise InvalidRequest.of(
                "after_sequence", f"is {request.after_sequence}; allowed: 0 or more"
            )
        record = await self._record(request.name)
        async for event in self._watch(record, request.after_sequence):
            yield collage_service_pb2.WatchJobResponse(event=event)

    async def GenerateImages(
        self, request: collage_service_pb2.GenerateImagesRequest, context: Any
    ) -> AsyncIterator[collage_service_pb2.GenerateImagesResponse]:
        """CreateJob and WatchJob in one stream."""
        if request.on_disconnect not in collage_service_pb2.DisconnectPolicy.values():
            raise InvalidRequest.of(
                "on_disconnect",
                f"is {request.on_disconnect}; allowed: "
                + ", ".join(collage_service_pb2.DisconnectPolicy.keys()),
            )
        cancels = request.on_disconnect == collage_service_pb2.DISCONNECT_POLICY_CANCEL
        create, field = _as_job(request)
        job_id = job_id_of(create.request_id)
        try:
            record = await self._submit(create, field=field)
        except asyncio.CancelledError:
            # Gone while the job was being queued: it may have been.
            if cancels:
                self._cancel_later(job_id)
            raise
        ended, stream = False, object()
        if cancels:
            self._owed[stream] = job_id
        try:
            async for event in self._watch(record, 0):
                ended = event.WhichOneof("kind") in ("done", "failed", "cancelled")
                yield collage_service_pb2.GenerateImagesResponse(event=event)
        finally:
            if self._owed.pop(stream, None) and not ended:
                self._cancel_later(job_id)

    async def CheckBlobs(
        self, request: collage_service_pb2.CheckBlobsRequest, context: Any
    ) -> collage_service_pb2.CheckBlobsResponse:
        """Which digests are unknown here."""
        return collage_service_pb2.CheckBlobsResponse(
            missing_sha256=await self._blobs.missing(request.sha256)
        )

    async def PutBlob(
        self, requests: AsyncIterator[collage_service_pb2.PutBlobRequest], context: Any
    ) -> collage_service_pb2.PutBlobResponse:
        """Header, chunks, digest checked, stored."""
        blob = await self._blobs.put(requests, peer=context.peer())
        return collage_service_pb2.PutBlobResponse(blob=wire.render_blob(blob))

    async def GetBlob(
        self, request: collage_service_pb2.GetBlobRequest, context: Any
    ) -> AsyncIterator[collage_service_pb2.GetBlobResponse]:
        """Header, then chunks."""
        async for part in self._blobs.get(request.sha256):
            yield part

    async def ListModels(
        self, request: collage_service_pb2.ListModelsRequest, context: Any
    ) -> collage_service_pb2.ListModelsResponse:
        """The default first."""
        models, cut_out_models = await self._models.described()
        page, token = _page(models, request)
        return collage_service_pb2.ListModelsResponse(
            models=page, next_page_token=token, cut_out_models=cut_out_models
        )

    async def ListWords(
        self, request: collage_service_pb2.ListWordsRequest, context: Any
    ) -> collage_service_pb2.ListWordsResponse:
        """By name."""
        size = _page_size(request.page_size)
        try:
            found, token = await self._words.page(size, request.page_token)
        except ValueError:
            raise _bad_token(request.page_token) from None
        return collage_service_pb2.ListWordsResponse(words=found, next_page_token=token)

    async def GetWord(
        self, request: collage_service_pb2.GetWordRequest, context: Any
    ) -> collage_service_pb2.GetWordResponse:
        """One word; its vectors are a blob."""
        return collage_service_pb2.GetWordResponse(word=await self._words.get(request.name))

    async def ImportWord(
        self, request: collage_service_pb2.ImportWordRequest, context: Any
    ) -> collage_service_pb2.ImportWordResponse:
        """Has the inversion service look at the vectors and keep them."""
        model = await self._models.named(request.model, Field("model"))
        vectors = wire.parse_blob(request.vectors, "vectors")
        stat = await self._store.stat(vectors.key)
        if stat is None:
            raise MissingBlobs({"vectors": vectors.sha256})
        answer = await asked(
            self._inversion.AdoptWord(
                inversion_service_pb2.AdoptWordRequest(
                    model=model.name,
                    text=request.text,
                    vectors=wire.render_blob(replace(vectors, size_bytes=stat.size_bytes)),
                ),
                timeout=bounded(ASK_TIMEOUT_S),
                metadata=outgoing(),
            )
        )
        return collage_service_pb2.ImportWordResponse(word=answer.word)

    async def DeleteWord(
        self, request: collage_service_pb2.DeleteWordRequest, context: Any
    ) -> collage_service_pb2.DeleteWordResponse:
        """Jobs that are under way keep what they took."""
        await self._words.delete(request.name)
        return collage_service_pb2.DeleteWordResponse()

    async def _submit(
        self, request: collage_service_pb2.CreateJobRequest, *, field: Field | None = None
    ) -> JobRecord:
        """The job of a request: the one it has already, else one that is planned and queued now.

        Looked up before anything else, so that a request sent again finds its job whatever has become of the models,
        pictures and services that it was accepted with. `field`: as in `gateway.request.parse`.
        """
        request_id = request_id_of(request.request_id)
        digest = digest_of(request)
        if request.request_id and (record := await self._known(request_id, digest)) is not None:
            return record
        work = await parse(request, self._models, request_id=request_id, field=field)
        accepted = await self._planner.accept(work, request_id=request_id, request_digest=digest)
        try:
            return await self._jobs.submit(
                request_id, accepted.SerializeToString(deterministic=True)
            )
        except RequestReused as error:
            # Sent twice at once: the other was queued first, with a plan of its own.
            if (record := await self._known(request_id, digest)) is not None:
                return record
            raise Unavailable("the job is just being queued; send it again") from error
        except ValueError as error:
            raise InvalidRequest.of("collage", f"is too large to queue: {error}") from error
        except QueueFull as error:
            raise Overloaded(str(error), retry_after_s=error.retry_after_s) from error
        except JobsUnavailable as error:
            raise storage_error(error) from error

    async def _known(self, request_id: str, digest: str) -> JobRecord | None:
        """The job that this very request has already, None where there is none.

        Raises:
            InvalidRequest: the id stands for another request.
        """
        try:
            record = await self._jobs.get(job_id_of(request_id))
        except JobMissing:
            return None
        except JobsUnavailable as error:
            raise storage_error(error) from error
        if job_pb2.AcceptedJob.FromString(record.body).request_digest == digest:
            return record
        raise InvalidRequest.of(
            "request_id",
            f"is {quote(request_id)}, already used for another request; allowed: a new UUID",
            reason="REQUEST_ID_REUSED",
        )

    async def close(self) -> None:
        """Returns when the jobs of callers who are gone are cancelled: while the queue is still open.

        A stream that the server's end has cut off need not have come to its own end by now.
        """
        while self._owed:
            self._cancel_later(self._owed.popitem()[1])
        await asyncio.gather(*self._cancels)

    def _cancel_later(self, job_id: str) -> None:
        """Cancels a job whose caller is gone, and outlives the caller's stream."""

        async def cancel() -> None:
            try:
                await self._jobs.cancel(job_id, payload=cancelled_event().SerializeToString())
            except (JobMissing, JobsUnavailable) as error:
                log.warning("job of a lost caller not cancelled", job=job_id, message=str(error))

        task = asyncio.create_task(cancel())
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _record(self, name: str) -> JobRecord:
        kind, _, job_id = name.partition("/")
        try:
            if kind != "jobs" or not job_id:
                raise JobMissing(name)
            return await self._jobs.get(job_id)
        except (JobMissing, ValueError):
            raise NotFound(f"no job {quote(name)}", reason="JOB_NOT_FOUND") from None
        except JobsUnavailable as error:
            raise storage_error(error) from error

    async def _watch(
        self, record: JobRecord, after: int
    ) -> AsyncIterator[collage_service_pb2.JobEvent]:
        """Events of a job as messages, and between them how many jobs stand before it."""
        try:
            async for told in self._jobs.watch(record.id, after=after):
                if isinstance(told, Ahead):
                    yield collage_service_pb2.JobEvent(
                        job=f"jobs/{record.id}",
                        sequence=after,
                        time=_timestamp(time.time()),
                        queued=collage_service_pb2.Queued(position=told.jobs),
                    )
                else:
                    after = told.sequence
                    yield await self._render_event(record.id, told)
        except JobMissing:
            raise NotFound(f"no job {quote(f'jobs/{record.id}')}", reason="JOB_NOT_FOUND") from None
        except JobsUnavailable as error:
            raise storage_error(error) from error

    async def _render_event(self, job_id: str, event: Event) -> collage_service_pb2.JobEvent:
        message = collage_service_pb2.JobEvent.FromString(event.payload)
        message.job = f"jobs/{job_id}"
        message.sequence = event.sequence
        message.time.CopyFrom(_timestamp(event.at))
        if message.HasField("image"):
            await self._sign(message.image)
        return message

    async def _sign(self, image: collage_service_pb2.GeneratedImage) -> None:
        """Puts in the address to fetch the picture from."""
        key = blob_key(image.blob.sha256)
        image.download_url = await self._store.presign(key, expires_s=DOWNLOAD_URL_S) or ""


def _as_job(
    request: collage_service_pb2.GenerateImagesRequest,
) -> tuple[collage_service_pb2.CreateJobRequest, Field]:
    """The job that a stream asks for, its id set, and where its work stands in the stream's request."""
    create = collage_service_pb2.CreateJobRequest(request_id=request_id_of(request.request_id))
    if not request.HasField("redo"):
        create.generate.collage.CopyFrom(request.collage)
        create.generate.sampling.CopyFrom(request.sampling)
        create.generate.skip_failed_words = request.skip_failed_words
        return create, Field()
    for name in ("collage", "sampling"):
        if request.HasField(name):
            raise InvalidRequest.of(name, "is set beside redo, which has its own; allowed: one")
    if request.skip_failed_words:
        raise InvalidRequest.of(
            "skip_failed_words", "is set beside redo, which has its own; allowed: one"
        )
    create.redo.CopyFrom(request.redo)
    return create, Field("redo")


def render_job(record: JobRecord) -> collage_service_pb2.Job:
    """The record as a message, without what only the log knows."""
    job = collage_service_pb2.Job(
        name=f"jobs/{record.id}",
        request_id=record.request_id,
        state=_STATES[record.state],
        create_time=_timestamp(record.created_at),
        # The claim at work, and one more for each that was lost; what was given back is none.
        attempts=min(record.attempt, record.lost + 1),
    )
    if record.started_at is not None:
        job.start_time.CopyFrom(_timestamp(record.started_at))
    if record.finished_at is not None:
        job.end_time.CopyFrom(_timestamp(record.finished_at))
    return job


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def _page_size(size: int) -> int:
    if size < 0:
        raise InvalidRequest.of("page_size", f"is {size}; allowed: 0 to {LARGEST_PAGE}")
    return min(size or DEFAULT_PAGE, LARGEST_PAGE)


def _page(items: Sequence[Item], request: Any) -> tuple[Sequence[Item], str]:
    """One page of a list held in memory; its token is the place it ended."""
    size = _page_size(request.page_size)
    try:
        start = range(len(items) + 1).index(int(request.page_token or 0))
    except ValueError:
        raise _bad_token(request.page_token) from None
    end = start + size
    return items[start:end], str(end) if end < len(items) else ""


def _bad_token(token: str) -> InvalidRequest:
    return InvalidRequest.of(
        "page_token", f"is {quote(token)}; allowed: empty, or next_page_token of the page before"
    )
