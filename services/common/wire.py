"""Messages to values and back: the only module that knows both `collage.v1` and `services.common.collage`.

`parse_*` checks every field and tells all that is wrong at once, with full paths; what it returns can exist. `render_*`
writes values for the internal services. Sizes are capped here, before a byte of a picture is decoded; `read_blob`
reads what a field refers to.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from collage.v1 import blob_pb2, collage_pb2, collage_service_pb2
from services.common import limits
from services.common.blobs import BlobCorrupt, BlobMissing, BlobRef, BlobStore, BlobTooLarge
from services.common.collage import (
    DEFAULT_BACKGROUND,
    DIALS,
    Adapter,
    Appearance,
    Collage,
    Extent,
    Layer,
    Picture,
    Sampling,
    Structure,
    Transform,
)
from services.common.errors import DataLoss, InvalidRequest, MissingBlobs, Violation, quote
from services.common.field import Field

UNKNOWN_MEDIA_TYPE = "application/octet-stream"
# Those of Unicode (Cc) but tab, line feed, vertical tab, form feed, carriage return and next line.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


class Checker:
    """Collects what is wrong with a message, so that the caller hears all of it at once."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def refuse(self, field: Field | str, description: str) -> None:
        """Notes one wrong field."""
        self.violations.append(Violation(field=str(field), description=description))

    def number(
        self, field: Field | str, value: float, low: float, high: float, *, above: bool = False
    ) -> float:
        """`value` if it is finite and in [low, high] ((low, high] with `above`), else `high` and a note."""
        if math.isfinite(value) and low <= value <= high and not (above and value == low):
            return value
        # All digits of the largest bound, a number of bytes.
        lowest, highest = f"{low:.12g}", f"{high:.12g}"
        bounds = f"above {lowest}, at most {highest}" if above else f"from {lowest} to {highest}"
        self.refuse(field, f"is {value!r}; allowed: {bounds}")
        return high

    def text(self, field: Field | str, value: str, limit: int) -> str:
        """`value` if it is not too long and holds no control characters but white space."""
        if len(value) > limit:
            self.refuse(field, f"has {len(value)} characters; allowed: at most {limit}")
            return ""
        if _CONTROL.search(value):
            self.refuse(
                field,
                f"is {quote(value)}; control characters other than white space are not allowed",
            )
            return ""
        return value

    def done(self) -> None:
        """Raises InvalidRequest if anything was noted."""
        if self.violations:
            raise InvalidRequest(self.violations)


def parse_collage(message: collage_pb2.Collage, field: Field = Field("collage")) -> Collage:
    """The collage a message holds.

    Raises:
        InvalidRequest: naming every wrong field below `field`.
    """
    check = Checker()
    width = int(
        check.number(field["size"]["width"], message.size.width, limits.MIN_SIDE, limits.MAX_SIDE)
    )
    height = int(
        check.number(field["size"]["height"], message.size.height, limits.MIN_SIDE, limits.MAX_SIDE)
    )
    prompt = check.text(field["prompt"], message.prompt, limits.MAX_PROMPT_CHARACTERS)
    negative = check.text(
        field["negative_prompt"], message.negative_prompt, limits.MAX_PROMPT_CHARACTERS
    )
    background = _parse_background(check, message.background, field["background"])
    if not 1 <= len(message.layers) <= limits.MAX_LAYERS:
        check.refuse(
            field["layers"],
            f"has {len(message.layers)} layers; allowed: from 1 to {limits.MAX_LAYERS}",
        )
    layers: list[Layer] = []
    first_use: dict[str, int] = {}
    for index, part in enumerate(message.layers[: limits.MAX_LAYERS]):
        path = field["layers"][index]
        layer = _parse_layer(check, part, path)
        if layer.name in first_use:
            check.refuse(
                path["name"],
                f"is {quote(layer.name)}, the name of layers[{first_use[layer.name]}] too; "
                "allowed: a name of its own",
            )
        first_use.setdefault(layer.name, index)
        layers.append(layer)
    kinds = {structure.kind for layer in layers for structure in layer.structure}
    if len(kinds) > limits.MAX_STRUCTURES:
        check.refuse(
            field["layers"],
            f"name {len(kinds)} control kinds; allowed: at most {limits.MAX_STRUCTURES}",
        )
    check.done()
    return Collage(
        size=Extent(width=width, height=height),
        prompt=prompt,
        negative_prompt=negative,
        background=background,
        layers=tuple(layers),
    )


