"""The public face: `CollageService`. Each method parses, calls and renders; the work is elsewhere.

Main type: `CollageServicer`. It knows the contract, the queue and the storage, and no stage.
"""

import asyncio
import hashlib
import secrets
import uuid
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
from gateway.pipeline import Pipeline
from gateway.planner import ASK_TIMEOUT_S, Models, Planned, Planner, asked
from gateway.words import Words
from gateway.worker import cancelled_event
from services.common import wire
from services.common.blobs import BlobMissing, BlobRef, BlobStore, blob_key
from services.common.collage import Collage
from services.common.errors import (
    CollageError,
    InvalidRequest,
    MissingBlobs,
    NotFound,
    Overloaded,
    Unavailable,
    quote,
)
from services.common.rpc import bounded, outgoing
from services.common.telemetry import log

DEFAULT_PAGE, LARGEST_PAGE = 20, 100
MAX_CHECKED_DIGESTS = 256
# Uploads held in memory at a time, each up to limits.MAX_BLOB_BYTES.
MAX_UPLOADS = 4
# Uploads that may wait for their turn.
MAX_WAITING_UPLOADS = 64
UPLOAD_TIMEOUT_S = 120.0
# Longest silence within an upload: a caller that sends nothing must not keep others from their turn.
UPLOAD_SILENCE_S = 10.0
CHUNK_BYTES = 1024 * 1024
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
        blobs: BlobStore,
        jobs: Jobs,
        words: Words,
        planner: Planner,
        models: Models,
        pipeline: Pipeline,
        inversion: inversion_service_pb2_grpc.InversionServiceStub,
    ) -> None:
        self._blobs = blobs
        self._words = words
        self._inversion = inversion
        self._jobs = jobs
        self._planner = planner
        self._models = models
        self._pipeline = pipeline
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)
        self._admitted_uploads = 0
        # Cancels that must outlive the stream whose end asked for them.
        self._cancels: set[asyncio.Task[Any]] = set()

    async def PlanCollage(
        self, request: collage_service_pb2.PlanCollageRequest, context: Any
    ) -> collage_service_pb2.PlanCollageResponse:
        """Validates and composes; runs no model."""
        planned = await self._planner.plan(
            request.collage, request.sampling, seed=secrets.randbits(63)
        )
        return collage_service_pb2.PlanCollageResponse(plan=planned.plan)

    async def CreateJob(
        self, request: collage_service_pb2.CreateJobRequest, context: Any
    ) -> collage_service_pb2.CreateJobResponse:
        """Checks everything that can be checked, then queues."""
        record = await self._submit(request)
        return collage_service_pb2.CreateJobResponse(job=render_job(record))

    async def GetJob(
        self, request: collage_service_pb2.GetJobRequest, context: Any
    ) -> collage_service_pb2.GetJobResponse:
        """The record, with plan, pictures and error collected from the log."""
        record = await self._record(request.name)
        job = render_job(record)
        try:
            async for event in self._jobs.events(record.id, live=False):
                _collect(job, await self._render_event(record.id, event))
        except JobsUnavailable as error:
            raise _storage_down() from error
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
            raise _storage_down() from error
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
            raise _storage_down() from error
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
        create = collage_service_pb2.CreateJobRequest(
            request_id=_request_id(request.request_id),
            generate=collage_service_pb2.GenerateWork(
                collage=request.collage,
                sampling=request.sampling,
                skip_failed_words=request.skip_failed_words,
            ),
        )
        try:
            record = await self._submit(create)
        except (InvalidRequest, MissingBlobs) as error:
            raise _without_root(error, "generate.") from error
        except asyncio.CancelledError:
            # Gone while the job was being queued: it may have been.
            if cancels:
                self._cancel_later(job_id_of(create.request_id))
            raise
        ended = False
        try:
            async for event in self._watch(record, 0):
                ended = event.WhichOneof("kind") in ("done", "failed", "cancelled")
                yield collage_service_pb2.GenerateImagesResponse(event=event)
        finally:
            if cancels and not ended:
                self._cancel_later(record.id)

    async def CheckBlobs(
        self, request: collage_service_pb2.CheckBlobsRequest, context: Any
    ) -> collage_service_pb2.CheckBlobsResponse:
        """Which digests are unknown here."""
        if len(request.sha256) > MAX_CHECKED_DIGESTS:
            raise InvalidRequest.of(
                "sha256", f"has {len(request.sha256)} digests; allowed: {MAX_CHECKED_DIGESTS}"
            )
        keys = [_digest_key(digest, f"sha256[{i}]") for i, digest in enumerate(request.sha256)]
        stats = await asyncio.gather(*map(self._blobs.stat, keys))
        return collage_service_pb2.CheckBlobsResponse(
            missing_sha256=[
                digest for digest, stat in zip(request.sha256, stats, strict=True) if stat is None
            ]
        )

    async def PutBlob(
        self, requests: AsyncIterator[collage_service_pb2.PutBlobRequest], context: Any
    ) -> collage_service_pb2.PutBlobResponse:
        """Header, chunks, digest checked, stored."""
        if self._admitted_uploads >= MAX_UPLOADS + MAX_WAITING_UPLOADS:
            raise Overloaded(f"{MAX_WAITING_UPLOADS} uploads wait", retry_after_s=2.0)
        self._admitted_uploads += 1
        try:
            async with self._uploads:
                async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                    blob, data = await _receive(requests)
                await self._blobs.create(blob.key, data, media_type=blob.media_type)
        finally:
            self._admitted_uploads -= 1
        return collage_service_pb2.PutBlobResponse(blob=wire.render_blob(blob))

    async def GetBlob(
        self, request: collage_service_pb2.GetBlobRequest, context: Any
    ) -> AsyncIterator[collage_service_pb2.GetBlobResponse]:
        """Header, then chunks."""
        key = _digest_key(request.sha256, "sha256")
        stat = await self._blobs.stat(key)
        if stat is None:
            raise _no_blob(request.sha256)
        header = BlobRef(
            sha256=request.sha256, size_bytes=stat.size_bytes, media_type=stat.media_type
        )
        yield collage_service_pb2.GetBlobResponse(header=wire.render_blob(header))
        try:
            async for chunk in self._blobs.read(key):
                yield collage_service_pb2.GetBlobResponse(chunk=chunk)
        except BlobMissing:
            raise _no_blob(request.sha256) from None

    async def ListModels(
        self, request: collage_service_pb2.ListModelsRequest, context: Any
    ) -> collage_service_pb2.ListModelsResponse:
        """The default first."""
        page, token = _page(await self._models.described(), request)
        return collage_service_pb2.ListModelsResponse(models=page, next_page_token=token)

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
        model = await self._models.named(request.model, "model")
        vectors = wire.parse_blob(request.vectors, "vectors")
        stat = await self._blobs.stat(vectors.key)
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

    async def _submit(self, request: collage_service_pb2.CreateJobRequest) -> JobRecord:
        """Plans the request and queues it, its pictures stored and referred to."""
        accepted = job_pb2.AcceptedJob(request=request)
        accepted.request.request_id = _request_id(request.request_id)
        if request.request_id and _names_words(request):
            accepted.words.extend(await self._words_taken(accepted.request.request_id))
        checked = await self._pipeline.check(accepted)
        _refer(accepted, checked)
        body = accepted.SerializeToString(deterministic=True)
        try:
            return await self._jobs.submit(accepted.request.request_id, body)
        except RequestReused:
            raise InvalidRequest.of(
                "request_id",
                f"is {quote(request.request_id)}, already used for another request; "
                "allowed: a new UUID",
                reason="REQUEST_ID_REUSED",
            ) from None
        except ValueError as error:
            raise InvalidRequest.of("collage", f"is too large to queue: {error}") from error
        except QueueFull as error:
            raise Overloaded(str(error), retry_after_s=error.retry_after_s) from error
        except JobsUnavailable as error:
            raise _storage_down() from error

    async def _words_taken(self, request_id: str) -> Sequence[collage_service_pb2.Word]:
        """The words that the job of this request took, if there is one.

        A request sent again is the same request, whatever became of the names in it since.
        """
        try:
            record = await self._jobs.get(job_id_of(request_id))
        except JobMissing:
            return ()
        except JobsUnavailable as error:
            raise _storage_down() from error
        return job_pb2.AcceptedJob.FromString(record.body).words

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
            raise _storage_down() from error

    async def _watch(
        self, record: JobRecord, after: int
    ) -> AsyncIterator[collage_service_pb2.JobEvent]:
        """Events of a job as messages, led by its place in the queue while it waits."""
        try:
            if record.state is JobState.QUEUED:
                position = await self._jobs.position(record.id)
                if position:
                    yield collage_service_pb2.JobEvent(
                        job=f"jobs/{record.id}",
                        sequence=after,
                        time=_timestamp(record.created_at),
                        queued=collage_service_pb2.Queued(position=position - 1),
                    )
            async for event in self._jobs.events(record.id, after=after):
                yield await self._render_event(record.id, event)
        except JobsUnavailable as error:
            raise _storage_down() from error

    async def _render_event(self, job_id: str, event: Event) -> collage_service_pb2.JobEvent:
        message = collage_service_pb2.JobEvent.FromString(event.payload)
        message.job = f"jobs/{job_id}"
        message.sequence = event.sequence
        message.time.CopyFrom(_timestamp(event.at))
        if message.HasField("image"):
            url = await self._blobs.presign(
                blob_key(message.image.blob.sha256), expires_s=DOWNLOAD_URL_S
            )
            message.image.download_url = url or ""
        return message


