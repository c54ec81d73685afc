"""The judge: a small network that says what is where in a picture, in which artist's look, and where shadows fall.

    python -m benchmarks.judge          # trains it where it is not cached, then prints how good it is

Main types: `Judge`, what benchmarks ask, and `Composer`, what it is taught with. It is independent of what it judges:
it sees the art alone, icons on grounds drawn here, never a scene of the model's recipe nor a generated picture. Its
classes are the model's concepts and as many again that the model does not know, so that a blob of the right colour has
other names to be called by. One trunk, two heads: a 64-pixel crop's rendering (concept and look in one softmax, or
nothing); and in each cell of a whole picture the concept that fills it (or nothing) and whether a shadow falls on it.
Of the second, only where something stands is asked: what it is, the first tells better.
Everything follows from the seed and the number of steps; weights are kept under the digest of this file.
Suffixes: B pictures, K objects of a picture, back to front; H, W pixels; h, w cells of 4 pixels; N renderings, or
concepts and nothing; L looks; D features.
"""

import hashlib
import io
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "models" / "mini" / "recipe"))
import art

# Concepts of the same icon sets that the model does not know.
UNKNOWN = (  # noqa: SIM905 a list of strings would take a line a word
    "pizza hamburger banana grapes watermelon pineapple eggplant ear-of-corn mushroom bread cheese-wedge "
    "soft-ice-cream lollipop automobile bus airplane rocket umbrella balloon guitar key bell books penguin owl "
    "turtle butterfly octopus elephant crown wrapped-gift basketball cactus"
).split()
# The fifth look, which neither the model nor the judge was taught.
FIFTH = art.Look(
    name="fxemoji", package="@iconify-json/fxemoji", version="1.2.2", licence="Apache-2.0"
)
# Its names of the model's concepts, where they are not the other sets' names without hyphens. Its rainbow and sailboat
# are left out: they are opaque squares.
FIFTH_NAMES = {
    "house": "housebuilding",
    "evergreen-tree": "evergreen",
    "snow-capped-mountain": "snowmountains",
    "castle": "europeancastle",
    "cat": "catside",
    "dog": "dogside",
    "sun": "sunrays",
    "rainbow": "",
    "sailboat": "",
}
KEYS = (*art.CONCEPTS, *UNKNOWN)
NAMES = (*art.CONCEPTS.values(), *(key.replace("-", " ") for key in UNKNOWN))
LOOKS = len(art.LOOKS)
RENDERINGS = len(KEYS) * LOOKS
NOTHING = RENDERINGS

CROP, SCENE, CELL = 64, 128, 4
STEPS, CROPS, SCENES = 2200, 64, 8
RATE, DECAY = 3e-3, 0.02
SEED, CALIBRATION_SEED, HELD_OUT_SEED = 1, 500_009, 1_000_003
# Art side and canvas side of a stored sprite: the margin holds the blurred shadow.
ART, CANVAS = 48, 72
MARGIN = (CANVAS - ART) // 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scenes:
    """Composed pictures, RGB in [0, 1], and what is known of them.

    rendering_BK: concept * LOOKS + look of each object, -1 for none; visible_BKHW: what can be seen of each, in [0, 1];
    shown_BK: the visible share of each object's own area; shade_BHW: how much darker a cast shadow makes the ground.
    """

    x_B3HW: Tensor
    rendering_BK: Tensor
    visible_BKHW: Tensor
    shown_BK: Tensor
    shade_BHW: Tensor

    def cells_Bhw(self) -> Tensor:
        """The concept that fills each cell, len(KEYS) for nothing, -100 where neither is clear."""
        share_BKhw = F.avg_pool2d(self.visible_BKHW, CELL)
        top_Bhw, which_Bhw = share_BKhw.max(dim=1)
        concept_BK = self.rendering_BK.clamp(min=0) // LOOKS
        picked_Bhw = concept_BK.gather(1, which_Bhw.flatten(1)).view_as(which_Bhw)
        nothing_Bhw = share_BKhw.sum(dim=1) < 0.25
        cells_Bhw = torch.where(top_Bhw > 0.6, picked_Bhw, -100)
        return torch.where(nothing_Bhw, len(KEYS), cells_Bhw)

    def shadow_Bhw(self) -> Tensor:
        """1 where a shadow falls on the ground, 0 where none does, -100 where it is faint."""
        shade_Bhw = F.avg_pool2d(self.shade_BHW, CELL)
        return torch.where(shade_Bhw > 0.12, 1, torch.where(shade_Bhw < 0.03, 0, -100))