def _parse_layer(check: Checker, message: collage_pb2.Layer, path: Field) -> Layer:
    if not _NAME.fullmatch(message.name):
        check.refuse(
            path["name"],
            f"is {quote(message.name)}; allowed: 1 to 64 of A-Z a-z 0-9 _ -",
        )
    text = check.text(path["text"], message.text, limits.MAX_TEXT_CHARACTERS).strip()
    if not message.text.strip():
        check.refuse(path["text"], "is empty; required: the words that name the object")
    dials = {
        dial: check.number(path[dial], getattr(message, dial), 0, 1)
        for dial in DIALS
        if message.HasField(dial)
    }
    structure = tuple(
        _parse_structure(check, part, path["structure"][index])
        for index, part in enumerate(message.structure[: limits.MAX_STRUCTURES])
    )
    kinds = [part.kind for part in structure]
    if len(message.structure) > limits.MAX_STRUCTURES:
        check.refuse(
            path["structure"],
            f"has {len(message.structure)} parts; allowed: at most {limits.MAX_STRUCTURES}",
        )
    else:
        for index, kind in enumerate(kinds):
            if kind in kinds[:index]:
                check.refuse(
                    path["structure"][index]["kind"],
                    f"is {quote(kind)}, as in structure[{kinds.index(kind)}]; allowed: each kind once",
                )
    return Layer(
        name=message.name,
        image=_parse_picture(check, message.image, path["image"]),
        text=text,
        transform=_parse_transform(check, message.transform, path["transform"]),
        opacity=(
            check.number(path["opacity"], message.opacity, 0, 1)
            if message.HasField("opacity")
            else 1.0
        ),
        visible=message.visible if message.HasField("visible") else True,
        structure=structure,
        appearance=_parse_appearance(check, message, path),
        seed=message.seed if message.HasField("seed") else None,
        **dials,
    )


def _parse_transform(check: Checker, message: collage_pb2.Transform, path: Field) -> Transform:
    # A centre may lie outside the canvas, but not so far that arithmetic on it loses sub-pixels.
    far = 16.0 * limits.MAX_SIDE
    values = {
        name: check.number(path[name], getattr(message, name), low, high, above=above)
        for name, low, high, above in (
            ("x", -far, far, False),
            ("y", -far, far, False),
            ("scale", 0.0, 64.0, True),
            ("rotation", -360.0, 360.0, False),
        )
        if message.HasField(name)
    }
    return Transform(
        flip_horizontal=message.flip_horizontal, flip_vertical=message.flip_vertical, **values
    )


def _parse_structure(check: Checker, message: collage_pb2.Structure, path: Field) -> Structure:
    if not message.kind:
        check.refuse(path["kind"], "is empty; required: a control kind of the model")
    elif not _NAME.fullmatch(message.kind):
        check.refuse(path["kind"], f"is {quote(message.kind)}; allowed: 1 to 64 of A-Z a-z 0-9 _ -")
    values = {
        name: check.number(path[name], getattr(message, name), 0, 1)
        for name in ("scale", "start", "end", "emphasis")
        if message.HasField(name)
    }
    image = (
        _parse_picture(check, message.image, path["image"]) if message.HasField("image") else None
    )
    structure = Structure(kind=message.kind, image=image, **values)
    if structure.start > structure.end:
        check.refuse(path["end"], f"is {structure.end:g}, before start {structure.start:g}")
    return structure


def _parse_appearance(check: Checker, message: collage_pb2.Layer, path: Field) -> Appearance | None:
    if not message.HasField("appearance"):
        return None
    source = message.appearance
    if source.WhichOneof("source") is None or (source.HasField("learn") and not source.learn):
        check.refuse(path["appearance"], "is empty; allowed: learn: true, or a word's name")
    if source.HasField("word") and not source.word:
        check.refuse(path["appearance"]["word"], "is empty; required: a word's name")
    weight = (
        check.number(path["appearance"]["weight"], source.weight, 0, 2)
        if source.HasField("weight")
        else 1.0
    )
    vectors = 1
    if source.HasField("vectors"):
        vectors = int(
            check.number(path["appearance"]["vectors"], source.vectors, 1, limits.MAX_VECTORS)
        )
        if source.HasField("word"):
            check.refuse(
                path["appearance"]["vectors"],
                f"is {source.vectors} beside a stored word, which has as many as it has; allowed: "
                "only with learn",
            )
    return Appearance(word=source.word or None, weight=weight, vectors=vectors)


def _parse_background(
    check: Checker, message: collage_pb2.Background, path: Field
) -> tuple[int, int, int] | Picture:
    kind = message.WhichOneof("kind")
    if kind == "image":
        return _parse_picture(check, message.image, path["image"])
    if kind == "color":
        red, green, blue = (
            int(check.number(path["color"][name], getattr(message.color, name), 0, 255))
            for name in ("red", "green", "blue")
        )
        return red, green, blue
    return DEFAULT_BACKGROUND


