"""A collage and its pictures to a composition: `compose`.

One pass from the top layer down, with the transmittance of what lies above, gives the visible masks
v_i = a_i * (1 - A_{>i}) and the composite at once, and holds one picture at a time. Compositing is premultiplied "over"
in sRGB values, as in the paper; masks are linear in alpha. This module knows no file formats, no storage, no messages.

Suffixes: H, W canvas pixels; h, w latent cells or a layer's box; C or 3 = R, G, B; 4 = R, G, B, A; L layers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.common.collage import Collage, Dials, Extent, Layer, Redo, Transform
from services.common.plate import Plate
from services.compositor.noise import Visible, cell_means, resolve_dials, strength_map
from services.compositor.placement import Placed, place, stretch
from services.compositor.release import release_all_but, release_only
from services.compositor.structure import DETECTORS, ControlPicture, Detector

# A layer no pixel of which would show in an 8-bit mask is hidden.
_HIDDEN_BELOW = 0.5 / 255
# A layer with less than this of its own area visible deserves a warning.
_BARELY_VISIBLE = 0.02

# Answers the control picture that came with a structure, HW3, by the layer's index and the structure's in it.
Supplied = Callable[[int, int], NDArray[np.uint8]]
_Painted = list[tuple[Visible, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something the caller should know: a stable name, the field it is about, a sentence."""

    reason: str
    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ComposedLayer:
    """One layer as it came out: the placement and dials used, and what can be seen of it.

    `visible_fraction` is of the canvas, `unoccluded_fraction` of the layer's own area on an unbounded canvas.
    """

    layer: Layer
    transform: Transform
    dials: Dials
    visible: Visible | None
    visible_fraction: float
    unoccluded_fraction: float

    def mask(self, canvas: Extent) -> NDArray[np.uint8]:
        """The visible mask of the whole canvas, HW, 255 where the layer is fully visible."""
        mask_HW = np.zeros((canvas.height, canvas.width), np.uint8)
        if self.visible:
            mask_HW[self.visible.box] = np.rint(self.visible.mask_hw * 255).astype(np.uint8)
        return mask_HW


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Composition:
    """A plate, and what is reported about its layers (back to front)."""

    plate: Plate
    layers: tuple[ComposedLayer, ...]
    notices: tuple[Notice, ...]


