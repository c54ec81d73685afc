"""What callers get wrong, sent to a whole running system: the right code, the field by name, and nothing else."""

from __future__ import annotations

import asyncio
import io
import math
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from collage.v1 import collage_pb2
from collage.v1 import collage_service_pb2 as pb
from testing.system import (
    LIMIT_S,
    claimed_png,
    collage,
    cutout,
    layer,
    png,
    running,
    upload,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID, MISSING = "INVALID_ARGUMENT", "FAILED_PRECONDITION"
UNKNOWN_DIGEST = "ab" * 32
# What all of this may add to the process' memory at any moment.
MEMORY_LIMIT_BYTES = 300e6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory):
    async with running(tmp_path_factory.mktemp("system")) as system:
        await draw(system)
        # From here on the kernel's high-water mark is that of the bad input.
        Path("/proc/self/clear_refs").write_text("5")  # noqa: ASYNC240 no disk behind it
        before = memory("VmRSS")
        yield system
        await draw(system)
        assert memory("VmHWM") - before < MEMORY_LIMIT_BYTES


def memory(name: str) -> int:
    """A figure of this process' memory, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


async def draw(system) -> None:
    """A right request, done from one end to the other; and health says so."""
    events = await system.generate(
        pb.GenerateImagesRequest(
            request_id=str(uuid.uuid4()), collage=collage(), sampling={"steps": 2}
        )
    )
    assert events[-1].WhichOneof("kind") == "done", events[-1]
    check = health_pb2_grpc.HealthStub(system.channel).Check
    answer = await check(
        health_pb2.HealthCheckRequest(service="collage.v1.CollageService"), timeout=LIMIT_S
    )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What a caller is told. `fields`: of the wrong fields, or the missing blobs."""

    code: str
    reason: str
    fields: tuple[str, ...]
    message: str
    subjects: tuple[str, ...]


async def refused(call) -> Refusal:
    """The refusal that a call ends with, its details held to the rules that all errors follow."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return told(rpc_status.from_call(caught.value), caught.value)


def told(status: status_pb2.Status | None, error: object = None) -> Refusal:
    assert status is not None, error
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.PreconditionFailure,
    )
    found = {}
    for detail in status.details:
        for kind in kinds:
            if detail.Is(kind.DESCRIPTOR):
                assert kind not in found, "one detail of a kind"
                found[kind] = kind()
                detail.Unpack(found[kind])
    info, bad, lacking = (found.get(kind, kind()) for kind in kinds)
    assert info.domain == "collage.v1"
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+", info.reason)
    code = grpc_name(status.code)
    if code == INVALID:
        assert bad.field_violations
    return Refusal(
        code=code,
        reason=info.reason,
        fields=tuple(violation.field for violation in bad.field_violations)
        or tuple(v.description.removesuffix(" refers to it") for v in lacking.violations),
        message=status.message,
        subjects=tuple(violation.subject for violation in lacking.violations),
    )


def grpc_name(number: int) -> str:
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


def image(data: bytes) -> collage_pb2.Collage:
    """A collage whose first cut-out is these bytes."""
    return collage(layers=[layer("a", image={"data": data}), layer("b")])


def first(**changes) -> collage_pb2.Collage:
    """A collage whose first layer is changed."""
    return collage(layers=[layer(**changes), layer("b")])


def picture(mode: str, format_: str = "PNG") -> bytes:
    """A picture of noise in a mode and format."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, format_)
    return file.getvalue()


LAYER = "collage.layers[0]"

