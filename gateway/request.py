"""A request as a value: what is asked for, every setting settled, each part with its place in the caller's message.

Main types: `Generate`, `Redo` and `Learn`, which together are `Work`. A message becomes one of them once, at the door;
whoever works on it later reads this value and never the message. This module knows neither storage nor stages.
"""

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from collage.v1 import blob_pb2, collage_service_pb2
from gateway.models import Models
from services.common import limits, wire
from services.common.collage import Collage, Picture, Sampling
from services.common.errors import InvalidRequest, Violation, quote
from services.common.field import Field

DEFAULT_FEATHER = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Pictures of a collage. `field`: where its collage and sampling stand. `model` is the one that draws."""

    field: Field
    model: collage_service_pb2.Model
    collage: Collage
    sampling: Sampling
    skips_failed_words: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Redo:
    """Some layers of an earlier picture drawn again: a generation over `parent`, a picture of the canvas' size.

    `layers` are drawn again. `feather`: width of the soft inner edge of the redo mask, canvas pixels, 0 to 64.
    """

    generate: Generate
    parent: Picture
    layers: tuple[str, ...]
    feather: float
    restore_cutout: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Learn:
    """Words of some layers, by their index in the collage, at least one."""

    field: Field
    model: collage_service_pb2.Model
    collage: Collage
    layers: tuple[int, ...]


Work = Generate | Redo | Learn


async def parse(
    request: collage_service_pb2.CreateJobRequest,
    models: Models,
    *,
    request_id: str,
    field: Field | None = None,
) -> Work:
    """What a request asks for.

    Args:
        request: as it came.
        models: who knows what a request may leave unset.
        request_id: of the request, see `request_id_of`.
        field: where the work stands in the caller's own message; by default where it stands in this one.

    Raises:
        InvalidRequest: naming every wrong field.
    """
    kind = request.WhichOneof("work")
    at = Field(str(kind)) if field is None else field
    seed = seed_of(request_id)
    if kind == "generate":
        return await parse_generate(request.generate, models, field=at, seed=seed)
    if kind == "redo":
        return await _parse_redo(request.redo, models, field=at, seed=seed)
    if kind == "learn":
        return await _parse_learn(request.learn, models, field=at)
    raise InvalidRequest.of("work", "is empty; required: generate, redo or learn")


async def parse_generate(
    work: collage_service_pb2.GenerateWork | collage_service_pb2.RedoWork,
    models: Models,
    *,
    field: Field,
    seed: int,
) -> Generate:
    """The generation that a message asks for, a redo's too; `seed` counts where it names none.

    Raises:
        InvalidRequest: naming every wrong field below `field`.
    """
    model = await models.named(work.sampling.model, field["sampling"]["model"])
    sampling = wire.parse_sampling(
        work.sampling, model, fallback_seed=seed, field=field["sampling"]
    )
    collage = wire.parse_collage(work.collage, field["collage"])
    _check_against(model, collage, field["collage"])
    return Generate(
        field=field,
        model=model,
        collage=collage,
        sampling=sampling,
        skips_failed_words=work.skip_failed_words,
    )


async def _parse_redo(
    work: collage_service_pb2.RedoWork, models: Models, *, field: Field, seed: int
) -> Redo:
    generate = await parse_generate(work, models, field=field, seed=seed)
    check = wire.Checker()
    feather = DEFAULT_FEATHER
    if work.HasField("feather"):
        feather = check.number(field["feather"], work.feather, 0, limits.MAX_FEATHER)
    if len(work.layers) > limits.MAX_LAYERS:
        check.refuse(
            field["layers"], f"has {len(work.layers)} names; allowed: at most {limits.MAX_LAYERS}"
        )
    elif not work.layers:
        check.refuse(field["layers"], "is empty; required: at least one name")
    _check_names(check, work.layers[: limits.MAX_LAYERS], generate.collage, field["layers"])
    check.done()
    return Redo(
        generate=generate,
        parent=wire.parse_picture(work.parent, field["parent"]),
        layers=tuple(work.layers),
        feather=feather,
        restore_cutout=work.restore_cutout,
    )


async def _parse_learn(
    work: collage_service_pb2.LearnWork, models: Models, *, field: Field
) -> Learn:
    model = await models.named(work.model, field["model"])
    collage = wire.parse_collage(work.collage, field["collage"])
    check = wire.Checker()
    _check_names(check, work.layers, collage, field["layers"])
    check.done()
    layers = tuple(
        index
        for index, layer in enumerate(collage.layers)
        if (layer.name in work.layers if work.layers else layer.asks_to_learn)
    )
    if not layers:
        raise InvalidRequest.of(
            field["layers"], "is empty, and no layer's appearance says learn; required: one layer"
        )
    return Learn(field=field, model=model, collage=collage, layers=layers)


def seed_of(request_id: str) -> int:
    """The seed of a request that names none: drawn from its id, so that a repeated call repeats it."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) >> 1