class Composer:
    """Sets sprites on grounds: everything it draws follows from the generator's seed.

    With `plain` scenes are as a renderer would make them; otherwise distorted in every way that should not matter, by
    `strength` 0 to 1.
    """

    def __init__(self, seed: int, *, plain: bool = False) -> None:
        self._g = torch.Generator().manual_seed(seed)
        self._plain = plain
        self.strength = 1.0
        self._sprites_N5HW = sprites()

    def crops(self, count: int) -> tuple[Scenes, Tensor]:
        """Pictures around one object, sometimes none, others beside and before it; and the label of each."""
        beside = self._whole(0, 3, count)
        size_B = self._between(30, 62, count)
        centre_B2 = CROP / 2 + self._between(-1, 1, count, 2) * (34 - size_B[:, None] / 2).clamp(2)
        others_BK = 2
        other_B3 = self._between(18, 60, count, others_BK)
        angle = self._between(0, 6.283, count, others_BK)
        apart = (size_B[:, None] + other_B3) / 2 * self._between(0.7, 1.15, count, others_BK)
        around = torch.stack([angle.cos(), angle.sin()], dim=-1) * apart[..., None]
        xy_BK2 = torch.cat([centre_B2[:, None], centre_B2[:, None] + around], dim=1)
        size_BK = torch.cat([size_B[:, None], other_B3], dim=1)
        rendering_BK = self._whole(0, RENDERINGS, count, 1 + others_BK)
        rendering_BK[:, 1:][torch.arange(others_BK) >= beside[:, None]] = -1
        is_empty_B = self._chance(0.06, count)
        rendering_BK[is_empty_B, 0] = -1
        # The one in question lies behind the others in a third of the pictures, before them in the rest.
        order = torch.tensor([[1, 2, 0], [0, 1, 2]])[self._chance(0.33, count).long()]
        scenes = self._paint(
            CROP,
            rendering_BK.gather(1, order),
            xy_BK2.gather(1, order[..., None].expand(-1, -1, 2)),
            size_BK.gather(1, order),
        )
        label_B = torch.where(is_empty_B, NOTHING, rendering_BK[:, 0])
        main_B = (order == 0).long().argmax(dim=1)
        shown_B = scenes.shown_BK.gather(1, main_B[:, None])[:, 0]
        # What is covered by more than half is nobody's to name.
        return scenes, torch.where((shown_B < 0.5) & ~is_empty_B, -100, label_B)

    def scenes(self, count: int) -> Scenes:
        """Whole pictures of one to six objects, anywhere, one over another."""
        objects_B = self._whole(1, 7, count)
        base_B = 92 - 9 * objects_B
        size_BK = base_B[:, None] * self._between(0.65, 1.25, count, 6)
        xy_BK2 = self._between(0.12, 0.88, count, 6, 2) * SCENE
        rendering_BK = self._whole(0, RENDERINGS, count, 6)
        # Every third picture shows one concept twice.
        twice_B = self._chance(0.33, count)
        concept_B = rendering_BK[:, 0] // LOOKS
        rendering_BK[twice_B, 1] = (concept_B * LOOKS + self._whole(0, LOOKS, count))[twice_B]
        rendering_BK[torch.arange(6) >= objects_B[:, None]] = -1
        return self._paint(SCENE, rendering_BK, xy_BK2, size_BK)

    def _paint(self, side: int, rendering_BK: Tensor, xy_BK2: Tensor, size_BK: Tensor) -> Scenes:
        count, objects = rendering_BK.shape
        turn = 0.2 if self._plain else 0.45
        angle_BK = self._between(-turn, turn, count, objects)
        flip_BK = 1 - 2 * self._chance(0.4, count, objects).float()
        pixel_W = torch.arange(side) + 0.5
        at_HW2 = torch.stack(torch.meshgrid(pixel_W, pixel_W, indexing="xy"), dim=-1)
        # Sprite coordinates: 1 is half a sprite's canvas.
        rel = (
            (at_HW2 - xy_BK2[:, :, None, None])
            * 2
            / (size_BK * CANVAS / ART)[..., None, None, None]
        )
        cos, sin = angle_BK.cos()[..., None, None], angle_BK.sin()[..., None, None]
        u = (cos * rel[..., 0] + sin * rel[..., 1]) * flip_BK[..., None, None]
        grid = torch.stack([u, cos * rel[..., 1] - sin * rel[..., 0]], dim=-1).flatten(0, 1)
        if not self._plain:
            bent = 0.045 * self._clouds(count * objects, 2, 4, 4, side)
            stretch = torch.exp(0.1 * self._normal(count * objects, 1, 1, 2))
            grid = grid * stretch + bent.permute(0, 2, 3, 1)
        stack = self._sprites_N5HW[rendering_BK.clamp(min=0).flatten()]
        paint = _sampled(stack[:, :4], grid).unflatten(0, (count, objects))
        paint = paint * (rendering_BK >= 0)[..., None, None, None]
        shadow_B = self._chance(0.5, count)
        # As in the recipe's scenes a shadow falls to the ground below; how far, where and how dark is wider here.
        offset_B2 = torch.stack(
            [self._between(-0.1, 0.1, count), self._between(0.03, 0.12, count)], dim=-1
        )
        cast = cos.new_zeros(count, objects, 2)
        cast[..., 0] = (
            cos[..., 0, 0] * offset_B2[:, None, 0] + sin[..., 0, 0] * offset_B2[:, None, 1]
        ) * flip_BK
        cast[..., 1] = (
            cos[..., 0, 0] * offset_B2[:, None, 1] - sin[..., 0, 0] * offset_B2[:, None, 0]
        )
        moved = grid - (cast * 2 * ART / CANVAS).flatten(0, 1)[:, None, None]
        strength_B = self._between(0.22, 0.55, count) * shadow_B
        dark = _sampled(stack[:, 4:], moved).unflatten(0, (count, objects))
        dark = dark * (strength_B[:, None] * (rendering_BK >= 0))[..., None, None, None]
        x = self._ground(count, side)
        shade = x.new_zeros(count, side, side)
        visible: list[Tensor] = []
        for k in range(objects):
            alpha = paint[:, k, 3:]
            x = x * (1 - dark[:, k]) * (1 - alpha) + paint[:, k, :3]
            shade = (1 - (1 - shade) * (1 - dark[:, k, 0])) * (1 - alpha[:, 0])
            visible = [mask * (1 - alpha[:, 0]) for mask in visible] + [alpha[:, 0]]
        visible_BKHW = torch.stack(visible, dim=1)
        # Measured against the drawn area, so that the frame's edge counts as a cover.
        whole_N = self._sprites_N5HW[:, 3].mean(dim=(1, 2)) * (CANVAS / ART) ** 2
        area_BK = whole_N[rendering_BK.clamp(min=0)] * size_BK**2
        return Scenes(
            x_B3HW=self._softened(x) if self._plain else self._distorted(x),
            rendering_BK=rendering_BK,
            visible_BKHW=visible_BKHW,
            shown_BK=visible_BKHW.sum(dim=(2, 3)) / area_BK,
            shade_BHW=shade,
        )

    def _ground(self, count: int, side: int) -> Tensor:
        """Plain, cloudy, grainy, striped, checked, starry, or one of these above another."""
        x = self._texture(count, side)
        if side == SCENE or count > 1:
            other = self._texture(count, side)
            line_B1W = self._between(0.3, 0.8, count, 1, 1) + 0.05 * torch.sin(
                torch.arange(side) * self._between(0.03, 0.15, count, 1, 1)
            )
            row_H1 = (torch.arange(side)[:, None] / side)[None]
            below = (row_H1 > line_B1W)[:, None] & self._chance(0.15, count)[:, None, None, None]
            x = torch.where(below, other, x)
        return x.clamp(0, 1)

    def _texture(self, count: int, side: int) -> Tensor:
        colours = torch.tensor(
            [[176, 122, 72], [236, 234, 230], [142, 144, 150], [98, 164, 62], [225, 200, 150], [240, 244, 250],
             [130, 185, 235], [20, 26, 60], [150, 150, 150], [210, 130, 120]]
        ) / 255  # fmt: skip
        base_B3 = colours[self._whole(0, len(colours), count)] + 0.06 * self._normal(count, 3)
        base_B3 = torch.where(
            self._chance(0.4, count)[:, None], self._between(0, 1, count, 3), base_B3
        )
        x = base_B3[..., None, None].expand(-1, -1, side, side)

        def some(share: float, most: float) -> Tensor:
            amount = self._between(0, most, count, 1, 1, 1) * self._chance(share, count, 1, 1, 1)
            return amount * (1 + 0.4 * self._normal(count, 3, 1, 1))

        for rows, columns, share, most in (
            (4, 4, 0.6, 0.16),
            (24, 24, 0.4, 0.14),
            (32, 4, 0.3, 0.16),
        ):
            x = x + some(share, most) * 0.6 * self._clouds(count, 1, rows, columns, side)
        pixel_W = torch.arange(side).float()
        angle = self._between(0, 6.283, count, 1, 1, 1)
        along = angle.cos() * pixel_W + angle.sin() * pixel_W[:, None]
        wave = torch.sin(along * 6.283 / self._between(6, 40, count, 1, 1, 1))
        x = x + some(0.2, 0.12) * torch.where(self._chance(0.5, count, 1, 1, 1), wave, wave.sign())
        cell = self._between(8, 26, count, 1, 1, 1)
        checks = ((pixel_W // cell) % 2 + (pixel_W[:, None] // cell) % 2) / 2
        x = x - some(0.15, 0.7) * checks
        stars = (torch.rand(count, 1, side, side, generator=self._g) > 0.996).float()
        return (x + 0.7 * stars * self._chance(0.08, count, 1, 1, 1)).clamp(0, 1)

    def _softened(self, x: Tensor) -> Tensor:
        """What any renderer or camera may do to a picture."""
        count = len(x)
        x = torch.lerp(x, _blurred(x, 0.8), self._between(0, 1, count, 1, 1, 1))
        x = x * self._between(0.92, 1.08, count, 1, 1, 1)
        return (x + 0.015 * self._normal(*x.shape)).clamp(0, 1)

    def _distorted(self, x: Tensor) -> Tensor:
        """Colour, blur, coarseness, noise and JPEG."""
        count, side, sharp = len(x), x.shape[-1], x
        grey = x.mean(dim=1, keepdim=True)
        x = grey + (x - grey) * self._between(0.6, 1.3, count, 1, 1, 1)
        x = (x - 0.5) * self._between(0.75, 1.25, count, 1, 1, 1) + 0.5
        x = x * self._between(0.85, 1.15, count, 3, 1, 1) + self._between(
            -0.08, 0.08, count, 1, 1, 1
        )
        x = x.clamp(0, 1) ** torch.exp(0.2 * self._normal(count, 1, 1, 1))
        radius = float(self._between(0.6, 2.2, 1))
        x = torch.lerp(x, _blurred(x, radius), self._between(0, 1, count, 1, 1, 1))
        if self._chance(0.3, 1).any():
            small = int(side * self._between(0.35, 0.8, 1))
            coarse = F.interpolate(x, (small, small), mode="bilinear", antialias=True)
            x = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
        amount = 0.06 * self._between(0, 1, count, 1, 1, 1) ** 2
        x = (x + amount * self._normal(*x.shape)).clamp(0, 1)
        x = torch.lerp(sharp, x, self.strength)
        for index in self._chance(0.15 * self.strength, count).nonzero()[:, 0].tolist():
            x[index] = _jpeg(x[index], int(self._between(15, 80, 1)))
        return x

    def _clouds(self, count: int, channels: int, rows: int, columns: int, side: int) -> Tensor:
        """Smooth noise of about unit spread, as fine as the given numbers of knots."""
        noise = self._normal(count, channels, rows, columns)
        return _spread(side, rows) @ noise @ _spread(side, columns).T

    def _between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._g)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._g)

    def _whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._g)

    def _chance(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._g) < share


