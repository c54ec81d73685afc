from collage.v1 import blob_pb2 as _blob_pb2
from collage.v1 import collage_service_pb2 as _collage_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LearnWordsRequest(_message.Message):
    __slots__ = ("model", "subjects", "job", "model_digest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SUBJECTS_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    subjects: _containers.RepeatedCompositeFieldContainer[Subject]
    job: str
    model_digest: str
    def __init__(self, model: _Optional[str] = ..., subjects: _Optional[_Iterable[_Union[Subject, _Mapping]]] = ..., job: _Optional[str] = ..., model_digest: _Optional[str] = ...) -> None: ...

class Subject(_message.Message):
    __slots__ = ("layer", "image", "text", "vectors")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    layer: str
    image: _blob_pb2.BlobRef
    text: str
    vectors: int
    def __init__(self, layer: _Optional[str] = ..., image: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., text: _Optional[str] = ..., vectors: _Optional[int] = ...) -> None: ...

class LearnWordsResponse(_message.Message):
    __slots__ = ("progress", "word", "error")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    progress: _collage_service_pb2.WordProgress
    word: _collage_service_pb2.Word
    error: _collage_service_pb2.JobError
    def __init__(self, progress: _Optional[_Union[_collage_service_pb2.WordProgress, _Mapping]] = ..., word: _Optional[_Union[_collage_service_pb2.Word, _Mapping]] = ..., error: _Optional[_Union[_collage_service_pb2.JobError, _Mapping]] = ...) -> None: ...

class EstimateWordsRequest(_message.Message):
    __slots__ = ("learn",)
    LEARN_FIELD_NUMBER: _ClassVar[int]
    learn: LearnWordsRequest
    def __init__(self, learn: _Optional[_Union[LearnWordsRequest, _Mapping]] = ...) -> None: ...

class EstimateWordsResponse(_message.Message):
    __slots__ = ("words", "seconds", "seconds_low", "seconds_high")
    WORDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LOW_FIELD_NUMBER: _ClassVar[int]
    SECONDS_HIGH_FIELD_NUMBER: _ClassVar[int]
    words: int
    seconds: float
    seconds_low: float
    seconds_high: float
    def __init__(self, words: _Optional[int] = ..., seconds: _Optional[float] = ..., seconds_low: _Optional[float] = ..., seconds_high: _Optional[float] = ...) -> None: ...

class AdoptWordRequest(_message.Message):
    __slots__ = ("model", "text", "vectors")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    vectors: _blob_pb2.BlobRef
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., vectors: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class AdoptWordResponse(_message.Message):
    __slots__ = ("word",)
    WORD_FIELD_NUMBER: _ClassVar[int]
    word: _collage_service_pb2.Word
    def __init__(self, word: _Optional[_Union[_collage_service_pb2.Word, _Mapping]] = ...) -> None: ...
