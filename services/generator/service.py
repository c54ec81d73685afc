"""GeneratorService over gRPC: requests to jobs, plates read from storage, pictures written to it.

Main type: `GeneratorServicer`. Pictures are kept under the digest of all they depend on, so that a request asked again
is answered from storage. This module computes nothing.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from safetensors import SafetensorError

from collage.v1 import (
    collage_pb2,
    collage_service_pb2,
    generator_service_pb2,
    generator_service_pb2_grpc,
)
from services.common import limits, wire
from services.common.blobs import (
    BlobCorrupt,
    BlobMissing,
    BlobStore,
    BlobTooLarge,
    put_blob,
)
from services.common.collage import DIALS, Dials, Extent, Sampling
from services.common.decoder import Decoder
from services.common.errors import InvalidRequest, ModelChanged, quote
from services.common.field import Field
from services.common.pictures import MAX_ENCODED_BYTES, InvalidPicture
from services.common.plate import Plate
from services.common.rpc import bounded
from services.common.telemetry import log
from services.diffusion.pace import Expected
from services.diffusion.word import MAX_FILE_BYTES, InvalidWord, Word
from services.generator.card import GeneratorCard
from services.generator.conditioning import LayerControl
from services.generator.duration import Duration
from services.generator.engine import Engine
from services.generator.estimate import coarse_dials, idle_structure, read_structure, unread
from services.generator.job import ImageMade, Job, PreviewMade, QueuedAt, StepDone
from services.generator.schedule import SAMPLERS

# Part of every result's key: raise it when the same request gives another picture.
VERSION = 1
# A list of 16 pictures.
MAX_RESULT_BYTES = 64 * 1024
# A prompt as long as the contract allows, and every layer's text appended to it.
MAX_BOUND_CHARACTERS = limits.MAX_PROMPT_CHARACTERS + limits.MAX_LAYERS * (
    limits.MAX_TEXT_CHARACTERS + 2
)
# Plates read at a time: what bounds memory before the queue does.
MAX_READING = 4


class GeneratorServicer(generator_service_pb2_grpc.GeneratorServiceServicer):
    """Generates from plates in `blobs`.

    limit_bytes: what a request may take beyond the weights; 0 for what the engine finds right. limit_s: seconds that
    the device may be at work on it.
    """

    def __init__(
        self,
        engine: Engine[Any],
        blobs: BlobStore,
        decoder: Decoder,
        *,
        limit_bytes: float,
        limit_s: float,
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._limit_bytes = limit_bytes
        self._limit_s = limit_s
        self._reading = asyncio.Semaphore(MAX_READING)
        self._decoder = decoder

    async def Generate(
        self, request: generator_service_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generator_service_pb2.GenerateResponse]:
        """See generator_service.proto."""
        # Of the caller, who may name none: what waits here waits for as long as it takes.
        deadline_s = time.monotonic() + bounded(math.inf)
        card = self._engine.catalog.find(request.sampling.model, field="sampling.model")
        if request.model_digest not in ("", card.digest):
            raise ModelChanged.of(card.name, card.digest, request.model_digest)
        sampling = wire.parse_sampling(request.sampling, _render_model(card), fallback_seed=0)
        card.check_sampling(sampling)
        _check(request, card)
        key = f"results/{_digest(request, sampling, card, self._engine.arithmetic(card))}"
        kept = await self._kept(key)
        if kept is not None:
            log.info("answered from storage", key=key)
            for image in kept:
                yield generator_service_pb2.GenerateResponse(image=image)
            return
        async with self._reading:
            plate = await self._read_plate(request, card)
            parent_HWC = await self._read_parent(request, plate)
            words = await self._read_words(request, card)
        job = Job(
            plate=plate,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            layers=_controls(request, plate, words),
            sampling=sampling,
            deadline_s=deadline_s,
            limit_s=self._limit_s,
        )
        self._duration(
            card,
            _extent(plate),
            sampling,
            largest_noise=float(plate.strength_hw.max()),
            controlnets=len(_kinds(request)),
            has_emphasis=job.has_emphasis,
        ).check(canvas="plate")
        self._memory_bytes(
            card,
            _extent(plate),
            sampling,
            has_structure=bool(_kinds(request)),
            has_emphasis=job.has_emphasis,
        )
        images = []
        async with contextlib.aclosing(self._engine.generate(job)) as events:
            async for event in events:
                if isinstance(event, ImageMade):
                    image = await self._store(event, card, parent_HWC)
                    images.append(image)
                    yield generator_service_pb2.GenerateResponse(image=image)
                else:
                    yield _render_progress(event)
        await self._keep(key, images)

    async def DescribeModels(
        self, request: generator_service_pb2.DescribeModelsRequest, context: Any
    ) -> generator_service_pb2.DescribeModelsResponse:
        """See generator_service.proto."""
        return generator_service_pb2.DescribeModelsResponse(
            models=[self._render_model(card) for card in self._engine.catalog.cards]
        )

    async def Estimate(
        self, request: generator_service_pb2.EstimateRequest, context: Any
    ) -> generator_service_pb2.EstimateResponse:
        """See generator_service.proto. Prompts that are too long are counted, not refused."""
        card = self._engine.catalog.find(request.sampling.model, field="sampling.model")
        sampling = wire.parse_sampling(request.sampling, _render_model(card), fallback_seed=0)
        card.check_sampling(sampling)
        check = wire.Checker()
        for name in ("prompt", "negative_prompt"):
            check.text(name, getattr(request, name), MAX_BOUND_CHARACTERS)
        check.number("word_tokens", request.word_tokens, 0, limits.MAX_LAYERS * limits.MAX_VECTORS)
        width = check.number("size.width", request.size.width, limits.MIN_SIDE, limits.MAX_SIDE)
        height = check.number("size.height", request.size.height, limits.MIN_SIDE, limits.MAX_SIDE)
        largest_noise = check.number("largest_noise", request.largest_noise, 0, 1)
        plans = {Field("layers")[i]: plan for i, plan in enumerate(request.layers)}
        _check_plans(check, plans, card, request.prompt)
        check.done()
        size = Extent(width=int(width), height=int(height))
        card.check_size(size, field="size")
        has_emphasis = any(
            part.emphasis > 0 for layer in request.layers for part in layer.structure
        )
        memory_bytes = self._memory_bytes(
            card,
            size,
            sampling,
            has_structure=any(layer.structure for layer in request.layers),
            has_emphasis=has_emphasis,
        )
        duration = self._duration(
            card,
            size,
            sampling,
            largest_noise=largest_noise,
            controlnets=len({part.kind for layer in request.layers for part in layer.structure}),
            has_emphasis=has_emphasis,
        )
        duration.check(canvas="size")
        expected = duration.expected
        is_negative_read = card.facts.reads_negative(sampling.guidance_scale)
        warnings = [
            *(
                []
                if is_negative_read
                else unread(request.layers, request.negative_prompt, sampling)
            ),
            *duration.warnings(),
            *coarse_dials(request.layers, sampling.steps),
            *idle_structure(
                request.layers,
                largest_noise=largest_noise,
                steps=sampling.steps,
                max_steps=card.max_steps,
            ),
        ]
        return generator_service_pb2.EstimateResponse(
            prompt_tokens=card.count_tokens(request.prompt) + request.word_tokens,
            negative_prompt_tokens=(
                card.count_tokens(request.negative_prompt) if is_negative_read else 0
            ),
            prompt_tokens_limit=card.tokens_limit,
            seconds=expected.seconds,
            seconds_low=expected.low,
            seconds_high=expected.high,
            memory_bytes=memory_bytes,
            warnings=warnings,
        )

    def _duration(
        self,
        card: GeneratorCard,
        size: Extent,
        sampling: Sampling,
        *,
        largest_noise: float,
        controlnets: int,
        has_emphasis: bool,
    ) -> Duration:
        """How long a request is expected to take, and is allowed to."""

        def of(size: Extent, images: int, steps: int) -> Expected:
            return self._engine.expected(
                card,
                size,
                replace(sampling, images=images),
                steps=math.floor(steps * largest_noise),
                controlnets=controlnets,
                has_emphasis=has_emphasis,
            )

        return Duration(
            card=card,
            size=size,
            sampling=sampling,
            limit_s=self._limit_s,
            expected=of(size, sampling.images, sampling.steps),
            of=of,
        )

    def _render_model(self, card: GeneratorCard) -> collage_service_pb2.Model:
        model = _render_model(card)
        model.max_work_seconds = self._limit_s
        return model

    def _memory_bytes(
        self,
        card: GeneratorCard,
        size: Extent,
        sampling: Sampling,
        *,
        has_structure: bool,
        has_emphasis: bool,
    ) -> int:
        """Working memory of a request.

        Raises:
            InvalidRequest: more than is allowed.
        """
        needed = card.memory_bytes(
            size,
            sampling,
            max_rows=self._engine.max_rows,
            has_structure=has_structure,
            has_emphasis=has_emphasis,
        )
        most = self._limit_bytes or self._engine.most_bytes(card)
        if needed > most:
            raise InvalidRequest.of(
                "sampling.images",
                f"is {sampling.images}; at {size.width} x {size.height} pixels that takes "
                f"{needed / 2**30:.1f} GiB of memory, allowed: {most / 2**30:.1f} GiB; "
                "ask for fewer at a time, or for a smaller canvas",
                reason="TOO_MUCH_MEMORY",
            )
        return needed

    async def _kept(self, key: str) -> list[collage_service_pb2.GeneratedImage] | None:
        """The pictures made for the same request before, if all of them are still there."""
        try:
            data = json.loads(await self._blobs.get(key, limit_bytes=MAX_RESULT_BYTES))
            images = [
                json_format.ParseDict(each, collage_service_pb2.GeneratedImage())
                for each in data["images"]
            ]
            refs = [wire.parse_blob(image.blob, "kept") for image in images]
        # Whatever is no list of pictures is made anew.
        except (
            *(BlobMissing, BlobCorrupt, BlobTooLarge),
            *(ValueError, KeyError, TypeError, RecursionError),
            *(json_format.ParseError, InvalidRequest),
        ):
            return None
        stats = await asyncio.gather(*(self._blobs.stat(ref.key) for ref in refs))
        return images if images and all(stats) else None

    async def _keep(self, key: str, images: list[collage_service_pb2.GeneratedImage]) -> None:
        data = {"images": [json_format.MessageToDict(image) for image in images]}
        await self._blobs.put(
            key, json.dumps(data, sort_keys=True).encode(), media_type="application/json"
        )

    async def _read_plate(
        self, request: generator_service_pb2.GenerateRequest, card: GeneratorCard
    ) -> Plate:
        limit = limits.MAX_PLATE_BYTES
        ref = wire.parse_blob(request.plate, "plate", limit_bytes=limit)
        data = await wire.read_blob(self._blobs, ref, "plate", limit_bytes=limit)
        try:
            plate = await asyncio.to_thread(Plate.from_bytes, data)
        except (SafetensorError, TypeError, ValueError, ArithmeticError, AssertionError) as error:
            raise InvalidRequest.of("plate", f"is no plate: {error}") from error
        if plate.latent_factor != card.facts.latent_factor:
            raise InvalidRequest.of(
                "plate",
                f"has latent factor {plate.latent_factor}; model {card.name!r} has "
                f"{card.facts.latent_factor}",
            )
        card.check_size(_extent(plate), field="plate")
        return plate

    async def _read_parent(
        self, request: generator_service_pb2.GenerateRequest, plate: Plate
    ) -> NDArray[np.uint8] | None:
        """The pixels of a redo's parent, None where this is no redo."""
        if not request.HasField("parent"):
            return None
        ref = wire.parse_blob(request.parent, "parent")
        data = await wire.read_blob(self._blobs, ref, "parent", limit_bytes=MAX_ENCODED_BYTES)
        try:
            # The pixels the compositor composed over, so that only what differs from them counts as changed.
            parent_HWC = await self._decoder.decode(data, "parent", is_opaque=True)
        except InvalidPicture as error:
            raise InvalidRequest.of("parent", str(error), reason="INVALID_PICTURE") from error
        canvas = _extent(plate)
        height, width = parent_HWC.shape[:2]
        if Extent(width=width, height=height) != canvas:
            raise InvalidRequest.of(
                "parent",
                f"is {width} x {height} pixels; required: the plate's {canvas.width} x {canvas.height}",
            )
        return parent_HWC

    async def _read_words(
        self, request: generator_service_pb2.GenerateRequest, card: GeneratorCard
    ) -> list[Word | None]:
        """The learned word of each layer, its weight in it; None for a layer without one."""
        words: list[Word | None] = []
        for index, layer in enumerate(request.layers):
            if not layer.HasField("word"):
                words.append(None)
                continue
            field = f"layers[{index}].word"
            ref = wire.parse_blob(layer.word, field)
            data = await wire.read_blob(self._blobs, ref, field, limit_bytes=MAX_FILE_BYTES)
            try:
                word = Word.from_bytes(data, card.facts.text_widths)
            except InvalidWord as error:
                raise InvalidRequest.of(field, str(error)) from error
            words.append(word.weighted(layer.word_weight))
        return words

    async def _store(
        self, event: ImageMade, card: GeneratorCard, parent_HWC: NDArray[np.uint8] | None
    ) -> collage_service_pb2.GeneratedImage:
        ref = await put_blob(self._blobs, event.png, media_type="image/png")
        image = collage_service_pb2.GeneratedImage(
            index=event.index,
            seed=event.seed,
            blob=wire.render_blob(ref),
            model_digest=card.digest,
        )
        if parent_HWC is not None:
            image.changed_pixels = int((event.pixels_HWC != parent_HWC).any(axis=2).sum())
        return image