class Network(nn.Module):
    """The trunk and its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 32, stride=2)
        self.fine = nn.Sequential(_Block(32, 48), _Block(48, 48, stride=1))
        self.middle = nn.Sequential(_Block(48, 96), _Block(96, 96, stride=1))
        self.coarse = _Block(96, 160)
        self.rendering = nn.Linear(160, RENDERINGS + 1)
        self.from_coarse = nn.Conv2d(160, 64, 1)
        self.from_middle = nn.Conv2d(96, 64, 1)
        self.from_fine = nn.Conv2d(48, 64, 1)
        self.mix_middle = _conv(64, 64)
        self.mix_fine = _conv(64, 64)
        self.cells = nn.Conv2d(64, len(KEYS) + 2, 1)
        # Above these logits a cell is an object's, or in shadow; see `calibrate`.
        self.object_from: Tensor
        self.shadow_from: Tensor
        self.register_buffer("object_from", torch.zeros(()))
        self.register_buffer("shadow_from", torch.zeros(()))

    def levels(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at strides 4, 8 and 16."""
        fine = self.fine(self.stem((x_B3HW - 0.5) * 4))
        middle = self.middle(fine)
        return fine, middle, self.coarse(middle)

    def crops(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the renderings and nothing [B, N + 1], and features [B, D]."""
        features_BD = self.levels(x_B3HW)[2].mean(dim=(2, 3))
        return self.rendering(features_BD), features_BD

    def scenes(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """In every cell the logits of the concepts and nothing, [B, concepts + 1, h, w], and of a shadow, [B, h, w]."""
        fine, middle, coarse = self.levels(x_B3HW)
        up = F.interpolate(self.from_coarse(coarse), scale_factor=2.0) + self.from_middle(middle)
        up = F.interpolate(self.mix_middle(up), scale_factor=2.0) + self.from_fine(fine)
        cells = self.cells(self.mix_fine(up))
        return cells[:, :-1], cells[:, -1]


class _Block(nn.Module):
    """Two convolutions and a way past them."""

    def __init__(self, before: int, after: int, *, stride: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(before, after, stride=stride),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.past = nn.Sequential(
            nn.AvgPool2d(2) if stride == 2 else nn.Identity(),
            nn.Conv2d(before, after, 1) if before != after else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.past(x))


class Judge:
    """What the network says of pictures, uint8 sRGB."""

    def __init__(self, network: Network) -> None:
        self._network = network.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def crops(self, x_BHWC: NDArray[np.uint8]) -> "Verdict":
        """Names what is in the middle of square crops of any one size."""
        x = torch.from_numpy(x_BHWC.copy()).permute(0, 3, 1, 2).float() / 255
        if x.shape[-1] != CROP:
            x = F.interpolate(x, (CROP, CROP), mode="bilinear", antialias=True)
        rendering, features = self._network.crops(x)
        share = rendering.softmax(dim=1)
        of = share[:, :NOTHING].unflatten(1, (len(KEYS), LOOKS))
        return Verdict(
            concept_BN=torch.cat([of.sum(dim=2), share[:, NOTHING:]], dim=1).numpy(),
            rendering_BNL=of.numpy(),
            features_BD=F.normalize(features, dim=1).numpy(),
        )

    @torch.inference_mode()
    def cells(self, x_BHWC: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Of whole pictures, in each cell: whether something stands there, and whether a shadow falls; [B, h, w]."""
        x = torch.from_numpy(x_BHWC.copy()).permute(0, 3, 1, 2).float() / 255
        object_Bhw, shadow_Bhw = _marks(self._network, x)
        return (
            (object_Bhw > self._network.object_from).numpy(),
            (shadow_Bhw > self._network.shadow_from).numpy(),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """Of each crop: shares of the concepts (last: nothing), of concept and look together, and features of length 1."""

    concept_BN: NDArray[np.float32]
    rendering_BNL: NDArray[np.float32]
    features_BD: NDArray[np.float32]


def sprites() -> Tensor:
    """Every rendering, premultiplied RGB, alpha, and the alpha a soft shadow has: [N, 5, CANVAS, CANVAS] in [0, 1]."""
    path = art.WORK / "art" / f"judge-{len(KEYS)}x{CANVAS}.npy"
    if not path.exists():
        looks = [art.icons(look) for look in art.LOOKS]
        drawn = []
        for key in KEYS:
            for look in looks:
                straight = art.render(look[key])
                pixels = np.asarray(
                    straight.convert("RGBa").resize((ART, ART), Image.Resampling.BOX)
                )
                drawn.append(np.pad(pixels, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))))
        np.save(path, np.asarray(drawn, np.uint8).transpose(0, 3, 1, 2))
    stack_N4HW = torch.from_numpy(np.load(path)).float() / 255
    return torch.cat([stack_N4HW, _blurred(stack_N4HW[:, 3:], 1 + 0.045 * ART)], dim=1)


