"""`POST /files/open` and `POST /files/save`: collages in files of other tools, for a page or a script.

Main type: `Files`. The files are opened and written by `interchange`, in a process that can be ended; pictures go to
the gateway as blobs and come from it. No pixel is seen here.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import parse_qs

import grpc
from google.protobuf import json_format
from google.rpc import code_pb2
from starlette.types import Receive, Scope, Send

from collage.v1 import blob_pb2, collage_pb2, collage_service_pb2_grpc
from collage.v1 import collage_service_pb2 as pb
from door import status
from door.calls import JSON_BYTES, JSON_MEDIA_TYPE, call_options, refuse, upload
from door.exchange import Exchange, Gone, Holding, Load, TooLarge
from interchange.asking import FORMS, MEDIA_TYPES, Interchange
from services.common.errors import (
    CollageError,
    InvalidRequest,
    MissingBlobs,
    NotSupported,
    from_rpc,
    quote,
)
from services.common.field import Field

PATH = "/files/"
# A file, and all pictures of one: they are held while they are worked on.
MAX_FILE_BYTES = 120 * 2**20
# Less than a message may hold.
_CHUNK_BYTES = 512 * 1024
_MEDIA_TYPES = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"RIFF", "image/webp"),
)
# What reads PSD files is installed by the extra `files`.
_READER = "psd_tools"

T = TypeVar("T")


class Files:
    """Opens and writes files, with the gateway at the other end of a channel.

    Args:
        channel: to the gateway.
        load: of files alone: one may hold nearly all that there is.
        interchange: closed by whoever made it.
    """

    def __init__(self, channel: grpc.aio.Channel, load: Load, interchange: Interchange) -> None:
        self._stub: Any = collage_service_pb2_grpc.CollageServiceStub(channel)  # type: ignore[no-untyped-call]
        self._load = load
        self._interchange = interchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One exchange, as ASGI has it."""
        exchange = Exchange(scope, receive, send)
        what = str(scope["path"]).removeprefix(PATH)
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        with suppress(Gone):
            try:
                with self._load.exchange(exchange.peer) as holding:
                    await self._serve(exchange, what, query, holding)
            except (CollageError, grpc.aio.AioRpcError) as error:
                await refuse(exchange, status.told(error))

    async def _serve(
        self, exchange: Exchange, what: str, query: Mapping[str, list[str]], holding: Holding
    ) -> None:
        if what not in ("open", "save"):
            raise NotSupported(
                f"no {quote(what)} here; there are POST {PATH}open and POST {PATH}save",
                reason="NO_PATH",
            )
        if exchange.method != "POST":
            told = NotSupported(f"{exchange.method} is not allowed here", reason="HTTP_FORM")
            body = status.rendered(told.to_status()).encode()
            await exchange.answer(405, body, JSON_MEDIA_TYPE, [("allow", "POST")])
            return
        if find_spec(_READER) is None:
            raise NotSupported(
                "this server opens no files; its operator installs collage-diffusion[files]",
                reason="NOT_INSTALLED",
            )
        if what == "open":
            await self._open(exchange, holding)
        else:
            await self._save(exchange, query.get("form", [""])[0], holding)

    async def _open(self, exchange: Exchange, holding: Holding) -> None:
        """A file in, its collage out, its pictures as blobs."""
        data = await exchange.body(MAX_FILE_BYTES, holding)
        if data is None:
            told = exchange.announced_bytes()
            size = f"{told}" if told > 0 else "more"
            raise InvalidRequest.of("file", f"has {size} bytes; allowed: at most {MAX_FILE_BYTES}")
        collage, warnings = await _while_there(exchange, self._opened(exchange, data, holding))
        tree = {
            "collage": json_format.MessageToDict(collage),
            "warnings": [json_format.MessageToDict(each) for each in warnings],
        }
        body = json.dumps(tree).encode()
        await exchange.answer(200, body, JSON_MEDIA_TYPE, [("cache-control", "no-store")])

    async def _save(self, exchange: Exchange, form: str, holding: Holding) -> None:
        """A collage in, a file out."""
        if form not in FORMS:
            raise InvalidRequest.of("form", f"is {quote(form)}; allowed: {', '.join(FORMS)}")
        body = await exchange.body(JSON_BYTES, holding)
        if body is None:
            told = exchange.announced_bytes()
            raise TooLarge(str(told) if told > 0 else "more", JSON_BYTES)
        collage, drawn = await asyncio.to_thread(_parsed, body)
        work = self._saved(exchange, collage, drawn, form, holding)
        data = await _while_there(exchange, work)
        name = f'attachment; filename="collage.{form}"'
        more = [("content-disposition", name), ("cache-control", "no-store")]
        await exchange.answer(200, data, MEDIA_TYPES[form], more)

    async def _opened(
        self, exchange: Exchange, data: bytes, holding: Holding
    ) -> tuple[collage_pb2.Collage, list[collage_pb2.Warning]]:
        options = call_options(exchange)
        collage, warnings = await self._interchange.opened(data)
        images = [image for _, image in _images(collage)]
        holding.take(sum(len(image.data) for image in images))
        for image in images:
            image.blob.CopyFrom(await self._put(image.data, options))
        return collage, warnings

    async def _saved(
        self,
        exchange: Exchange,
        collage: collage_pb2.Collage,
        drawn: blob_pb2.BlobRef,
        form: str,
        holding: Holding,
    ) -> bytes:
        options = call_options(exchange)
        found: dict[str, bytes] = {}
        for field, image in _images(collage):
            if image.WhichOneof("source") == "blob":
                image.data = await self._get(f"{field}.blob", image.blob, found, options, holding)
        result = b""
        if drawn.sha256:
            result = await self._get("result", drawn, found, options, holding)
        return await self._interchange.saved(collage, form, result)

    async def _put(self, data: bytes, options: dict[str, Any]) -> blob_pb2.BlobRef:
        """Stores a picture, where it is not stored."""
        kind = next((kind for start, kind in _MEDIA_TYPES if data.startswith(start)), "")
        ref = blob_pb2.BlobRef(
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            media_type=kind or "application/octet-stream",
        )
        known = await self._stub.CheckBlobs(pb.CheckBlobsRequest(sha256=[ref.sha256]), **options)
        if known.missing_sha256:
            await upload(self._stub.PutBlob(**options), _parts(ref, data))
        return ref

    async def _get(
        self,
        field: str,
        ref: blob_pb2.BlobRef,
        found: dict[str, bytes],
        options: dict[str, Any],
        holding: Holding,
    ) -> bytes:
        """A stored picture, once for all fields that name it.

        Raises:
            MissingBlobs: it is not stored.
            InvalidRequest: all together are too large.
        """
        if ref.sha256 in found:
            return found[ref.sha256]
        data = bytearray()
        call = self._stub.GetBlob(pb.GetBlobRequest(sha256=ref.sha256), **options)
        try:
            async for part in call:
                total = sum(map(len, found.values())) + len(data) + len(part.chunk)
                if total > MAX_FILE_BYTES:
                    raise InvalidRequest.of(
                        field,
                        f"brings all pictures to more than {MAX_FILE_BYTES} bytes; allowed: that many",
                    )
                holding.take(len(part.chunk))
                data += part.chunk
        except grpc.aio.AioRpcError as error:
            if error.code().value[0] == code_pb2.NOT_FOUND:
                raise MissingBlobs({field: ref.sha256}) from error
            if error.code().value[0] == code_pb2.INVALID_ARGUMENT:
                raise from_rpc(error).moved({"sha256": Field(f"{field}.sha256")}) from error
            raise
        finally:
            call.cancel()
        found[ref.sha256] = bytes(data)
        return found[ref.sha256]


