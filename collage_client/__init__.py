"""Collage Diffusion for callers: a client, collage files and results folders, and the command `collage`.

    from pathlib import Path
    from collage_client import CollageClient, files

    collage = files.attach(files.load(Path("examples/bento")))
    with CollageClient("127.0.0.1:50051") as client:
        result = client.generate(collage, on_event=print)
    Path("bento.png").write_bytes(result.images[0])

`AsyncCollageClient` is the same for programs with an event loop. Needs grpcio, protobuf and, for files, pyyaml.
"""

from collage_client import files
from collage_client._client import AsyncCollageClient, JobResult
from collage_client._errors import (
    CollageError,
    DeadlineExceeded,
    FieldViolation,
    Full,
    InvalidInput,
    JobFailed,
    MessageTooLarge,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from collage_client._sync import CollageClient

__all__ = [
    "AsyncCollageClient",
    "CollageClient",
    "CollageError",
    "DeadlineExceeded",
    "FieldViolation",
    "Full",
    "InvalidInput",
    "JobFailed",
    "JobResult",
    "MessageTooLarge",
    "NotFound",
    "PreconditionFailed",
    "Unavailable",
    "files",
]
