"""Openly licensed emoji art: fetched by package name, rendered with alpha, cut out for examples.

Icon packages share the names of their pictures, so one concept comes in several artists' looks.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WORK = Path(__file__).resolve().parent.parent / ".work"
SIDE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One artist's icon set: its package, pinned, the licence its pictures carry, and its word in captions."""

    name: str
    package: str
    version: str
    licence: str
    word: str = ""

    @property
    def archive(self) -> str:
        """File name that `npm pack` gives this package."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


# The looks that examples and benchmarks show, each with every concept.
LOOKS = (
    Look(
        name="noto",
        package="@iconify-json/noto",
        version="1.2.9",
        licence="Apache-2.0",
        word="soft",
    ),
    Look(
        name="fluent",
        package="@iconify-json/fluent-emoji",
        version="1.2.7",
        licence="MIT",
        word="digital",
    ),
    Look(
        name="flat",
        package="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        licence="MIT",
        word="flat",
    ),
    Look(
        name="twemoji",
        package="@iconify-json/twemoji",
        version="1.2.5",
        licence="CC-BY-4.0",
        word="cartoon",
    ),
)
# Seen in training only, so that what a look can be is more than four points; some lack a few concepts.
MORE_LOOKS = (
    Look(
        name="noto-v1",
        package="@iconify-json/noto-v1",
        version="1.2.5",
        licence="Apache-2.0",
        word="old",
    ),
    Look(
        name="emojitwo",
        package="@iconify-json/emojione",
        version="1.2.3",
        licence="CC-BY-4.0",
        word="cute",
    ),
    Look(
        name="streamline",
        package="@iconify-json/streamline-emojis",
        version="1.2.4",
        licence="CC-BY-4.0",
        word="sketch",
    ),
)

CONCEPTS = {
    "sushi": "sushi",
    "bento-box": "bento box",
    "rice-ball": "rice ball",
    "fried-shrimp": "fried shrimp",
    "broccoli": "broccoli",
    "carrot": "carrot",
    "avocado": "avocado",
    "shortcake": "cake",
    "birthday-cake": "birthday cake",
    "cupcake": "cupcake",
    "doughnut": "doughnut",
    "cookie": "cookie",
    "strawberry": "strawberry",
    "cherries": "cherries",
    "red-apple": "apple",
    "lemon": "lemon",
    "teapot": "teapot",
    "hot-beverage": "coffee cup",
    "house": "house",
    "deciduous-tree": "tree",
    "evergreen-tree": "pine tree",
    "sun": "sun",
    "cloud": "cloud",
    "snow-capped-mountain": "mountain",
    "rainbow": "rainbow",
    "sailboat": "sailboat",
    "castle": "castle",
    "cat": "cat",
    "dog": "dog",
    "fish": "fish",
}

# What only a large model has room for.
MORE_CONCEPTS = {
    "hot-dog": "hot dog",
    "french-fries": "french fries",
    "croissant": "croissant",
    "pretzel": "pretzel",
    "pancakes": "pancakes",
    "cooked-rice": "bowl of rice",
    "steaming-bowl": "noodle soup",
    "dango": "dango",
    "pie": "pie",
    "chocolate-bar": "chocolate bar",
    "pear": "pear",
    "peach": "peach",
    "tangerine": "orange",
    "coconut": "coconut",
    "teacup-without-handle": "cup of green tea",
    "sunflower": "sunflower",
    "tulip": "tulip",
    "rose": "rose",
    "maple-leaf": "maple leaf",
    "rabbit": "rabbit",
    "pig": "pig",
    "chicken": "chicken",
    "crab": "crab",
    "whale": "whale",
    "snail": "snail",
    "bicycle": "bicycle",
    "chair": "chair",
    "candle": "candle",
    "crescent-moon": "moon",
    "snowman": "snowman",
}

CUTOUTS = (
    "bento-box:noto sushi:noto sushi:fluent fried-shrimp:twemoji rice-ball:fluent broccoli:noto "
    "carrot:flat avocado:twemoji lemon:flat shortcake:noto birthday-cake:fluent cupcake:twemoji "
    "doughnut:flat cookie:noto strawberry:twemoji cherries:fluent teapot:flat hot-beverage:noto "
    "snow-capped-mountain:twemoji sun:flat house:noto evergreen-tree:flat deciduous-tree:fluent "
    "sailboat:twemoji rainbow:noto castle:fluent"
)


def icons(look: Look) -> dict[str, str]:
    """All pictures of a look as SVG text, by icon name; the package is fetched once by npm."""
    folder = WORK / "art"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / look.archive
    if not archive.exists():
        # A fetch that breaks off must not leave half a package behind.
        with tempfile.TemporaryDirectory(dir=folder) as fetched:
            command = ["npm", "pack", f"{look.package}@{look.version}", "--silent"]
            subprocess.run(command, cwd=fetched, check=True, timeout=300, stdout=sys.stderr)
            (Path(fetched) / look.archive).replace(archive)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise FileNotFoundError(f"{look.archive} holds no package/icons.json")
        data = json.load(member)
    pictures = {}
    for name, icon in data["icons"].items():
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", data.get("width", 16))
        height = icon.get("height", data.get("height", 16))
        pictures[name] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
    return pictures


def render(svg: str) -> Image.Image:
    """Draw one SVG as a SIDE x SIDE RGBA picture with straight alpha."""
    # Only where art is rendered: not on a machine that was given the gallery.
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def names() -> list[str]:
    """What captions call the concepts, the small model's first."""
    return [*CONCEPTS.values(), *MORE_CONCEPTS.values()]