def _collect(job: collage_service_pb2.Job, event: collage_service_pb2.JobEvent) -> None:
    """Adds what an event tells of a job's outcome."""
    kind = event.WhichOneof("kind")
    if kind == "planned":
        # A word that failed may be told before the plan is.
        earlier = list(job.plan.warnings)
        job.plan.CopyFrom(event.planned.plan)
        job.plan.warnings.extend(each for each in earlier if each not in job.plan.warnings)
    elif kind == "warning" and event.warning not in job.plan.warnings:
        job.plan.warnings.append(event.warning)
    elif kind == "image":
        job.images.append(event.image)
        job.images.sort(key=lambda image: image.index)
    elif kind in ("failed", "cancelled"):
        job.error.CopyFrom(getattr(event, kind))


async def _receive(
    requests: AsyncIterator[collage_service_pb2.PutBlobRequest],
) -> tuple[BlobRef, bytes]:
    """The header and the bytes of an upload, never holding more than is allowed."""
    header: BlobRef | None = None
    data = bytearray()
    while True:
        try:
            async with asyncio.timeout(UPLOAD_SILENCE_S):
                request = await anext(requests)
        except StopAsyncIteration:
            break
        if request.HasField("header"):
            if header is not None:
                raise InvalidRequest.of("header", "came twice; allowed: once, first")
            header = wire.parse_blob(request.header, "header")
        elif header is None:
            raise InvalidRequest.of("header", "is missing; required: first message")
        elif not 1 <= len(request.chunk) <= CHUNK_BYTES:
            raise InvalidRequest.of(
                "chunk",
                f"has {len(request.chunk)} bytes; allowed: from 1 to {CHUNK_BYTES} a message",
            )
        else:
            data += request.chunk
            if len(data) > header.size_bytes:
                raise InvalidRequest.of(
                    "chunk", f"goes beyond header.size_bytes, {header.size_bytes}"
                )
    if header is None:
        raise InvalidRequest.of("header", "is missing; required: first message")
    if len(data) != header.size_bytes:
        raise InvalidRequest.of(
            "header.size_bytes", f"is {header.size_bytes}, but {len(data)} bytes came"
        )
    received = bytes(data)
    digest = hashlib.sha256(received).hexdigest()
    if digest != header.sha256:
        raise InvalidRequest.of("header.sha256", f"is {header.sha256}, but the bytes have {digest}")
    return header, received


