"""Collage Diffusion for callers: a client, collages in Python and as files, and the command `collage`.

    from pathlib import Path
    from collage_client import Collage, CollageClient, Layer

    collage = Collage(
        size=(128, 128),
        prompt="a {box} on a wooden table",
        layers=[Layer("box", "box.png", text="bento box", x=64, y=66, scale=0.5, noise=0.35)],
    )
    with CollageClient("127.0.0.1:50051") as client:
        job = client.generate(collage)
        for event in job:
            print(event.WhichOneof("kind"))
        Path("bento.png").write_bytes(job.result().images[0])

`AsyncCollageClient` has the same verbs with `await`: `job = await client.generate(collage)`, `async for event in job`,
`await job.result()`. A collage may also be the raw message (`collage.v1`), or come from a file:
`files.attach(files.load(Path("examples/bento")))`. Needs grpcio, protobuf, googleapis-common-protos
and, for files, pyyaml.

What a call raises:

    CollageError             code, reason, message, field_violations, retry_after_s
    ├── InvalidInput         the request or a collage file is wrong: mend it
    │   └── MessageTooLarge  one message is above gRPC's limit
    ├── PreconditionFailed   a blob or a word that the request names is missing
    ├── NotFound             no such job, word or blob
    ├── Full                 no room now: come again after retry_after_s
    ├── Unavailable          not reached, and the retries are used up
    ├── DeadlineExceeded     the caller's time is over; a job may still be going on
    └── JobFailed            the job ended without a result; CANCELLED when someone stopped it
"""

from collage_client import files
from collage_client._client import AsyncCollageClient
from collage_client._collage import Collage, Layer, Sampling, Structure
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
from collage_client._job import AsyncJob, JobResult
from collage_client._sync import CollageClient, Job

__version__ = "0.1.0"

__all__ = [
    "AsyncCollageClient",
    "AsyncJob",
    "Collage",
    "CollageClient",
    "CollageError",
    "DeadlineExceeded",
    "FieldViolation",
    "Full",
    "InvalidInput",
    "Job",
    "JobFailed",
    "JobResult",
    "Layer",
    "MessageTooLarge",
    "NotFound",
    "PreconditionFailed",
    "Sampling",
    "Structure",
    "Unavailable",
    "files",
]