def request_id_of(text: str) -> str:
    """A canonical UUID; a new one for an empty text.

    Raises:
        InvalidRequest: it is no UUID.
    """
    try:
        return str(uuid.UUID(text)) if text else str(uuid.uuid4())
    except ValueError:
        raise InvalidRequest.of(
            "request_id", f"is {quote(text)}; allowed: a UUID, or empty"
        ) from None


def digest_of(request: collage_service_pb2.CreateJobRequest) -> str:
    """Names what is asked for, under whatever id, whether its pictures come along or are referred to."""
    named = collage_service_pb2.CreateJobRequest()
    named.CopyFrom(request)
    named.ClearField("request_id")
    kind = named.WhichOneof("work")
    if kind is not None:
        work = getattr(named, kind)
        for image in _images(work):
            _name(image)
    return hashlib.sha256(named.SerializeToString(deterministic=True)).hexdigest()


def _images(
    work: collage_service_pb2.GenerateWork
    | collage_service_pb2.RedoWork
    | collage_service_pb2.LearnWork,
) -> list[blob_pb2.Image]:
    """Every picture of a work message."""
    found = [work.parent] if isinstance(work, collage_service_pb2.RedoWork) else []
    if work.collage.background.HasField("image"):
        found.append(work.collage.background.image)
    for layer in work.collage.layers:
        found += [layer.image, *(part.image for part in layer.structure if part.HasField("image"))]
    return found


def _name(image: blob_pb2.Image) -> None:
    """Leaves of a picture nothing but its digest."""
    if image.HasField("data"):
        digest = hashlib.sha256(image.data).hexdigest()
    elif image.HasField("blob"):
        digest = image.blob.sha256
    else:
        return
    image.blob.CopyFrom(blob_pb2.BlobRef(sha256=digest))


def _check_names(check: wire.Checker, names: Iterable[str], collage: Collage, field: Field) -> None:
    """Refuses names that no layer has."""
    known = [layer.name for layer in collage.layers]
    for index, name in enumerate(names):
        if name not in known:
            check.refuse(field[index], f"is {quote(name)}; layers: {', '.join(known)}")


def _check_against(model: collage_service_pb2.Model, collage: Collage, field: Field) -> None:
    """Refuses what the model cannot do."""
    violations: list[Violation] = []
    multiple = model.size_multiple
    for side in ("width", "height"):
        value = getattr(collage.size, side)
        if value % multiple or not model.min_side <= value <= model.max_side:
            near = {value // multiple * multiple, -(-value // multiple) * multiple}
            allowed = sorted({min(max(each, model.min_side), model.max_side) for each in near})
            violations.append(
                Violation(
                    field=str(field["size"][side]),
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
                        field=str(field["layers"][index]["structure"][number]["kind"]),
                        description=f"is {quote(structure.kind)}; model {model.name} takes: {kinds}",
                    )
                )
    if violations:
        raise InvalidRequest(violations)
