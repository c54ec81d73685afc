"""From a request's message to everything that can be known before a model runs.

Main types: `Planner` and what it returns, `Planned`. One plan serves `PlanCollage`, the check before a job is queued,
and the job itself, so that all three see the same errors. Composing twice costs nothing: the compositor finds its plate
by the digest of the inputs. This module knows neither jobs nor pixels.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import grpc

from collage.v1 import (
    collage_pb2,
    collage_service_pb2,
    compositor_service_pb2,
    compositor_service_pb2_grpc,
    generator_service_pb2,
    generator_service_pb2_grpc,
)
from gateway.prompt import BoundPrompt, bind
from gateway.words import Words
from services.common import limits, wire
from services.common.blobs import BlobRef, BlobStore, put_blob
from services.common.collage import Collage, Layer, Picture, Redo, Sampling
from services.common.errors import (
    InvalidRequest,
    MissingBlobs,
    Violation,
    from_rpc,
    quote,
)
from services.common.rpc import bounded, outgoing

# Composing 32 layers at 2048 x 2048 takes seconds, and a network that draws their control pictures takes seconds for
# each. Longer than that, a call is made again, and finds what networks gave; it is shorter than a job's patience with a
# stage, so that a compositor that hangs loses no job.
COMPOSE_TIMEOUT_S = 100.0
ASK_TIMEOUT_S = 15.0
# A noise dial that acts further from its value than this is warned of.
COARSE_DIAL = 0.1
# Models change only when a generator restarts.
MODELS_FRESH_S = 5.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A checked request: every picture stored, every setting resolved, the plate composed.

    `plan` is what the caller sees; its layers carry the resolved dials and the spans of `bound`. `words` are the stored
    words that layers name, hidden ones too, by word name.
    """

    collage: Collage
    sampling: Sampling
    bound: BoundPrompt
    plate: BlobRef
    plan: collage_service_pb2.Plan
    redo: Redo | None
    words: Mapping[str, collage_service_pb2.Word]

    def vectors(self) -> dict[str, BlobRef]:
        """The vectors of each visible layer that names a stored word, by layer name."""
        return {
            layer.name: wire.parse_blob(self.words[name].vectors, "word.vectors")
            for layer, name in _named_words(self.collage)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RedoFields:
    """What a redo request adds, as it came. Paths of errors are `redo.parent` and so on."""

    parent: Picture
    layers: tuple[str, ...]
    feather: float
    restore_cutout: bool


class Models:
    """The models that are served, asked of the generator and remembered for a few seconds."""

    def __init__(
        self,
        generator: generator_service_pb2_grpc.GeneratorServiceStub,
        compositor: compositor_service_pb2_grpc.CompositorServiceStub,
    ) -> None:
        self._generator = generator
        self._compositor = compositor
        self._models: Sequence[collage_service_pb2.Model] = ()
        self._asked = -MODELS_FRESH_S

    async def all(self) -> Sequence[collage_service_pb2.Model]:
        """Every model, the default first."""
        if time.monotonic() - self._asked >= MODELS_FRESH_S:
            answer = await asked(
                self._generator.DescribeModels(
                    generator_service_pb2.DescribeModelsRequest(),
                    timeout=bounded(ASK_TIMEOUT_S),
                    metadata=outgoing(),
                )
            )
            self._models = answer.models
            self._asked = time.monotonic()
        return self._models

    async def described(self) -> Sequence[collage_service_pb2.Model]:
        """Every model with the control kinds that the compositor draws, which nothing but a list of models needs."""
        models, drawn = await asyncio.gather(
            self.all(),
            asked(
                self._compositor.DescribeDetectors(
                    compositor_service_pb2.DescribeDetectorsRequest(),
                    timeout=bounded(ASK_TIMEOUT_S),
                    metadata=outgoing(),
                )
            ),
        )
        return [_with_drawn(model, drawn.kinds) for model in models]

    async def named(self, name: str, field: str) -> collage_service_pb2.Model:
        """The model of this name, the default for an empty one.

        Raises:
            InvalidRequest: naming the known models.
        """
        models = await self.all()
        for model in models:
            if name in ("", model.name):
                return model
        known = ", ".join(model.name for model in models)
        raise InvalidRequest.of(
            field, f"is {quote(name)}; allowed: {known}", reason="UNKNOWN_MODEL"
        )


class Planner:
    """Checks, stores, binds, composes, estimates."""

    def __init__(
        self,
        *,
        blobs: BlobStore,
        words: Words,
        models: Models,
        compositor: compositor_service_pb2_grpc.CompositorServiceStub,
        generator: generator_service_pb2_grpc.GeneratorServiceStub,
    ) -> None:
        self._blobs = blobs
        self._words = words
        self._models = models
        self._compositor = compositor
        self._generator = generator

    async def plan(
        self,
        collage: collage_pb2.Collage,
        sampling: collage_pb2.Sampling,
        *,
        seed: int,
        root: str = "",
        redo: RedoFields | None = None,
        taken: Mapping[str, collage_service_pb2.Word] = MappingProxyType({}),
    ) -> Planned:
        """The whole plan of a request.

        Args:
            collage: as it came.
            sampling: as it came.
            seed: taken when the request names none.
            root: where both stand in the request, for field paths: "", "generate." or "redo.".
            redo: for a redo.
            taken: words, by name, that the request's job took when it was accepted; others are looked up.

        Raises:
            InvalidRequest: any wrong field, with its path.
            MissingBlobs: pictures that must be uploaded first.
        """
        model = await self._models.named(sampling.model, f"{root}sampling.model")
        settings = wire.parse_sampling(sampling, model, fallback_seed=seed, field=f"{root}sampling")
        parsed = wire.parse_collage(collage, f"{root}collage")
        _check_against(model, parsed, root)
        words = await self._words_of(parsed, model, root, taken)
        if redo is not None:
            _check_redo(redo, parsed)
        bound = bind(parsed.prompt, parsed.layers, field=f"{root}collage.prompt")
        stored, stored_redo = await self._store_pictures(parsed, redo, root)
        composed, estimate = await asyncio.gather(
            self._compose(stored, stored_redo, model.latent_factor, root),
            self._estimate(stored, bound, settings, _word_tokens(stored, words), root),
        )
        _check_tokens(estimate, root)
        return Planned(
            collage=stored,
            sampling=settings,
            bound=bound,
            plate=wire.parse_blob(composed.plate, "plate", limit_bytes=limits.MAX_PLATE_BYTES),
            plan=_render_plan(stored, settings, bound, composed, estimate, model.max_steps),
            redo=stored_redo,
            words=words,
        )

    async def store(self, collage: Collage, *, root: str) -> Collage:
        """The same collage with every picture a stored blob.

        Raises:
            MissingBlobs: pictures that must be uploaded first.
        """
        stored, _ = await self._store_pictures(collage, None, root)
        return stored

    async def _words_of(
        self,
        collage: Collage,
        model: collage_service_pb2.Model,
        root: str,
        taken: Mapping[str, collage_service_pb2.Word],
    ) -> dict[str, collage_service_pb2.Word]:
        """The stored words that layers name, by word name: those taken already, else looked up.

        Raises:
            InvalidRequest: a word that is not stored, or was learned for another model; of hidden layers too.
        """
        asked_for = {
            index: layer.appearance.word
            for index, layer in enumerate(collage.layers)
            if layer.appearance is not None and layer.appearance.word is not None
        }
        missing = sorted(set(asked_for.values()) - taken.keys())
        looked_up = await asyncio.gather(*map(self._words.find, missing))
        found = {**taken, **dict(zip(missing, looked_up, strict=True))}
        unknown, foreign = [], []
        for index, name in asked_for.items():
            field = f"{root}collage.layers[{index}].appearance.word"
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
        return {name: word for name in asked_for.values() if (word := found[name]) is not None}

    async def _store_pictures(
        self, collage: Collage, redo: RedoFields | None, root: str
    ) -> tuple[Collage, Redo | None]:
        """The same collage with every picture a stored blob."""
        prefix = f"{root}collage."
        pictures = {f"{prefix}{path}": picture for path, picture in collage.pictures().items()}
        if redo is not None:
            pictures["redo.parent"] = redo.parent
        stored = dict(
            zip(
                pictures,
                await asyncio.gather(*(self._store(one) for one in pictures.values())),
                strict=True,
            )
        )
        missing = {
            field: picture.sha256
            for field, picture in pictures.items()
            if isinstance(picture, BlobRef) and stored[field] is None
        }
        if missing:
            raise MissingBlobs(missing)
        refs = {field: ref for field, ref in stored.items() if ref is not None}
        with_refs = collage.with_pictures(
            {path.removeprefix(prefix): ref for path, ref in refs.items()}
        )
        return with_refs, (
            Redo(
                parent=refs["redo.parent"],
                layers=redo.layers,
                feather=redo.feather,
                restore_cutout=redo.restore_cutout,
            )
            if redo is not None
            else None
        )

    async def _store(self, picture: Picture) -> BlobRef | None:
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

    async def _compose(
        self, collage: Collage, redo: Redo | None, latent_factor: int, root: str
    ) -> compositor_service_pb2.ComposeResponse:
        request = compositor_service_pb2.ComposeRequest(
            collage=wire.render_collage(collage), latent_factor=latent_factor
        )
        if redo is not None:
            request.redo.CopyFrom(
                compositor_service_pb2.Redo(
                    parent=wire.render_blob(redo.parent),
                    layers=redo.layers,
                    feather=redo.feather,
                    restore_cutout=redo.restore_cutout,
                )
            )
        try:
            return await asked(
                self._compositor.Compose(
                    request, timeout=bounded(COMPOSE_TIMEOUT_S), metadata=outgoing()
                )
            )
        except InvalidRequest as error:
            raise _rooted(error, root) from error

    async def _estimate(
        self,
        collage: Collage,
        bound: BoundPrompt,
        sampling: Sampling,
        word_tokens: int,
        root: str,
    ) -> generator_service_pb2.EstimateResponse:
        request = generator_service_pb2.EstimateRequest(
            sampling=wire.render_sampling(sampling),
            size=collage_pb2.Size(width=collage.size.width, height=collage.size.height),
            layers=len(collage.layers),
            prompt=bound.text,
            negative_prompt=collage.negative_prompt,
            word_tokens=word_tokens,
            has_structure=any(layer.structure for layer in collage.layers),
            has_emphasis=any(
                part.emphasis > 0 for layer in collage.layers for part in layer.structure
            ),
        )
        try:
            return await asked(
                self._generator.Estimate(
                    request, timeout=bounded(ASK_TIMEOUT_S), metadata=outgoing()
                )
            )
        except InvalidRequest as error:
            raise _rooted(error, root) from error


async def asked(call: Awaitable[Answer]) -> Answer:
    """The answer of another service, its error as one of ours."""
    try:
        return await call
    except grpc.RpcError as error:
        raise from_rpc(error) from error


def _with_drawn(
    model: collage_service_pb2.Model, kinds: Sequence[str]
) -> collage_service_pb2.Model:
    """A copy that says which of its control kinds are drawn."""
    told = collage_service_pb2.Model()
    told.CopyFrom(model)
    told.drawn_control_kinds.extend(kind for kind in model.control_kinds if kind in kinds)
    return told


def _rooted(error: InvalidRequest, root: str) -> InvalidRequest:
    """The error of a service, whose paths start at its own request, with paths that start at the caller's."""
    return InvalidRequest(
        [
            violation
            if violation.field.startswith("redo.")
            else replace(violation, field=root + violation.field)
            for violation in error.violations
        ],
        reason=error.reason,
    )


def _check_against(model: collage_service_pb2.Model, collage: Collage, root: str) -> None:
    """Refuses what the model cannot do."""
    violations: list[Violation] = []
    multiple = model.size_multiple
    for side in ("width", "height"):
        value = getattr(collage.size, side)
        if value % multiple or not model.min_side <= value <= model.max_side:
            near = {value // multiple * multiple, -(-value // multiple) * multiple}
            allowed = sorted({min(max(side, model.min_side), model.max_side) for side in near})
            violations.append(
                Violation(
                    field=f"{root}collage.size.{side}",
                    description=f"is {value}; model {model.name} takes multiples of {multiple} from "
                    f"{model.min_side} to {model.max_side}, nearest: {', '.join(map(str, allowed))}",
                )
            )
    for index, layer in enumerate(collage.layers):
        for number, structure in enumerate(layer.structure):
            if structure.kind not in model.control_kinds:
                kinds = ", ".join(model.control_kinds) or "none, it has no ControlNet"
                violations.append(
                    Violation(
                        field=f"{root}collage.layers[{index}].structure[{number}].kind",
                        description=f"is {quote(structure.kind)}; model {model.name} takes: {kinds}",
                    )
                )
    if violations:
        raise InvalidRequest(violations)


def _named_words(collage: Collage) -> Iterator[tuple[Layer, str]]:
    """Each visible layer that names a stored word, and that name."""
    for layer in collage.layers:
        if layer.visible and layer.appearance is not None and layer.appearance.word is not None:
            yield layer, layer.appearance.word


def _word_tokens(collage: Collage, words: Mapping[str, collage_service_pb2.Word]) -> int:
    """Tokens that learned words add to the prompt: one for each vector."""
    learned = sum(
        layer.appearance.vectors
        for layer in collage.layers
        if layer.visible and layer.appearance is not None and layer.appearance.word is None
    )
    return learned + sum(words[name].vector_count for _, name in _named_words(collage))


def _check_redo(redo: RedoFields, collage: Collage) -> None:
    names = [layer.name for layer in collage.layers]
    violations = [
        Violation(
            field=f"redo.layers[{index}]",
            description=f"is {quote(name)}; layers: {', '.join(names)}",
        )
        for index, name in enumerate(redo.layers)
        if name not in names
    ]
    if not redo.layers:
        violations.append(
            Violation(field="redo.layers", description="is empty; required: at least one name")
        )
    if violations:
        raise InvalidRequest(violations)


def _check_tokens(estimate: generator_service_pb2.EstimateResponse, root: str) -> None:
    limit = estimate.prompt_tokens_limit
    violations = [
        Violation(
            field=f"{root}collage.{name}",
            description=f"takes {tokens} tokens, {tokens - limit} too many; allowed: {limit} with "
            "begin and end marks",
        )
        for name, tokens in (
            ("prompt", estimate.prompt_tokens),
            ("negative_prompt", estimate.negative_prompt_tokens),
        )
        if tokens > limit
    ]
    if violations:
        raise InvalidRequest(violations, reason="PROMPT_TOO_LONG")


def _render_plan(
    collage: Collage,
    sampling: Sampling,
    bound: BoundPrompt,
    composed: compositor_service_pb2.ComposeResponse,
    estimate: generator_service_pb2.EstimateResponse,
    max_steps: int,
) -> collage_service_pb2.Plan:
    """The plan as callers see it. Its warnings name fields from the collage on, whatever request that came in."""
    plan = collage_service_pb2.Plan(
        composite=composed.composite,
        layers=composed.layers,
        prompt=bound.text,
        sampling=wire.render_sampling(sampling),
        prompt_tokens=estimate.prompt_tokens,
        prompt_tokens_limit=estimate.prompt_tokens_limit,
        estimated_seconds=estimate.seconds,
        estimated_memory_bytes=estimate.memory_bytes,
    )
    for layer, (start, end), asked in zip(plan.layers, bound.spans, collage.layers, strict=True):
        layer.text_start, layer.text_end = start, end
        layer.structure.extend(wire.render_structure(asked.structure))
    plan.warnings.extend(composed.warnings)
    for index in bound.not_found:
        plan.warnings.append(
            collage_pb2.Warning(
                reason="TEXT_NOT_FOUND",
                field=f"collage.layers[{index}].text",
                message=f"{quote(collage.layers[index].text)} does not stand in the prompt; "
                "it was appended",
            )
        )
    if collage.negative_prompt and not estimate.negative_prompt_tokens:
        plan.warnings.append(
            collage_pb2.Warning(
                reason="NEGATIVE_PROMPT_UNUSED",
                field="collage.negative_prompt",
                message=f"is not read: at guidance scale {sampling.guidance_scale:g} model "
                f"{sampling.model} takes the prompt only",
            )
        )
    plan.warnings.extend(_coarse_dials(plan.layers, sampling.steps))
    plan.warnings.extend(_idle_structure(collage, composed, sampling.steps, max_steps))
    if not estimate.negative_prompt_tokens:
        plan.warnings.extend(_unguided_structure(collage, sampling))
    return plan


def _coarse_dials(
    layers: Sequence[collage_pb2.LayerPlan], steps: int
) -> Iterator[collage_pb2.Warning]:
    """A warning for each layer in sight whose noise, cut into so few steps, acts far from what was asked.

    A layer is drawn in int(steps * noise) of the steps, as in diffusers' img2img.
    """
    for index, layer in enumerate(layers):
        acting = math.floor(steps * layer.noise) / steps
        if layer.visible_fraction == 0 or layer.noise - acting <= COARSE_DIAL:
            continue
        levels = ", ".join(f"{step / steps:.2g}" for step in range(steps + 1))
        effect = (
            "the layer's pixels stay as they are" if acting == 0 else f"it acts as {acting:.2g}"
        )
        yield collage_pb2.Warning(
            reason="NOISE_DIAL_COARSE",
            field=f"collage.layers[{index}].noise",
            message=f"is {layer.noise:.2g}: with {steps} steps the dial has only the levels {levels}; "
            f"the next below counts, so {effect}; set one of them, or take more steps",
        )


def _idle_structure(
    collage: Collage, composed: compositor_service_pb2.ComposeResponse, steps: int, max_steps: int
) -> Iterator[collage_pb2.Warning]:
    """A warning for each window of a layer in sight that no whole step lies in.

    Windows are fractions of the steps that a picture takes, which are fewer than `steps` where no dial is at 1.
    """

    def taken(of: int) -> int:
        return math.floor(of * composed.largest_noise)

    for index, (layer, plan) in enumerate(zip(collage.layers, composed.layers, strict=True)):
        for number, part in enumerate(layer.structure):
            is_wanted = plan.visible_fraction > 0 and part.scale > 0 and taken(steps) > 0
            if not is_wanted or part.acts_within(taken(steps)):
                continue
            more = range(steps + 1, max_steps + 1)
            enough = next((each for each in more if part.acts_within(taken(each))), None)
            cure = f"or take {enough} steps" if enough else f"up to {max_steps} steps none does"
            yield collage_pb2.Warning(
                reason="STRUCTURE_NEVER_ACTS",
                field=f"collage.layers[{index}].structure[{number}]",
                message=f"never acts: with {steps} steps the picture takes {taken(steps)}, and none of these "
                f"lies wholly from {part.start:g} to {part.end:g} of them; widen the window, {cure}",
            )


def _unguided_structure(collage: Collage, sampling: Sampling) -> Iterator[collage_pb2.Warning]:
    """A warning for each emphasis, where there are no predictions without the prompt."""
    for index, layer in enumerate(collage.layers):
        for number, part in enumerate(layer.structure):
            if part.emphasis > 0:
                yield collage_pb2.Warning(
                    reason="STRUCTURE_EMPHASIS_UNUSED",
                    field=f"collage.layers[{index}].structure[{number}].emphasis",
                    message=f"changes nothing: at guidance scale {sampling.guidance_scale:g} model "
                    f"{sampling.model} has no guidance to strengthen structure by",
                )


def parse_redo(message: Any) -> RedoFields:
    """The redo fields of a RedoWork message.

    Raises:
        InvalidRequest: naming the wrong field.
    """
    check = wire.Checker()
    feather = (
        check.number("redo.feather", message.feather, 0, limits.MAX_FEATHER)
        if message.HasField("feather")
        else 4.0
    )
    if len(message.layers) > limits.MAX_LAYERS:
        check.refuse(
            "redo.layers", f"has {len(message.layers)} names; allowed: at most {limits.MAX_LAYERS}"
        )
    check.done()
    return RedoFields(
        parent=wire.parse_picture(message.parent, "redo.parent"),
        layers=tuple(message.layers),
        feather=feather,
        restore_cutout=message.restore_cutout if message.HasField("restore_cutout") else False,
    )
