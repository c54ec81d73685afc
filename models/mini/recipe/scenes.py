"""Captioned scenes: emoji art of one look set on a procedural ground, with soft cast shadows.

The caption names the objects and the ground, never the look. Everything follows from the seed.
"""

from dataclasses import dataclass
from functools import cache

import art
import numpy as np
from PIL import Image, ImageFilter

SIDE = 128
# A ground is what follows the objects in a caption, and whether things cast a shadow on it.
GROUNDS = {
    "on a wooden table": True,
    "on a white table cloth": True,
    "on a checkered cloth": True,
    "on grey stone": True,
    "on grass": True,
    "on sand": True,
    "on snow": True,
    "in a blue sky": False,
    "in the night sky": False,
}
LANDS = {"on grass": "green grass", "on sand": "yellow sand", "on snow": "white snow"}
AIRBORNE = ("sun", "cloud", "rainbow")
STANDING = ("house", "tree", "pine tree", "castle", "cat", "dog", "mountain")
# The examples are made of these: they are drawn more often than the other concepts and grounds.
OFTEN = {"sushi": 3.0, "bento box": 1.5, "rice ball": 1.5, "fried shrimp": 1.5, "avocado": 1.5}
OFTEN_GROUNDS = {"on a wooden table": 2.0}
TEXTURES_PER_GROUND = 12
TEXTURE_SIDE = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One object of a scene: centre and side in pixels, rotation in degrees."""

    concept: str
    x: float
    y: float
    side: float
    angle: float = 0.0
    flip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is composed: a ground float32 [SIDE, SIDE, RGB], objects back to front, and words."""

    ground_HWC: np.ndarray
    placements: list[Placement]
    look: int
    shadow: tuple[float, float, float]
    caption: str

    def paint(self) -> np.ndarray:
        """The picture, uint8 [SIDE, SIDE, RGB]."""
        return paint(self.ground_HWC, self.placements, self.look, self.shadow)


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    grid = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    size = (TEXTURE_SIDE, TEXTURE_SIDE)
    smooth = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32)[..., None] / 255 - 0.5


