"""The asynchronous client: `AsyncCollageClient`, every call of `CollageService` as a method.

Pictures go up by digest and only when the server lacks them, a broken event stream is taken up again where it
broke, and every error is a `CollageError`. Knows nothing of files, terminals or pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from collage.v1 import blob_pb2, collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client._calls import Calls, Span
from collage_client._collage import (
    AnyCollage,
    AnySampling,
    Picture,
    collage_message,
    picture,
    sampling_message,
)
from collage_client._job import CALL_TIMEOUT_S, AsyncJob

# Seconds. A job may stand in a queue; a caller who means to wait longer says so.
JOB_TIMEOUT_S = 3600.0

Work = pb.GenerateWork | pb.RedoWork | pb.LearnWork


class AsyncCollageClient:
    """A connection to one collage service. Make it inside a running event loop; close it, or use `async with`.

    `address` is `host:port`, or `unix:PATH`. `credentials` unset means plain text. Collages may carry inline picture
    bytes of any size up to 64 MiB; they are uploaded before the call. Every method raises `CollageError`.

    `generate`, `redo` and `learn` return as soon as their job is accepted, with a handle to follow it by; `watch` gives
    one for a job that exists.
    """

    def __init__(self, address: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._calls = Calls(address, credentials)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls still going on are cancelled. Again: nothing."""
        await self._calls.close()

    # Collages and jobs

    async def plan(
        self,
        collage: AnyCollage,
        sampling: AnySampling | None = None,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> pb.Plan:
        """Resolved dials, composite, masks, warnings and cost of a collage. Runs no model."""
        span = Span(timeout_s)
        request = pb.PlanCollageRequest(
            collage=collage_message(collage), sampling=sampling_message(sampling)
        )
        await self._upload(_pictures(request.collage), span)
        answer: pb.PlanCollageResponse = await self._calls.call("PlanCollage", request, span)
        return answer.plan

    async def cut_out(
        self,
        image: Picture,
        *,
        model: str = "",
        points: Sequence[tuple[float, float]] = (),
        not_points: Sequence[tuple[float, float]] = (),
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> blob_pb2.BlobRef:
        """The object of a photograph, without its ground: a stored RGBA PNG, which a layer takes as its picture.

        `fetch` gives its bytes.

        Args:
            image: the photograph.
            model: one of the server's cut-out models; "" is the first that takes points if there are points, else the
                first that takes none.
            points: places on the object, as fractions of the picture's width and height.
            not_points: the same of what is not meant.
            timeout_s: for all of it.
        """
        span = Span(timeout_s)
        request = pb.CutOutRequest(image=picture(image), model=model)
        for outside, places in ((False, points), (True, not_points)):
            for x, y in places:
                request.points.add(x=x, y=y, outside=outside)
        await self._upload([request.image], span)
        answer: pb.CutOutResponse = await self._calls.call("CutOut", request, span)
        return answer.image.blob

    async def generate(
        self,
        collage: AnyCollage,
        sampling: AnySampling | None = None,
        *,
        skip_failed_words: bool = False,
        request_id: str = "",
        cancel_on_disconnect: bool = False,
        timeout_s: float = JOB_TIMEOUT_S,
    ) -> AsyncJob:
        """Draws a collage. Returns once the job is accepted.

        `request_id` (a UUID) names the job across calls; "" draws one. With `cancel_on_disconnect` the server
        cancels the job when this side's stream breaks, and following it then raises instead of resuming. With
        `skip_failed_words` a layer whose word cannot be learned is drawn without it, with a warning. `timeout_s`
        bounds the whole following.
        """
        span = Span(timeout_s, request_id)
        request = pb.GenerateImagesRequest(
            request_id=span.request_id,
            collage=collage_message(collage),
            sampling=sampling_message(sampling),
            skip_failed_words=skip_failed_words,
        )
        return await self._draw(request, _pictures(request.collage), cancel_on_disconnect, span)

    async def redo(
        self,
        collage: AnyCollage,
        parent: Picture,
        layers: Sequence[str],
        sampling: AnySampling | None = None,
        *,
        feather: float | None = None,
        restore_cutout: bool | None = None,
        skip_failed_words: bool = False,
        request_id: str = "",
        cancel_on_disconnect: bool = False,
        timeout_s: float = JOB_TIMEOUT_S,
    ) -> AsyncJob:
        """Draws some layers of `parent` (a picture of the canvas' size) again. Returns once the job is accepted.

        The rest is as for `generate`.
        """
        span = Span(timeout_s, request_id)
        work = pb.RedoWork(
            collage=collage_message(collage),
            parent=picture(parent),
            layers=[layers] if isinstance(layers, str) else layers,
            sampling=sampling_message(sampling),
            feather=feather,
            restore_cutout=restore_cutout,
            skip_failed_words=skip_failed_words,
        )
        request = pb.GenerateImagesRequest(request_id=span.request_id, redo=work)
        pictures = [*_pictures(request.redo.collage), request.redo.parent]
        return await self._draw(request, pictures, cancel_on_disconnect, span)

    async def learn(
        self,
        collage: AnyCollage,
        layers: Sequence[str] = (),
        *,
        model: str = "",
        request_id: str = "",
        timeout_s: float = JOB_TIMEOUT_S,
    ) -> AsyncJob:
        """Learns a word for each named layer (none: each whose appearance says learn).

        Returns once the job is accepted.
        """
        work = pb.LearnWork(
            collage=collage_message(collage),
            layers=[layers] if isinstance(layers, str) else layers,
            model=model,
        )
        span = Span(timeout_s, request_id)
        request = _creation(work, span)

        async def start() -> Any:
            job = await self._create(request, span)
            return self._calls.watch(job.name, 0, span)

        return await AsyncJob.of(self._calls, self._calls.follow(span, start=start), span)

    async def create_job(
        self,
        work: Work,
        *,
        request_id: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> pb.Job:
        """Queues work and returns at once; the same `request_id` and work give the same job."""
        span = Span(timeout_s, request_id)
        return await self._create(_creation(work, span), span)

    def watch(
        self, name: str, *, after_sequence: int = 0, timeout_s: float = JOB_TIMEOUT_S
    ) -> AsyncJob:
        """A handle of a job by its name, whose events begin after a sequence number. Asks nothing yet.

        The words in its result are those learned after that number.
        """
        return AsyncJob(self._calls, name, Span(timeout_s), after_sequence=after_sequence)

    async def job(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> pb.Job:
        """A job's present state."""
        return await self.watch(name).record(timeout_s=timeout_s)

    async def cancel(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> pb.Job:
        """Stops exactly this job; a finished one stays as it is."""
        return await self.watch(name).cancel(timeout_s=timeout_s)

    async def jobs(self, limit: int = 20, *, timeout_s: float = CALL_TIMEOUT_S) -> list[pb.Job]:
        """The newest jobs, at most `limit`, without plans and images."""

        def page(token: str) -> pb.ListJobsRequest:
            return pb.ListJobsRequest(page_size=min(limit, 100), page_token=token)

        return await self._calls.pages("ListJobs", page, "jobs", limit, Span(timeout_s))

    # Blobs

    async def put(self, data: bytes, *, timeout_s: float = CALL_TIMEOUT_S) -> blob_pb2.BlobRef:
        """Stores bytes under their digest, sending them only when the server lacks them."""
        (ref,) = await self._calls.put_all([data], Span(timeout_s))
        return ref

    async def fetch(
        self, blob: blob_pb2.BlobRef | str, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> bytes:
        """The bytes of a blob, named by reference or SHA-256; the digest is verified."""
        sha256 = blob if isinstance(blob, str) else blob.sha256
        return await self._calls.fetch(sha256, Span(timeout_s))

    # Models and words

    async def models(self, *, timeout_s: float = CALL_TIMEOUT_S) -> list[pb.Model]:
        """Every model served, with its limits and defaults."""

        def page(token: str) -> pb.ListModelsRequest:
            return pb.ListModelsRequest(page_token=token)

        return await self._calls.pages("ListModels", page, "models", None, Span(timeout_s))

    async def cut_out_models(
        self, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> list[collage_pb2.CutOutModel]:
        """What `cut_out` may be asked of, and whether it takes points; the default first."""
        request = pb.ListModelsRequest(page_size=1)
        answer: pb.ListModelsResponse = await self._calls.call(
            "ListModels", request, Span(timeout_s)
        )
        return list(answer.cut_out_models)

    async def words(self, *, timeout_s: float = CALL_TIMEOUT_S) -> list[pb.Word]:
        """Every learned word, by name."""

        def page(token: str) -> pb.ListWordsRequest:
            return pb.ListWordsRequest(page_token=token)

        return await self._calls.pages("ListWords", page, "words", None, Span(timeout_s))

    async def word(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> pb.Word:
        """One learned word; `fetch` its `vectors` for the safetensors file."""
        answer = await self._calls.call("GetWord", pb.GetWordRequest(name=name), Span(timeout_s))
        word: pb.Word = answer.word
        return word

    async def import_word(
        self, text: str, vectors: bytes, *, model: str = "", timeout_s: float = CALL_TIMEOUT_S
    ) -> pb.Word:
        """Takes in a word learned elsewhere: a safetensors file in diffusers' form."""
        span = Span(timeout_s)
        (ref,) = await self._calls.put_all([vectors], span)
        request = pb.ImportWordRequest(text=text, model=model, vectors=ref)
        word: pb.Word = (await self._calls.call("ImportWord", request, span)).word
        return word

    async def delete_word(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Forgets a word."""
        await self._calls.call("DeleteWord", pb.DeleteWordRequest(name=name), Span(timeout_s))

    async def _draw(
        self,
        request: pb.GenerateImagesRequest,
        pictures: Sequence[blob_pb2.Image],
        cancel_on_disconnect: bool,
        span: Span,
    ) -> AsyncJob:
        """Creates a job and follows it, in one stream."""
        policy = (
            pb.DISCONNECT_POLICY_CANCEL if cancel_on_disconnect else pb.DISCONNECT_POLICY_DETACH
        )
        request.on_disconnect = policy

        async def start() -> Any:
            await self._upload(pictures, span)
            return self._calls.stub.GenerateImages(request, **span.options())

        events = self._calls.follow(span, start=start, resumes=not cancel_on_disconnect)
        return await AsyncJob.of(self._calls, events, span)

    async def _create(self, request: pb.CreateJobRequest, span: Span) -> pb.Job:
        work: Work = getattr(request, request.WhichOneof("work") or "")
        pictures = _pictures(work.collage)
        if isinstance(work, pb.RedoWork):
            pictures.append(work.parent)
        await self._upload(pictures, span)
        job: pb.Job = (await self._calls.call("CreateJob", request, span)).job
        return job

    async def _upload(self, pictures: Sequence[blob_pb2.Image], span: Span) -> None:
        """Turns inline pictures, in place, into references to blobs the server holds.

        One rule for all sizes: messages stay small, and a sweep or a redo sends no picture twice.
        """
        inline = [each for each in pictures if each.WhichOneof("source") == "data"]
        refs = await self._calls.put_all([each.data for each in inline], span)
        for each, ref in zip(inline, refs, strict=True):
            each.blob.CopyFrom(ref)


def _creation(work: Work, span: Span) -> pb.CreateJobRequest:
    """The request that creates this work, with a copy of it."""
    kind = {pb.GenerateWork: "generate", pb.RedoWork: "redo", pb.LearnWork: "learn"}[type(work)]
    request = pb.CreateJobRequest(request_id=span.request_id)
    getattr(request, kind).CopyFrom(work)
    return request


def _pictures(collage: collage_pb2.Collage) -> list[blob_pb2.Image]:
    pictures = [layer.image for layer in collage.layers]
    for layer in collage.layers:
        pictures += [part.image for part in layer.structure if part.HasField("image")]
    if collage.background.WhichOneof("kind") == "image":
        pictures.append(collage.background.image)
    return pictures