def _parse_picture(check: Checker, message: blob_pb2.Image, path: Field) -> Picture:
    source = message.WhichOneof("source")
    if source == "blob":
        return _parse_blob(check, message.blob, path["blob"])
    if source == "data":
        if not 1 <= len(message.data) <= limits.MAX_INLINE_BYTES:
            check.refuse(
                path["data"],
                f"has {len(message.data)} bytes; allowed: from 1 to {limits.MAX_INLINE_BYTES}, "
                "larger pictures go through PutBlob",
            )
            return b""
        return message.data
    if source == "path":
        check.refuse(
            path["path"],
            f"is {quote(message.path)}; a server opens no paths: send data or a blob",
        )
    else:
        check.refuse(path, "is empty; required: data or a blob")
    return b""


async def read_blob(store: BlobStore, ref: BlobRef, field: str, *, limit_bytes: int) -> bytes:
    """The bytes that a field refers to.

    Raises:
        MissingBlobs: they are not stored.
        DataLoss: they are damaged.
        InvalidRequest: there are more than `limit_bytes`.
    """
    try:
        return await store.get(ref.key, limit_bytes=limit_bytes)
    except BlobMissing as error:
        raise MissingBlobs({field: ref.sha256}) from error
    except BlobCorrupt as error:
        raise DataLoss.of({field: ref.sha256}) from error
    except BlobTooLarge as error:
        raise InvalidRequest.of(
            field, f"has {error.size_bytes} bytes; allowed: at most {limit_bytes}"
        ) from error


def _parse_blob(
    check: Checker, message: blob_pb2.BlobRef, path: Field, limit_bytes: int = limits.MAX_BLOB_BYTES
) -> Picture:
    size_bytes = int(check.number(path["size_bytes"], message.size_bytes, 0, limit_bytes))
    try:
        ref = BlobRef(sha256=message.sha256, size_bytes=size_bytes, media_type=UNKNOWN_MEDIA_TYPE)
    except ValueError:
        check.refuse(
            path["sha256"], f"is {quote(message.sha256)}; allowed: 64 lowercase hex digits"
        )
        return b""
    try:
        return replace(ref, media_type=message.media_type or UNKNOWN_MEDIA_TYPE)
    except ValueError:
        check.refuse(
            path["media_type"],
            f"is {quote(message.media_type)}; allowed: one that reads like 'image/png'",
        )
        return b""


def parse_blob(
    message: blob_pb2.BlobRef, field: Field | str, *, limit_bytes: int = limits.MAX_BLOB_BYTES
) -> BlobRef:
    """The blob a message refers to, which may have `limit_bytes`.

    Raises:
        InvalidRequest: naming the wrong field below `field`.
    """
    check = Checker()
    blob = _parse_blob(check, message, Field(str(field)), limit_bytes)
    check.done()
    assert isinstance(blob, BlobRef), "a checked reference is a reference"
    return blob


def parse_picture(message: blob_pb2.Image, field: Field) -> Picture:
    """The picture a message holds or refers to.

    Raises:
        InvalidRequest: naming the wrong field below `field`.
    """
    check = Checker()
    picture = _parse_picture(check, message, field)
    check.done()
    return picture


def parse_sampling(
    message: collage_pb2.Sampling,
    model: collage_service_pb2.Model,
    *,
    fallback_seed: int,
    field: Field = Field("sampling"),
) -> Sampling:
    """The sampling settings, what is unset taken from the model's defaults and `fallback_seed`.

    Raises:
        InvalidRequest: naming every wrong field below `field`.
    """
    check = Checker()
    defaults = model.defaults
    max_steps, max_images = (
        model.max_steps or limits.MAX_STEPS,
        model.max_images or limits.MAX_IMAGES,
    )

    def pick(name: str, low: float, high: float) -> float:
        source = message if message.HasField(name) else defaults
        return check.number(field[name], getattr(source, name), low, high)

    if message.sampler and message.sampler not in model.samplers:
        check.refuse(
            field["sampler"],
            f"is {quote(message.sampler)}; allowed: {', '.join(model.samplers)}",
        )
    sampling = Sampling(
        model=model.name,
        sampler=message.sampler or defaults.sampler,
        steps=int(pick("steps", 1, max_steps)),
        guidance_scale=pick("guidance_scale", 0, limits.MAX_GUIDANCE),
        images=int(pick("images", 1, max_images)) if message.HasField("images") else 1,
        seed=message.seed if message.HasField("seed") else fallback_seed,
        preview_every=(
            int(pick("preview_every", 1, limits.MAX_STEPS))
            if message.HasField("preview_every")
            else None
        ),
        adapters=_parse_adapters(check, message, model, field["adapters"]),
    )
    if sampling.preview_every is not None:
        previews = sampling.steps // sampling.preview_every * sampling.images
        if previews > limits.MAX_PREVIEWS:
            check.refuse(
                field["preview_every"],
                f"is {sampling.preview_every}, which makes {previews} previews; allowed: {limits.MAX_PREVIEWS}",
            )
    check.done()
    return sampling


