from collage.v1 import collage_service_pb2 as _collage_service_pb2
from collage.v1 import compositor_service_pb2 as _compositor_service_pb2
from collage.v1 import generator_service_pb2 as _generator_service_pb2
from collage.v1 import inversion_service_pb2 as _inversion_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AcceptedJob(_message.Message):
    __slots__ = ("request_digest", "drawing", "learning")
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DRAWING_FIELD_NUMBER: _ClassVar[int]
    LEARNING_FIELD_NUMBER: _ClassVar[int]
    request_digest: str
    drawing: Drawing
    learning: Learning
    def __init__(self, request_digest: _Optional[str] = ..., drawing: _Optional[_Union[Drawing, _Mapping]] = ..., learning: _Optional[_Union[Learning, _Mapping]] = ...) -> None: ...

class Drawing(_message.Message):
    __slots__ = ("field", "plan", "compose", "learning", "generate")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    COMPOSE_FIELD_NUMBER: _ClassVar[int]
    LEARNING_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    field: str
    plan: _collage_service_pb2.Plan
    compose: _compositor_service_pb2.ComposeRequest
    learning: Learning
    generate: _generator_service_pb2.GenerateRequest
    def __init__(self, field: _Optional[str] = ..., plan: _Optional[_Union[_collage_service_pb2.Plan, _Mapping]] = ..., compose: _Optional[_Union[_compositor_service_pb2.ComposeRequest, _Mapping]] = ..., learning: _Optional[_Union[Learning, _Mapping]] = ..., generate: _Optional[_Union[_generator_service_pb2.GenerateRequest, _Mapping]] = ...) -> None: ...

class Learning(_message.Message):
    __slots__ = ("request", "field", "layers", "skips_failed")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SKIPS_FAILED_FIELD_NUMBER: _ClassVar[int]
    request: _inversion_service_pb2.LearnWordsRequest
    field: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    skips_failed: bool
    def __init__(self, request: _Optional[_Union[_inversion_service_pb2.LearnWordsRequest, _Mapping]] = ..., field: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., skips_failed: _Optional[bool] = ...) -> None: ...
