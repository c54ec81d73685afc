"""A collage in Python: `Collage`, `Layer`, `Structure` and `Sampling`, which render to the contract's messages.

What is None stays unset, and the server chooses. Ranges are the server's to check: it names every wrong field at once.
Wherever one of these is taken, the raw message of the same name is taken too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import BinaryIO

from collage.v1 import blob_pb2, collage_pb2

# A picture: the path of a file, encoded bytes, an open file, or what names a stored one.
Picture = str | os.PathLike[str] | bytes | BinaryIO | blob_pb2.BlobRef | blob_pb2.Image


@dataclass(frozen=True, slots=True)
class Structure:
    """One ControlNet's part in a layer; see `Structure` in collage.proto for ranges. A picture is read when made."""

    kind: str
    _: KW_ONLY
    scale: float | None = None
    start: float | None = None
    end: float | None = None
    emphasis: float | None = None
    image: Picture | None = None

    def __post_init__(self) -> None:
        if self.image is not None:
            object.__setattr__(self, "image", picture(self.image))

    def message(self) -> collage_pb2.Structure:
        """The message of the contract."""
        return collage_pb2.Structure(
            kind=self.kind,
            scale=self.scale,
            start=self.start,
            end=self.end,
            emphasis=self.emphasis,
            image=None if self.image is None else picture(self.image),
        )