async def _while_there(exchange: Exchange, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is cancelled when the other side goes. Raises `Gone`."""
    working, watching = asyncio.create_task(work), asyncio.create_task(exchange.gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _parts(ref: blob_pb2.BlobRef, data: bytes) -> AsyncIterator[pb.PutBlobRequest]:
    yield pb.PutBlobRequest(header=ref)
    for start in range(0, len(data), _CHUNK_BYTES):
        yield pb.PutBlobRequest(chunk=data[start : start + _CHUNK_BYTES])


def _images(collage: collage_pb2.Collage) -> list[tuple[str, blob_pb2.Image]]:
    """Every picture of a collage, with its field."""
    found = []
    for index, layer in enumerate(collage.layers):
        field = f"collage.layers[{index}]"
        found.append((f"{field}.image", layer.image))
        found += [
            (f"{field}.structure[{number}].image", structure.image)
            for number, structure in enumerate(layer.structure)
            if structure.HasField("image")
        ]
    if collage.background.WhichOneof("kind") == "image":
        found.append(("collage.background.image", collage.background.image))
    return [(field, image) for field, image in found if image.WhichOneof("source")]


def _parsed(body: bytes) -> tuple[collage_pb2.Collage, blob_pb2.BlobRef]:
    """The collage to be saved, and the drawn picture."""
    collage, drawn = collage_pb2.Collage(), blob_pb2.BlobRef()
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.of("request", f"is no JSON: {error}") from None
    if not isinstance(tree, dict) or not {*tree} <= {"collage", "result"}:
        raise InvalidRequest.of("request", 'is no {"collage": ..., "result": {"sha256": ...}}')
    for name, message in (("collage", collage), ("result", drawn)):
        try:
            json_format.ParseDict(tree.get(name) or {}, message)
        except (json_format.ParseError, TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest.of(name, f"is no such message: {error}") from None
    return collage, drawn