def _check(request: generator_service_pb2.GenerateRequest, card: GeneratorCard) -> None:
    """Refuses what the messages themselves show to be wrong."""
    check = wire.Checker()
    for name in ("prompt", "negative_prompt"):
        check.text(name, getattr(request, name), MAX_BOUND_CHARACTERS)
    if not request.layers:
        check.refuse("layers", f"has 0 layers; allowed: from 1 to {limits.MAX_LAYERS}")
    plans = {Field("layers")[i]["plan"]: layer.plan for i, layer in enumerate(request.layers)}
    _check_plans(check, plans, card, request.prompt)
    for index, layer in enumerate(request.layers[: limits.MAX_LAYERS]):
        if layer.HasField("word"):
            check.number(f"layers[{index}].word_weight", layer.word_weight, 0, 2)
        elif layer.word_weight:
            check.refuse(
                f"layers[{index}].word_weight",
                f"is {layer.word_weight:g}; allowed: only beside a word",
            )
    check.done()


def _check_plans(
    check: wire.Checker,
    plans: Mapping[Field, collage_pb2.LayerPlan],
    card: GeneratorCard,
    prompt: str,
) -> None:
    """Refuses what planned layers show to be wrong, each at its place."""
    if len(plans) > limits.MAX_LAYERS:
        check.refuse("layers", f"has {len(plans)} layers; allowed: from 1 to {limits.MAX_LAYERS}")
    for field, plan in itertools.islice(plans.items(), limits.MAX_LAYERS):
        for dial in DIALS:
            check.number(field[dial], getattr(plan, dial), 0, 1)
        if not 0 <= plan.text_start <= plan.text_end <= len(prompt):
            check.refuse(
                field["text_end"],
                f"spans characters {plan.text_start} to {plan.text_end}; the prompt has {len(prompt)}",
            )
        _check_structures(check, plan, card, field["structure"])