def _texture(ground: str, rng: np.random.Generator) -> np.ndarray:
    """One texture of a ground, float32 [TEXTURE_SIDE, TEXTURE_SIDE, RGB] in 0..255."""
    y_HW1, x_HW1 = np.mgrid[0:TEXTURE_SIDE, 0:TEXTURE_SIDE].astype(np.float32)[..., None]
    broad, fine = _noise(rng, 4, 4), _noise(rng, 40, 40)

    def rgb(*colour: float) -> np.ndarray:
        return np.asarray(colour, dtype=np.float32)

    if ground == "on a wooden table":
        plank = ((y_HW1 + rng.uniform(0, 40)) / 40).astype(int)
        shade = rng.uniform(-14, 14, 8).astype(np.float32)[plank]
        seam = (y_HW1 + rng.uniform(0, 40)) % 40 < 1.6
        grain = 34 * _noise(rng, 48, 4)
        return np.asarray(rgb(176, 122, 72) + shade + (grain - 38 * seam) * rgb(1, 0.85, 0.7))
    if ground == "on a white table cloth":
        folds = np.sin((x_HW1 * rng.uniform(-1, 1) + y_HW1) / rng.uniform(12, 20) + 3 * broad)
        return np.asarray(rgb(236, 234, 230) + 6 * folds + 14 * broad)
    if ground == "on a checkered cloth":
        cell = rng.uniform(18, 24)
        bands = ((x_HW1 // cell) % 2 + (y_HW1 // cell) % 2) / 2
        return np.asarray(rgb(240, 236, 232) - bands * rgb(30, 175, 180) + 12 * broad)
    if ground == "on grey stone":
        return np.asarray(rgb(142, 144, 150) + 42 * broad + 30 * fine)
    if ground == "on grass":
        return np.asarray(rgb(98, 164, 62) + (34 * broad + 46 * fine) * rgb(0.9, 1, 0.6))
    if ground == "on sand":
        waves = np.sin(y_HW1 / rng.uniform(4, 7) + 5 * broad)
        return np.asarray(rgb(228, 198, 140) + 5 * waves + 18 * fine + 16 * broad)
    if ground == "on snow":
        return np.asarray(rgb(228, 236, 246) + 22 * broad * rgb(1, 0.8, 0.5))
    depth = y_HW1 / TEXTURE_SIDE
    if ground == "in a blue sky":
        return np.asarray(rgb(92, 168, 236) + depth * rgb(80, 45, 12) + 16 * broad)
    stars = (rng.random((TEXTURE_SIDE, TEXTURE_SIDE, 1)) < 0.002).astype(np.float32)
    blurred = Image.fromarray((255 * stars[..., 0]).astype(np.uint8))
    glow = np.asarray(blurred.filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)[..., None]
    return np.asarray(rgb(18, 24, 62) + depth * rgb(24, 22, 40) + 10 * broad + 2.5 * glow)


@cache
def textures() -> dict[str, np.ndarray]:
    """Textures of every ground: float32 [TEXTURES_PER_GROUND, H, W, RGB] in 0..255."""
    rng = np.random.default_rng(1)
    drawn = {}
    for ground in GROUNDS:
        stack = [_texture(ground, rng) for _ in range(TEXTURES_PER_GROUND)]
        drawn[ground] = np.asarray(stack, dtype=np.float32)
    return drawn


@cache
def _gallery() -> np.ndarray:
    return art.gallery()


def paint_ground(ground: str, rng: np.random.Generator) -> np.ndarray:
    """A random crop of one texture, float32 [SIDE, SIDE, RGB] in 0..255."""
    texture = textures()[ground][rng.integers(TEXTURES_PER_GROUND)]
    top, left = rng.integers(0, TEXTURE_SIDE - SIDE + 1, 2)
    crop = texture[top : top + SIDE, left : left + SIDE]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.asarray(crop + rng.uniform(-8, 8), dtype=np.float32)


def paint_land(land: str, rng: np.random.Generator) -> np.ndarray:
    """Blue sky above a gently waving horizon, a land below: float32 [SIDE, SIDE, RGB]."""
    sky, ground = paint_ground("in a blue sky", rng), paint_ground(land, rng)
    x_W = np.arange(SIDE, dtype=np.float32)
    swell = rng.uniform(0, 4) * np.sin(x_W / rng.uniform(15, 30) + rng.uniform(0, 6))
    horizon_W = SIDE * rng.uniform(0.58, 0.68) + swell
    below_HW1 = np.clip(np.arange(SIDE)[:, None] - horizon_W[None], 0, 1)[..., None]
    return np.asarray(sky + below_HW1 * (ground - sky), dtype=np.float32)


def cut_out(item: Placement, look: int) -> Image.Image:
    """One object alone on the canvas: RGBA with straight alpha."""
    side = max(8, round(item.side))
    picture = Image.fromarray(_gallery()[list(art.CONCEPTS.values()).index(item.concept), look])
    picture = picture.resize((side, side), Image.Resampling.BOX if side < 100 else 3)
    if item.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste(picture, (round(item.x - side / 2), round(item.y - side / 2)))
    if item.angle:
        layer = layer.rotate(item.angle, Image.Resampling.BICUBIC, center=(item.x, item.y))
    return layer


def paint(
    ground_HWC: np.ndarray,
    placements: list[Placement],
    look: int,
    shadow: tuple[float, float, float],
) -> np.ndarray:
    """Set objects on a ground, first one farthest back; shadow is (dx, dy, strength 0..1).

    The shadow's offset is a fraction of the object's side. Returns uint8 [SIDE, SIDE, RGB].
    """
    canvas = ground_HWC.copy()
    dx, dy, strength = shadow
    for item in placements:
        side = max(8, round(item.side))
        layer = cut_out(item, look)
        if strength > 0:
            moved = Image.new("L", (SIDE, SIDE))
            moved.paste(layer.getchannel("A"), (round(dx * side), round(dy * side)))
            moved = moved.filter(ImageFilter.GaussianBlur(1 + 0.045 * side))
            canvas *= 1 - strength * np.asarray(moved, dtype=np.float32)[..., None] / 255
        pixels = np.asarray(layer, dtype=np.float32)
        canvas += (pixels[..., :3] - canvas) * (pixels[..., 3:] / 255)
    return np.clip(canvas.round(), 0, 255).astype(np.uint8)


def _article(word: str) -> str:
    if word == "cherries":
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _listing(words: list[str], rng: np.random.Generator) -> str:
    shown = [_article(word) for word in words] if rng.random() < 0.75 else words
    if len(shown) == 1:
        return shown[0]
    if rng.random() < 0.25:
        return ", ".join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _caption(words: list[str], where: str, rng: np.random.Generator) -> str:
    listing = _listing([words[i] for i in rng.permutation(len(words))], rng)
    shape = rng.random()
    if shape < 0.7:
        return f"{listing} {where}"
    return listing if shape < 0.9 else f"a picture of {listing} {where}"


def _spots(count: int, side: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres that keep their distance as far as a few tries allow."""
    margin = 0.46 * side
    best: list[tuple[float, float]] = []
    widest = -1.0
    for _ in range(12):
        xy = rng.uniform(margin, SIDE - margin, (count, 2))
        apart = min(
            (float(np.hypot(*(xy[i] - xy[j]))) for i in range(count) for j in range(i)),
            default=SIDE,
        )
        if apart > widest:
            widest, best = apart, [(float(x), float(y)) for x, y in xy]
        if widest > 0.92 * side:
            break
    return best


def _pick(
    names: list[str], often: dict[str, float], count: int, rng: np.random.Generator
) -> list[str]:
    weights = np.asarray([often.get(name, 1.0) for name in names])
    drawn = rng.choice(names, count, replace=False, p=weights / weights.sum())
    return [str(name) for name in drawn]


def _landscape(rng: np.random.Generator, look: int) -> Scene:
    land = str(rng.choice(list(LANDS)))
    airborne = list(rng.choice(AIRBORNE, rng.integers(0, 3), replace=False))
    standing = list(rng.choice(STANDING, rng.integers(1, 3), replace=False))
    standing.sort(key=lambda word: word != "mountain")
    placements = []
    for index, word in enumerate(airborne):
        x = SIDE * ((0.25 + 0.5 * index) + rng.uniform(-0.08, 0.08))
        side = rng.uniform(34, 48)
        placements.append(Placement(concept=str(word), x=x, y=rng.uniform(20, 32), side=side))
    slots = rng.permutation([0.28, 0.72]) if len(standing) > 1 else [0.5]
    for word, slot in zip(standing, slots, strict=False):
        side = rng.uniform(74, 92) if word == "mountain" else rng.uniform(46, 62)
        foot = rng.uniform(86, 94) if word == "mountain" else rng.uniform(98, 114)
        x, flip = SIDE * (slot + rng.uniform(-0.06, 0.06)), bool(rng.random() < 0.5)
        y = foot - side / 2
        placements.append(Placement(concept=str(word), x=float(x), y=y, side=side, flip=flip))
    words = [item.concept for item in placements]
    where = rng.choice(["{on}", "on {land} under a blue sky", "in a landscape with {land}"])
    caption = _caption(words, str(where).format(on=land, land=LANDS[land]), rng)
    return Scene(
        ground_HWC=paint_land(land, rng),
        placements=placements,
        look=look,
        shadow=(0.0, 0.06, 0.3),
        caption=caption,
    )


def compose(seed: int) -> tuple[np.ndarray, str]:
    """One scene of the training mix: uint8 [SIDE, SIDE, RGB] and its caption."""
    made = scene(seed)
    return made.paint(), made.caption


def scene(seed: int) -> Scene:
    """One scene of the training mix."""
    rng = np.random.default_rng(seed)
    look = int(rng.integers(len(art.LOOKS)))
    kind = rng.random()
    if kind > 0.88:
        return _landscape(rng, look)
    low, high, count = 60, 104, 1
    if kind > 0.76:
        low, high, count = 36, 50, int(rng.integers(4, 8))
    elif kind > 0.46:
        low, high, count = 46, 66, int(rng.integers(2, 4))
    words = _pick(list(art.CONCEPTS.values()), OFTEN, count, rng)
    ground = _pick(list(GROUNDS), OFTEN_GROUNDS, 1, rng)[0]
    side = rng.uniform(low, high)
    # A small object stands farther from the middle than a large one can.
    reach = 8 + 0.35 * (104 - side)
    spots = [(SIDE / 2 + rng.uniform(-reach, reach), SIDE / 2 + rng.uniform(-reach, reach))]
    if count > 1:
        spots = _spots(count, side, rng)
    placements = [
        Placement(
            concept=word,
            x=x,
            y=y,
            side=side * rng.uniform(0.92, 1.08),
            angle=float(rng.uniform(-10, 10)),
            flip=bool(rng.random() < 0.3),
        )
        for word, (x, y) in zip(words, spots, strict=True)
    ]
    shadow = (float(rng.uniform(-0.06, 0.06)), float(rng.uniform(0.04, 0.1)), 0.42)
    if not GROUNDS[ground]:
        shadow = (0.0, 0.0, 0.0)
    return Scene(
        ground_HWC=paint_ground(ground, rng),
        placements=placements,
        look=look,
        shadow=shadow,
        caption=_caption(words, ground, rng),
    )
