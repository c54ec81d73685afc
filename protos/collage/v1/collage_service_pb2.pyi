import datetime

from collage.v1 import blob_pb2 as _blob_pb2
from collage.v1 import collage_pb2 as _collage_pb2
from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_DONE: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]

class DisconnectPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISCONNECT_POLICY_UNSPECIFIED: _ClassVar[DisconnectPolicy]
    DISCONNECT_POLICY_DETACH: _ClassVar[DisconnectPolicy]
    DISCONNECT_POLICY_CANCEL: _ClassVar[DisconnectPolicy]
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_DONE: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
DISCONNECT_POLICY_UNSPECIFIED: DisconnectPolicy
DISCONNECT_POLICY_DETACH: DisconnectPolicy
DISCONNECT_POLICY_CANCEL: DisconnectPolicy

class PlanCollageRequest(_message.Message):
    __slots__ = ("collage", "sampling")
    COLLAGE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    collage: _collage_pb2.Collage
    sampling: _collage_pb2.Sampling
    def __init__(self, collage: _Optional[_Union[_collage_pb2.Collage, _Mapping]] = ..., sampling: _Optional[_Union[_collage_pb2.Sampling, _Mapping]] = ...) -> None: ...

class PlanCollageResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class CutOutRequest(_message.Message):
    __slots__ = ("image", "model", "points")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    image: _blob_pb2.Image
    model: str
    points: _containers.RepeatedCompositeFieldContainer[_collage_pb2.Point]
    def __init__(self, image: _Optional[_Union[_blob_pb2.Image, _Mapping]] = ..., model: _Optional[str] = ..., points: _Optional[_Iterable[_Union[_collage_pb2.Point, _Mapping]]] = ...) -> None: ...