def _check_structures(
    check: wire.Checker, plan: collage_pb2.LayerPlan, card: GeneratorCard, field: Field
) -> None:
    kinds = [structure.kind for structure in plan.structure]
    for index, structure in enumerate(plan.structure):
        for name in ("scale", "start", "end", "emphasis"):
            check.number(field[index][name], getattr(structure, name), 0, 1)
        if structure.start > structure.end:
            check.refuse(field[index]["end"], f"is {structure.end:g}, before the start")
        if structure.kind not in card.controlnets:
            known = ", ".join(card.controlnets) or "none"
            check.refuse(field[index]["kind"], f"is {quote(structure.kind)}; allowed: {known}")
        elif structure.kind in kinds[:index]:
            check.refuse(field[index]["kind"], f"is {structure.kind} again; allowed: once")


def _digest(
    request: generator_service_pb2.GenerateRequest,
    sampling: Sampling,
    card: GeneratorCard,
    arithmetic: str,
) -> str:
    """Names all that the pictures depend on: the request, the networks and how their sums are rounded.

    Not the networks' names, nor who watches.
    """
    inputs = generator_service_pb2.GenerateRequest()
    inputs.CopyFrom(request)
    inputs.sampling.CopyFrom(wire.render_sampling(sampling))
    inputs.sampling.ClearField("model")
    inputs.sampling.ClearField("preview_every")
    inputs.sampling.ClearField("adapters")
    # The card's own digest stands before the message.
    inputs.ClearField("model_digest")
    message = inputs.SerializeToString(deterministic=True)
    controlnets = [card.controlnets[kind] for kind in _kinds(request)]
    adapters = [
        f"{card.adapters[adapter.name]}*{adapter.weight!r}" for adapter in sampling.active_adapters
    ]
    networks = " ".join([str(VERSION), card.digest, arithmetic, *controlnets, *adapters, ""])
    return hashlib.sha256(networks.encode() + message).hexdigest()