# id: a wrong collage, the fields that are named, and words of the message.
COLLAGES = {
    "png cut short": (image(cutout()[:-300]), [f"{LAYER}.image"], "cut short"),
    "png cut in its header": (image(cutout()[:20]), [f"{LAYER}.image"], "PNG, WebP or JPEG"),
    "png with a wrong checksum": (
        image(cutout().replace(b"IDAT", b"IDAT\0", 1)),
        [f"{LAYER}.image"],
        "damaged",
    ),
    "png of 100 megapixels": (
        image(claimed_png(10_000, 10_000, data=bytes(1000))),
        [f"{LAYER}.image"],
        "10000 x 10000",
    ),
    "png of 4 gigapixels": (
        image(claimed_png(65_535, 65_535, data=bytes(1000))),
        [f"{LAYER}.image"],
        "pixels",
    ),
    "png without a pixel": (image(claimed_png(0, 0)), [f"{LAYER}.image"], ""),
    "png without a row": (image(claimed_png(20, 0)), [f"{LAYER}.image"], ""),
    "png of 16 bits": (
        image(claimed_png(20, 20, bits=16, data=bytes(20 * 161))),
        [f"{LAYER}.image"],
        "8 bits",
    ),
    "gif": (image(picture("P", "GIF")), [f"{LAYER}.image"], "PNG, WebP or JPEG"),
    "garbage for a picture": (image(bytes(range(256))), [f"{LAYER}.image"], "no picture"),
    "no bytes": (image(b""), [f"{LAYER}.image.data"], "0 bytes"),
    "too many bytes inline": (
        image(bytes(2**20 + 1)),
        [f"{LAYER}.image.data"],
        "go through PutBlob",
    ),
    "no picture": (first(image={}), [f"{LAYER}.image"], "required"),
    "path on the server": (
        first(image={"path": "/etc/passwd"}),
        [f"{LAYER}.image.path"],
        "opens no paths",
    ),
    "malformed digest": (
        first(image={"blob": {"sha256": "../../x"}}),
        [f"{LAYER}.image.blob.sha256"],
        "64 lowercase hex",
    ),
    "digest in capitals": (
        first(image={"blob": {"sha256": "AB" * 32}}),
        [f"{LAYER}.image.blob.sha256"],
        "64 lowercase hex",
    ),
    "media type that is none": (
        first(image={"blob": {"sha256": "ab" * 32, "media_type": "sha256"}}),
        [f"{LAYER}.image.blob.media_type"],
        "image/png",
    ),
    "blob of negative size": (
        first(image={"blob": {"sha256": "ab" * 32, "size_bytes": -1}}),
        [f"{LAYER}.image.blob.size_bytes"],
        "-1",
    ),
    "background cut short": (
        collage(background={"image": {"data": picture("RGB")[:-50]}}),
        ["collage.background.image"],
        "cut short",
    ),
    "background with holes": (
        collage(background={"image": {"data": cutout()}}),
        ["collage.background.image"],
        "opaque",
    ),
    "colour out of range": (
        collage(background={"color": {"red": 256, "green": -1}}),
        ["collage.background.color.red", "collage.background.color.green"],
        "256",
    ),
    "dials that are no numbers": (
        first(noise=math.nan, attract=math.inf, repel=-math.inf, opacity=math.nan),
        [f"{LAYER}.noise", f"{LAYER}.attract", f"{LAYER}.repel", f"{LAYER}.opacity"],
        "nan",
    ),
    "dials out of range": (
        first(noise=1.0001, attract=-1e-9, repel=1e300, opacity=2),
        [f"{LAYER}.noise", f"{LAYER}.attract", f"{LAYER}.repel", f"{LAYER}.opacity"],
        "from 0 to 1",
    ),
    "transform out of range": (
        first(transform={"x": math.nan, "y": 1e9, "scale": 0, "rotation": 360.5}),
        [f"{LAYER}.transform.{name}" for name in ("x", "y", "scale", "rotation")],
        "nan",
    ),
    "scale too large": (
        first(transform={"scale": 64.5}),
        [f"{LAYER}.transform.scale"],
        "at most 64",
    ),
    "no layer": (collage(layers=[]), ["collage.layers"], "0 layers"),
    "33 layers": (
        collage(layers=[layer(f"l{index}") for index in range(33)], prompt=""),
        ["collage.layers"],
        "33 layers",
    ),
    "two layers of a name": (
        collage(layers=[layer("a"), layer("a")], prompt=""),
        ["collage.layers[1].name"],
        "layers[0]",
    ),
    "name like a path": (first(name="../../etc"), [f"{LAYER}.name"], "A-Z"),
    "name of a folder": (first(name=".."), [f"{LAYER}.name"], "A-Z"),
    "name too long": (first(name="a" * 65), [f"{LAYER}.name"], "1 to 64"),
    "no text": (first(text="  "), [f"{LAYER}.text"], "empty"),
    "text too long": (first(text="x" * 301), [f"{LAYER}.text"], "301"),
    "text with a zero byte": (first(text="a\0b"), [f"{LAYER}.text"], "control"),
    "prompt of 10,000 words": (
        collage(prompt="word " * 10_000),
        ["collage.prompt"],
        "50000 characters",
    ),
    # "sushi cake", the two marks, and 76 words of one token: 80 of 77.
    "prompt of 80 tokens": (
        collage(prompt="{a} {b}" + " a" * 76),
        ["collage.prompt"],
        "80 tokens, 3 too many",
    ),
    "negative prompt of 80 tokens": (
        collage(negative_prompt="a " * 78),
        ["collage.negative_prompt"],
        "3 too many",
    ),
    "placeholder of no layer": (collage(prompt="{a} {nobody}"), ["collage.prompt"], "nobody"),
    "placeholder twice": (collage(prompt="{a} {a}"), ["collage.prompt"], "twice"),
    "lone brace": (collage(prompt="{a} }"), ["collage.prompt"], "brace"),
    "size that is no multiple": (
        collage(size={"width": 40, "height": 48}),
        ["collage.size.width"],
        "nearest: 32, 48",
    ),
    "no size": (collage(size={}), ["collage.size.width", "collage.size.height"], "is 0"),
    "size above the contract's": (
        collage(size={"width": 2**31 - 1, "height": -(2**31)}),
        ["collage.size.width", "collage.size.height"],
        "2048",
    ),
    "size above the model's": (
        collage(size={"width": 2048, "height": 48}),
        ["collage.size.width"],
        "nearest: 128",
    ),
    "unknown control kind": (
        first(structure=[{"kind": "canny"}]),
        [f"{LAYER}.structure[0].kind"],
        "no ControlNet",
    ),
    "control that ends before it starts": (
        first(structure=[{"kind": "canny", "start": 0.9, "end": 0.1}]),
        [f"{LAYER}.structure[0].end"],
        "before start",
    ),
    "a thousand controls": (
        first(structure=[{"kind": "canny"}] * 1000),
        [f"{LAYER}.structure"],
        "1000 parts",
    ),
    "appearance of nothing": (first(appearance={}), [f"{LAYER}.appearance"], "empty"),
    "word without a name": (
        first(appearance={"word": ""}),
        [f"{LAYER}.appearance.word"],
        "required",
    ),
    "word that is not stored": (
        first(appearance={"word": "words/x"}),
        [f"{LAYER}.appearance.word"],
        "no word",
    ),
    "vectors of a word that has its own": (
        first(appearance={"word": "words/x", "vectors": 2}),
        [f"{LAYER}.appearance.vectors"],
        "only with learn",
    ),
    "too many vectors": (
        first(appearance={"learn": True, "vectors": 9}),
        [f"{LAYER}.appearance.vectors"],
        "from 1 to 8",
    ),
    "weight out of range": (
        first(appearance={"learn": True, "weight": 2.5}),
        [f"{LAYER}.appearance.weight"],
        "from 0 to 2",
    ),
    "no collage": (
        collage_pb2.Collage(),
        ["collage.size.width", "collage.size.height", "collage.layers"],
        "is 0",
    ),
}