# A layer's dials, each 0 to 1 and chosen from its size where it is left out, and what each does.
DIALS = {
    "noise": "how far the layer may move from its cut-out: 0 keeps every pixel, 1 only the place",
    "attract": "how much attention its words gain where it stands",
    "repel": "how much attention its words lose elsewhere",
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One cut-out: its picture, its words, its place and its dials; see `Layer` in collage.proto for ranges.

    Args:
        name: 1 to 64 of A-Z a-z 0-9 _ -, used in placeholders and reports.
        image: path, bytes, open file or reference; read when the layer is made (`OSError` where it cannot be).
        text: the words that name the object.
        x: of its centre, canvas pixels from the left; with y, from the top.
        scale: canvas pixels per picture pixel.
        rotation: degrees, clockwise.
        noise: 0 keeps the pixels exactly, 1 frees them from the first step.
        attract: how much attention its words gain inside its mask, 0 to 1.
        repel: how much they lose outside, 0 to 1.
        structure: ControlNets inside its mask; a bare kind such as "canny" stands for `Structure("canny")`.
        learn: whether a word is learned from its pixels; `word` names a stored one instead.
        word_weight: multiplies the word's vectors, 0 to 2.
        vectors: how many are learned, 1 to 8.
    """

    name: str
    image: Picture
    _: KW_ONLY
    text: str
    x: float | None = None
    y: float | None = None
    scale: float | None = None
    rotation: float | None = None
    flip_horizontal: bool = False
    flip_vertical: bool = False
    opacity: float | None = None
    visible: bool | None = None
    noise: float | None = None
    attract: float | None = None
    repel: float | None = None
    seed: int | None = None
    structure: Sequence[Structure | collage_pb2.Structure | str] = ()
    learn: bool = False
    word: str = ""
    word_weight: float | None = None
    vectors: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", picture(self.image))
        _check_seed(self.seed)
        if self.learn and self.word:
            raise ValueError(
                f"layer {self.name!r} has both learn and a word; one excludes the other"
            )

    def message(self) -> collage_pb2.Layer:
        """The message of the contract."""
        made = collage_pb2.Layer(
            name=self.name,
            image=picture(self.image),
            text=self.text,
            opacity=self.opacity,
            visible=self.visible,
            **{dial: getattr(self, dial) for dial in DIALS},
            seed=self.seed,
            structure=[_structure(each) for each in self.structure],
            transform=collage_pb2.Transform(
                x=self.x,
                y=self.y,
                scale=self.scale,
                rotation=self.rotation,
                flip_horizontal=self.flip_horizontal,
                flip_vertical=self.flip_vertical,
            ),
        )
        if self.learn or self.word or self.word_weight is not None or self.vectors is not None:
            made.appearance.MergeFrom(
                collage_pb2.Appearance(weight=self.word_weight, vectors=self.vectors)
            )
        if self.learn:
            made.appearance.learn = True
        if self.word:
            made.appearance.word = self.word
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Collage:
    """A stack of layers on a canvas, and the scene they are to become.

    Args:
        size: width and height of the canvas, pixels.
        prompt: the scene; `{name}` stands for the text of the layer of that name.
        layers: back to front.
        negative_prompt: what the picture must not show.
        background: a colour (red, green, blue; 0 to 255) or a picture; None for the contract's grey.
    """

    size: tuple[int, int]
    prompt: str
    layers: Sequence[Layer | collage_pb2.Layer]
    negative_prompt: str = ""
    background: tuple[int, int, int] | Picture | None = None

    def __post_init__(self) -> None:
        if self.background is not None and not isinstance(self.background, tuple):
            object.__setattr__(self, "background", picture(self.background))

    def message(self) -> collage_pb2.Collage:
        """The message of the contract."""
        width, height = self.size
        made = collage_pb2.Collage(
            size=collage_pb2.Size(width=width, height=height),
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            layers=[
                layer.message() if isinstance(layer, Layer) else layer for layer in self.layers
            ],
        )
        if isinstance(self.background, tuple):
            red, green, blue = self.background
            made.background.color.MergeFrom(collage_pb2.Color(red=red, green=green, blue=blue))
        elif self.background is not None:
            made.background.image.CopyFrom(picture(self.background))
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a collage becomes pictures; what is left out is the model's default.

    Args:
        model: name as `models` shows it.
        sampler: name as `models` shows it.
        steps: denoising steps at noise 1, 1 to 1000.
        guidance_scale: 0 to 50; 1 or less is none.
        images: how many, 1 to 16; picture k uses seed + k.
        seed: 0 to 2^64 - 1; None for one the server draws and reports.
        preview_every: steps between two previews; None for none.
        adapters: weights, -2 to 2, by the names of adapters (LoRA).
    """

    model: str = ""
    sampler: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    images: int | None = None
    seed: int | None = None
    preview_every: int | None = None
    adapters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def message(self) -> collage_pb2.Sampling:
        """The message of the contract."""
        return collage_pb2.Sampling(
            model=self.model,
            sampler=self.sampler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            images=self.images,
            seed=self.seed,
            preview_every=self.preview_every,
            adapters=[
                collage_pb2.Adapter(name=name, weight=weight)
                for name, weight in self.adapters.items()
            ],
        )


AnyCollage = Collage | collage_pb2.Collage
AnySampling = Sampling | collage_pb2.Sampling


def picture(source: Picture) -> blob_pb2.Image:
    """A picture as the contract takes it, read where it is a file. Raises `OSError` for one that cannot be read."""
    match source:
        case blob_pb2.Image():
            return source
        case blob_pb2.BlobRef():
            return blob_pb2.Image(blob=source)
        case bytes():
            return blob_pb2.Image(data=source)
        case str() | os.PathLike():
            return blob_pb2.Image(data=Path(source).read_bytes())
    return blob_pb2.Image(data=source.read())


def collage_message(collage: AnyCollage) -> collage_pb2.Collage:
    """The message of either form."""
    return collage.message() if isinstance(collage, Collage) else collage


def sampling_message(sampling: AnySampling | None) -> collage_pb2.Sampling | None:
    """The message of either form."""
    return sampling.message() if isinstance(sampling, Sampling) else sampling


def _check_seed(seed: int | None) -> None:
    """Other tools' -1 for "any" is no seed, and the message would only say that it is out of range."""
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; allowed: 0 to 2^64 - 1, or left out for a drawn one")


def _structure(part: Structure | collage_pb2.Structure | str) -> collage_pb2.Structure:
    if isinstance(part, str):
        return collage_pb2.Structure(kind=part)
    return part.message() if isinstance(part, Structure) else part