def _parse_adapters(
    check: Checker, message: collage_pb2.Sampling, model: collage_service_pb2.Model, path: Field
) -> tuple[Adapter, ...]:
    if len(message.adapters) > limits.MAX_ADAPTERS:
        check.refuse(
            path, f"has {len(message.adapters)} adapters; allowed: at most {limits.MAX_ADAPTERS}"
        )
    adapters: dict[str, Adapter] = {}
    for index, part in enumerate(message.adapters[: limits.MAX_ADAPTERS]):
        weight = part.weight if part.HasField("weight") else 1.0
        if part.name not in model.adapters:
            known = ", ".join(model.adapters) or "none, it has no adapter"
            check.refuse(
                path[index]["name"], f"is {quote(part.name)}; model {model.name} takes: {known}"
            )
        elif part.name in adapters:
            check.refuse(
                path[index]["name"], f"is {quote(part.name)} again; allowed: each adapter once"
            )
        adapters[part.name] = Adapter(
            name=part.name,
            weight=check.number(
                path[index]["weight"],
                weight,
                -limits.MAX_ADAPTER_WEIGHT,
                limits.MAX_ADAPTER_WEIGHT,
            ),
        )
    return tuple(adapters[name] for name in sorted(adapters))


def render_blob(blob: BlobRef) -> blob_pb2.BlobRef:
    """The message of a reference."""
    return blob_pb2.BlobRef(
        sha256=blob.sha256, size_bytes=blob.size_bytes, media_type=blob.media_type
    )


def render_picture(picture: Picture) -> blob_pb2.Image:
    """The message of a picture."""
    if isinstance(picture, bytes):
        return blob_pb2.Image(data=picture)
    return blob_pb2.Image(blob=render_blob(picture))


def render_transform(transform: Transform) -> collage_pb2.Transform:
    """The message of a placement."""
    return collage_pb2.Transform(
        x=transform.x,
        y=transform.y,
        scale=transform.scale,
        rotation=transform.rotation,
        flip_horizontal=transform.flip_horizontal,
        flip_vertical=transform.flip_vertical,
    )


def render_collage(collage: Collage) -> collage_pb2.Collage:
    """The message of a collage; `parse_collage` reads it back to an equal value."""
    background = (
        collage_pb2.Background(
            color=collage_pb2.Color(
                **dict(zip(("red", "green", "blue"), collage.background, strict=True))
            )
        )
        if isinstance(collage.background, tuple)
        else collage_pb2.Background(image=render_picture(collage.background))
    )
    return collage_pb2.Collage(
        size=collage_pb2.Size(width=collage.size.width, height=collage.size.height),
        prompt=collage.prompt,
        negative_prompt=collage.negative_prompt,
        background=background,
        layers=[_render_layer(layer) for layer in collage.layers],
    )


def _render_layer(layer: Layer) -> collage_pb2.Layer:
    message = collage_pb2.Layer(
        name=layer.name,
        image=render_picture(layer.image),
        text=layer.text,
        transform=render_transform(layer.transform),
        opacity=layer.opacity,
        visible=layer.visible,
        **{dial: getattr(layer, dial) for dial in DIALS},
        structure=render_structure(layer.structure),
        seed=layer.seed,
    )
    if layer.appearance:
        message.appearance.weight = layer.appearance.weight
        if layer.appearance.word is None:
            message.appearance.learn = True
            message.appearance.vectors = layer.appearance.vectors
        else:
            message.appearance.word = layer.appearance.word
    return message


def render_structure(structure: Sequence[Structure]) -> list[collage_pb2.Structure]:
    """The messages of a layer's ControlNets, every number set."""
    return [
        collage_pb2.Structure(
            kind=part.kind,
            scale=part.scale,
            start=part.start,
            end=part.end,
            emphasis=part.emphasis,
            image=None if part.image is None else render_picture(part.image),
        )
        for part in structure
    ]


def render_sampling(sampling: Sampling) -> collage_pb2.Sampling:
    """The message of resolved sampling settings."""
    return collage_pb2.Sampling(
        model=sampling.model,
        sampler=sampling.sampler,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        images=sampling.images,
        seed=sampling.seed,
        preview_every=sampling.preview_every,
        adapters=[
            collage_pb2.Adapter(name=adapter.name, weight=adapter.weight)
            for adapter in sampling.adapters
        ],
    )