def _names_words(request: collage_service_pb2.CreateJobRequest) -> bool:
    work = request.WhichOneof("work")
    return work is not None and any(
        layer.appearance.word for layer in getattr(request, work).collage.layers
    )


def _refer(job: job_pb2.AcceptedJob, checked: Planned | Collage) -> None:
    """Has the job refer to every picture, so that equal requests have equal bodies, and hold every word that is named.

    So it has the word whatever becomes of the name.
    """
    request = job.request
    message = getattr(request, str(request.WhichOneof("work"))).collage
    collage = checked if isinstance(checked, Collage) else checked.collage
    for part, layer in zip(message.layers, collage.layers, strict=True):
        part.image.CopyFrom(wire.render_picture(layer.image))
        for structure, value in zip(part.structure, layer.structure, strict=True):
            if value.image is not None:
                structure.image.CopyFrom(wire.render_picture(value.image))
    if isinstance(collage.background, BlobRef):
        message.background.image.CopyFrom(wire.render_picture(collage.background))
    del job.words[:]
    if isinstance(checked, Planned):
        job.words.extend(checked.words[name] for name in sorted(checked.words))
        if checked.redo is not None:
            request.redo.parent.CopyFrom(wire.render_picture(checked.redo.parent))


def _request_id(text: str) -> str:
    """A canonical UUID; a new one for an empty text."""
    try:
        return str(uuid.UUID(text)) if text else str(uuid.uuid4())
    except ValueError:
        raise InvalidRequest.of(
            "request_id", f"is {quote(text)}; allowed: a UUID, or empty"
        ) from None


def _without_root(error: InvalidRequest | MissingBlobs, root: str) -> CollageError:
    """The same error with field paths that start one level lower."""
    if isinstance(error, MissingBlobs):
        return MissingBlobs(
            {field.removeprefix(root): digest for field, digest in error.missing.items()}
        )
    return InvalidRequest(
        [
            replace(violation, field=violation.field.removeprefix(root))
            for violation in error.violations
        ],
        reason=error.reason,
    )


def render_job(record: JobRecord) -> collage_service_pb2.Job:
    """The record as a message, without what only the log knows."""
    job = collage_service_pb2.Job(
        name=f"jobs/{record.id}",
        request_id=record.request_id,
        state=_STATES[record.state],
        create_time=_timestamp(record.created_at),
        attempts=record.attempt,
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


def _digest_key(digest: str, field: str) -> str:
    try:
        return BlobRef(sha256=digest, size_bytes=0, media_type="a/b").key
    except ValueError:
        raise InvalidRequest.of(
            field, f"is {quote(digest)}; allowed: 64 lowercase hexadecimal digits"
        ) from None


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


def _storage_down() -> CollageError:
    return Unavailable("the job storage does not answer", reason="STORAGE_UNAVAILABLE")


def _no_blob(digest: str) -> NotFound:
    return NotFound(f"no blob {digest}", reason="BLOB_NOT_FOUND", metadata={"sha256": digest})