def fifth() -> dict[str, Image.Image]:
    """The fifth look's renderings of the model's concepts, by the concepts' keys."""
    icons = art.icons(FIFTH)
    names = {key: FIFTH_NAMES.get(key, key.replace("-", "")) for key in art.CONCEPTS}
    return {key: art.render(icons[name]) for key, name in names.items() if name in icons}


def digest() -> str:
    """Names the recipe: this file and the pinned art."""
    pinned = "".join(look.archive for look in art.LOOKS)
    return hashlib.sha256(Path(__file__).read_bytes() + pinned.encode()).hexdigest()[:12]


def load() -> Judge:
    """The cached judge; trained now where there is none."""
    path = art.WORK / f"judge-{digest()}.safetensors"
    if not path.exists():
        weights = calibrate(train()).state_dict()
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    network = Network()
    network.load_state_dict(load_file(path))
    return Judge(network)


def train(steps: int = STEPS) -> Network:
    """Teaches the three heads together on one thread, in about ten minutes of one core."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    network = Network().to(memory_format=torch.channels_last)
    composer = Composer(SEED)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    began_s, hits = time.monotonic(), list[float]()
    for step in range(steps):
        # Distortions grow over the first half.
        composer.strength = min(1.0, 0.3 + 1.4 * step / steps)
        crops, label_B = composer.crops(CROPS)
        rendering, _ = network.crops(_last(crops.x_B3HW))
        # The look is often in doubt where the concept is not: it gets a loss of its own.
        concept_BN = _of_concepts(rendering)
        concept_B = torch.where(label_B < 0, label_B, label_B // LOOKS)
        losses = [
            F.cross_entropy(rendering, label_B),
            F.cross_entropy(concept_BN, concept_B),
        ]
        hits.append(float((concept_BN.argmax(dim=1) == concept_B).float().mean()))
        if step % 2:
            scenes = composer.scenes(SCENES)
            cells, shadow = network.scenes(_last(scenes.x_B3HW))
            falls_Bhw = scenes.shadow_Bhw()
            losses.append(F.cross_entropy(cells, scenes.cells_Bhw()))
            losses.append(
                F.binary_cross_entropy_with_logits(
                    shadow, (falls_Bhw > 0).float(), weight=(falls_Bhw >= 0).float()
                )
            )
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            rendered, named, cells_loss, shadow_loss = (float(loss.detach()) for loss in losses)
            print(
                f"judge: step {step + 1} of {steps}, rendering {rendered:.2f}, concept {named:.2f} "
                f"({np.mean(hits[-50:]):.1%}), cells {cells_loss:.2f}, shadow {shadow_loss:.3f}, "
                f"{time.monotonic() - began_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return network


@torch.inference_mode()
def calibrate(network: Network) -> Network:
    """Sets what a cell needs to be marked so that, on scenes composed for it, as many are missed as marked falsely."""
    network.eval()
    composer = Composer(CALIBRATION_SEED)
    marks: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
    for _ in range(12):
        scenes = composer.scenes(10)
        truth, falls = scenes.cells_Bhw(), scenes.shadow_Bhw()
        stands, shadow = _marks(network, scenes.x_B3HW)
        marks[0].append(stands[(truth >= 0) & (truth < len(KEYS))])
        marks[1].append(stands[truth == len(KEYS)])
        marks[2].append(shadow[falls == 1])
        marks[3].append(shadow[falls == 0])
    yes_object, no_object, yes_shadow, no_shadow = (torch.cat(values) for values in marks)
    network.object_from.fill_(_even(yes_object, no_object))
    network.shadow_from.fill_(_even(yes_shadow, no_shadow))
    return network


def report(judge: Judge) -> dict[str, float]:
    """How good it is on pictures of seeds it never saw, plain and distorted; accuracies in [0, 1]."""
    found: dict[str, float] = {"classes": len(KEYS)}
    for kind, plain in (("plain", True), ("distorted", False)):
        hits: dict[str, list[NDArray[np.bool_]]] = {}
        for is_right in _trials(judge, Composer(HELD_OUT_SEED, plain=plain)):
            for name, values in is_right.items():
                hits.setdefault(name, []).append(values)
        for name, values in hits.items():
            found[f"{name}, {kind}"] = float(np.concatenate(values).mean())
    return found


def _trials(judge: Judge, composer: Composer) -> Iterator[dict[str, NDArray[np.bool_]]]:
    for _ in range(20):
        crops, label_B = composer.crops(100)
        label = label_B.numpy()
        verdict = judge.crops(as_bytes(crops.x_B3HW))
        named = label >= 0
        is_object = named & (label < NOTHING)
        of_concept = verdict.rendering_BNL[
            np.arange(len(label)), np.clip(label, 0, NOTHING - 1) // LOOKS
        ]
        yield {
            "concept": (verdict.concept_BN.argmax(1) == label // LOOKS)[named],
            "look": (of_concept.argmax(1) == label % LOOKS)[is_object],
        }
        scenes = composer.scenes(10)
        truth, falls = scenes.cells_Bhw().numpy(), scenes.shadow_Bhw().numpy()
        stands, shadow = judge.cells(as_bytes(scenes.x_B3HW))
        shows = (truth >= 0) & (truth < len(KEYS))
        yield {
            "cells of objects": stands[shows],
            "cells of nothing": ~stands[truth == len(KEYS)],
            "cells in shadow": shadow[falls == 1],
            "cells without": ~shadow[falls == 0],
        }


def _marks(network: Network, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """In every cell how much more any concept has than nothing, and the shadow's logit: [B, h, w] each."""
    concepts, shadow_Bhw = network.scenes(x_B3HW)
    return concepts[:, :-1].amax(dim=1) - concepts[:, -1], shadow_Bhw


