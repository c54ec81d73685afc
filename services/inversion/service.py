"""InversionService over gRPC: requests to subjects, pictures read from storage, words and checkpoints written to it.

Main type: `InversionServicer`. A word is kept under the digest of all it depends on, so that a layer learned once is
never learned again, on any machine. This module computes nothing.
"""

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from prometheus_client import Counter

from collage.v1 import collage_service_pb2, inversion_service_pb2, inversion_service_pb2_grpc
from services.common import limits, wire, words
from services.common.blobs import BlobCorrupt, BlobMissing, BlobRef, BlobStore, BlobTooLarge
from services.common.decoder import Decoder
from services.common.errors import (
    TOO_LONG,
    CollageError,
    DataLoss,
    Internal,
    InvalidRequest,
    MissingBlobs,
    ModelChanged,
    quote,
)
from services.common.pictures import MAX_ENCODED_BYTES, InvalidPicture
from services.common.rpc import bounded
from services.common.telemetry import log
from services.diffusion.pace import Expected
from services.diffusion.word import MAX_FILE_BYTES, InvalidWord, Word
from services.inversion.engine import Engine, Learned
from services.inversion.learn import Progress, Trainer, seeds_in
from services.inversion.networks import LearningCard
from services.inversion.subject import InvalidSubject, Subject

# Part of every word's digest: raise it when the same inputs give another word.
VERSION = 1
# Longest a call may take; the gateway makes it again.
MAX_CALL_S = 24 * 3600.0
# Pictures decoded at a time: each may take 64 MiB until it is cropped.
MAX_READING = 2
# What of a cut-out must be seen, its pixels weighed by their alpha: so many, and so great a part of the box they fill.
# At less, hardly a latent cell of a training canvas is the object's: the word would be of its grounds.
MIN_VISIBLE_PIXELS = 16.0
MIN_VISIBLE_PART = 0.02
# A batch of 32 words of 8 vectors, four tensors each.
MAX_STATE_BYTES = 64 * 1024 * 1024

