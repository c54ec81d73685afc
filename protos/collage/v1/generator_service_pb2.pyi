from collage.v1 import blob_pb2 as _blob_pb2
from collage.v1 import collage_pb2 as _collage_pb2
from collage.v1 import collage_service_pb2 as _collage_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("plate", "prompt", "negative_prompt", "layers", "sampling", "parent", "model_digest")
    PLATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    plate: _blob_pb2.BlobRef
    prompt: str
    negative_prompt: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerControl]
    sampling: _collage_pb2.Sampling
    parent: _blob_pb2.BlobRef
    model_digest: str
    def __init__(self, plate: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerControl, _Mapping]]] = ..., sampling: _Optional[_Union[_collage_pb2.Sampling, _Mapping]] = ..., parent: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., model_digest: _Optional[str] = ...) -> None: ...

class LayerControl(_message.Message):
    __slots__ = ("plan", "seed", "word", "word_weight")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    WORD_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    plan: _collage_pb2.LayerPlan
    seed: int
    word: _blob_pb2.BlobRef
    word_weight: float
    def __init__(self, plan: _Optional[_Union[_collage_pb2.LayerPlan, _Mapping]] = ..., seed: _Optional[int] = ..., word: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., word_weight: _Optional[float] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("queued", "step", "preview", "image")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    queued: _collage_service_pb2.Queued
    step: _collage_service_pb2.Step
    preview: _collage_service_pb2.Preview
    image: _collage_service_pb2.GeneratedImage
    def __init__(self, queued: _Optional[_Union[_collage_service_pb2.Queued, _Mapping]] = ..., step: _Optional[_Union[_collage_service_pb2.Step, _Mapping]] = ..., preview: _Optional[_Union[_collage_service_pb2.Preview, _Mapping]] = ..., image: _Optional[_Union[_collage_service_pb2.GeneratedImage, _Mapping]] = ...) -> None: ...

class DescribeModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_collage_service_pb2.Model]
    def __init__(self, models: _Optional[_Iterable[_Union[_collage_service_pb2.Model, _Mapping]]] = ...) -> None: ...

class EstimateRequest(_message.Message):
    __slots__ = ("sampling", "size", "prompt", "negative_prompt", "word_tokens", "layers", "largest_noise")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WORD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LARGEST_NOISE_FIELD_NUMBER: _ClassVar[int]
    sampling: _collage_pb2.Sampling
    size: _collage_pb2.Size
    prompt: str
    negative_prompt: str
    word_tokens: int
    layers: _containers.RepeatedCompositeFieldContainer[_collage_pb2.LayerPlan]
    largest_noise: float
    def __init__(self, sampling: _Optional[_Union[_collage_pb2.Sampling, _Mapping]] = ..., size: _Optional[_Union[_collage_pb2.Size, _Mapping]] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., word_tokens: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[_collage_pb2.LayerPlan, _Mapping]]] = ..., largest_noise: _Optional[float] = ...) -> None: ...

class EstimateResponse(_message.Message):
    __slots__ = ("prompt_tokens", "negative_prompt_tokens", "prompt_tokens_limit", "seconds", "memory_bytes", "warnings", "seconds_low", "seconds_high")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LOW_FIELD_NUMBER: _ClassVar[int]
    SECONDS_HIGH_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    negative_prompt_tokens: int
    prompt_tokens_limit: int
    seconds: float
    memory_bytes: int
    warnings: _containers.RepeatedCompositeFieldContainer[_collage_pb2.Warning]
    seconds_low: float
    seconds_high: float
    def __init__(self, prompt_tokens: _Optional[int] = ..., negative_prompt_tokens: _Optional[int] = ..., prompt_tokens_limit: _Optional[int] = ..., seconds: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., warnings: _Optional[_Iterable[_Union[_collage_pb2.Warning, _Mapping]]] = ..., seconds_low: _Optional[float] = ..., seconds_high: _Optional[float] = ...) -> None: ...
