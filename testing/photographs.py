"""Photographs of objects whose truth is known: their own colours and alpha, over a ground as cameras see one."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

ART = Path(__file__).parents[1] / "examples" / "art"
# Objects of one outline each. Feathered ones have no edge, and of a mountain or a lake the network sees a landscape.
OBJECTS = (
    *("avocado-twemoji", "bento-box-noto", "broccoli-noto", "cookie-noto", "cupcake-twemoji"),
    *("deciduous-tree-fluent", "house-noto", "rainbow-noto", "strawberry-twemoji", "sushi-noto"),
)
# Of how many pixels a lens makes one, as the deviation of its blur, and the noise of a sensor, of 1.
LENS, NOISE = 1.0, 0.008


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """pixels_HW3: what the camera sees. colours_HW3, alpha_HW: the object's own, in [0, 1]."""

    pixels_HW3: np.ndarray
    colours_HW3: np.ndarray
    alpha_HW: np.ndarray

    @property
    def edge_HW(self):
        """Where object and ground are mixed, and two pixels around."""
        is_mixed_HW = (self.alpha_HW > 0.02) & (self.alpha_HW < 0.98)
        return cv2.dilate(is_mixed_HW.astype(np.uint8), np.ones((5, 5))) > 0


def ground(rng, height, width):
    """Clouds of every size, as the grounds of photographs have them (their power falls with the square), HW3."""
    clouds_HW3 = np.zeros((height, width, 3), np.float32)
    side, share = 2, 1.0
    while side <= max(height, width):
        colours = 0.6 * rng.normal(size=(side, side, 3)) + rng.normal(size=(side, side, 1))
        clouds_HW3 += share * cv2.resize(
            colours.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
        )
        side, share = 2 * side, 0.62 * share
    return np.clip(rng.uniform(0.2, 0.8, 3) + 0.16 * clouds_HW3, 0, 1)


def photograph(name, *, side=512, seed=0):
    """The art of this name, over seven tenths of a square picture."""
    rng = np.random.default_rng(seed)
    art_HW4 = np.asarray(Image.open(ART / f"{name}.png").convert("RGBA"), np.float32) / 255
    art_HW4 = np.dstack([art_HW4[..., :3] * art_HW4[..., 3:], art_HW4[..., 3:]])
    scale = 0.7 * side / max(art_HW4.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    art_HW4 = np.clip(cv2.resize(art_HW4, None, fx=scale, fy=scale, interpolation=how), 0, 1)
    height, width = art_HW4.shape[:2]
    seen_HW4 = np.zeros((side, side, 4), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    seen_HW4[top : top + height, left : left + width] = art_HW4
    seen_HW4 = cv2.GaussianBlur(seen_HW4, (0, 0), LENS)
    alpha_HW = seen_HW4[..., 3]
    mixed_HW3 = seen_HW4[..., :3] + (1 - alpha_HW[..., None]) * ground(rng, side, side)
    mixed_HW3 = np.clip(mixed_HW3 + rng.normal(0, NOISE, mixed_HW3.shape), 0, 1)
    return Photograph(
        pixels_HW3=np.rint(mixed_HW3 * 255).astype(np.uint8),
        colours_HW3=np.clip(seen_HW4[..., :3] / np.maximum(alpha_HW, 1e-3)[..., None], 0, 1),
        alpha_HW=alpha_HW,
    )


def halo(found_HW4, truth):
    """How far a cut-out is from the true one at its edge: seen on black, grey and white; its colours alone; of 255."""
    edge_HW, alpha_HW = truth.edge_HW, truth.alpha_HW
    found = found_HW4[..., :3] / 255, found_HW4[..., 3] / 255
    seen = np.mean(
        [
            np.abs(over(truth.colours_HW3, alpha_HW, grey) - over(*found, grey))
            for grey in (0, 0.5, 1)
        ],
        axis=0,
    )
    weight = np.minimum(alpha_HW, found[1])[edge_HW]
    off = np.abs(truth.colours_HW3 - found[0]).mean(axis=-1)[edge_HW]
    return 255 * seen[edge_HW].mean(), 255 * (off * weight).sum() / weight.sum()


def over(colours_HW3, alpha_HW, grey):
    return colours_HW3 * alpha_HW[..., None] + grey * (1 - alpha_HW[..., None])