# id: wrong sampling settings, the fields that are named, and words of the message.
SAMPLINGS = {
    "unknown model": ({"model": "dall-e"}, ["sampling.model"], "allowed: toy"),
    "unknown sampler": ({"sampler": "magic"}, ["sampling.sampler"], "euler, euler_ancestral, ddim"),
    "no steps": ({"steps": 0}, ["sampling.steps"], "from 1 to 1000"),
    "too many steps": ({"steps": 1001}, ["sampling.steps"], "1001"),
    "17 images": ({"images": 17}, ["sampling.images"], "from 1 to 16"),
    "no image": ({"images": 0}, ["sampling.images"], "from 1 to 16"),
    "guidance that is no number": (
        {"guidance_scale": math.nan},
        ["sampling.guidance_scale"],
        "nan",
    ),
    "guidance out of range": ({"guidance_scale": -1}, ["sampling.guidance_scale"], "from 0 to 50"),
    "preview every zero steps": ({"preview_every": 0}, ["sampling.preview_every"], "from 1"),
}

BEGINNINGS = ("plan", "generate", "create", "redo")


def begin(stub, way: str, scene: collage_pb2.Collage, sampling=None):
    """One of the calls that take a collage, and where that stands in its request."""
    sampling = collage_pb2.Sampling(**(sampling or {}))
    if way == "plan":
        request = pb.PlanCollageRequest(collage=scene, sampling=sampling)
        return stub.PlanCollage(request, timeout=LIMIT_S), ""
    if way == "generate":
        request = pb.GenerateImagesRequest(collage=scene, sampling=sampling)
        return stub.GenerateImages(request, timeout=LIMIT_S), ""
    if way == "create":
        work = pb.GenerateWork(collage=scene, sampling=sampling)
        return stub.CreateJob(pb.CreateJobRequest(generate=work), timeout=LIMIT_S), "generate."
    parent = {"data": png(np.zeros((48, 32, 3), np.uint8))}
    redo = pb.RedoWork(collage=scene, sampling=sampling, parent=parent, layers=["b"])
    return stub.CreateJob(pb.CreateJobRequest(redo=redo), timeout=LIMIT_S), "redo."


@pytest.mark.parametrize(
    ("row", "way"),
    [
        (row, way)
        for row in COLLAGES
        for way in BEGINNINGS
        # A redo draws no background.
        if way != "redo" or not row.startswith("background")
    ],
)
async def test_a_wrong_collage_is_refused_by_field(system, row, way):
    scene, fields, words = COLLAGES[row]
    call, root = begin(system.stub, way, scene)
    refusal = await refused(call)
    assert refusal.code == INVALID
    assert list(refusal.fields) == [root + field for field in fields]
    assert words in refusal.message
    assert refusal.message.startswith(root + fields[0])


