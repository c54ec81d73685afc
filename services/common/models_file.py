"""The models an operator serves, and the detectors beside them: where each one lies, and what is asked of it.

Main types: `ModelSource` and `DetectorSource`. The generator draws with a model, the inversion service learns words for
it, and the compositor draws control pictures for its ControlNets and cuts objects out, so all read the same setting
here. This module opens the operator's file and none of a model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from services.common.limits import MAX_GUIDANCE, MAX_IMAGES, MAX_SIDE, MAX_STEPS, MIN_SIDE
from services.common.operator_file import HUB, Place, read_file, resolve
from services.common.settings import InvalidSetting

# The bundled model, beside the packages in the repository.
BUNDLED = Path(__file__).parents[2] / "models" / "mini" / "weights"
# What cuts out where an operator names nothing else, under this name.
BUNDLED_CUTOUT, BUNDLED_CUTOUT_NAME = BUNDLED.parents[1] / "cutout" / "u2netp.onnx", "u2netp"
# What models.yaml may say. Of a device, empty stands for the generator's choice.
_TOP_KEYS = ("models", "detectors", "cutouts")
_DEVICE = r"cpu|cuda(:\d+)?"
DTYPES = ("float32", "float16", "bfloat16")
MODELS_FILE_SUFFIXES = (".yaml", ".yml")
# What a detector's network gives, and what may be said of each beside file and form.
_DETECTOR_KEYS = {
    "edges": ("side", "mean", "std", "invert"),
    "depth": ("side", "mean", "std", "invert"),
    "pose": ("mean", "std", "confidence"),
}
# What finds the object by itself, and what is told by points.
_CUTOUT_KEYS = ("file", "side", "mean", "std", "invert")
_SELECT_KEYS = ("file", "decoder", "mean", "std")
# Sides of what a network is shown, in pixels: the first layers of one for edges take 64 values a pixel.
MIN_DETECTOR_SIDE, MAX_DETECTOR_SIDE = 32, 1024
# Of ImageNet's pictures, R, G, B in [0, 1]: most networks for depth and all of RTMPose are trained so.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What RTMPose's own demonstrations draw from.
_CONFIDENCE = 0.3

Rgb = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most a request may ask of a model; None for no limit beyond the model's own."""

    max_side: int | None = None
    max_images: int | None = None
    max_steps: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request that leaves sampling unset gets; None for the generator's choice."""

    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One served model, as the operator names it.

    source: a folder in diffusers format, or a text that names a hub's, see `locate`. controlnets: by control kind
    ("canny"), the same of ControlNets for it. adapters: by name, safetensors files, or the same that hold one.
    dtype: one of `DTYPES`, device: "cpu", "cuda" or "cuda:1"; either empty for the generator's choice.
    """

    name: str
    source: Path | str
    controlnets: Mapping[str, Path | str] = field(default_factory=dict)
    adapters: Mapping[str, Path | str] = field(default_factory=dict)
    dtype: str = ""
    device: str = ""
    limits: Limits = Limits()
    defaults: Defaults = Defaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSource:
    """One ONNX file, as the operator names it: a detector draws control pictures of a kind, another cuts objects out.

    kind: what it is called. form: what the network gives, "edges", "depth" or "pose", or "cutout": an alpha, or
    "select": what its decoder is asked with. side: of what it is shown, in pixels; None where the file says it, or for
    the detector's choice. mean, std: what R, G and B in [0, 1] are brought to zero and one with. is_inverted: whether
    an edge, what is near, or the object has the lower values. confidence: below it a keypoint is not drawn. decoder: of
    form "select" alone, its other file.
    place: where it stands, for what shows only when the file is opened.
    """

    kind: str
    file: Path
    form: str
    side: int | None
    mean: Rgb
    std: Rgb
    is_inverted: bool
    confidence: float
    place: Place = field(compare=False)
    decoder: Path | None = None


def read_detectors(models: str) -> tuple[DetectorSource, ...]:
    """The detectors of a setting that is the path of a models.yaml; of any other, see `read_sources`, there are none.

    Raises:
        InvalidSetting: naming the file, the place in it, the value and what is allowed there.
    """
    if not is_models_file(models):
        return ()
    top = read_file(Path(models))
    top.keys(*_TOP_KEYS)
    return tuple(
        _read_detector(kind, place) for kind, place in top.get("detectors").named().items()
    )


def read_cutouts(models: str) -> tuple[DetectorSource, ...]:
    """What cuts objects out, the default first: what a models.yaml names, then the bundled one if its name is free.

    Raises:
        InvalidSetting: as `read_detectors`.
    """
    found: dict[str, DetectorSource] = {}
    if is_models_file(models):
        top = read_file(Path(models))
        top.keys(*_TOP_KEYS)
        for name, place in top.get("cutouts").named().items():
            found[name] = _read_cutout(name, place)
    bundled = Place(BUNDLED_CUTOUT.parent / "models.yaml", "", {"file": BUNDLED_CUTOUT.name})
    found.setdefault(BUNDLED_CUTOUT_NAME, _read_network(BUNDLED_CUTOUT_NAME, "cutout", bundled))
    return tuple(found.values())


def _read_detector(kind: str, place: Place) -> DetectorSource:
    place.keys(
        "file", "form", *dict.fromkeys(key for keys in _DETECTOR_KEYS.values() for key in keys)
    )
    form = place.get("form").one_of(tuple(_DETECTOR_KEYS))
    place.keys("file", "form", *_DETECTOR_KEYS[form])
    return _read_network(kind, form, place)


def _read_cutout(name: str, place: Place) -> DetectorSource:
    place.keys(*dict.fromkeys((*_CUTOUT_KEYS, *_SELECT_KEYS)))
    decoder = place.get("decoder").optional(Place.file)
    if decoder is None:
        return _read_network(name, "cutout", place)
    place.keys(*_SELECT_KEYS)
    return replace(_read_network(name, "select", place), decoder=decoder)


def _read_network(kind: str, form: str, place: Place) -> DetectorSource:
    is_plain = form == "edges"
    return DetectorSource(
        kind=kind,
        file=place.get("file").file(),
        form=form,
        side=place.get("side").optional(
            lambda side: side.integer(MIN_DETECTOR_SIDE, MAX_DETECTOR_SIDE)
        ),
        mean=place.get("mean").optional(lambda mean: _read_rgb(mean, -255, 255))
        or ((0.0, 0.0, 0.0) if is_plain else _IMAGENET_MEAN),
        std=place.get("std").optional(lambda std: _read_rgb(std, 0.001, 255))
        or ((1.0, 1.0, 1.0) if is_plain else _IMAGENET_STD),
        is_inverted=place.get("invert").optional(Place.boolean) or False,
        confidence=_CONFIDENCE
        if (least := place.get("confidence").optional(lambda least: least.number(0, 1))) is None
        else least,
        place=place,
    )


def _read_rgb(place: Place, low: float, high: float) -> Rgb:
    values = [value.number(low, high) for value in place.items()]
    if len(values) != 3:
        raise place.wrong("required: three numbers, of R, G, B")
    return values[0], values[1], values[2]


def is_models_file(models: str) -> bool:
    """Whether a setting is the path of a models.yaml, there or not."""
    path = Path(models)
    return path.suffix in MODELS_FILE_SUFFIXES and (
        path.is_file() or ("=" not in models and not path.is_dir())
    )


def _is_one(models: str) -> bool:
    """Whether a setting is one source, rather than a list of names and sources."""
    return models.startswith(HUB) or Path(models).is_dir() or not ("=" in models or "," in models)


def name_of(source: Path | str) -> str:
    """A model's name, made from the last part of its source: what no name may hold becomes `-`."""
    last = source.name if isinstance(source, Path) else source.partition("@")[0].rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.")[:64] or "model"