def _even(yes: Tensor, no: Tensor) -> float:
    """The value that as large a share of `yes` lies below as of `no` above."""
    levels = torch.linspace(0, 1, 2001)
    missed = yes.sort().values[(levels * (len(yes) - 1)).long()]
    falsely = no.sort(descending=True).values[(levels * (len(no) - 1)).long()]
    return float(missed[int((missed - falsely).abs().argmin())])


def _of_concepts(rendering_BN: Tensor) -> Tensor:
    """Logits of the concepts and nothing from those of their renderings: [B, concepts + 1]."""
    of = rendering_BN[:, :NOTHING].unflatten(1, (len(KEYS), LOOKS)).logsumexp(dim=2)
    return torch.cat([of, rendering_BN[:, NOTHING:]], dim=1)


def _conv(before: int, after: int, *, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def as_bytes(x_B3HW: Tensor) -> NDArray[np.uint8]:
    return np.asarray((x_B3HW.permute(0, 2, 3, 1) * 255).round().byte().numpy())


def _sampled(stack: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(stack, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of square pictures, edges repeated; as two products, which a CPU does fastest."""
    side = x.shape[-1]
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, side + reach)
    weight = torch.exp(-0.5 * ((at - torch.arange(side)[:, None]) / sigma) ** 2)
    fold = F.one_hot(at.clamp(0, side - 1), side).float()
    matrix = (weight / weight.sum(dim=1, keepdim=True)) @ fold
    return matrix @ x @ matrix.T


@cache
def _spread(side: int, knots: int) -> Tensor:
    """From knots to pixels, Gaussian weights between: [side, knots]."""
    at = (torch.arange(side) + 0.5) * knots / side - 0.5
    weight = torch.exp(-0.5 * ((at[:, None] - torch.arange(knots)) / 0.5) ** 2)
    return weight / weight.square().sum(dim=1, keepdim=True).sqrt()


def _jpeg(x_3HW: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(as_bytes(x_3HW[None])[0]).save(buffer, "JPEG", quality=quality)
    pixels = np.array(Image.open(buffer))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


if __name__ == "__main__":
    torch.set_num_threads(1)
    for label, value in report(load()).items():
        print(f"{label:28s} {value:8.3f}" if value <= 1 else f"{label:28s} {value:8.0f}")