def _kinds(request: generator_service_pb2.GenerateRequest) -> list[str]:
    """The control kinds that the layers name, each once."""
    return sorted({part.kind for layer in request.layers for part in layer.plan.structure})


def _controls(
    request: generator_service_pb2.GenerateRequest, plate: Plate, words: Sequence[Word | None]
) -> tuple[LayerControl, ...]:
    if len(request.layers) != len(plate.visible_Lhw):
        raise InvalidRequest.of(
            "layers", f"has {len(request.layers)} layers; the plate has {len(plate.visible_Lhw)}"
        )
    if lacking := [kind for kind in _kinds(request) if kind not in plate.control]:
        raise InvalidRequest.of("plate", f"has no control picture of kind {', '.join(lacking)}")
    return tuple(
        LayerControl(
            text_start=layer.plan.text_start,
            text_end=layer.plan.text_end,
            seed=layer.seed if layer.HasField("seed") else None,
            structures=tuple(map(read_structure, layer.plan.structure)),
            word=word,
            dials=Dials(**{dial: getattr(layer.plan, dial) for dial in DIALS}),
        )
        for layer, word in zip(request.layers, words, strict=True)
    )


def _extent(plate: Plate) -> Extent:
    height, width = plate.release_HW.shape
    return Extent(width=width, height=height)


