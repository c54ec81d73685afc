from collage.v1 import blob_pb2 as _blob_pb2
from collage.v1 import collage_pb2 as _collage_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComposeRequest(_message.Message):
    __slots__ = ("collage", "latent_factor", "redo")
    COLLAGE_FIELD_NUMBER: _ClassVar[int]
    LATENT_FACTOR_FIELD_NUMBER: _ClassVar[int]
    REDO_FIELD_NUMBER: _ClassVar[int]
    collage: _collage_pb2.Collage
    latent_factor: int
    redo: Redo
    def __init__(self, collage: _Optional[_Union[_collage_pb2.Collage, _Mapping]] = ..., latent_factor: _Optional[int] = ..., redo: _Optional[_Union[Redo, _Mapping]] = ...) -> None: ...

class Redo(_message.Message):
    __slots__ = ("parent", "layers", "feather", "restore_cutout")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    FEATHER_FIELD_NUMBER: _ClassVar[int]
    RESTORE_CUTOUT_FIELD_NUMBER: _ClassVar[int]
    parent: _blob_pb2.BlobRef
    layers: _containers.RepeatedScalarFieldContainer[str]
    feather: float
    restore_cutout: bool
    def __init__(self, parent: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., layers: _Optional[_Iterable[str]] = ..., feather: _Optional[float] = ..., restore_cutout: _Optional[bool] = ...) -> None: ...

class ComposeResponse(_message.Message):
    __slots__ = ("plate", "composite", "layers", "warnings", "largest_noise")
    PLATE_FIELD_NUMBER: _ClassVar[int]
    COMPOSITE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    LARGEST_NOISE_FIELD_NUMBER: _ClassVar[int]
    plate: _blob_pb2.BlobRef
    composite: _blob_pb2.BlobRef
    layers: _containers.RepeatedCompositeFieldContainer[_collage_pb2.LayerPlan]
    warnings: _containers.RepeatedCompositeFieldContainer[_collage_pb2.Warning]
    largest_noise: float
    def __init__(self, plate: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., composite: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[_collage_pb2.LayerPlan, _Mapping]]] = ..., warnings: _Optional[_Iterable[_Union[_collage_pb2.Warning, _Mapping]]] = ..., largest_noise: _Optional[float] = ...) -> None: ...

class CutRequest(_message.Message):
    __slots__ = ("image", "model", "points")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    image: _blob_pb2.BlobRef
    model: str
    points: _containers.RepeatedCompositeFieldContainer[_collage_pb2.Point]
    def __init__(self, image: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., model: _Optional[str] = ..., points: _Optional[_Iterable[_Union[_collage_pb2.Point, _Mapping]]] = ...) -> None: ...

class CutResponse(_message.Message):
    __slots__ = ("image", "model")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    image: _blob_pb2.BlobRef
    model: str
    def __init__(self, image: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class DescribeDetectorsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeDetectorsResponse(_message.Message):
    __slots__ = ("kinds", "cut_out_models")
    KINDS_FIELD_NUMBER: _ClassVar[int]
    CUT_OUT_MODELS_FIELD_NUMBER: _ClassVar[int]
    kinds: _containers.RepeatedScalarFieldContainer[str]
    cut_out_models: _containers.RepeatedCompositeFieldContainer[_collage_pb2.CutOutModel]
    def __init__(self, kinds: _Optional[_Iterable[str]] = ..., cut_out_models: _Optional[_Iterable[_Union[_collage_pb2.CutOutModel, _Mapping]]] = ...) -> None: ...