@pytest.mark.parametrize("way", BEGINNINGS)
@pytest.mark.parametrize("row", SAMPLINGS)
async def test_wrong_sampling_is_refused_by_field(system, row, way):
    sampling, fields, words = SAMPLINGS[row]
    call, root = begin(system.stub, way, collage(), sampling)
    refusal = await refused(call)
    assert (refusal.code, list(refusal.fields)) == (INVALID, [root + field for field in fields])
    assert words in refusal.message


@pytest.mark.parametrize("way", BEGINNINGS)
async def test_blobs_that_were_not_uploaded_are_named_with_their_fields(system, way):
    unknown = {"blob": {"sha256": UNKNOWN_DIGEST}}
    other = {"blob": {"sha256": "cd" * 32}}
    scene = collage(
        layers=[layer("a", image=unknown), layer("b"), layer("c", image=other, text="rice")],
        background={"image": unknown},
    )
    call, root = begin(system.stub, way, scene)
    refusal = await refused(call)
    assert (refusal.code, refusal.reason) == (MISSING, "BLOB_MISSING")
    assert dict(zip(refusal.fields, refusal.subjects, strict=True)) == {
        f"{root}collage.layers[0].image": UNKNOWN_DIGEST,
        f"{root}collage.layers[2].image": "cd" * 32,
        f"{root}collage.background.image": UNKNOWN_DIGEST,
    }
    assert UNKNOWN_DIGEST in refusal.message


SQUARE = np.zeros((16, 16, 3), np.uint8)
# id: what is wrong with a redo, and the field that is named.
REDOS = {
    "a layer nobody knows": ({"layers": ["nobody"]}, "redo.layers[0]"),
    "no layer": ({"layers": []}, "redo.layers"),
    "33 layers": ({"layers": ["a"] * 33}, "redo.layers"),
    "a parent of another size": ({"parent": {"data": png(SQUARE)}}, "redo.parent"),
    "a parent with holes": ({"parent": {"data": cutout()}}, "redo.parent"),
    "a parent cut short": ({"parent": {"data": png(SQUARE)[:40]}}, "redo.parent"),
    "no parent": ({"parent": {}}, "redo.parent"),
    "a feather that is no number": ({"feather": math.nan}, "redo.feather"),
    "a feather too wide": ({"feather": 64.5}, "redo.feather"),
}


@pytest.mark.parametrize("row", REDOS)
async def test_a_wrong_redo_is_refused_by_field(system, row):
    changes, field = REDOS[row]
    right = {
        "collage": collage(),
        "parent": {"data": png(np.zeros((48, 32, 3), np.uint8))},
        "layers": ["a"],
    }
    request = pb.CreateJobRequest(redo=pb.RedoWork(**{**right, **changes}))
    refusal = await refused(system.stub.CreateJob(request, timeout=LIMIT_S))
    assert (refusal.code, refusal.fields) == (INVALID, (field,))


async def test_a_redo_names_a_parent_that_was_not_uploaded(system):
    parent = {"blob": {"sha256": UNKNOWN_DIGEST}}
    redo = pb.RedoWork(collage=collage(), parent=parent, layers=["a"])
    refusal = await refused(system.stub.CreateJob(pb.CreateJobRequest(redo=redo), timeout=LIMIT_S))
    assert (refusal.code, refusal.fields) == (MISSING, ("redo.parent",))


PUT = "PutBlob"
DATA = b"some bytes"
HEADER, DATA_CHUNK = upload(DATA)
LARGE = {"size_bytes": 64 * 2**20}