def read_sources(models: str) -> tuple[ModelSource, ...]:
    """The models of a setting, the default first.

    Args:
        models: a folder or `hub:OWNER/NAME@REVISION`, named as in `name_of`; or `NAME=` such a one, separated by
            commas; or the path of a `.yaml` file, see `read_models_file`; empty for the bundled model. Relative folders
            are relative to the working one. A folder's subfolders `controlnet-KIND` are its ControlNets.

    Raises:
        InvalidSetting: naming the entry that does not parse or stands twice.
    """
    if is_models_file(models):
        return read_models_file(Path(models))
    if models and _is_one(models):
        source = resolve(models, Path())
        resolved = source.resolve() if isinstance(source, Path) else source
        return (_found_beside(name_of(resolved), source),)
    sources: dict[str, ModelSource] = {}
    for entry in (models or f"mini={BUNDLED}").split(","):
        name, _, text = (part.strip() for part in entry.partition("="))
        if not name or not text or name in sources:
            raise InvalidSetting(
                f"models: {entry!r} must be NAME=FOLDER or NAME={HUB}OWNER/NAME@REVISION, each name once; "
                "folders with , or = in their names go into a models.yaml"
            )
        sources[name] = _found_beside(name, resolve(text, Path()))
    return tuple(sources.values())


