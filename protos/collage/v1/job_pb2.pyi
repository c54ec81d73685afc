from collage.v1 import collage_service_pb2 as _collage_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AcceptedJob(_message.Message):
    __slots__ = ("request", "words")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    request: _collage_service_pb2.CreateJobRequest
    words: _containers.RepeatedCompositeFieldContainer[_collage_service_pb2.Word]
    def __init__(self, request: _Optional[_Union[_collage_service_pb2.CreateJobRequest, _Mapping]] = ..., words: _Optional[_Iterable[_Union[_collage_service_pb2.Word, _Mapping]]] = ...) -> None: ...