# id: method, request (a list for a stream), code, the field or the reason, and words of the message.
CALLS = {
    "request id that is no UUID": (
        "CreateJob",
        pb.CreateJobRequest(request_id="mine", generate={"collage": collage()}),
        INVALID,
        "request_id",
        "a UUID",
    ),
    "request id of a stream that is no UUID": (
        "GenerateImages",
        pb.GenerateImagesRequest(request_id="../x", collage=collage()),
        INVALID,
        "request_id",
        "a UUID",
    ),
    "unknown disconnect policy": (
        "GenerateImages",
        pb.GenerateImagesRequest(collage=collage(), on_disconnect=7),
        INVALID,
        "on_disconnect",
        "DISCONNECT_POLICY_CANCEL",
    ),
    "job of no work": ("CreateJob", pb.CreateJobRequest(), INVALID, "work", "required"),
    "learning for a layer nobody knows": (
        "CreateJob",
        pb.CreateJobRequest(learn={"collage": collage(), "layers": ["a", "nobody"]}),
        INVALID,
        "learn.layers[1]",
        "nobody",
    ),
    "learning nothing": (
        "CreateJob",
        pb.CreateJobRequest(learn={"collage": collage()}),
        INVALID,
        "learn.layers",
        "required",
    ),
    "learning for an unknown model": (
        "CreateJob",
        pb.CreateJobRequest(learn={"collage": collage(), "layers": ["a"], "model": "x"}),
        INVALID,
        "learn.model",
        "toy",
    ),
    "learning from a wrong collage": (
        "CreateJob",
        pb.CreateJobRequest(learn={"collage": first(noise=2), "layers": ["a"]}),
        INVALID,
        "learn.collage.layers[0].noise",
        "2",
    ),
    **{
        f"{method}, page size below zero": (
            method,
            getattr(pb, f"{method}Request")(page_size=-1),
            INVALID,
            "page_size",
            "0 to 100",
        )
        for method in ("ListJobs", "ListModels", "ListWords")
    },
    **{
        f"{method}, page token {token[:9]!r}": (
            method,
            getattr(pb, f"{method}Request")(page_token=token),
            INVALID,
            "page_token",
            "next_page_token",
        )
        for method in ("ListJobs", "ListModels", "ListWords")
        for token in ("x", "-1", "1.5", "'; DROP TABLE jobs", "9" * 5000)
    },
    "page of words behind the last": (
        "ListWords",
        pb.ListWordsRequest(page_token="9" * 30),
        INVALID,
        "page_token",
        "99",
    ),
    **{
        f"{method} of {name[:12]!r}": (
            method,
            getattr(pb, f"{method}Request")(name=name),
            "NOT_FOUND",
            "JOB_NOT_FOUND",
            "no job",
        )
        for method in ("GetJob", "CancelJob", "WatchJob")
        for name in ("", "jobs/", "jobs/nobody", "words/x", "jobs/../x", "jobs/" + "x" * 10**6)
    },
    "watching from before the start": (
        "WatchJob",
        pb.WatchJobRequest(name="jobs/x", after_sequence=-1),
        INVALID,
        "after_sequence",
        "0 or more",
    ),
    "getting a malformed digest": (
        "GetBlob",
        pb.GetBlobRequest(sha256="../../etc/passwd"),
        INVALID,
        "sha256",
        "64 lowercase",
    ),
    "getting an unknown blob": (
        "GetBlob",
        pb.GetBlobRequest(sha256=UNKNOWN_DIGEST),
        "NOT_FOUND",
        "BLOB_NOT_FOUND",
        UNKNOWN_DIGEST,
    ),
    "checking a malformed digest": (
        "CheckBlobs",
        pb.CheckBlobsRequest(sha256=[UNKNOWN_DIGEST, "x"]),
        INVALID,
        "sha256[1]",
        "'x'",
    ),
    "checking 257 digests": (
        "CheckBlobs",
        pb.CheckBlobsRequest(sha256=[UNKNOWN_DIGEST] * 257),
        INVALID,
        "sha256",
        "256",
    ),
    "upload of nothing": (PUT, [], INVALID, "header", "required"),
    "upload without a header": (PUT, [DATA_CHUNK, HEADER], INVALID, "header", "required"),
    "upload with two headers": (PUT, [HEADER, HEADER, DATA_CHUNK], INVALID, "header", "twice"),
    "upload of an empty message": (
        PUT,
        [HEADER, pb.PutBlobRequest(), DATA_CHUNK],
        INVALID,
        "chunk",
        "0 bytes",
    ),
    "upload of other bytes": (
        PUT,
        list(upload(DATA, sha256=UNKNOWN_DIGEST)),
        INVALID,
        "header.sha256",
        UNKNOWN_DIGEST,
    ),
    "upload under a malformed digest": (
        PUT,
        list(upload(DATA, sha256="x")),
        INVALID,
        "header.sha256",
        "64 lowercase",
    ),
    "upload with a malformed media type": (
        PUT,
        list(upload(DATA, media_type="a\nb")),
        INVALID,
        "header.media_type",
        "image/png",
    ),
    "upload of too many bytes": (PUT, list(upload(DATA, size_bytes=9)), INVALID, "chunk", "beyond"),
    "upload of too few bytes": (
        PUT,
        list(upload(DATA, size_bytes=11)),
        INVALID,
        "header.size_bytes",
        "10 bytes came",
    ),
    "upload larger than allowed": (
        PUT,
        list(upload(DATA, size_bytes=64 * 2**20 + 1)),
        INVALID,
        "header.size_bytes",
        "67108864",
    ),
    "upload of negative size": (
        PUT,
        list(upload(DATA, size_bytes=-1)),
        INVALID,
        "header.size_bytes",
        "-1",
    ),
    "upload in too large pieces": (
        PUT,
        [next(upload(DATA, **LARGE)), pb.PutBlobRequest(chunk=bytes(2**20 + 1))],
        INVALID,
        "chunk",
        "1048576",
    ),
    "getting a word": (
        "GetWord",
        pb.GetWordRequest(name="words/x"),
        "NOT_FOUND",
        "WORD_NOT_FOUND",
        "words/x",
    ),
    "deleting a word": (
        "DeleteWord",
        pb.DeleteWordRequest(name="words/x"),
        "NOT_FOUND",
        "WORD_NOT_FOUND",
        "words/x",
    ),
    "importing a word for an unknown model": (
        "ImportWord",
        pb.ImportWordRequest(text="x", model="nobody"),
        INVALID,
        "model",
        "nobody",
    ),
    "importing nothing": (
        "ImportWord",
        pb.ImportWordRequest(text="x"),
        INVALID,
        "vectors.sha256",
        "64 lowercase",
    ),
    "importing what was not uploaded": (
        "ImportWord",
        pb.ImportWordRequest(text="x", vectors={"sha256": UNKNOWN_DIGEST}),
        MISSING,
        "BLOB_MISSING",
        UNKNOWN_DIGEST,
    ),
}


