"""The collage and its sampling settings as values.

Main types: `Collage`, `Layer`, `Sampling`. Everything here is frozen and already validated: the one place that
turns a message into these values, and complains about the ones that cannot exist, is `services.common.wire`.
Pixels are not here, only references to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from services.common.blobs import BlobRef

# RGB of the canvas under all layers when a collage names no background: the grey of the paper's released code.
DEFAULT_BACKGROUND = (150, 150, 150)

# A picture on its way in (encoded bytes) or already stored.
Picture = bytes | BlobRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Width and height in pixels, both at least 1."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Area in pixels."""
        return self.width * self.height


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """Affine placement: flip, then scale, then rotate, then move; see `collage.v1.Transform` for units.

    `x` and `y` are the centre in canvas pixels, None for the canvas' centre. `rotation` is in degrees,
    clockwise as seen on screen. `scale` is in (0, 64].
    """

    x: float | None = None
    y: float | None = None
    scale: float = 1.0
    rotation: float = 0.0
    flip_horizontal: bool = False
    flip_vertical: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """One ControlNet's part in a layer: weight in [0, 1], acting from `start` to `end` of the steps (fractions).

    `emphasis`, in [0, 1]: how far guidance strengthens it inside the layer's mask.
    `image` is a control picture made elsewhere, stretched over the layer's own; None to make one from the layer.
    """

    kind: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    emphasis: float = 0.0
    image: Picture | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Appearance:
    """The learned word before a layer's text: a stored word's name, or None to learn one from the layer itself.

    `weight` multiplies its vectors. `vectors`: how many are learned; a stored word has as many as it has.
    """

    word: str | None
    weight: float = 1.0
    vectors: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Dials:
    """The resolved dials of one layer, each in [0, 1].

    Messages, parsers and plans follow these names: a new dial is named here and in `Layer`, see CONTRIBUTING.md.
    """

    noise: float
    attract: float
    repel: float


DIALS = tuple(each.name for each in fields(Dials))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One cut-out picture, its words, its place and its dials. A dial that is None is resolved from its size."""

    name: str
    image: Picture
    text: str
    transform: Transform = Transform()
    opacity: float = 1.0
    visible: bool = True
    noise: float | None = None
    attract: float | None = None
    repel: float | None = None
    structure: tuple[Structure, ...] = ()
    appearance: Appearance | None = None
    seed: int | None = None

    @property
    def asks_to_learn(self) -> bool:
        """Whether a word is to be learned from it."""
        return self.appearance is not None and self.appearance.word is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Collage:
    """A canvas, its scene prompt, and the layers on it from back to front."""

    size: Extent
    prompt: str
    layers: tuple[Layer, ...]
    negative_prompt: str = ""
    # An sRGB colour, or a picture stretched over the canvas.
    background: tuple[int, int, int] | Picture = DEFAULT_BACKGROUND

    def pictures(self) -> dict[str, Picture]:
        """Every picture by its field path below the collage."""
        found: dict[str, Picture] = {}
        for index, layer in enumerate(self.layers):
            found[f"layers[{index}].image"] = layer.image
            for number, structure in enumerate(layer.structure):
                if structure.image is not None:
                    found[f"layers[{index}].structure[{number}].image"] = structure.image
        if not isinstance(self.background, tuple):
            found["background.image"] = self.background
        return found

    def with_pictures(self, pictures: Mapping[str, Picture]) -> "Collage":
        """The same collage with others in place of the `pictures` it has, by the same paths."""
        layers = tuple(
            replace(
                layer,
                image=pictures[f"layers[{index}].image"],
                structure=tuple(
                    replace(
                        structure, image=pictures.get(f"layers[{index}].structure[{number}].image")
                    )
                    for number, structure in enumerate(layer.structure)
                ),
            )
            for index, layer in enumerate(self.layers)
        )
        background = pictures.get("background.image", self.background)
        return replace(self, layers=layers, background=background)


@dataclass(frozen=True, slots=True, kw_only=True)
class Redo:
    """Which layers of `parent` are drawn again. `feather` is the soft inner edge of the redo mask, canvas pixels."""

    parent: BlobRef
    layers: tuple[str, ...]
    feather: float = 4.0
    restore_cutout: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A place in a picture, as fractions of its width and height; outside: of what is not meant."""

    x: float
    y: float
    outside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A low-rank change of a model's weights, by its name there, and what multiplies it, in [-2, 2]."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a collage becomes pictures, every value resolved.

    `steps` counts the denoising steps at noise 1. `guidance_scale` at or below 1 means no guidance.
    Picture k of `images` uses seed (`seed` + k) mod 2**64. `preview_every` is in steps, None for no previews.
    `adapters` are sorted by name, so that their sum is rounded one way.
    """

    model: str
    sampler: str
    steps: int
    guidance_scale: float
    images: int
    seed: int
    preview_every: int | None = None
    adapters: tuple[Adapter, ...] = ()

    @property
    def active_adapters(self) -> tuple[Adapter, ...]:
        """Those that change something."""
        return tuple(adapter for adapter in self.adapters if adapter.weight != 0)

    def seed_of(self, index: int) -> int:
        """The seed of picture `index`."""
        return (self.seed + index) % 2**64