class Stack:
    """Layers laid under one another from the top down.

    transmittance_HW: float32, 1 - A of all layers so far; with the masks so far it sums to 1.
    """

    def __init__(self, canvas: Extent) -> None:
        self.transmittance_HW = np.ones((canvas.height, canvas.width), np.float32)
        self._paint_3HW = np.zeros((3, canvas.height, canvas.width), np.float32)
        self._painted_HW = np.zeros((canvas.height, canvas.width), np.float32)

    def slide_under(
        self, placed: Placed, *, opacity: float, is_painted: bool = True
    ) -> Visible | None:
        """Lays the next layer under those so far; None, and nothing changes, where it cannot be seen.

        Args:
            placed: the layer's picture on the canvas.
            opacity: multiplies its alpha.
            is_painted: whether it becomes part of the picture, or only takes its place.
        """
        above_hw = self.transmittance_HW[placed.box] * np.float32(opacity)
        mask_hw = placed.alpha_hw * above_hw
        if mask_hw.max(initial=0) < _HIDDEN_BELOW:
            return None
        if is_painted:
            self._paint_3HW[:, placed.box[0], placed.box[1]] += placed.paint_3hw * above_hw
            self._painted_HW[placed.box] += mask_hw
        self.transmittance_HW[placed.box] -= mask_hw
        return Visible(box=placed.box, mask_hw=mask_hw)

    def over(self, under_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The painted layers over an opaque picture of the canvas' size, rounded once."""
        under_3HW = under_HWC.transpose(2, 0, 1).astype(np.float32)
        picture_3HW = self._paint_3HW * 255 + under_3HW * (1 - self._painted_HW)
        rounded_3HW = np.rint(np.clip(picture_3HW, 0, 255)).astype(np.uint8)
        return np.ascontiguousarray(rounded_3HW.transpose(1, 2, 0))


def compose(
    collage: Collage,
    cutouts: Iterable[NDArray[np.uint8]],
    under_HWC: NDArray[np.uint8],
    *,
    latent_factor: int,
    redo: Redo | None = None,
    supplied: Supplied | None = None,
    detectors: Mapping[str, Detector] = DETECTORS,
) -> Composition:
    """Everything that is known about a collage before a model runs.

    Args:
        collage: its sides are multiples of `latent_factor`.
        cutouts: the layers' pictures, HW4, straight alpha, from the top down (the last layer's first); each is taken
            when its turn comes and let go before the next.
        under_HWC: what lies under all layers: the background, or for a redo the parent.
        latent_factor: pixels from canvas to latent cell, each way.
        redo: which layers are drawn again; None for a generation.
        supplied: asked for the control picture of each structure that has an image, where the layer is seen.
        detectors: by kind, for the control picture of each structure that has no image.
    """
    canvas = collage.size
    assert under_HWC.shape == (canvas.height, canvas.width, 3), "what lies under fills the canvas"
    stack = Stack(canvas)
    composed: list[ComposedLayer] = []
    notices: list[Notice] = []
    kinds = {structure.kind for layer in collage.layers for structure in layer.structure}
    control = {kind: ControlPicture(canvas) for kind in sorted(kinds)}
    is_topmost = True
    indices = reversed(range(len(collage.layers)))
    for index, pixels_HW4 in zip(indices, cutouts, strict=True):
        layer = collage.layers[index]
        is_redone = redo is not None and layer.name in redo.layers
        placed = place(pixels_HW4, layer.transform, canvas)
        visible = None
        if layer.visible:
            is_painted = redo is None or (is_redone and redo.restore_cutout)
            visible = stack.slide_under(placed, opacity=layer.opacity, is_painted=is_painted)
        for number, structure in enumerate(layer.structure if visible else ()):
            assert visible is not None, "only a layer that is seen has structure"
            if structure.image is None:
                picture_HW3 = detectors[structure.kind].draw(placed.on(canvas))
            else:
                assert supplied is not None, "a picture that came with the request is at hand"
                picture_HW3 = _over_cutout(supplied(index, number), pixels_HW4, layer, canvas)
            control[structure.kind].slide_under(picture_HW3, visible.box, visible.mask_hw)
        dials = resolve_dials(
            layer,
            size=max(placed.width / canvas.width, placed.height / canvas.height),
            is_topmost=is_topmost and visible is not None,
        )
        is_topmost = is_topmost and visible is None
        if redo is not None and not is_redone:
            dials = replace(dials, noise=0.0)
        part = _report(layer, placed, visible, dials, canvas)
        composed.insert(0, part)
        notices[:0] = _notices(part, placed, f"collage.layers[{index}]", latent_factor)
    composite_HWC = stack.over(under_HWC)
    if redo is None:
        painted, ground, release_HW = _generation(composed, canvas)
    else:
        painted, ground, release_HW, redone_HW = _redoing(composed, redo, canvas)
        # A cut-out's faintest edge may lie where nothing is released: there the parent's own bytes stay.
        composite_HWC = np.where((redone_HW > 0)[..., None], composite_HWC, under_HWC)
    grid = (canvas.height // latent_factor, canvas.width // latent_factor)
    visible_Lhw = np.zeros((len(composed), *grid), np.float32)
    for part, mask_hw in zip(composed, visible_Lhw, strict=True):
        if part.visible is not None:
            mask_hw[:] = cell_means(part.visible, canvas=canvas, latent_factor=latent_factor)
    return Composition(
        plate=Plate(
            composite_HWC=composite_HWC,
            visible_Lhw=visible_Lhw,
            strength_hw=strength_map(
                painted, ground=ground, canvas=canvas, latent_factor=latent_factor
            ),
            release_HW=release_HW,
            control={kind: picture.pixels_HW3 for kind, picture in control.items()},
        ),
        layers=tuple(composed),
        notices=tuple(notices),
    )


def _over_cutout(
    picture_HW3: NDArray[np.uint8], pixels_HW4: NDArray[np.uint8], layer: Layer, canvas: Extent
) -> NDArray[np.uint8]:
    """A control picture stretched over the layer's own picture, and where that lies on the canvas, HW3."""
    height, width = pixels_HW4.shape[:2]
    stretched_HW3 = stretch(picture_HW3, width=width, height=height)
    opaque_HW4 = np.dstack([stretched_HW3, np.full((height, width), 255, np.uint8)])
    return place(opaque_HW4, layer.transform, canvas).on(canvas)[..., :3]


def _generation(
    composed: list[ComposedLayer], canvas: Extent
) -> tuple[_Painted, float, NDArray[np.uint8]]:
    """What is painted into the noise map over which ground, and the release."""
    painted = [(part.visible, part.dials.noise) for part in composed if part.visible is not None]
    # The background is as free as the freest layer.
    ground = max((strength for _, strength in painted), default=0.0)
    if ground == 0:
        return painted, ground, np.zeros((canvas.height, canvas.width), np.uint8)
    kept = [visible for visible, strength in painted if strength == 0]
    return painted, ground, release_all_but(kept, canvas=canvas)


def _redoing(
    composed: list[ComposedLayer], redo: Redo, canvas: Extent
) -> tuple[_Painted, float, NDArray[np.uint8], NDArray[np.uint8]]:
    """As `_generation`, and the redo mask."""
    painted = [
        (part.visible, part.dials.noise)
        for part in composed
        if part.visible is not None and part.layer.name in redo.layers
    ]
    redone_HW = release_only(
        [visible for visible, _ in painted], feather=redo.feather, canvas=canvas
    )
    # A layer with noise 0 keeps its pixels in a redo too: only its cut-out may have been restored.
    kept = [visible for visible, strength in painted if strength == 0]
    release_HW = np.minimum(redone_HW, release_all_but(kept, canvas=canvas))
    return painted, 0.0, release_HW, redone_HW


def _report(
    layer: Layer, placed: Placed, visible: Visible | None, dials: Dials, canvas: Extent
) -> ComposedLayer:
    shown = 0.0 if visible is None else float(visible.mask_hw.sum(dtype=np.float64))
    transform = layer.transform
    return ComposedLayer(
        layer=layer,
        transform=replace(
            transform,
            x=canvas.width / 2 if transform.x is None else transform.x,
            y=canvas.height / 2 if transform.y is None else transform.y,
        ),
        dials=dials,
        visible=visible,
        visible_fraction=min(shown / canvas.pixels, 1.0),
        unoccluded_fraction=min(shown / (placed.area * layer.opacity), 1.0) if shown else 0.0,
    )


def _notices(part: ComposedLayer, placed: Placed, field: str, latent_factor: int) -> list[Notice]:
    name = part.layer.name
    if part.visible is None:
        suffix, cause = _why_hidden(part.layer, placed)
        message = f"layer {name} takes no part: {cause}"
        return [Notice(reason="LAYER_HIDDEN", field=field + suffix, message=message)]
    notices = []
    if part.unoccluded_fraction < _BARELY_VISIBLE:
        message = (
            f"only {part.unoccluded_fraction:.2%} of layer {name} can be seen; "
            "move it, or the layers above it"
        )
        notices.append(Notice(reason="LAYER_BARELY_VISIBLE", field=field, message=message))
    if placed.area < latent_factor**2:
        message = (
            f"layer {name} covers {placed.area:.1f} pixels, less than the {latent_factor} x {latent_factor} "
            "that the model works in; make it larger for its words to count"
        )
        notices.append(Notice(reason="LAYER_TINY", field=f"{field}.transform", message=message))
    return notices


def _why_hidden(layer: Layer, placed: Placed) -> tuple[str, str]:
    """The field below the layer's that hides it, and the cause in words."""
    if not layer.visible:
        return ".visible", "visible is false"
    if placed.area == 0:
        return ".image", "its picture is wholly transparent"
    if layer.opacity < _HIDDEN_BELOW:
        return ".opacity", f"its opacity is {layer.opacity:g}"
    brightest = placed.alpha_hw.max(initial=0)
    if brightest == 0:
        return ".transform", "it lies wholly outside the canvas"
    if brightest * layer.opacity < _HIDDEN_BELOW:
        return ".transform", "it is too small or too faint to show in any pixel"
    return "", "the layers above cover it wholly"