class CutOutResponse(_message.Message):
    __slots__ = ("image", "model")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    image: _blob_pb2.Image
    model: str
    def __init__(self, image: _Optional[_Union[_blob_pb2.Image, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("composite", "layers", "warnings", "prompt", "sampling", "prompt_tokens", "prompt_tokens_limit", "estimated_seconds", "estimated_memory_bytes", "estimated_seconds_low", "estimated_seconds_high")
    COMPOSITE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_SECONDS_LOW_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_SECONDS_HIGH_FIELD_NUMBER: _ClassVar[int]
    composite: _blob_pb2.BlobRef
    layers: _containers.RepeatedCompositeFieldContainer[_collage_pb2.LayerPlan]
    warnings: _containers.RepeatedCompositeFieldContainer[_collage_pb2.Warning]
    prompt: str
    sampling: _collage_pb2.Sampling
    prompt_tokens: int
    prompt_tokens_limit: int
    estimated_seconds: float
    estimated_memory_bytes: int
    estimated_seconds_low: float
    estimated_seconds_high: float
    def __init__(self, composite: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[_collage_pb2.LayerPlan, _Mapping]]] = ..., warnings: _Optional[_Iterable[_Union[_collage_pb2.Warning, _Mapping]]] = ..., prompt: _Optional[str] = ..., sampling: _Optional[_Union[_collage_pb2.Sampling, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., prompt_tokens_limit: _Optional[int] = ..., estimated_seconds: _Optional[float] = ..., estimated_memory_bytes: _Optional[int] = ..., estimated_seconds_low: _Optional[float] = ..., estimated_seconds_high: _Optional[float] = ...) -> None: ...

class CreateJobRequest(_message.Message):
    __slots__ = ("request_id", "generate", "redo", "learn")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    REDO_FIELD_NUMBER: _ClassVar[int]
    LEARN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    generate: GenerateWork
    redo: RedoWork
    learn: LearnWork
    def __init__(self, request_id: _Optional[str] = ..., generate: _Optional[_Union[GenerateWork, _Mapping]] = ..., redo: _Optional[_Union[RedoWork, _Mapping]] = ..., learn: _Optional[_Union[LearnWork, _Mapping]] = ...) -> None: ...

class GenerateWork(_message.Message):
    __slots__ = ("collage", "sampling", "skip_failed_words")
    COLLAGE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SKIP_FAILED_WORDS_FIELD_NUMBER: _ClassVar[int]
    collage: _collage_pb2.Collage
    sampling: _collage_pb2.Sampling
    skip_failed_words: bool
    def __init__(self, collage: _Optional[_Union[_collage_pb2.Collage, _Mapping]] = ..., sampling: _Optional[_Union[_collage_pb2.Sampling, _Mapping]] = ..., skip_failed_words: _Optional[bool] = ...) -> None: ...

class RedoWork(_message.Message):
    __slots__ = ("collage", "parent", "layers", "sampling", "feather", "restore_cutout", "skip_failed_words")
    COLLAGE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    FEATHER_FIELD_NUMBER: _ClassVar[int]
    RESTORE_CUTOUT_FIELD_NUMBER: _ClassVar[int]
    SKIP_FAILED_WORDS_FIELD_NUMBER: _ClassVar[int]
    collage: _collage_pb2.Collage
    parent: _blob_pb2.Image
    layers: _containers.RepeatedScalarFieldContainer[str]
    sampling: _collage_pb2.Sampling
    feather: float
    restore_cutout: bool
    skip_failed_words: bool
    def __init__(self, collage: _Optional[_Union[_collage_pb2.Collage, _Mapping]] = ..., parent: _Optional[_Union[_blob_pb2.Image, _Mapping]] = ..., layers: _Optional[_Iterable[str]] = ..., sampling: _Optional[_Union[_collage_pb2.Sampling, _Mapping]] = ..., feather: _Optional[float] = ..., restore_cutout: _Optional[bool] = ..., skip_failed_words: _Optional[bool] = ...) -> None: ...

class LearnWork(_message.Message):
    __slots__ = ("collage", "layers", "model")
    COLLAGE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    collage: _collage_pb2.Collage
    layers: _containers.RepeatedScalarFieldContainer[str]
    model: str
    def __init__(self, collage: _Optional[_Union[_collage_pb2.Collage, _Mapping]] = ..., layers: _Optional[_Iterable[str]] = ..., model: _Optional[str] = ...) -> None: ...

class CreateJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("name", "request_id", "state", "create_time", "start_time", "end_time", "attempts", "plan", "images", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    state: JobState
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    attempts: int
    plan: Plan
    images: _containers.RepeatedCompositeFieldContainer[GeneratedImage]
    error: JobError
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., attempts: _Optional[int] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., images: _Optional[_Iterable[_Union[GeneratedImage, _Mapping]]] = ..., error: _Optional[_Union[JobError, _Mapping]] = ...) -> None: ...

class JobError(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class GeneratedImage(_message.Message):
    __slots__ = ("index", "seed", "blob", "model_digest", "changed_pixels", "download_url")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHANGED_PIXELS_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_URL_FIELD_NUMBER: _ClassVar[int]
    index: int
    seed: int
    blob: _blob_pb2.BlobRef
    model_digest: str
    changed_pixels: int
    download_url: str
    def __init__(self, index: _Optional[int] = ..., seed: _Optional[int] = ..., blob: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., model_digest: _Optional[str] = ..., changed_pixels: _Optional[int] = ..., download_url: _Optional[str] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("name", "after_sequence")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    after_sequence: int
    def __init__(self, name: _Optional[str] = ..., after_sequence: _Optional[int] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: JobEvent
    def __init__(self, event: _Optional[_Union[JobEvent, _Mapping]] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("job", "sequence", "time", "queued", "stage_started", "planned", "step", "preview", "word", "image", "warning", "done", "failed", "cancelled")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STAGE_STARTED_FIELD_NUMBER: _ClassVar[int]
    PLANNED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    job: str
    sequence: int
    time: _timestamp_pb2.Timestamp
    queued: Queued
    stage_started: StageStarted
    planned: Planned
    step: Step
    preview: Preview
    word: WordProgress
    image: GeneratedImage
    warning: _collage_pb2.Warning
    done: Done
    failed: JobError
    cancelled: JobError
    def __init__(self, job: _Optional[str] = ..., sequence: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., queued: _Optional[_Union[Queued, _Mapping]] = ..., stage_started: _Optional[_Union[StageStarted, _Mapping]] = ..., planned: _Optional[_Union[Planned, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ..., word: _Optional[_Union[WordProgress, _Mapping]] = ..., image: _Optional[_Union[GeneratedImage, _Mapping]] = ..., warning: _Optional[_Union[_collage_pb2.Warning, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., failed: _Optional[_Union[JobError, _Mapping]] = ..., cancelled: _Optional[_Union[JobError, _Mapping]] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class StageStarted(_message.Message):
    __slots__ = ("stage", "attempt")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    stage: str
    attempt: int
    def __init__(self, stage: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Planned(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "total")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    step: int
    total: int
    def __init__(self, step: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("index", "step", "png")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PNG_FIELD_NUMBER: _ClassVar[int]
    index: int
    step: int
    png: bytes
    def __init__(self, index: _Optional[int] = ..., step: _Optional[int] = ..., png: _Optional[bytes] = ...) -> None: ...

class WordProgress(_message.Message):
    __slots__ = ("layer", "step", "total", "loss", "word")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    layer: str
    step: int
    total: int
    loss: float
    word: str
    def __init__(self, layer: _Optional[str] = ..., step: _Optional[int] = ..., total: _Optional[int] = ..., loss: _Optional[float] = ..., word: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("stage_seconds",)
    class StageSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STAGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    stage_seconds: _containers.ScalarMap[str, float]
    def __init__(self, stage_seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...

class GenerateImagesRequest(_message.Message):
    __slots__ = ("request_id", "collage", "sampling", "on_disconnect", "skip_failed_words", "redo")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    COLLAGE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    SKIP_FAILED_WORDS_FIELD_NUMBER: _ClassVar[int]
    REDO_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    collage: _collage_pb2.Collage
    sampling: _collage_pb2.Sampling
    on_disconnect: DisconnectPolicy
    skip_failed_words: bool
    redo: RedoWork
    def __init__(self, request_id: _Optional[str] = ..., collage: _Optional[_Union[_collage_pb2.Collage, _Mapping]] = ..., sampling: _Optional[_Union[_collage_pb2.Sampling, _Mapping]] = ..., on_disconnect: _Optional[_Union[DisconnectPolicy, str]] = ..., skip_failed_words: _Optional[bool] = ..., redo: _Optional[_Union[RedoWork, _Mapping]] = ...) -> None: ...

class GenerateImagesResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: JobEvent
    def __init__(self, event: _Optional[_Union[JobEvent, _Mapping]] = ...) -> None: ...

class CheckBlobsRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sha256: _Optional[_Iterable[str]] = ...) -> None: ...

class CheckBlobsResponse(_message.Message):
    __slots__ = ("missing_sha256",)
    MISSING_SHA256_FIELD_NUMBER: _ClassVar[int]
    missing_sha256: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, missing_sha256: _Optional[_Iterable[str]] = ...) -> None: ...

class PutBlobRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: _blob_pb2.BlobRef
    chunk: bytes
    def __init__(self, header: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PutBlobResponse(_message.Message):
    __slots__ = ("blob",)
    BLOB_FIELD_NUMBER: _ClassVar[int]
    blob: _blob_pb2.BlobRef
    def __init__(self, blob: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class GetBlobRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class GetBlobResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: _blob_pb2.BlobRef
    chunk: bytes
    def __init__(self, header: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token", "cut_out_models")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CUT_OUT_MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    next_page_token: str
    cut_out_models: _containers.RepeatedCompositeFieldContainer[_collage_pb2.CutOutModel]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., cut_out_models: _Optional[_Iterable[_Union[_collage_pb2.CutOutModel, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "digest", "family", "size_multiple", "min_side", "max_side", "native_side", "prompt_tokens_limit", "samplers", "control_kinds", "defaults", "max_layers", "latent_factor", "adapters", "max_images", "max_steps", "drawn_control_kinds", "max_work_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    SIZE_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    MIN_SIDE_FIELD_NUMBER: _ClassVar[int]
    MAX_SIDE_FIELD_NUMBER: _ClassVar[int]
    NATIVE_SIDE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_LIMIT_FIELD_NUMBER: _ClassVar[int]
    SAMPLERS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_KINDS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    MAX_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LATENT_FACTOR_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    DRAWN_CONTROL_KINDS_FIELD_NUMBER: _ClassVar[int]
    MAX_WORK_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    family: str
    size_multiple: int
    min_side: int
    max_side: int
    native_side: int
    prompt_tokens_limit: int
    samplers: _containers.RepeatedScalarFieldContainer[str]
    control_kinds: _containers.RepeatedScalarFieldContainer[str]
    defaults: _collage_pb2.Sampling
    max_layers: int
    latent_factor: int
    adapters: _containers.RepeatedScalarFieldContainer[str]
    max_images: int
    max_steps: int
    drawn_control_kinds: _containers.RepeatedScalarFieldContainer[str]
    max_work_seconds: float
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., family: _Optional[str] = ..., size_multiple: _Optional[int] = ..., min_side: _Optional[int] = ..., max_side: _Optional[int] = ..., native_side: _Optional[int] = ..., prompt_tokens_limit: _Optional[int] = ..., samplers: _Optional[_Iterable[str]] = ..., control_kinds: _Optional[_Iterable[str]] = ..., defaults: _Optional[_Union[_collage_pb2.Sampling, _Mapping]] = ..., max_layers: _Optional[int] = ..., latent_factor: _Optional[int] = ..., adapters: _Optional[_Iterable[str]] = ..., max_images: _Optional[int] = ..., max_steps: _Optional[int] = ..., drawn_control_kinds: _Optional[_Iterable[str]] = ..., max_work_seconds: _Optional[float] = ...) -> None: ...

class Word(_message.Message):
    __slots__ = ("name", "text", "model_digest", "vectors", "create_time", "vector_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    VECTOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    text: str
    model_digest: str
    vectors: _blob_pb2.BlobRef
    create_time: _timestamp_pb2.Timestamp
    vector_count: int
    def __init__(self, name: _Optional[str] = ..., text: _Optional[str] = ..., model_digest: _Optional[str] = ..., vectors: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., vector_count: _Optional[int] = ...) -> None: ...

class ListWordsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListWordsResponse(_message.Message):
    __slots__ = ("words", "next_page_token")
    WORDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    words: _containers.RepeatedCompositeFieldContainer[Word]
    next_page_token: str
    def __init__(self, words: _Optional[_Iterable[_Union[Word, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetWordRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetWordResponse(_message.Message):
    __slots__ = ("word",)
    WORD_FIELD_NUMBER: _ClassVar[int]
    word: Word
    def __init__(self, word: _Optional[_Union[Word, _Mapping]] = ...) -> None: ...

class ImportWordRequest(_message.Message):
    __slots__ = ("text", "model", "vectors")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    text: str
    model: str
    vectors: _blob_pb2.BlobRef
    def __init__(self, text: _Optional[str] = ..., model: _Optional[str] = ..., vectors: _Optional[_Union[_blob_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class ImportWordResponse(_message.Message):
    __slots__ = ("word",)
    WORD_FIELD_NUMBER: _ClassVar[int]
    word: Word
    def __init__(self, word: _Optional[_Union[Word, _Mapping]] = ...) -> None: ...

class DeleteWordRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteWordResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