def _render_model(card: GeneratorCard) -> collage_service_pb2.Model:
    return collage_service_pb2.Model(
        name=card.name,
        digest=card.digest,
        family=card.family,
        size_multiple=card.facts.size_multiple,
        min_side=card.min_side,
        max_side=card.max_side,
        native_side=max(card.facts.native.width, card.facts.native.height),
        prompt_tokens_limit=card.tokens_limit,
        samplers=list(SAMPLERS),
        defaults=wire.render_sampling(card.defaults()),
        control_kinds=list(card.controlnets),
        max_layers=limits.MAX_LAYERS,
        adapters=list(card.adapters),
        max_images=card.max_images,
        max_steps=card.max_steps,
        latent_factor=card.facts.latent_factor,
    )


def _render_progress(
    event: QueuedAt | StepDone | PreviewMade,
) -> generator_service_pb2.GenerateResponse:
    match event:
        case QueuedAt():
            return generator_service_pb2.GenerateResponse(
                queued=collage_service_pb2.Queued(position=event.place)
            )
        case StepDone():
            return generator_service_pb2.GenerateResponse(
                step=collage_service_pb2.Step(step=event.step, total=event.total)
            )
        case PreviewMade():
            return generator_service_pb2.GenerateResponse(
                preview=collage_service_pb2.Preview(
                    index=event.index, step=event.step, png=event.png
                )
            )
