"""Collages that benchmarks draw: held out, fixed by seeds, sent through the service as any client's are.

Main types: `Cutout`, one artist's rendering of one concept; `Scene`, a collage before its dials are set; `Service`,
which draws one. Cut-outs come from pools of forty, so that a word learned for one serves every collage that holds it.
They are rendered from the icon packages, by the four artists the model was taught and a fifth whom neither it nor the
judge was shown.
"""

import io
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from benchmarks.judge import FIFTH, art, fifth
from collage.v1 import collage_pb2, collage_service_pb2
from collage_client import AsyncCollageClient, AsyncJob, CollageError
from local import embedded
from services.common import wire
from services.common.collage import Extent
from services.common.telemetry import start_logging
from services.compositor.placement import place

SIDE = 128
POOL_SEED, SCENES_SEED = 20240, 30000
# Of the pools whose concepts in two looks stand side by side. Nothing was chosen by these pairs, as the recipe of words
# was by those of the first pool.
PAIRS_SEEDS = (20241, 20242)
# Of the pool's forty: concepts in two looks, how many of these in the fifth, concepts in one look; every so-manieth is
# feathered.
IN_TWO, IN_FIFTH, IN_ONE, SOFT_EVERY = 16, 8, 8, 5
LAYERS = (2, 3, 4, 5, 6)
# Widths of a layer's picture in pixels, by the number of layers.
WIDTHS = {1: (78, 92), 2: (54, 66), 3: (46, 56), 4: (40, 50), 5: (36, 44), 6: (34, 42)}
# Noise of a scene's layers on the last rung: no two neighbours alike, one of them the freest.
NOISES = (0.9, 0.3, 0.6, 0.45, 0.75, 0.3)
# Vectors of a learned word: as many as leave room for six layers in the text encoder's window.
VECTORS = 4
# Grounds on which things cast shadows, and the plain colour that stands for each in a collage.
GROUNDS = {
    "on a wooden table": (176, 122, 72),
    "on a white table cloth": (226, 224, 220),
    "on a checkered cloth": (225, 150, 145),
    "on grey stone": (142, 144, 150),
    "on grass": (98, 164, 62),
    "on sand": (222, 198, 148),
    "on snow": (236, 240, 246),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutout:
    """One rendering of a concept, by the names of `art`; a soft one fades out towards its edge."""

    key: str
    look: str
    is_soft: bool = False

    @property
    def text(self) -> str:
        """The concept in words."""
        return art.CONCEPTS[self.key]

    def pixels(self) -> NDArray[np.uint8]:
        """RGBA with straight alpha, [art.SIDE, art.SIDE, 4]."""
        return _pixels(self)

    def others(self) -> list["Cutout"]:
        """The other artists' renderings of the same concept, cut out in the same way."""
        looks = [look.name for look in art.LOOKS]
        looks += [FIFTH.name] if self.key in _fifth() else []
        return [
            Cutout(key=self.key, look=look, is_soft=self.is_soft)
            for look in looks
            if look != self.look
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A cut-out in its place: centre and width in canvas pixels, degrees clockwise, and its own noise, 0 to 1."""

    cutout: Cutout
    x: float
    y: float
    width: float
    rotation: float
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dials:
    """What a collage is drawn with.

    noise: of every layer, None for each layer's own; control: attract and repel of every layer, None for automatic
    ones; words: the cut-outs whose learned words are used; structure: the kind of control picture, "" for none;
    emphasis: of structure; only: with structure, 0 or 1 for every second layer alone, from the first or from the
    second, None for all layers.
    """

    noise: float | None
    control: float | None = 0.0
    words: frozenset[Cutout] = frozenset()
    structure: str = ""
    emphasis: float = 0.0
    only: int | None = None

    def is_structured(self, index: int) -> bool:
        """Whether the layer of that place has structure."""
        return bool(self.structure) and self.only in (None, index % 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Pieces from back to front on a plain ground, and the order in which the prompt names them."""

    pieces: tuple[Piece, ...]
    ground: str
    colour: tuple[int, int, int]
    told: tuple[int, ...]
    seed: int

    def message(self, dials: Dials) -> collage_pb2.Collage:
        """The collage as a client sends it."""
        words = [
            f"{_article(self.pieces[index].cutout.text)}{{{_name(index)}}}" for index in self.told
        ]
        listing = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
        red, green, blue = self.colour
        collage = collage_pb2.Collage(
            size={"width": SIDE, "height": SIDE},
            prompt=f"{listing} {self.ground}",
            background={"color": {"red": red, "green": green, "blue": blue}},
        )
        for index, piece in enumerate(self.pieces):
            layer = collage.layers.add(
                name=_name(index),
                image={"data": _png(piece.cutout)},
                text=piece.cutout.text,
                transform={
                    "x": piece.x,
                    "y": piece.y,
                    "scale": piece.width / art.SIDE,
                    "rotation": piece.rotation,
                },
                noise=piece.noise if dials.noise is None else dials.noise,
            )
            if dials.control is not None:
                layer.attract = layer.repel = dials.control
            if piece.cutout in dials.words:
                layer.appearance.learn = True
                layer.appearance.vectors = VECTORS
            if dials.is_structured(index):
                layer.structure.add(kind=dials.structure, emphasis=dials.emphasis)
        return collage

    def alone(self, index: int, cutout: Cutout) -> NDArray[np.float32]:
        """A cut-out where piece `index` stands, and nothing else: premultiplied RGB and alpha in [0, 1], HW4."""
        layer = wire.parse_collage(self.message(Dials(noise=0.5))).layers[index]
        placed = place(cutout.pixels(), layer.transform, Extent(width=SIDE, height=SIDE))
        canvas_HW4 = np.zeros((SIDE, SIDE, 4), np.float32)
        canvas_HW4[(*placed.box, slice(0, 3))] = placed.paint_3hw.transpose(1, 2, 0)
        canvas_HW4[(*placed.box, 3)] = placed.alpha_hw
        return canvas_HW4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """A picture as it came back, uint8 HWC, the composite it began as, and each layer's visible mask in [0, 1]."""

    picture_HWC: NDArray[np.uint8]
    composite_HWC: NDArray[np.uint8]
    mask_LHW: NDArray[np.float32]
    png: bytes


class Service:
    """The whole system in this process, spoken to by the public client."""

    def __init__(self, client: AsyncCollageClient, model: collage_service_pb2.Model) -> None:
        """Use `serving`."""
        self._client = client
        self.model = model

    async def draw(
        self, scene: Scene, dials: Dials, *, steps: int, seed: int | None = None
    ) -> Drawn:
        """One picture of the scene."""
        sampling = collage_pb2.Sampling(
            steps=steps, images=1, seed=scene.seed if seed is None else seed
        )
        return await self._drawn(await self._client.generate(scene.message(dials), sampling))

    async def imagine(self, text: str, ground: str, *, steps: int, seed: int) -> NDArray[np.uint8]:
        """A picture from words alone: one grey layer over the whole canvas, free from the first step, not steered."""
        buffer = io.BytesIO()
        Image.new("RGBA", (8, 8), (128, 128, 128, 255)).save(buffer, "PNG")
        collage = collage_pb2.Collage(
            size={"width": SIDE, "height": SIDE}, prompt=f"{_article(text)}{{all}} {ground}"
        )
        layer = collage.layers.add(name="all", text=text, noise=1, attract=0, repel=0)
        layer.image.data = buffer.getvalue()
        layer.transform.scale = SIDE / 4
        sampling = collage_pb2.Sampling(steps=steps, images=1, seed=seed)
        return (await self._drawn(await self._client.generate(collage, sampling))).picture_HWC

    async def redo(
        self, scene: Scene, dials: Dials, parent: bytes, index: int, steps: int
    ) -> Drawn:
        """One layer of an earlier picture drawn again."""
        sampling = collage_pb2.Sampling(steps=steps, images=1, seed=scene.seed + 1)
        message = scene.message(dials)
        return await self._drawn(await self._client.redo(message, parent, [_name(index)], sampling))

    async def learn(self, cutouts: Sequence[Cutout]) -> str:
        """Learns a word for each; empty when all are there, otherwise why not."""
        scene = Scene(
            pieces=tuple(
                Piece(
                    cutout=cutout,
                    x=SIDE * (index + 0.5) / len(cutouts),
                    y=64,
                    width=40,
                    rotation=0,
                    noise=0.5,
                )
                for index, cutout in enumerate(cutouts)
            ),
            ground=next(iter(GROUNDS)),
            colour=(150, 150, 150),
            told=tuple(range(len(cutouts))),
            seed=0,
        )
        message = scene.message(Dials(noise=0.5, words=frozenset(cutouts)))
        try:
            await (await self._client.learn(message)).result()
        except CollageError as error:
            return str(error)
        return ""

    async def _drawn(self, job: AsyncJob) -> Drawn:
        result = await job.result()
        plan = result.job.plan
        masks = [decoded(await self._client.fetch(layer.mask)) for layer in plan.layers]
        return Drawn(
            picture_HWC=decoded(result.images[0]),
            composite_HWC=decoded(await self._client.fetch(plan.composite)),
            mask_LHW=np.asarray(masks, np.float32) / 255,
            png=result.images[0],
        )


@asynccontextmanager
async def serving(data: Path, *, model: str = "", threads: int = 0) -> AsyncIterator[Service]:
    """Starts everything in this process; words and pictures kept in `data` are found again."""
    start_logging("ladder", level="ERROR")
    server = await embedded.start(data, model=model, threads=threads)
    async with AsyncCollageClient(server.address) as client:
        yield Service(client, (await client.models())[0])
    await server.stop()


def pool(seed: int = POOL_SEED) -> list[Cutout]:
    """Forty cut-outs: concepts in two looks first, their second look beside the first."""
    rng = np.random.default_rng(seed)
    keys = [str(key) for key in rng.permutation(list(art.CONCEPTS))]
    keys.sort(key=lambda key: key not in _fifth())
    # The two Fluent sets are one artist's drawings, shaded or not: never both of them for one concept.
    two, one, found = keys[:IN_TWO], keys[IN_TWO : IN_TWO + IN_ONE], []
    for index, key in enumerate(two):
        looks = [str(look) for look in rng.permutation(["noto", "fluent", "flat", "twemoji"])]
        looks.remove(str(rng.choice(["fluent", "flat"])))
        pair = [looks[0], FIFTH.name] if index < IN_FIFTH else looks[:2]
        found += [(key, look) for look in pair]
    found += [(key, art.LOOKS[int(rng.integers(4))].name) for key in one]
    return [
        Cutout(key=key, look=look, is_soft=index % SOFT_EVERY == SOFT_EVERY - 1)
        for index, (key, look) in enumerate(found)
    ]


def scenes(count: int, first_seed: int = SCENES_SEED) -> list[Scene]:
    """Held-out collages: two to six layers of mixed looks, some overlapping, some with one concept twice."""
    return [_scene(number, first_seed + number) for number in range(count)]


def pairs(seed: int) -> list[Scene]:
    """For each concept that a pool has in two looks: both, side by side."""
    cutouts = pool(seed)
    return [
        arranged(cutouts[2 * index : 2 * index + 2], seed=40000 + index) for index in range(IN_TWO)
    ]


def arranged(cutouts: Sequence[Cutout], *, seed: int, told: Sequence[int] | None = None) -> Scene:
    """Cut-outs side by side from left to right, told in any order, or in the one given."""
    rng = np.random.default_rng(seed)
    ground, colour = _ground(rng)
    low, high = WIDTHS[len(cutouts)]
    step = SIDE / len(cutouts)
    return Scene(
        pieces=tuple(
            Piece(
                cutout=cutout,
                x=step * (index + 0.5),
                y=SIDE / 2 + float(rng.uniform(-12, 12)),
                width=float(rng.uniform(low, high)),
                rotation=float(rng.uniform(-10, 10)),
                noise=NOISES[index],
            )
            for index, cutout in enumerate(cutouts)
        ),
        ground=ground,
        colour=colour,
        told=tuple(told or (int(index) for index in rng.permutation(len(cutouts)))),
        seed=seed,
    )


def decoded(png: bytes) -> NDArray[np.uint8]:
    """A PNG's pixels."""
    return np.asarray(Image.open(io.BytesIO(png)))


def _scene(number: int, seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    count = LAYERS[number % len(LAYERS)]
    cutouts = pool()
    chosen: list[Cutout] = []
    if number % 3 == 0:
        first = 2 * int(rng.integers(IN_TWO))
        chosen = cutouts[first : first + 2]
    for index in rng.permutation(len(cutouts)):
        if len(chosen) < count and cutouts[index].key not in {cutout.key for cutout in chosen}:
            chosen.append(cutouts[index])
    chosen = [chosen[index] for index in rng.permutation(count)]
    ground, colour = _ground(rng)
    widths = rng.uniform(*WIDTHS[count], count)
    overlaps = number % 2 == 1
    xy = _spots(widths, 0.62 if overlaps else 1.0, rng)
    noises = np.asarray(NOISES[:count])[rng.permutation(count)]
    return Scene(
        pieces=tuple(
            Piece(
                cutout=cutout,
                x=float(x),
                y=float(y),
                width=float(width),
                rotation=float(rng.uniform(-12, 12)),
                noise=float(noise),
            )
            for cutout, (x, y), width, noise in zip(chosen, xy, widths, noises, strict=True)
        ),
        ground=ground,
        colour=colour,
        told=tuple(int(index) for index in rng.permutation(count)),
        seed=seed,
    )


def _spots(
    widths: NDArray[np.float64], reach: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Centres about `reach` mean widths apart, or as far as many tries allow: none is closer than it must be."""
    half, count = widths / 2, len(widths)
    wanted = reach * (half[:, None] + half[None])[~np.eye(count, dtype=bool)].min()
    best, closest = rng.uniform(half[:, None], SIDE - half[:, None], (count, 2)), -1.0
    for _ in range(400):
        xy = rng.uniform(half[:, None], SIDE - half[:, None], (count, 2))
        apart = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))[
            ~np.eye(count, dtype=bool)
        ].min()
        # For an overlap the first that keeps half of everything in sight; otherwise the widest.
        if apart > closest:
            best, closest = xy, float(apart)
        if closest >= wanted:
            break
    return best


def _ground(rng: np.random.Generator) -> tuple[str, tuple[int, int, int]]:
    """A ground in words, and a plain colour near its own."""
    ground = str(rng.choice(list(GROUNDS)))
    red, green, blue = (
        int(np.clip(value + rng.integers(-16, 17), 0, 255)) for value in GROUNDS[ground]
    )
    return ground, (red, green, blue)


def _name(index: int) -> str:
    return f"layer{index}"


def _article(text: str) -> str:
    if text == "cherries":
        return ""
    return "an " if text[0] in "aeiou" else "a "


@cache
def _fifth() -> dict[str, Image.Image]:
    return fifth()


@cache
def _icons(look: str) -> dict[str, str]:
    icons: dict[str, str] = art.icons(next(each for each in art.LOOKS if each.name == look))
    return icons


@cache
def _pixels(cutout: Cutout) -> NDArray[np.uint8]:
    is_fifth = cutout.look == FIFTH.name
    picture = _fifth()[cutout.key] if is_fifth else art.render(_icons(cutout.look)[cutout.key])
    pixels = np.array(picture)
    if cutout.is_soft:
        # Fades inwards: nothing is known of the colours outside.
        inner = Image.fromarray(pixels[..., 3]).filter(ImageFilter.MinFilter(17))
        fade = np.asarray(inner.filter(ImageFilter.GaussianBlur(8)), np.float32) / 255
        pixels[..., 3] = np.rint(pixels[..., 3] * fade)
    return pixels


@cache
def _png(cutout: Cutout) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(cutout.pixels()).save(buffer, "PNG")
    return buffer.getvalue()