@pytest.mark.parametrize("row", CALLS)
async def test_a_wrong_call_is_refused(system, row):
    method, request, code, name, words = CALLS[row]
    argument = iter(request) if isinstance(request, list) else request
    refusal = await refused(getattr(system.stub, method)(argument, timeout=LIMIT_S))
    assert refusal.code == code
    if code == INVALID:
        assert refusal.fields == (name,)
    else:
        assert refusal.reason == name
    assert words in refusal.message


async def test_a_request_id_is_not_taken_for_another_request(system):
    request = pb.CreateJobRequest(
        request_id=str(uuid.uuid4()), generate={"collage": collage(), "sampling": {"steps": 1}}
    )
    await system.stub.CreateJob(request, timeout=LIMIT_S)
    request.generate.collage.layers[0].noise = 0.25
    refusal = await refused(system.stub.CreateJob(request, timeout=LIMIT_S))
    assert (refusal.code, refusal.reason) == (INVALID, "REQUEST_ID_REUSED")
    assert refusal.fields == ("request_id",)


@pytest.mark.parametrize("way", BEGINNINGS)
async def test_what_does_not_fit_the_machine_is_refused_before_it_runs(system, way, monkeypatch):
    # As if a U-Net took so much.
    monkeypatch.setattr("services.generator.card.UNET_COPIES", 2**40)
    call, root = begin(system.stub, way, collage(), {"images": 16})
    refusal = await refused(call)
    assert (refusal.code, refusal.reason) == (INVALID, "TOO_MUCH_MEMORY")
    assert refusal.fields == (f"{root}sampling.images",)


async def test_slow_uploads_keep_nobody_from_uploading_and_end(system, monkeypatch):
    monkeypatch.setattr("gateway.uploads.LEAST_BYTES_S", 1.0)

    async def silent():
        yield HEADER
        await asyncio.sleep(LIMIT_S)

    async def trickling():
        yield HEADER
        while True:
            await asyncio.sleep(0.1)
            yield pb.PutBlobRequest(chunk=DATA[:1])

    calls = [
        system.stub.PutBlob(sender(), timeout=LIMIT_S)
        for sender in (silent, trickling)
        for _ in range(8)
    ]
    put = await system.stub.PutBlob(upload(DATA), timeout=LIMIT_S)
    assert put.blob.sha256 == HEADER.header.sha256
    for call in calls:
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == ("DEADLINE_EXCEEDED", "UPLOAD_TOO_SLOW")


async def test_an_upload_may_last_as_long_as_enough_comes(system, monkeypatch):
    monkeypatch.setattr("gateway.uploads.LEAST_BYTES_S", 1.0)
    monkeypatch.setattr("gateway.uploads.LEAST_BYTES", 1)
    data = bytes(range(40))

    async def slow():
        header, *_ = upload(data)
        yield header
        for byte in data:
            await asyncio.sleep(0.06)
            yield pb.PutBlobRequest(chunk=bytes([byte]))

    put = await system.stub.PutBlob(slow(), timeout=LIMIT_S)
    assert put.blob.size_bytes == len(data)


def faint(alpha: int, *, side: int = 20, box: int = 100) -> np.ndarray:
    """A square of that alpha and a dot in the corner, so that both are seen in a box of that many pixels."""
    pixels_HW4 = np.full((box, box, 4), 200, np.uint8)
    pixels_HW4[..., 3] = 0
    pixels_HW4[:side, :side, 3] = alpha
    pixels_HW4[-1, -1, 3] = 1
    return pixels_HW4


