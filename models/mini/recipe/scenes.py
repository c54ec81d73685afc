"""Pictures composed of the art: objects on a ground, with soft cast shadows, and their captions.

Main types: `Scene`, what is to be seen, which follows from a seed alone; `Composer`, which paints scenes in batches on
a device. Places and sizes are in 128ths of the canvas, so that scenes do not depend on the number of pixels.

Suffixes: B scenes; M objects of all scenes; N renderings; H, W pixels; 3 = R, G, B; 4 = R, G, B times alpha, alpha.
"""

import colorsys
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import art
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional

UNITS = 128
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
    "on a bamboo mat": True,
}
LANDS = {"on grass": "green grass", "on sand": "yellow sand", "on snow": "white snow"}
AIRBORNE = ("sun", "cloud", "rainbow")
STANDING = ("house", "tree", "pine tree", "castle", "cat", "dog", "mountain")
# The examples are made of these: they are drawn more often than the other concepts and grounds.
OFTEN = {"sushi": 3.0, "bento box": 1.5, "rice ball": 1.5, "fried shrimp": 1.5, "avocado": 1.5}
OFTEN_GROUNDS = {"on a wooden table": 2.0}
TEXTURES_PER_GROUND = 12
TEXTURE_UNITS = 160
# Each size is at most 4/3 of the next: between two of them bilinear sampling neither blurs nor aliases visibly.
SPRITE_SIDES = tuple(art.SIDE * share // 32 for share in (32, 24, 16, 12, 8, 6, 4, 3))
# What a word of its own is made from.
PORTRAIT_SIDE = 48
# The shadow's picture has half a sprite more on every side than it needs; blurred, it needs few pixels.
SHADOW_SIDE, SHADOW_REACH, SHADOW_BLUR = 48, 1.5, 0.06


# A look has its word, and a colour its name: captions with both teach the text encoder and cross-attention that a word
# can say what a thing looks like. Learned words live on that.
LOOK_WORDS = tuple(look.word for look in (*art.LOOKS, *art.MORE_LOOKS))
# Turns of the hue circle in which an object may be painted, sixths of it.
TURNS = 6
ONE_LOOK, LOOK_TOLD, COLOUR_TOLD, TURNED, TWINS = 0.4, 0.8, 0.2, 0.2, 0.2
# How many objects have a word of their own instead, made from their picture (`networks.Describer`) as learned words are
# made from theirs; these are turned more often. In a caption it is its placement's mark, once for each of its vectors.
DESCRIBED, DESCRIBED_TURNED = 0.5, 0.5
MOST, VECTORS = 8, (1, 2, 4, 8)
MARKS = tuple(chr(0xE000 + place) for place in range(MOST))
# Stands before and behind what a placement is called.
BOUNDS = tuple(chr(0xE100 + place) for place in range(MOST))
# Regular expressions of a word of its own and of a bound.
OWN_WORD, BOUND = f"[{MARKS[0]}-{MARKS[-1]}]+", f"[{BOUNDS[0]}-{BOUNDS[-1]}]"
# Which colour words hold for each rendering, (concept, look), turn by turn. What is not in it does not exist.
Palette = Mapping[tuple[str, int], Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One object of a scene: centre and side in units, rotation in degrees counter-clockwise.

    look: index into `LOOK_WORDS`. turn: of its hues, in sixths of the circle. is_described: by a word of its own.
    """

    concept: str
    look: int
    turn: int = 0
    is_described: bool = False
    x: float
    y: float
    side: float
    angle: float = 0.0
    flip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is composed.

    seed: what is random about the ground follows from it. placements: back to front.
    shadow: offset to the right and down as shares of the object's side, and strength in [0, 1]. is_land: whether the
    ground lies under a blue sky, to be seen from the side.
    """

    seed: int
    ground: str
    is_land: bool
    placements: list[Placement]
    shadow: tuple[float, float, float]
    caption: str


def _noise(rng: np.random.Generator, rows: int, columns: int, side: int) -> np.ndarray:
    grid = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    smooth = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32)[..., None] / 255 - 0.5


def _texture(ground: str, rng: np.random.Generator, side: int) -> np.ndarray:
    """One texture of a ground, TEXTURE_UNITS wide: float32 [side, side, RGB] in 0..255."""
    y_HW1, x_HW1 = np.mgrid[0:side, 0:side].astype(np.float32)[..., None] * TEXTURE_UNITS / side
    broad, fine = _noise(rng, 4, 4, side), _noise(rng, 40, 40, side)

    def rgb(*colour: float) -> np.ndarray:
        return np.asarray(colour, dtype=np.float32)

    if ground == "on a wooden table":
        plank = ((y_HW1 + rng.uniform(0, 40)) / 40).astype(int)
        shade = rng.uniform(-14, 14, 8).astype(np.float32)[plank]
        seam = (y_HW1 + rng.uniform(0, 40)) % 40 < 1.6
        grain = 34 * _noise(rng, 48, 4, side)
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
    if ground == "on a bamboo mat":
        slat = (y_HW1 / 5).astype(int)
        shade = rng.uniform(-12, 12, 40).astype(np.float32)[slat]
        gap = (y_HW1 % 5 < 1) * 28 + ((x_HW1 + rng.uniform(0, 40)) % 40 < 2) * 30
        return np.asarray(rgb(190, 186, 104) + shade + 16 * fine - gap * rgb(0.8, 0.8, 0.7))
    depth = y_HW1 / TEXTURE_UNITS
    if ground == "in a blue sky":
        return np.asarray(rgb(92, 168, 236) + depth * rgb(80, 45, 12) + 16 * broad)
    per_star = (TEXTURE_UNITS / side) ** 2
    stars = (rng.random((side, side)) < 0.002 * per_star).astype(np.uint8) * 255
    blurred = Image.fromarray(stars).filter(ImageFilter.GaussianBlur(0.8 * per_star**-0.5))
    glow = np.asarray(blurred, dtype=np.float32)[..., None] / per_star
    return np.asarray(rgb(18, 24, 62) + depth * rgb(24, 22, 40) + 10 * broad + 2.5 * glow)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layers:
    """The objects of some scenes, each alone on the canvas.

    of_M, slot_M: the scene of each object and its place in it, 0 farthest back. shown_M2: its rendering and its turn.
    paint_M4HW: premultiplied, in [0, 1]. shade_M1HW: the share of light that its shadow takes away.
    """

    of_M: Tensor
    slot_M: Tensor
    shown_M2: Tensor
    paint_M4HW: Tensor
    shade_M1HW: Tensor

    def visible(self, scenes: int, side: int) -> Tensor:
        """What is seen of each, in [0, 1]: [scenes, MOST, side, side], 0 where a scene has no such object."""
        alpha_M1HW = self.paint_M4HW[:, 3:]
        through_B1HW = torch.ones_like(alpha_M1HW[:1]).repeat(scenes, 1, 1, 1)
        visible_BKhw = alpha_M1HW.new_zeros(scenes, MOST, side, side)
        for slot in reversed(range(MOST)):
            at = (self.slot_M == slot).nonzero()[:, 0]
            of, alpha_N1HW = self.of_M[at], alpha_M1HW[at]
            seen_N1HW = through_B1HW[of] * alpha_N1HW
            visible_BKhw[of, slot] = functional.adaptive_avg_pool2d(seen_N1HW, side)[:, 0]
            through_B1HW[of] *= 1 - alpha_N1HW
        return visible_BKhw


class Composer:
    """Paints scenes of `side` pixels in batches; all art and all grounds lie on its device.

    gallery_NLHWC: the art it was prepared from. palette: the renderings there are, and what colour each has.
    """

    def __init__(
        self, side: int, names: Sequence[str], gallery_NLHWC: np.ndarray, device: torch.device
    ) -> None:
        """Prepare the art.

        Args:
            side: of the pictures, in pixels.
            names: the concepts, in the order of the gallery.
            gallery_NLHWC: uint8 [concept, look, H, W, RGBA], straight alpha; concepts without a name are left out.
            device: where everything is and happens.
        """
        self.side, self.device = side, device
        self.gallery_NLHWC = gallery_NLHWC[: len(names)]
        self._places = {name: index for index, name in enumerate(names)}
        turns_T33 = torch.stack([_turned(turn) for turn in range(TURNS)])
        self.palette = {
            (name, look): [colour(picture_HWC, turn_33) for turn_33 in turns_T33.numpy()]
            for name, row_LHWC in zip(names, gallery_NLHWC, strict=False)
            for look, picture_HWC in enumerate(row_LHWC)
            if picture_HWC[..., 3].any()
        }
        self._turns_T33 = turns_T33.to(device)
        pictures_N4HW = torch.from_numpy(gallery_NLHWC[: len(names)]).flatten(0, 1)
        sprites_N4HW = pictures_N4HW.permute(0, 3, 1, 2)
        sides = [level for level in SPRITE_SIDES if level <= 1.5 * side]
        levels: list[list[Tensor]] = [[] for _ in sides]
        shadows = []
        for part_N4HW in sprites_N4HW.split(32):
            x_N4HW = part_N4HW.to(device).float() / 255
            x_N4HW[:, :3] *= x_N4HW[:, 3:]
            for level, size in zip(levels, sides, strict=True):
                level.append(_resized(x_N4HW, size).half())
            shadows.append(_shadow(x_N4HW[:, 3:]).half())
        self._levels = [(size, torch.cat(level)) for size, level in zip(sides, levels, strict=True)]
        self._shadows_N1hw = torch.cat(shadows)
        rng = np.random.default_rng(1)
        self._texture_side = side * TEXTURE_UNITS // UNITS
        self._textures = {}
        for ground in GROUNDS:
            drawn = [_texture(ground, rng, self._texture_side) for _ in range(TEXTURES_PER_GROUND)]
            stack = torch.from_numpy(np.asarray(drawn, dtype=np.float32)).clamp(0, 255).to(device)
            self._textures[ground] = (stack.permute(0, 3, 1, 2) / 255).half()
        self._at_W = (torch.arange(side, device=device) + 0.5) * UNITS / side

    def rendering(self, item: Placement) -> int:
        """Which rendering is placed, among all of all concepts."""
        return self._places[item.concept] * len(LOOK_WORDS) + item.look

    def portraits(self, shown_M2: Tensor) -> Tensor:
        """Renderings alone, their hues turned, premultiplied: float32 [M, 4, PORTRAIT_SIDE, PORTRAIT_SIDE]."""
        which_M, turn_M = shown_M2.long().T
        paint_M4HW = dict(self._levels)[PORTRAIT_SIDE][which_M].float()
        return self._in_colours(paint_M4HW, turn_M)

    def _in_colours(self, paint_M4HW: Tensor, turn_M: Tensor) -> Tensor:
        colours_M3HW = torch.einsum("mij,mjhw->mihw", self._turns_T33[turn_M], paint_M4HW[:, :3])
        paint_M4HW[:, :3] = colours_M3HW.clamp(min=0).minimum(paint_M4HW[:, 3:])
        return paint_M4HW

    def layers(self, scenes: Sequence[Scene]) -> Layers:
        """Every object of the scenes, scene by scene, back to front."""
        rows = [
            (
                *(index, slot, self.rendering(item)),
                *(item.x, item.y, item.side, np.deg2rad(item.angle), 1 - 2 * item.flip),
                *scene.shadow,
                item.turn,
            )
            for index, scene in enumerate(scenes)
            for slot, item in enumerate(scene.placements)
        ]
        table_CM = torch.tensor(rows, dtype=torch.float32).view(-1, 12).T
        pixels_M = table_CM[5] * self.side / UNITS
        level_M = sum((pixels_M <= size).long() for size, _ in self._levels[1:])
        of_M, slot_M, which_M, turn_M = table_CM[[0, 1, 2, 11]].long().to(self.device)
        x, y, size, angle, mirror, right, down, strength = table_CM[3:11].to(self.device)[
            ..., None, None
        ]
        # From canvas to sprite, whose half side is 1.
        x_MHW = (self._at_W - x) * 2 / size
        y_MHW = (self._at_W[:, None] - y) * 2 / size
        cosine, sine = angle.cos(), angle.sin()

        def grid(x_MHW: Tensor, y_MHW: Tensor) -> Tensor:
            return torch.stack(
                [(cosine * x_MHW - sine * y_MHW) * mirror, sine * x_MHW + cosine * y_MHW], dim=-1
            )

        grid_MHW2 = grid(x_MHW, y_MHW)
        paint_M4HW = torch.empty(len(rows), 4, self.side, self.side, device=self.device)
        for number, (_, sprites_N4HW) in enumerate(self._levels):
            at = (level_M == number).nonzero()[:, 0].to(self.device)
            if len(at):
                paint_M4HW[at] = _sampled(sprites_N4HW[which_M[at]], grid_MHW2[at])
        paint_M4HW = self._in_colours(paint_M4HW, turn_M)
        moved_MHW2 = grid(x_MHW - 2 * right, y_MHW - 2 * down) / SHADOW_REACH
        shade_M1HW = _sampled(self._shadows_N1hw[which_M], moved_MHW2) * strength[:, None]
        return Layers(
            of_M=of_M,
            slot_M=slot_M,
            shown_M2=torch.stack([which_M, turn_M], dim=1),
            paint_M4HW=paint_M4HW,
            shade_M1HW=shade_M1HW,
        )

    def paint(self, scenes: Sequence[Scene], layers: Layers | None = None) -> Tensor:
        """The pictures, uint8 [B, 3, H, W]; `layers` where they are there already."""
        layers = layers or self.layers(scenes)
        x_B3HW = torch.stack([self._ground(scene) for scene in scenes])
        for slot in range(max((len(scene.placements) for scene in scenes), default=0)):
            at = (layers.slot_M == slot).nonzero()[:, 0]
            paint_M4HW, of = layers.paint_M4HW[at], layers.of_M[at]
            lit_M1HW = (1 - layers.shade_M1HW[at]) * (1 - paint_M4HW[:, 3:])
            x_B3HW[of] = x_B3HW[of] * lit_M1HW + paint_M4HW[:, :3]
        return (x_B3HW.clamp(0, 1) * 255).round().to(torch.uint8)

    def _ground(self, scene: Scene) -> Tensor:
        rng = np.random.default_rng([scene.seed, 1])
        if not scene.is_land:
            return self._patch(scene.ground, rng)
        sky_3HW, land_3HW = self._patch("in a blue sky", rng), self._patch(scene.ground, rng)
        swell = float(rng.uniform(0, 4))
        wave_W = torch.sin(self._at_W / float(rng.uniform(15, 30)) + float(rng.uniform(0, 6)))
        horizon_W = UNITS * float(rng.uniform(0.58, 0.68)) + swell * wave_W
        below_HW = ((self._at_W[:, None] - horizon_W) * self.side / UNITS).clamp(0, 1)
        return torch.lerp(sky_3HW, land_3HW, below_HW)

    def _patch(self, ground: str, rng: np.random.Generator) -> Tensor:
        """A random part of one texture, float32 [3, H, W], about 0..1."""
        texture_3HW = self._textures[ground][int(rng.integers(TEXTURES_PER_GROUND))]
        top, left = rng.integers(0, self._texture_side - self.side + 1, 2)
        patch_3HW = texture_3HW[:, top : top + self.side, left : left + self.side].float()
        if rng.random() < 0.5:
            patch_3HW = patch_3HW.flip(-1)
        return patch_3HW + float(rng.uniform(-8, 8)) / 255


def _turned(turn: int) -> Tensor:
    """The matrix [3, 3] that turns hues by so many sixths of the circle and keeps luma (as CSS' hue-rotate)."""
    if turn == 0:
        return torch.eye(3)
    angle = 2 * np.pi * turn / TURNS
    luma_3 = torch.tensor([0.213, 0.715, 0.072])
    grey_33 = luma_3.expand(3, 3)
    across_33 = torch.tensor(
        [[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]]
    )
    return (
        grey_33 + float(np.cos(angle)) * (torch.eye(3) - grey_33) + float(np.sin(angle)) * across_33
    )


def colour(picture_HW4: np.ndarray, turn_33: np.ndarray) -> str:
    """The word for most of a picture's colour, uint8 with straight alpha, its hues turned; vivid pixels count more."""
    rgb_P3 = picture_HW4[::4, ::4, :3].reshape(-1, 3) / 255 @ turn_33.T
    rgb_P3 = rgb_P3.clip(0, 1)
    spread_P = rgb_P3.max(axis=1) - rgb_P3.min(axis=1)
    weight_P = picture_HW4[::4, ::4, 3].ravel() * (0.1 + spread_P)
    hue, saturation, value = colorsys.rgb_to_hsv(*(weight_P @ rgb_P3 / max(1e-9, weight_P.sum())))
    if saturation < 0.18:
        return "white" if value > 0.75 else "grey" if value > 0.3 else "black"
    if 15 <= 360 * hue < 45:
        return "orange" if value > 0.78 else "brown"
    for name, end in (("red", 15), ("yellow", 68), ("green", 165), ("blue", 255), ("purple", 290)):
        if 360 * hue < end:
            return name
    return "pink" if 360 * hue < 340 else "red"


def _resized(x_NCHW: Tensor, side: int) -> Tensor:
    return functional.interpolate(x_NCHW, (side, side), mode="bilinear", antialias=True)


def _shadow(alpha_N1HW: Tensor) -> Tensor:
    """Alpha with a margin for the blur, blurred by a Gaussian of SHADOW_BLUR sides: [N, 1, h, h]."""
    margin = round(SHADOW_SIDE * (SHADOW_REACH - 1) / 2)
    small_N1hw = functional.pad(_resized(alpha_N1HW, SHADOW_SIDE), [margin] * 4)
    at = torch.arange(SHADOW_SIDE + 2 * margin, device=alpha_N1HW.device)
    apart = (at[:, None] - at) / (SHADOW_BLUR * SHADOW_SIDE)
    blur_hh = torch.exp(-0.5 * apart**2)
    blur_hh /= blur_hh[len(at) // 2].sum()
    return blur_hh @ small_N1hw @ blur_hh


def _sampled(x_MCHW: Tensor, grid_MHW2: Tensor) -> Tensor:
    return functional.grid_sample(x_MCHW.float(), grid_MHW2, align_corners=False)


def _article(word: str) -> str:
    if "cherries" in word:
        return word
    return f"{'an' if re.sub(BOUND, '', word)[0] in 'aeiou' else 'a'} {word}"


def _listing(words: list[str], rng: np.random.Generator) -> str:
    shown = [_article(word) for word in words] if rng.random() < 0.75 else words
    if len(shown) == 1:
        return shown[0]
    if rng.random() < 0.25:
        return ", ".join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def without_marks(caption: str) -> str:
    """A caption as anyone could write it: words of their own and marks are left out."""
    return re.sub(f" ?{OWN_WORD} ", " ", re.sub(BOUND, "", caption)).strip()


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
        xy = rng.uniform(margin, UNITS - margin, (count, 2))
        apart = min(
            (float(np.hypot(*(xy[i] - xy[j]))) for i in range(count) for j in range(i)),
            default=UNITS,
        )
        if apart > widest:
            widest, best = apart, [(float(x), float(y)) for x, y in xy]
        if widest > 0.92 * side:
            break
    return best


def _pick(
    names: Sequence[str], often: dict[str, float], count: int, rng: np.random.Generator
) -> list[str]:
    weights = np.asarray([often.get(name, 1.0) for name in names])
    drawn = rng.choice(list(names), count, replace=False, p=weights / weights.sum())
    return [str(name) for name in drawn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dress:
    """How an object looks and is told: see `Placement`."""

    look: int
    turn: int
    is_described: bool


class Dresser:
    """Gives the objects of one scene their looks and hues; two scenes in five are of one look."""

    def __init__(self, palette: Palette, rng: np.random.Generator) -> None:
        self._palette, self._rng = palette, rng
        self._look = int(rng.integers(len(art.LOOKS))) if rng.random() < ONE_LOOK else None

    def dressed(self, concept: str, but: int | None = None) -> Dress:
        """A look that the concept comes in, not the one of `but`, a turn, and whether a word of its own tells it."""
        looks = [look for name, look in self._palette if name == concept and look != but]
        look = self._look if self._look in looks else int(self._rng.choice(looks))
        is_described = bool(self._rng.random() < DESCRIBED)
        is_turned = self._rng.random() < (DESCRIBED_TURNED if is_described else TURNED)
        turn = int(self._rng.integers(TURNS)) if is_turned else 0
        return Dress(look=look, turn=turn, is_described=is_described)

    def told(self, placements: Sequence[Placement]) -> list[str]:
        """What a caption calls the objects."""
        fitting = [count for count in VECTORS if count * len(placements) <= 2 * MOST]
        vectors = int(self._rng.choice(fitting))
        marks = zip(placements, MARKS, BOUNDS, strict=False)
        return [bound + self._told(item, mark * vectors) + bound for item, mark, bound in marks]

    def _told(self, item: Placement, word: str) -> str:
        parts = [item.concept]
        if item.is_described:
            return f"{word} {item.concept}"
        # An unusual colour is always told, so that without a word for it things have their own.
        colour = self._palette[item.concept, item.look][item.turn]
        is_unusual = colour != self._palette[item.concept, item.look][0]
        if is_unusual or self._rng.random() < COLOUR_TOLD:
            parts.insert(0, colour)
        if self._rng.random() < LOOK_TOLD:
            parts.insert(0, LOOK_WORDS[item.look])
        return " ".join(parts)


def _landscape(seed: int, dresser: Dresser, rng: np.random.Generator) -> Scene:
    land = str(rng.choice(list(LANDS)))
    airborne = list(rng.choice(AIRBORNE, rng.integers(0, 3), replace=False))
    standing = list(rng.choice(STANDING, rng.integers(1, 3), replace=False))
    standing.sort(key=lambda word: word != "mountain")
    placements = []
    for index, word in enumerate(airborne):
        x = UNITS * ((0.25 + 0.5 * index) + rng.uniform(-0.08, 0.08))
        side, y = rng.uniform(34, 48), rng.uniform(20, 32)
        dress = asdict(dresser.dressed(str(word)))
        placements.append(Placement(concept=str(word), x=x, y=y, side=side, **dress))
    slots = rng.permutation([0.28, 0.72]) if len(standing) > 1 else [0.5]
    for word, slot in zip(standing, slots, strict=False):
        side = rng.uniform(74, 92) if word == "mountain" else rng.uniform(46, 62)
        foot = rng.uniform(86, 94) if word == "mountain" else rng.uniform(98, 114)
        x, flip = UNITS * (slot + rng.uniform(-0.06, 0.06)), bool(rng.random() < 0.5)
        y = foot - side / 2
        dress = asdict(dresser.dressed(str(word)))
        placements.append(
            Placement(concept=str(word), x=float(x), y=y, side=side, flip=flip, **dress)
        )
    words = dresser.told(placements)
    where = rng.choice(["{on}", "on {land} under a blue sky", "in a landscape with {land}"])
    caption = _caption(words, str(where).format(on=land, land=LANDS[land]), rng)
    return Scene(
        seed=seed,
        ground=land,
        is_land=True,
        placements=placements,
        shadow=(0.0, 0.06, 0.3),
        caption=caption,
    )


def scene(seed: int, names: Sequence[str], palette: Palette) -> Scene:
    """One scene of the training mix, of the concepts of these names and the renderings of this palette."""
    rng = np.random.default_rng(seed)
    dresser = Dresser(palette, rng)
    kind = rng.random()
    if kind > 0.88:
        return _landscape(seed, dresser, rng)
    low, high, count = 60, 104, 1
    if kind > 0.76:
        low, high, count = 36, 50, int(rng.integers(4, 8))
    elif kind > 0.46:
        low, high, count = 46, 66, int(rng.integers(2, 4))
    concepts = _pick(names, OFTEN, count, rng)
    dressed = [dresser.dressed(concept) for concept in concepts]
    if count > 1 and rng.random() < TWINS:
        concepts[1], dressed[1] = concepts[0], dresser.dressed(concepts[0], but=dressed[0].look)
    ground = _pick(list(GROUNDS), OFTEN_GROUNDS, 1, rng)[0]
    side = rng.uniform(low, high)
    # A small object stands farther from the middle than a large one can.
    reach = 8 + 0.35 * (104 - side)
    spots = [(UNITS / 2 + rng.uniform(-reach, reach), UNITS / 2 + rng.uniform(-reach, reach))]
    if count > 1:
        spots = _spots(count, side, rng)
    placements = [
        Placement(
            concept=concept,
            x=x,
            y=y,
            side=side * rng.uniform(0.92, 1.08),
            angle=float(rng.uniform(-10, 10)),
            flip=bool(rng.random() < 0.3),
            **asdict(dress),
        )
        for concept, dress, (x, y) in zip(concepts, dressed, spots, strict=True)
    ]
    shadow = (float(rng.uniform(-0.06, 0.06)), float(rng.uniform(0.04, 0.1)), 0.42)
    if not GROUNDS[ground]:
        shadow = (0.0, 0.0, 0.0)
    return Scene(
        seed=seed,
        ground=ground,
        is_land=False,
        placements=placements,
        shadow=shadow,
        caption=_caption(dresser.told(placements), ground, rng),
    )
