from collage.v1 import blob_pb2 as _blob_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Collage(_message.Message):
    __slots__ = ("size", "prompt", "negative_prompt", "background", "layers")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    size: Size
    prompt: str
    negative_prompt: str
    background: Background
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    def __init__(self, size: _Optional[_Union[Size, _Mapping]] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., background: _Optional[_Union[Background, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ...) -> None: ...

class Size(_message.Message):
    __slots__ = ("width", "height")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class Background(_message.Message):
    __slots__ = ("color", "image")
    COLOR_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    color: Color
    image: _blob_pb2.Image
    def __init__(self, color: _Optional[_Union[Color, _Mapping]] = ..., image: _Optional[_Union[_blob_pb2.Image, _Mapping]] = ...) -> None: ...

class Color(_message.Message):
    __slots__ = ("red", "green", "blue")
    RED_FIELD_NUMBER: _ClassVar[int]
    GREEN_FIELD_NUMBER: _ClassVar[int]
    BLUE_FIELD_NUMBER: _ClassVar[int]
    red: int
    green: int
    blue: int
    def __init__(self, red: _Optional[int] = ..., green: _Optional[int] = ..., blue: _Optional[int] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("name", "image", "text", "transform", "opacity", "visible", "noise", "attract", "repel", "structure", "appearance", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TRANSFORM_FIELD_NUMBER: _ClassVar[int]
    OPACITY_FIELD_NUMBER: _ClassVar[int]
    VISIBLE_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    ATTRACT_FIELD_NUMBER: _ClassVar[int]
    REPEL_FIELD_NUMBER: _ClassVar[int]
    STRUCTURE_FIELD_NUMBER: _ClassVar[int]
    APPEARANCE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    image: _blob_pb2.Image
    text: str
    transform: Transform
    opacity: float
    visible: bool
    noise: float
    attract: float
    repel: float
    structure: _containers.RepeatedCompositeFieldContainer[Structure]
    appearance: Appearance
    seed: int
    def __init__(self, name: _Optional[str] = ..., image: _Optional[_Union[_blob_pb2.Image, _Mapping]] = ..., text: _Optional[str] = ..., transform: _Optional[_Union[Transform, _Mapping]] = ..., opacity: _Optional[float] = ..., visible: _Optional[bool] = ..., noise: _Optional[float] = ..., attract: _Optional[float] = ..., repel: _Optional[float] = ..., structure: _Optional[_Iterable[_Union[Structure, _Mapping]]] = ..., appearance: _Optional[_Union[Appearance, _Mapping]] = ..., seed: _Optional[int] = ...) -> None: ...

class Transform(_message.Message):
    __slots__ = ("x", "y", "scale", "rotation", "flip_horizontal", "flip_vertical")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    ROTATION_FIELD_NUMBER: _ClassVar[int]
    FLIP_HORIZONTAL_FIELD_NUMBER: _ClassVar[int]
    FLIP_VERTICAL_FIELD_NUMBER: _ClassVar[int]
    x: float
    y: float
    scale: float
    rotation: float
    flip_horizontal: bool
    flip_vertical: bool
    def __init__(self, x: _Optional[float] = ..., y: _Optional[float] = ..., scale: _Optional[float] = ..., rotation: _Optional[float] = ..., flip_horizontal: _Optional[bool] = ..., flip_vertical: _Optional[bool] = ...) -> None: ...

class Structure(_message.Message):
    __slots__ = ("kind", "scale", "start", "end", "image", "emphasis")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    EMPHASIS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    scale: float
    start: float
    end: float
    image: _blob_pb2.Image
    emphasis: float
    def __init__(self, kind: _Optional[str] = ..., scale: _Optional[float] = ..., start: _Optional[float] = ..., end: _Optional[float] = ..., image: _Optional[_Union[_blob_pb2.Image, _Mapping]] = ..., emphasis: _Optional[float] = ...) -> None: ...

class Appearance(_message.Message):
    __slots__ = ("learn", "word", "weight", "vectors")
    LEARN_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    learn: bool
    word: str
    weight: float
    vectors: int
    def __init__(self, learn: _Optional[bool] = ..., word: _Optional[str] = ..., weight: _Optional[float] = ..., vectors: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("model", "sampler", "steps", "guidance_scale", "images", "seed", "preview_every", "adapters")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    sampler: str
    steps: int
    guidance_scale: float
    images: int
    seed: int
    preview_every: int
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, model: _Optional[str] = ..., sampler: _Optional[str] = ..., steps: _Optional[int] = ..., guidance_scale: _Optional[float] = ..., images: _Optional[int] = ..., seed: _Optional[int] = ..., preview_every: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class LayerPlan(_message.Message):
    __slots__ = ("name", "opacity", "noise", "attract", "repel", "visible_fraction", "unoccluded_fraction", "mask", "text_start", "text_end", "transform", "structure")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPACITY_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    ATTRACT_FIELD_NUMBER: _ClassVar[int]
    REPEL_FIELD_NUMBER: _ClassVar[int]
    VISIBLE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    UNOCCLUDED_FRACTION_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    TEXT_START_FIELD_NUMBER: _ClassVar[int]
    TEXT_END_FIELD_NUMBER: _ClassVar[int]
    TRANSFORM_FIELD_NUMBER: _ClassVar[int]
    STRUCTURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    opacity: float
    noise: float
    attract: float
    repel: float
    visible_fraction: float
    unoccluded_fraction: float
    mask: _blob_pb2.BlobRef
    text_start: int
    text_end: int
    transform: Transform
    structure: _containers.RepeatedCompositeFieldContainer[Structure]
    def __init__(self, name: _Optional[str] = ..., opacity: _Optional[float] = ..., noise: _Optional[float] = ..., attract: _Optional[float] = ..., repel: _Optional[float] = ..., visible_fraction: _Optional[float] = ..., unoccluded_fraction: _Optional[float] = ..., mask: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., text_start: _Optional[int] = ..., text_end: _Optional[int] = ..., transform: _Optional[_Union[Transform, _Mapping]] = ..., structure: _Optional[_Iterable[_Union[Structure, _Mapping]]] = ...) -> None: ...

class Warning(_message.Message):
    __slots__ = ("reason", "field", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    field: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., field: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Point(_message.Message):
    __slots__ = ("x", "y", "outside")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    OUTSIDE_FIELD_NUMBER: _ClassVar[int]
    x: float
    y: float
    outside: bool
    def __init__(self, x: _Optional[float] = ..., y: _Optional[float] = ..., outside: _Optional[bool] = ...) -> None: ...

class CutOutModel(_message.Message):
    __slots__ = ("name", "takes_points")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TAKES_POINTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    takes_points: bool
    def __init__(self, name: _Optional[str] = ..., takes_points: _Optional[bool] = ...) -> None: ...