WORDS = Counter("collage_inversion_words_total", "Words answered", ["source"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One subject of a request: `digest` names its word, `field` where it stands."""

    field: str
    layer: str
    image: BlobRef
    text: str
    vectors: int
    digest: str


class InversionServicer(inversion_service_pb2_grpc.InversionServiceServicer):
    """Learns with `engine` from pictures in `blobs`, for `limit_s` seconds a request at most, waiting apart."""

    def __init__(
        self, engine: Engine, blobs: BlobStore, decoder: Decoder, *, limit_s: float
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._reading = asyncio.Semaphore(MAX_READING)
        self._decoder = decoder
        self._limit_s = limit_s

    async def LearnWords(
        self, request: inversion_service_pb2.LearnWordsRequest, context: Any
    ) -> AsyncIterator[inversion_service_pb2.LearnWordsResponse]:
        """See inversion_service.proto."""
        deadline_s = time.monotonic() + bounded(MAX_CALL_S)
        card = self._engine.catalog.find(request.model, field="model")
        if request.model_digest not in ("", card.digest):
            raise ModelChanged.of(card.name, card.digest, request.model_digest)
        every = self._parse(request, card)
        missing = []
        for one in every:
            if stored := await words.read(self._blobs, one.digest):
                yield _found(one, stored)
            else:
                missing.append(one)
        if not missing:
            return
        self._expected(card, every, missing)
        left_s = self._limit_s
        async with self._engine.turn() as wait:
            async for _ in wait:
                yield inversion_service_pb2.LearnWordsResponse()
            # While this call waited, another may have learned the same.
            left = []
            for one in missing:
                if stored := await words.read(self._blobs, one.digest):
                    yield _found(one, stored)
                else:
                    left.append(one)
            # Several batches where one would be too large. Which, follows from the whole call: not from what is stored.
            for batch in self._batches(card, every):
                began_s = time.monotonic()
                answers = self._learn(
                    request.job,
                    card,
                    [one for one in every if one.digest in batch],
                    [one for one in left if one.digest in batch],
                    deadline_s,
                    left_s,
                )
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        yield answer
                left_s -= time.monotonic() - began_s

    async def EstimateWords(
        self, request: inversion_service_pb2.EstimateWordsRequest, context: Any
    ) -> inversion_service_pb2.EstimateWordsResponse:
        """See inversion_service.proto."""
        card = self._engine.catalog.find(request.learn.model, field="model")
        every = self._parse(request.learn, card)
        missing = [one for one in every if not await words.read(self._blobs, one.digest)]
        expected = self._expected(card, every, missing)
        return inversion_service_pb2.EstimateWordsResponse(
            words=len(missing),
            seconds=expected.seconds,
            seconds_low=expected.low,
            seconds_high=expected.high,
        )

    async def AdoptWord(
        self, request: inversion_service_pb2.AdoptWordRequest, context: Any
    ) -> inversion_service_pb2.AdoptWordResponse:
        """See inversion_service.proto."""
        card = self._engine.catalog.find(request.model, field="model")
        check = wire.Checker()
        text = check.text("text", request.text, limits.MAX_TEXT_CHARACTERS).strip()
        if not request.text.strip():
            check.refuse("text", "is empty; required: the words of the object it stands before")
        check.done()
        ref = wire.parse_blob(request.vectors, "vectors")
        data = await wire.read_blob(self._blobs, ref, "vectors", limit_bytes=MAX_FILE_BYTES)
        try:
            made = await asyncio.to_thread(Word.from_bytes, data, card.facts.text_widths)
        except InvalidWord as error:
            raise InvalidRequest.of("vectors", str(error), reason="INVALID_WORD") from error
        inputs = f"{VERSION} import {card.digest} {hashlib.sha256(data).hexdigest()} {text}"
        digest = hashlib.sha256(inputs.encode()).hexdigest()
        word = await words.read(self._blobs, digest)
        if word is None:
            file = made.to_bytes(digest)
            word = await words.write(self._blobs, digest, file, _card(card, text, len(made)))
            WORDS.labels("import").inc()
        return inversion_service_pb2.AdoptWordResponse(word=word)

    def _batches(self, card: LearningCard, every: Sequence[Wanted]) -> list[list[str]]:
        """The digests of a request's words, as they are learned together."""
        digests = list(dict.fromkeys(one.digest for one in every))
        size = self._engine.together(card)
        return [digests[first : first + size] for first in range(0, len(digests), size)]

    def _expected(
        self, card: LearningCard, every: Sequence[Wanted], missing: Sequence[Wanted]
    ) -> Expected:
        """How long learning takes what is missing of a request; what is stored costs nothing.

        Raises:
            InvalidRequest: longer than the operator allows, even at the low end of what is expected.
        """
        left = list(dict.fromkeys(one.digest for one in missing))
        whole, fits = Expected(), 0
        for batch in self._batches(card, every):
            count = len(set(left).intersection(batch))
            for more in range(1, count + 1):
                if (whole + self._engine.expected(card, more)).seconds <= self._limit_s:
                    fits += 1
            if count:
                whole += self._engine.expected(card, count)
        if whole.low <= self._limit_s:
            return whole
        # The first one that does not fit.
        beyond = left[min(fits, len(left) - 1)]
        first = next(one for one in missing if one.digest == beyond)
        raise InvalidRequest.of(
            first.field,
            f"is one of {len(left)} layers whose words are to be learned; that takes about {whole.seconds:.0f} s here "
            f"({whole.low:.0f} to {whole.high:.0f}), and the operator allows a request {self._limit_s:g} s "
            f"(COLLAGE_MAX_WORK_S); expected to fit: {fits} at a time",
            reason=TOO_LONG,
        )

    def _parse(
        self, request: inversion_service_pb2.LearnWordsRequest, card: LearningCard
    ) -> list[Wanted]:
        """The subjects of a request.

        Raises:
            InvalidRequest: naming every wrong field.
        """
        check = wire.Checker()
        if not 1 <= len(request.subjects) <= limits.MAX_LAYERS:
            check.refuse(
                "subjects", f"has {len(request.subjects)}; allowed: from 1 to {limits.MAX_LAYERS}"
            )
        try:
            words.checkpoint_key(request.job, "0" * 64)
        except ValueError:
            check.refuse(
                "job",
                f"is {quote(request.job)}; allowed: 1 to 64 letters, digits, '_' and '-', the first no '-'",
            )
        layers = [subject.layer for subject in request.subjects]
        found = []
        for index, subject in enumerate(request.subjects[: limits.MAX_LAYERS]):
            field = f"subjects[{index}]"
            text = check.text(f"{field}.text", subject.text, limits.MAX_TEXT_CHARACTERS).strip()
            if not subject.text.strip():
                check.refuse(f"{field}.text", "is empty; required: the words that name the object")
            if layers.index(subject.layer) < index:
                check.refuse(f"{field}.layer", f"is {subject.layer!r}, which stands before already")
            vectors = int(check.number(f"{field}.vectors", subject.vectors, 1, limits.MAX_VECTORS))
            image = wire.parse_blob(subject.image, f"{field}.image")
            inputs = (
                f"{VERSION} {card.digest} {self._engine.recipe.inputs()} {image.sha256} "
                f"{vectors} {text}"
            )
            found.append(
                Wanted(
                    field=field,
                    layer=subject.layer,
                    image=image,
                    text=text,
                    vectors=vectors,
                    digest=hashlib.sha256(inputs.encode()).hexdigest(),
                )
            )
        check.done()
        return found

    async def _learn(
        self,
        job: str,
        card: LearningCard,
        every: Sequence[Wanted],
        left: Sequence[Wanted],
        deadline_s: float,
        limit_s: float,
    ) -> AsyncGenerator[inversion_service_pb2.LearnWordsResponse, None]:
        """Learns what is left of a batch; `every` names it, with what is stored already."""
        if not left:
            return
        key = words.checkpoint_key(
            job, hashlib.sha256(" ".join(one.digest for one in every).encode()).hexdigest()
        )
        # Equal layers are one subject.
        by_digest: dict[str, list[Wanted]] = {}
        for one in left:
            by_digest.setdefault(one.digest, []).append(one)
        subjects: dict[str, Subject] = {}
        for digest, sharing in by_digest.items():
            try:
                subjects[digest] = await self._subject(card, sharing[0])
            except (InvalidRequest, MissingBlobs, DataLoss) as error:
                for one in sharing:
                    yield _failed(one, error)
        state = await self._state(key)
        # A word of this very call may have been stored since its checkpoint was: the batch stays as it was, or the
        # others' last bits would change.
        again = {one.digest: one for one in every if state and one.digest not in by_digest}
        for digest, one in again.items():
            with contextlib.suppress(InvalidRequest, MissingBlobs, DataLoss):
                subjects[digest] = await self._subject(card, one)
        batch = list(dict.fromkeys(one.digest for one in every if one.digest in subjects))
        if state is not None:
            held = seeds_in(state)
            of_state = [digest for digest in batch if subjects[digest].seed in held]
            if len(of_state) == len(held) and set(of_state) >= set(subjects) - set(again):
                batch = of_state
            else:
                log.warning("checkpoint left aside: it is of another batch", key=key)
                state, batch = None, [digest for digest in batch if digest not in again]
        if not batch:
            return
        events = self._engine.learn(
            card,
            [subjects[digest] for digest in batch],
            state=state,
            deadline_s=deadline_s,
            limit_s=limit_s,
        )
        ended: set[str] = set()
        async with contextlib.aclosing(events):
            async for event in events:
                if event.state is not None:
                    await self._blobs.put(key, event.state, media_type=words.MEDIA_TYPE)
                stored = await self._keep(card, batch, by_digest, event)
                for digest, progress in zip(batch, event.progress, strict=True):
                    if digest in ended:
                        continue
                    for one in by_digest.get(digest, ()):
                        yield self._render(one, progress, stored.get(digest))
                    if progress.is_done:
                        ended.add(digest)
        await self._blobs.delete(key)

    async def _keep(
        self,
        card: LearningCard,
        batch: Sequence[str],
        wanted: Mapping[str, Sequence[Wanted]],
        event: Learned,
    ) -> dict[str, collage_service_pb2.Word]:
        """Stores the words that are done; answers their cards by digest."""
        stored = {}
        for number, word in event.words.items():
            digest = batch[number]
            if event.progress[number].is_broken or digest not in wanted:
                continue
            one = wanted[digest][0]
            stored[digest] = await words.write(
                self._blobs, digest, word.to_bytes(digest), _card(card, one.text, one.vectors)
            )
            WORDS.labels("learned").inc()
        return stored

    def _render(
        self, one: Wanted, progress: Progress, word: collage_service_pb2.Word | None
    ) -> inversion_service_pb2.LearnWordsResponse:
        if progress.is_done and progress.is_broken:
            return _failed(
                one,
                Internal(
                    f"the loss of layer {one.layer!r} is not finite", reason="LOSS_NOT_FINITE"
                ),
            )
        return inversion_service_pb2.LearnWordsResponse(
            progress=collage_service_pb2.WordProgress(
                layer=one.layer,
                step=progress.step,
                # A word may be done early: then so many steps were all of them.
                total=progress.step if progress.is_done else self._engine.recipe.steps,
                loss=progress.loss if math.isfinite(progress.loss) else 0.0,
                word=word.name if word else "",
            ),
            word=word,
        )

    async def _subject(self, card: LearningCard, one: Wanted) -> Subject:
        """The picture and words of a layer.

        Raises:
            InvalidRequest: nothing can be learned from them.
            MissingBlobs: the picture is not stored.
            DataLoss: it is damaged.
        """
        async with self._reading:
            data = await wire.read_blob(
                self._blobs, one.image, f"{one.field}.image", limit_bytes=MAX_ENCODED_BYTES
            )

            try:
                pixels_HW4 = await self._decoder.decode(data, f"{one.field}.image")
                picture = Image.fromarray(pixels_HW4)
                subject = await asyncio.to_thread(
                    Subject.of, picture, one.text, vectors=one.vectors
                )
            except (InvalidPicture, InvalidSubject) as error:
                raise InvalidRequest.of(
                    f"{one.field}.image", str(error), reason="INVALID_PICTURE"
                ) from error
        _check_visible(subject, f"{one.field}.image")
        if not Trainer.fits(card.facts, subject):
            raise InvalidRequest.of(
                f"{one.field}.text",
                "does not fit the model's text encoder together with its word; shorten it",
                reason="PROMPT_TOO_LONG",
            )
        return subject

    async def _state(self, key: str) -> bytes | None:
        try:
            return await self._blobs.get(key, limit_bytes=MAX_STATE_BYTES)
        except (BlobMissing, BlobCorrupt, BlobTooLarge):
            return None


def _check_visible(subject: Subject, field: str) -> None:
    """Refuses a cut-out of which too little is seen."""
    alpha_HW = subject.pixels_HW4[..., 3]
    pixels = float(alpha_HW.sum(dtype=int)) / 255
    height, width = alpha_HW.shape
    if pixels < MIN_VISIBLE_PIXELS:
        told = (
            f"shows {pixels:.3g} pixels, weighed by their alpha; required: {MIN_VISIBLE_PIXELS:g}"
        )
    elif pixels < MIN_VISIBLE_PART * alpha_HW.size:
        told = (
            f"shows {pixels / alpha_HW.size:.2%} of the {width} x {height} pixels around it, weighed "
            f"by their alpha; required: {MIN_VISIBLE_PART:.0%}"
        )
    else:
        return
    raise InvalidRequest.of(field, f"{told}, for a word to learn from", reason="TOO_LITTLE_VISIBLE")


def _card(card: LearningCard, text: str, vectors: int) -> collage_service_pb2.Word:
    word = collage_service_pb2.Word(text=text, model_digest=card.digest, vector_count=vectors)
    word.create_time.FromNanoseconds(time.time_ns())
    return word


def _found(one: Wanted, word: collage_service_pb2.Word) -> inversion_service_pb2.LearnWordsResponse:
    """The answer for a word that is stored: no step was made for it."""
    WORDS.labels("storage").inc()
    return inversion_service_pb2.LearnWordsResponse(
        progress=collage_service_pb2.WordProgress(layer=one.layer, word=word.name), word=word
    )


def _failed(one: Wanted, error: CollageError) -> inversion_service_pb2.LearnWordsResponse:
    """The answer for a layer that gets no word."""
    WORDS.labels("failed").inc()
    log.info("no word", layer=one.layer, reason=error.reason, message=error.message)
    return inversion_service_pb2.LearnWordsResponse(
        progress=collage_service_pb2.WordProgress(layer=one.layer),
        error=collage_service_pb2.JobError(
            code=error.code, message=error.message, details=error.details()
        ),
    )