def _found_beside(name: str, source: Path | str) -> ModelSource:
    return ModelSource(name=name, source=source, controlnets=_controlnets_in(source))


def read_models_file(file: Path) -> tuple[ModelSource, ...]:
    """The models of a `models.yaml`, the default first. Relative folders are relative to the file.

    Raises:
        InvalidSetting: naming the file, the place in it, the value and what is allowed there.
    """
    top = read_file(file)
    top.keys(*_TOP_KEYS)
    places = top.get("models").items()
    sources: dict[str, ModelSource] = {}
    for place in places:
        source = _read_model(place)
        if source.name in sources:
            raise place.get("name").wrong("the name of an earlier model; allowed: one of its own")
        sources[source.name] = source
    return tuple(sources.values())


def _read_model(place: Place) -> ModelSource:
    place.keys("name", "source", "dtype", "device", "controlnets", "adapters", "limits", "defaults")
    source = place.get("source").source()
    limits, defaults = place.get("limits"), place.get("defaults")
    limits.keys("max_side", "max_images", "max_steps")
    defaults.keys("sampler", "steps", "guidance_scale")
    return ModelSource(
        name=place.get("name").name(),
        source=source,
        controlnets={**_controlnets_in(source), **place.get("controlnets").sources()},
        adapters=place.get("adapters").sources(),
        dtype=place.get("dtype").optional(lambda dtype: dtype.one_of(DTYPES)) or "",
        device=place.get("device").optional(
            lambda device: device.matching(_DEVICE, "cpu, cuda, or cuda:NUMBER")
        )
        or "",
        limits=Limits(
            max_side=limits.get("max_side").optional(lambda side: side.integer(MIN_SIDE, MAX_SIDE)),
            max_images=limits.get("max_images").optional(lambda most: most.integer(1, MAX_IMAGES)),
            max_steps=limits.get("max_steps").optional(lambda most: most.integer(1, MAX_STEPS)),
        ),
        defaults=Defaults(
            sampler=defaults.get("sampler").optional(Place.name),
            steps=defaults.get("steps").optional(lambda steps: steps.integer(1, MAX_STEPS)),
            guidance_scale=defaults.get("guidance_scale").optional(
                lambda scale: scale.number(0, MAX_GUIDANCE)
            ),
        ),
    )


def _controlnets_in(source: Path | str) -> dict[str, Path | str]:
    """The ControlNets that lie beside the parts of a local model, by kind."""
    beside = source.glob("controlnet-*") if isinstance(source, Path) else ()
    return {
        folder.name.removeprefix("controlnet-"): folder
        for folder in sorted(beside)
        if folder.is_dir()
    }