@pytest.mark.parametrize("work", ["generate", "learn"])
@pytest.mark.parametrize(
    ("pixels", "reason", "said"),
    [
        (np.zeros((20, 20, 4), np.uint8), "INVALID_PICTURE", "transparent everywhere"),
        (
            faint(10),
            "TOO_LITTLE_VISIBLE",
            "shows 15.7 pixels, weighed by their alpha; required: 16",
        ),
        (
            faint(120),
            "TOO_LITTLE_VISIBLE",
            "shows 1.88% of the 100 x 100 pixels around it, weighed by their alpha; required: 2%",
        ),
    ],
)
async def test_a_job_fails_where_nothing_can_be_learned_and_names_the_layer(
    system, work, pixels, reason, said
):
    nothing = png(pixels)
    scene = collage(
        layers=[layer("a"), layer("b", image={"data": nothing}, appearance={"learn": True})]
    )
    job = await system.stub.CreateJob(
        pb.CreateJobRequest(**{work: {"collage": scene}}), timeout=LIMIT_S
    )
    events = await system.watch(job.job.name)
    refusal = told(
        status_pb2.Status(
            code=events[-1].failed.code,
            message=events[-1].failed.message,
            details=events[-1].failed.details,
        )
    )
    assert (refusal.code, refusal.reason) == (INVALID, reason)
    assert refusal.fields == (f"{work}.collage.layers[1].image",)
    assert said in events[-1].failed.message
    assert "generate" not in [event.stage_started.stage for event in events]


@pytest.mark.parametrize(
    ("method", "kind"),
    [("PlanCollage", "unary_unary"), ("GenerateImages", "unary_stream"), (PUT, "stream_unary")],
)
async def test_bytes_that_are_no_message_are_refused(system, method, kind):
    data = b"\xff\xff\xff"
    call = getattr(system.channel, kind)(f"/collage.v1.CollageService/{method}")
    argument = iter([data]) if kind == "stream_unary" else data
    refusal = await refused(call(argument, timeout=LIMIT_S))
    assert (refusal.code, refusal.fields) == (INVALID, ("request",))


async def test_fields_of_a_newer_contract_are_not_dropped_silently(system):
    unknown = b"\x98\x06\x01"  # field 99, a number
    scene = collage()
    scene.layers[1].transform.MergeFromString(unknown)
    refusal = await refused(
        system.stub.PlanCollage(pb.PlanCollageRequest(collage=scene), timeout=LIMIT_S)
    )
    assert (refusal.code, refusal.fields) == (INVALID, ("collage.layers[1].transform.99",))
    request = pb.ListModelsRequest.FromString(unknown)
    refusal = await refused(system.stub.ListModels(request, timeout=LIMIT_S))
    assert (refusal.code, refusal.fields) == (INVALID, ("99",))


async def test_whatever_is_wrong_the_answer_fits_into_a_header(system):
    # Otherwise gRPC gives another code, and none of this reaches the caller.
    names = [f"{index:02}" + "長" * 3000 for index in range(32)]
    scene = collage(
        prompt="{" + "長" * 3900,
        layers=[layer(name, noise=math.nan, text="長" * 301, image={}) for name in names],
    )
    call, _ = begin(system.stub, "plan", scene, {"sampler": "長" * 10_000})
    assert (await refused(call)).code == INVALID
    call, _ = begin(system.stub, "plan", scene)
    refusal = await refused(call)
    assert refusal.fields[0] == f"{LAYER}.name"
    parent = {"data": png(np.zeros((48, 32, 3), np.uint8))}
    right = [layer("x" * 60 + f"{index:02}") for index in range(32)]
    redo = pb.RedoWork(collage=collage(layers=right, prompt=""), parent=parent, layers=names)
    refusal = await refused(system.stub.CreateJob(pb.CreateJobRequest(redo=redo), timeout=LIMIT_S))
    assert refusal.fields[0] == "redo.layers[0]"


async def test_a_request_id_that_cannot_stand_in_a_header_is_replaced(system):
    call = system.stub.PlanCollage(
        pb.PlanCollageRequest(collage=collage()),
        timeout=LIMIT_S,
        metadata=(("x-request-id", "x" * 4000),),
    )
    assert (await call).plan.prompt == "a sushi and a cake"


# Requests of all kinds: half of them right in every field, so that each part of the system gets to see them.