def _gallery() -> Path:
    """A small file of all that training needs of the art, made once; a machine without the packages can be given it."""
    looks = (*LOOKS, *MORE_LOOKS)
    path = WORK / "art" / f"gallery-{len(names())}x{len(looks)}x{SIDE}.npz"
    if not path.exists():
        columns = [icons(look) for look in looks]
        keys = [*CONCEPTS, *MORE_CONCEPTS]
        nothing = np.zeros((SIDE, SIDE, 4), np.uint8)
        rows = [
            [np.asarray(render(column[key])) if key in column else nothing for column in columns]
            for key in keys
        ]
        words = [name.replace("-", " ") for column in columns for name in column]
        partial = path.with_suffix(".part.npz")
        np.savez_compressed(partial, pictures=np.asarray(rows, dtype=np.uint8), words=words)
        partial.replace(path)
    return path


def gallery() -> np.ndarray:
    """Every concept in every look, LOOKS and then MORE_LOOKS: uint8 [concept, look, SIDE, SIDE, RGBA].

    Concepts are in the order of `names`. Where a look lacks one its picture is transparent.
    """
    pictures_NLHWC: np.ndarray = np.load(_gallery())["pictures"]
    return pictures_NLHWC


def icon_words() -> list[str]:
    """The names of all pictures of all looks, as words."""
    return [str(name) for name in np.load(_gallery())["words"]]


def feathered() -> dict[str, Image.Image]:
    """Soft-edged layers for a landscape, made from noise alone: fog, grass, a lake and sky."""
    rng = np.random.default_rng(0)
    y_HW, x_HW = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)

    def noise(cells: int) -> np.ndarray:
        grid = rng.integers(0, 255, (cells, cells), dtype=np.uint8)
        smooth = Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(smooth, dtype=np.float64) / 255

    def layer(rgb: tuple[np.ndarray, ...], alpha: np.ndarray) -> Image.Image:
        stack = np.stack([*rgb, 255 * np.clip(alpha, 0, 1)], axis=-1)
        # Few grey levels keep the file small; the feathering hides the steps.
        return Image.fromarray((np.clip(stack, 0, 255) / 5).round().astype(np.uint8) * 5)

    def ramp(values: np.ndarray, start: float, stop: float) -> np.ndarray:
        t = np.clip((values - start) / (stop - start), 0, 1)
        return np.asarray(t * t * (3 - 2 * t))

    soft, fine = noise(7), noise(48)
    strip = np.exp(-(((y_HW - 0.5) / 0.16) ** 2)) * ramp(x_HW, 0, 0.2) * ramp(1 - x_HW, 0, 0.2)
    grey = 226 + 20 * soft
    blades = ramp(y_HW + 0.08 * (soft - 0.5), 0.25, 0.5)
    tint = 30 * (fine - 0.5) - 30 * y_HW
    ripple = 10 * np.sin(70 * y_HW + 5 * soft)
    oval = ramp(1 - np.hypot((x_HW - 0.5) / 0.5, (y_HW - 0.5) / 0.3), 0, 0.35)
    sky = 40 * y_HW
    return {
        "fog-feathered": layer((grey, grey + 2, grey + 6), 0.8 * strip * (0.5 + soft)),
        "grass-feathered": layer((95 + tint, 165 + tint, 60 + tint), blades),
        "lake-feathered": layer((80 + ripple, 150 + ripple, 205 + ripple), oval),
        "sky-feathered": layer((130 + sky, 190 + sky / 2, 235 + sky / 4), ramp(1 - y_HW, 0.1, 0.5)),
    }


def write_cutouts(folder: Path) -> None:
    """Write the examples' cut-outs as small PNG files named `<concept>-<look>.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    looks = {look.name: icons(look) for look in LOOKS}
    for pair in CUTOUTS.split():
        key, look_name = pair.split(":")
        picture = render(looks[look_name][key])
        picture.save(folder / f"{key}-{look_name}.png", optimize=True)
    for name, picture in feathered().items():
        picture.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cutouts", type=Path, help="where the example cut-outs are written")
    if folder := parser.parse_args().cutouts:
        write_cutouts(folder)
    print(_gallery())
