"""From a request to everything that can be known before a model runs, and to the job that is accepted with it.

Main type: `Planner`. One plan serves `PlanCollage` and the job: what is found wrong is found here, and what is settled
here is what the job's worker does. This module knows neither the queue nor pixels.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from collage.v1 import (
    collage_pb2,
    collage_service_pb2,
    compositor_service_pb2,
    generator_service_pb2,
    inversion_service_pb2,
    job_pb2,
)
from gateway.jobs import job_id_of
from gateway.prompt import BoundPrompt, bind
from gateway.request import Generate, Learn, Redo, Work
from gateway.stages import Stages
from gateway.syntax import foreign
from gateway.words import Words
from services.common import wire
from services.common.blobs import BlobRef, BlobStore, put_blob
from services.common.collage import DIALS, Collage, Layer, Picture
from services.common.errors import InvalidRequest, MissingBlobs, Violation, quote
from services.common.field import Field
from services.common.rpc import caller
from services.common.turns import Turns

# Plans under way, of all callers and of one, beside those of callers whose plans are short; so many keep a compositor
# busy, and more would only be more for the others to wait for.
MAX_RUNNING, MAX_CALLER_RUNNING, KEPT = 8, 3, 2
# More than a server's calls: what waits is bounded there.
MAX_WAITING = 10_000


class Planner:
    """Stores, binds, composes, estimates."""

    def __init__(self, *, blobs: BlobStore, words: Words, stages: Stages) -> None:
        self._blobs = blobs
        self._words = words
        self._stages = stages
        # What one caller sends at once is planned a little at a time, so that the next caller's plan is soon among it.
        self._turns = Turns(
            "requests to be planned",
            running=MAX_RUNNING,
            kept=KEPT,
            caller_running=MAX_CALLER_RUNNING,
            waiting=MAX_WAITING,
            caller_waiting=MAX_WAITING,
        )

    async def accept(
        self, work: Work, *, request_id: str, request_digest: str
    ) -> job_pb2.AcceptedJob:
        """The job of a request, with all that its worker needs.

        Args:
            work: what is asked for.
            request_id: of the request.
            request_digest: see `gateway.request.digest_of`.

        Raises:
            InvalidRequest: any wrong field, at its place.
            MissingBlobs: pictures that must be uploaded first.
            Overloaded: too many requests wait.
        """
        async with self._turns.turn(caller.get()):
            return await self._accepted(work, request_id, request_digest)

    async def plan(self, work: Generate | Redo, *, request_id: str) -> job_pb2.Drawing:
        """The whole plan of a drawing.

        Raises:
            InvalidRequest, MissingBlobs, Overloaded: as `accept`.
        """
        async with self._turns.turn(caller.get()):
            return await self._planned(work, request_id)

    async def cut(
        self, picture: Picture, model: str, points: Sequence[collage_pb2.Point]
    ) -> compositor_service_pb2.CutResponse:
        """What is cut out of a picture, which stands at the request's `image`; errors are told at the request's fields.

        Raises:
            InvalidRequest, MissingBlobs, Overloaded: as `accept`.
        """
        async with self._turns.turn(caller.get()):
            stored = await self._put(picture)
            if stored is None:
                assert isinstance(picture, BlobRef), "bytes are stored"
                raise MissingBlobs({"image": picture.sha256})
            return await self._stages.cut(
                compositor_service_pb2.CutRequest(
                    image=wire.render_blob(stored), model=model, points=points
                )
            )

    async def _accepted(
        self, work: Work, request_id: str, request_digest: str
    ) -> job_pb2.AcceptedJob:
        accepted = job_pb2.AcceptedJob(request_digest=request_digest)
        if isinstance(work, Learn):
            collage, _ = await self._store(work.collage, None, work.field)
            learning = _learning(collage, work.layers, work.model, work.field, request_id)
            await self._stages.estimate_words(learning)
            accepted.learning.CopyFrom(learning)
            return accepted
        accepted.drawing.CopyFrom(await self._planned(work, request_id))
        return accepted

    async def _planned(self, work: Generate | Redo, request_id: str) -> job_pb2.Drawing:
        redo = work if isinstance(work, Redo) else None
        generate = work.generate if isinstance(work, Redo) else work
        field, model, sampling = generate.field, generate.model, generate.sampling
        words = await self._words_of(generate)
        bound = bind(
            generate.collage.prompt, generate.collage.layers, field=field["collage"]["prompt"]
        )
        collage, parent = await self._store(generate.collage, redo, field)
        compose = _compose_request(collage, redo, parent, model.latent_factor)
        composed = await self._stages.compose(compose, field)
        layers = _layer_plans(collage, bound, composed)
        controls = [
            _control(layer, told, words) for layer, told in zip(collage.layers, layers, strict=True)
        ]
        asked = generator_service_pb2.EstimateRequest(
            sampling=wire.render_sampling(sampling),
            size=compose.collage.size,
            prompt=bound.text,
            negative_prompt=collage.negative_prompt,
            word_tokens=_word_tokens(collage, words),
            layers=[control.plan for control in controls],
            largest_noise=composed.largest_noise,
        )
        estimate = await self._stages.estimate(asked, field)
        learned = [
            index
            for index, layer in enumerate(collage.layers)
            if layer.visible and layer.asks_to_learn
        ]
        learning = _learning(collage, learned, model, field, request_id)
        learning.skips_failed = generate.skips_failed_words
        seconds = await self._seconds(estimate, learning)
        await self._check_tokens(asked, estimate, collage, bound, field)
        plan = collage_service_pb2.Plan(
            composite=composed.composite,
            layers=layers,
            warnings=[
                *composed.warnings,
                *_not_found(collage, bound),
                *_foreign(collage),
                *estimate.warnings,
            ],
            prompt=bound.text,
            sampling=wire.render_sampling(sampling),
            prompt_tokens=estimate.prompt_tokens,
            prompt_tokens_limit=estimate.prompt_tokens_limit,
            estimated_seconds=seconds[0],
            estimated_seconds_low=seconds[1],
            estimated_seconds_high=seconds[2],
            estimated_memory_bytes=estimate.memory_bytes,
        )
        request = generator_service_pb2.GenerateRequest(
            prompt=bound.text,
            negative_prompt=collage.negative_prompt,
            sampling=plan.sampling,
            layers=controls,
            model_digest=model.digest,
        )
        if parent is not None:
            request.parent.CopyFrom(wire.render_blob(parent))
        return job_pb2.Drawing(
            field=str(field), plan=plan, compose=compose, learning=learning, generate=request
        )

    async def _seconds(
        self, drawing: generator_service_pb2.EstimateResponse, learning: job_pb2.Learning
    ) -> tuple[float, float, float]:
        """Expected seconds of the whole request, their low end and their high end; 0 where a part of it is unknown."""
        told = (drawing.seconds, drawing.seconds_low, drawing.seconds_high)
        if not learning.request.subjects:
            return told
        words = await self._stages.estimate_words(learning)
        if words is None or not drawing.seconds:
            return 0.0, 0.0, 0.0
        more = (words.seconds, words.seconds_low, words.seconds_high)
        seconds, low, high = (each + other for each, other in zip(told, more, strict=True))
        return seconds, low, high

    async def _check_tokens(
        self,
        asked: generator_service_pb2.EstimateRequest,
        told: generator_service_pb2.EstimateResponse,
        collage: Collage,
        bound: BoundPrompt,
        field: Field,
    ) -> None:
        """Refuses prompts that the text encoders cannot hold.

        Raises:
            InvalidRequest: naming whose words take how many tokens.
        """
        place, limit = field["collage"], told.prompt_tokens_limit
        violations: list[Violation] = []

        def refuse(where: Field, text: str, tokens: int) -> None:
            told = f"{text}, {tokens - limit} too many; allowed: {limit} with begin and end marks"
            violations.append(Violation(field=str(where), description=told))

        learned = f", {asked.word_tokens} of them of learned words" if asked.word_tokens else ""
        if told.prompt_tokens > limit and bound.appended:
            own, *each = await asyncio.gather(
                self._tokens(asked, bound.text[: bound.own_length], field),
                *(self._tokens(asked, collage.layers[i].text, field) for i in bound.appended),
            )
            own += asked.word_tokens
            refuse(
                # The prompt itself is to blame only where it would be too long without them.
                place["prompt"] if own > limit else place["layers"],
                f"has {len(each)} texts that do not stand in the prompt; appended to its own {own} "
                f"tokens{learned} they make {told.prompt_tokens}",
                told.prompt_tokens,
            )
            # Of a text alone begin and end marks are no part.
            violations += [
                Violation(
                    field=str(place["layers"][index]["text"]),
                    description=f"takes {tokens - 2} tokens, appended to the prompt because it does not stand there",
                )
                for index, tokens in zip(bound.appended, each, strict=True)
            ]
        elif told.prompt_tokens > limit:
            text = f"takes {told.prompt_tokens} tokens{learned}"
            refuse(place["prompt"], text, told.prompt_tokens)
        if told.negative_prompt_tokens > limit:
            text = f"takes {told.negative_prompt_tokens} tokens"
            refuse(place["negative_prompt"], text, told.negative_prompt_tokens)
        if violations:
            raise InvalidRequest(violations, reason="PROMPT_TOO_LONG")

    async def _tokens(
        self, asked: generator_service_pb2.EstimateRequest, text: str, field: Field
    ) -> int:
        """Tokens of a part of the prompt, begin and end marks included."""
        part = generator_service_pb2.EstimateRequest(
            sampling=asked.sampling, size=asked.size, prompt=text
        )
        return (await self._stages.estimate(part, field)).prompt_tokens

    async def _words_of(self, generate: Generate) -> dict[str, collage_service_pb2.Word]:
        """The stored words that layers name, by word name.

        Raises:
            InvalidRequest: a word that is not stored, or was learned for another model; of hidden layers too.
        """
        model = generate.model
        asked_for = {
            index: layer.appearance.word
            for index, layer in enumerate(generate.collage.layers)
            if layer.appearance is not None and layer.appearance.word is not None
        }
        names = sorted(set(asked_for.values()))
        looked_up = await asyncio.gather(*map(self._words.find, names))
        found = dict(zip(names, looked_up, strict=True))
        unknown, foreign = [], []
        for index, name in asked_for.items():
            field = str(generate.field["collage"]["layers"][index]["appearance"]["word"])
            word = found[name]
            if word is None:
                told = f"is {quote(name)}; no word of that name is stored"
                unknown.append(Violation(field=field, description=told))
            elif word.model_digest != model.digest:
                told = (
                    f"is {quote(word.name)}, learned for a model of digest {word.model_digest[:12]}; "
                    f"required: one for {model.name}, {model.digest[:12]}"
                )
                foreign.append(Violation(field=field, description=told))
        if unknown:
            raise InvalidRequest(unknown, reason="UNKNOWN_WORD")
        if foreign:
            raise InvalidRequest(foreign, reason="WORD_OF_ANOTHER_MODEL")
        return {name: word for name, word in found.items() if word is not None}

    async def _store(
        self, collage: Collage, redo: Redo | None, field: Field
    ) -> tuple[Collage, BlobRef | None]:
        """The same collage with every picture a stored blob, and a redo's parent.

        Raises:
            MissingBlobs: pictures that must be uploaded first.
        """
        pictures = collage.pictures()
        places = {path: field["collage"].below(path) for path in pictures}
        if redo is not None:
            pictures["parent"], places["parent"] = redo.parent, field["parent"]
        stored = await asyncio.gather(*(self._put(picture) for picture in pictures.values()))
        refs = {path: ref for path, ref in zip(pictures, stored, strict=True) if ref is not None}
        missing = {
            str(places[path]): picture.sha256
            for path, picture in pictures.items()
            if isinstance(picture, BlobRef) and path not in refs
        }
        if missing:
            raise MissingBlobs(missing)
        return collage.with_pictures(refs), refs.get("parent")

    async def _put(self, picture: Picture) -> BlobRef | None:
        """The stored blob of a picture, with its true size; None for a reference to nothing."""
        if isinstance(picture, bytes):
            return await put_blob(self._blobs, picture, media_type="application/octet-stream")
        stat = await self._blobs.stat(picture.key)
        # One form for one picture, whatever the caller said of it, so that equal requests have equal digests.
        if stat is None:
            return None
        return BlobRef(
            sha256=picture.sha256,
            size_bytes=stat.size_bytes,
            media_type="application/octet-stream",
        )


def _compose_request(
    collage: Collage, redo: Redo | None, parent: BlobRef | None, latent_factor: int
) -> compositor_service_pb2.ComposeRequest:
    request = compositor_service_pb2.ComposeRequest(
        collage=wire.render_collage(collage), latent_factor=latent_factor
    )
    if redo is not None and parent is not None:
        request.redo.CopyFrom(
            compositor_service_pb2.Redo(
                parent=wire.render_blob(parent),
                layers=redo.layers,
                feather=redo.feather,
                restore_cutout=redo.restore_cutout,
            )
        )
    return request


def _layer_plans(
    collage: Collage, bound: BoundPrompt, composed: compositor_service_pb2.ComposeResponse
) -> list[collage_pb2.LayerPlan]:
    """The layers as composed, with where their words stand in the prompt and their ControlNets."""
    plans = []
    for layer, told, (start, end) in zip(collage.layers, composed.layers, bound.spans, strict=True):
        plan = collage_pb2.LayerPlan()
        plan.CopyFrom(told)
        plan.text_start, plan.text_end = start, end
        plan.structure.extend(wire.render_structure(layer.structure))
        plans.append(plan)
    return plans


def _control(
    layer: Layer, plan: collage_pb2.LayerPlan, words: Mapping[str, collage_service_pb2.Word]
) -> generator_service_pb2.LayerControl:
    """How a layer steers the generation; a word that is still to be learned is put in when it is there."""
    # What the generator needs of the plan: pixels are the plate's.
    needed = collage_pb2.LayerPlan(
        name=plan.name,
        visible_fraction=plan.visible_fraction,
        text_start=plan.text_start,
        text_end=plan.text_end,
        structure=plan.structure,
        **{dial: getattr(plan, dial) for dial in DIALS},
    )
    for part in needed.structure:
        part.ClearField("image")
    control = generator_service_pb2.LayerControl(plan=needed, seed=layer.seed)
    if layer.visible and layer.appearance is not None:
        control.word_weight = layer.appearance.weight
        if layer.appearance.word is not None:
            control.word.CopyFrom(words[layer.appearance.word].vectors)
    return control


def _learning(
    collage: Collage,
    layers: Sequence[int],
    model: collage_service_pb2.Model,
    field: Field,
    request_id: str,
) -> job_pb2.Learning:
    """The words to learn from these layers of a stored collage."""
    return job_pb2.Learning(
        field=str(field),
        layers=layers,
        request=inversion_service_pb2.LearnWordsRequest(
            model=model.name,
            model_digest=model.digest,
            subjects=[_subject(collage.layers[index]) for index in layers],
            job=job_id_of(request_id),
        ),
    )


def _subject(layer: Layer) -> inversion_service_pb2.Subject:
    return inversion_service_pb2.Subject(
        layer=layer.name,
        image=wire.render_picture(layer.image).blob,
        text=layer.text,
        vectors=layer.appearance.vectors if layer.appearance is not None else 1,
    )


def _word_tokens(collage: Collage, words: Mapping[str, collage_service_pb2.Word]) -> int:
    """Tokens that learned words add to the prompt: one for each vector."""
    return sum(
        layer.appearance.vectors
        if layer.appearance.word is None
        else words[layer.appearance.word].vector_count
        for layer in collage.layers
        if layer.visible and layer.appearance is not None
    )


def _not_found(collage: Collage, bound: BoundPrompt) -> Iterator[collage_pb2.Warning]:
    """A warning for each layer whose text had to be appended to the prompt."""
    for index in bound.not_found:
        yield collage_pb2.Warning(
            reason="TEXT_NOT_FOUND",
            field=str(Field("collage")["layers"][index]["text"]),
            message=f"{quote(collage.layers[index].text)} does not stand in the prompt; "
            "it was appended",
        )


def _foreign(collage: Collage) -> Iterator[collage_pb2.Warning]:
    """A warning for each kind of other tools' syntax in a text."""
    place = Field("collage")
    texts = {place["prompt"]: collage.prompt, place["negative_prompt"]: collage.negative_prompt}
    for index, layer in enumerate(collage.layers):
        if layer.visible:
            texts[place["layers"][index]["text"]] = layer.text
    for field, text in texts.items():
        for message in foreign(text):
            yield collage_pb2.Warning(reason="PROMPT_SYNTAX", field=str(field), message=message)