ANY_NUMBER = st.floats(allow_nan=True, allow_infinity=True)
ANY_INTEGER = st.integers(-(2**31), 2**31 - 1)
RIGHT_PICTURES = [{"data": cutout(seed, side=side)} for seed, side in ((0, 20), (1, 9), (2, 1))]
WRONG_PICTURES = [
    {},
    {"path": "x"},
    {"data": cutout()[:-9]},
    {"data": b"x"},
    {"data": picture("RGB")},
    {"blob": {"sha256": UNKNOWN_DIGEST}},
    {"blob": {"sha256": "q", "size_bytes": -1}},
]


@st.composite
def requests(draw) -> pb.PlanCollageRequest:
    """A request that is small, and extreme in what it says."""
    wrong_percent = draw(st.sampled_from([0, 0, 1, 10]))

    def one(right, wrong):
        return draw(wrong if draw(st.integers(1, 100)) <= wrong_percent else right)

    def some(fields):
        """Some of the fields, each either right or wrong."""
        return {name: one(*ways) for name, ways in fields.items() if draw(st.booleans())}

    fraction = (st.floats(0, 1), ANY_NUMBER)
    place = (st.floats(-32768, 32768) | st.floats(0, 64), ANY_NUMBER)
    scale = (st.floats(0, 64, exclude_min=True) | st.floats(0.1, 4), ANY_NUMBER)
    transform = {"x": place, "y": place, "scale": scale, "rotation": (st.floats(-360, 360),) * 2}
    either = (st.booleans(), st.booleans())
    dials = {
        "noise": fraction,
        "attract": fraction,
        "repel": fraction,
        "opacity": fraction,
        "visible": either,
        "seed": (st.integers(0, 2**64 - 1),) * 2,
        "structure": (st.just([]), st.just([{"kind": "canny", "start": 2}])),
        "appearance": (st.just({"learn": True}), st.sampled_from([{}, {"word": "w"}])),
    }
    layers = [
        {
            "name": f"l{index}",
            "image": one(st.sampled_from(RIGHT_PICTURES), st.sampled_from(WRONG_PICTURES)),
            "text": one(st.sampled_from(["cake", "rice"]), st.text(max_size=9)),
            "transform": some({**transform, "flip_horizontal": either, "flip_vertical": either}),
            **some(dials),
        }
        for index in range(draw(st.integers(1, 8) | st.just(32)))
    ]
    side = (st.integers(1, 8).map(lambda cells: 16 * cells), ANY_INTEGER)
    scene = {
        "size": {"width": one(*side), "height": one(*side)},
        "layers": layers,
        **some(
            {
                "prompt": (st.sampled_from(["a cake", "{l0}", "", "é"]), st.text(max_size=50)),
                "negative_prompt": (st.just("rice"), st.text(max_size=50)),
                "background": (
                    st.just({"color": {"red": 9, "green": 255}}),
                    st.sampled_from([{"color": {"red": -1}}, {"image": {"data": cutout()}}]),
                ),
            }
        ),
    }
    sampling = some(
        {
            "sampler": (st.sampled_from(["euler", "unipc"]), st.text(max_size=9)),
            "steps": (st.integers(1, 1000), ANY_INTEGER),
            "guidance_scale": (st.floats(0, 50), ANY_NUMBER),
            "images": (st.integers(1, 16), ANY_INTEGER),
            "seed": (st.integers(0, 2**64 - 1),) * 2,
            "preview_every": (st.integers(1, 1000), ANY_INTEGER),
        }
    )
    return pb.PlanCollageRequest(
        collage=collage_pb2.Collage(**scene), sampling=collage_pb2.Sampling(**sampling)
    )


def stands_in(message, path: str) -> bool:
    """Is this the path of a field that the message has, elements of lists included?"""
    for part in path.split("."):
        name, _, index = part.partition("[")
        if name not in {field.name for field in message.DESCRIPTOR.fields}:
            return False
        message = getattr(message, name)
        if index:
            if not int(index.removesuffix("]")) < len(message):
                return False
            message = message[int(index.removesuffix("]"))]
    return True


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(request=requests())
async def test_any_request_is_planned_or_refused_by_a_field_that_it_has(system, request):
    try:
        plan = (await system.stub.PlanCollage(request, timeout=LIMIT_S)).plan
    except grpc.aio.AioRpcError as error:
        refusal = told(rpc_status.from_call(error), error)
        assert refusal.code in (INVALID, MISSING), error
        assert all(stands_in(request, field) for field in refusal.fields), refusal
        event(refusal.code)
        return
    event("planned")
    assert len(plan.layers) == len(request.collage.layers)
    for part in plan.layers:
        for name in ("noise", "attract", "repel", "visible_fraction", "unoccluded_fraction"):
            assert 0 <= getattr(part, name) <= 1, (name, part)
    assert all(stands_in(request, warning.field) for warning in plan.warnings)
