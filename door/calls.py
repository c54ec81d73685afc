"""`POST /collage.v1.CollageService/METHOD`: gRPC-Web frames and JSON, in front of the gateway.

Main type: `Calls`. Frames pass through as they are; JSON is read and written by the messages' own types, found in the
contract's descriptor. Neither knows a method by name, and no rule of the service stands here.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import quote as percent_encoded

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2
from starlette.types import Receive, Scope, Send

from collage.v1 import collage_service_pb2
from door import events, status
from door.exchange import Exchange, Gone, Holding, Load, TooLarge, too_slow
from services.common.errors import CollageError, InvalidRequest, NotSupported, quote
from services.common.rpc import MESSAGE_S, READ_MESSAGE_BYTES

SERVICE = collage_service_pb2.DESCRIPTOR.services_by_name["CollageService"]
PATH = f"/{SERVICE.full_name}/"
WEB_MEDIA_TYPE = "application/grpc-web+proto"
JSON_MEDIA_TYPE = "application/json"
# Bytes fields take a third more in JSON, and names and marks some.
JSON_BYTES = 3 * READ_MESSAGE_BYTES // 2
# JSON of more is read and written beside the loop.
_LARGE_BYTES = 64 * 1024
# How long the head of a stream's answer waits for the first message, whose failure it would tell.
_HEAD_S = 1.0
# Headers that are metadata; the rest is HTTP's own, or the browser's.
_METADATA = re.compile(
    r"authorization|traceparent|tracestate|x-(?!grpc-web|user-agent|forwarded)[0-9a-z_.-]+"
)
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
# Of a longer deadline than any call has none is made: gRPC's core cannot count up to all of them.
_LONGEST_S = 30 * 24 * 3600.0
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_FRAME_BYTES = 5
_TRAILERS = 0x80

Metadata = list[tuple[str, str | bytes]]


class Calls:
    """Passes calls on to the gateway at the other end of a channel."""

    def __init__(self, channel: grpc.aio.Channel, load: Load) -> None:
        self._channel, self._load = channel, load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One call, as ASGI has it."""
        exchange = Exchange(scope, receive, send)
        name = str(scope["path"]).removeprefix(PATH)
        form = _form(exchange)
        with suppress(Gone):
            if form is None:
                await _refuse_form(exchange)
                return
            try:
                with self._load.exchange(exchange.peer) as holding:
                    await self._pass_on(name, form, holding)
            except (CollageError, grpc.aio.AioRpcError) as error:
                await form.fail(error)

    async def _pass_on(self, name: str, form: "_Web | _Json", holding: Holding) -> None:
        method = SERVICE.methods_by_name.get(name)
        if method is None:
            raise NotSupported(
                f"{SERVICE.full_name} has no method {quote(name)}", reason="NO_METHOD"
            )
        options = call_options(form.exchange)
        path = PATH + name
        if method.client_streaming:
            call = self._channel.stream_unary(path)(**options)
            await form.one(call, upload(call, form.messages(method, holding)))
            return
        request = await _only(form.messages(method, holding))
        if not method.server_streaming:
            call = self._channel.unary_unary(path)(request, **options)
            async with cancelled_when_gone(form.exchange, call):
                await form.one(call, call)
            return
        call = self._channel.unary_stream(path)(request, **options)
        async with cancelled_when_gone(form.exchange, call):
            await form.stream(call)


def call_options(exchange: Exchange) -> dict[str, Any]:
    """Metadata and timeout of the call that an exchange asks for. Raises `InvalidRequest`."""
    metadata: Metadata = []
    for name, value in exchange.headers.items():
        if not _METADATA.fullmatch(name):
            continue
        if not value.isascii() or not value.isprintable():
            raise InvalidRequest.of(name, "is no printable ASCII, as metadata has to be")
        if name.endswith("-bin"):
            try:
                metadata.append(
                    (name, base64.b64decode(value + "=" * (-len(value) % 4), validate=True))
                )
            except (binascii.Error, ValueError):
                raise InvalidRequest.of(name, "is no base64") from None
        else:
            metadata.append((name, value))
    return {"metadata": metadata, "timeout": _timeout_s(exchange.headers.get("grpc-timeout"))}


def _timeout_s(told: str | None) -> float | None:
    if told is None:
        return None
    found = _TIMEOUT.fullmatch(told)
    if found is None:
        raise InvalidRequest.of(
            "grpc-timeout", f"is {quote(told)}; allowed: up to 8 digits and one of H, M, S, m, u, n"
        )
    timeout_s = int(found[1]) * _SECONDS[found[2]]
    return timeout_s if timeout_s <= _LONGEST_S else None


@asynccontextmanager
async def cancelled_when_gone(exchange: Exchange, call: Any) -> AsyncIterator[None]:
    """Cancels a call when the other side of its exchange goes, or the context is left before its end.

    Raises:
        Gone: it went.
    """

    async def watch() -> None:
        await exchange.gone()
        call.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if exchange.is_gone:
            raise Gone from None
        raise
    finally:
        watching.cancel()
        call.cancel()


async def upload(call: Any, messages: AsyncIterator[Any]) -> Any:
    """The answer of a call whose messages are sent as they come; it may come before their end.

    Raises:
        AioRpcError: the call failed.
        Gone: the messages broke off; whatever else getting one raises.
    """

    async def feed() -> None:
        async for message in messages:
            await call.write(message)
        await call.done_writing()

    async def ended() -> None:
        await call.code()

    feeding, ending = asyncio.create_task(feed()), asyncio.create_task(ended())
    try:
        await asyncio.wait((feeding, ending), return_when=asyncio.FIRST_COMPLETED)
        # What a finished call says of a message that comes too late is not how it ended.
        if feeding.done() and not call.done():
            feeding.result()
        return await call
    finally:
        call.cancel()
        feeding.cancel()
        ending.cancel()
        await asyncio.gather(feeding, ending, return_exceptions=True)


async def _only(messages: AsyncIterator[bytes]) -> bytes:
    """The one message of a call."""
    found: list[bytes] = []
    try:
        async with asyncio.timeout(MESSAGE_S):
            async for message in messages:
                found.append(message)
                if len(found) > 1:
                    break
    except TimeoutError:
        raise too_slow() from None
    if len(found) != 1:
        raise InvalidRequest.of(
            "request", f"is {'missing' if not found else 'more than one'}; required: one message"
        )
    return found[0]


def _form(exchange: Exchange) -> "_Web | _Json | None":
    """How an exchange speaks; None where it is none of ours."""
    kind, _, parameters = exchange.headers.get("content-type", "").lower().partition(";")
    if exchange.method != "POST":
        return None
    if kind.strip() in (WEB_MEDIA_TYPE, "application/grpc-web"):
        return _Web(exchange)
    charset = parameters.replace(" ", "").replace('"', "")
    if kind.strip() == JSON_MEDIA_TYPE and charset in ("", "charset=utf-8"):
        return _Json(exchange)
    return None


async def _refuse_form(exchange: Exchange) -> None:
    if exchange.method != "POST":
        message, code, more = (
            f"{exchange.method} is not allowed here; POST is",
            405,
            ("allow", "POST"),
        )
    else:
        kinds = f"{JSON_MEDIA_TYPE}, {WEB_MEDIA_TYPE}"
        message, code, more = f"Content-Type is none of {kinds}", 415, ("accept-post", kinds)
    body = status.rendered(NotSupported(message, reason="HTTP_FORM").to_status())
    await exchange.answer(code, body.encode(), JSON_MEDIA_TYPE, [more])


class _Web:
    """gRPC-Web: frames of bytes, the status in the last."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    async def messages(self, method: MethodDescriptor, holding: Holding) -> AsyncIterator[bytes]:
        """The messages of the body, as they come."""
        data = bytearray()
        async for chunk in self.exchange.chunks():
            holding.take(len(chunk))
            data += chunk
            while len(data) >= _FRAME_BYTES:
                size = int.from_bytes(data[1:_FRAME_BYTES], "big")
                if data[0] != 0:
                    raise NotSupported(
                        f"frames of kind {data[0]} are not read; 0 is", reason="FRAME"
                    )
                if size > READ_MESSAGE_BYTES:
                    raise TooLarge(str(size), READ_MESSAGE_BYTES)
                if len(data) < _FRAME_BYTES + size:
                    break
                message = bytes(data[_FRAME_BYTES : _FRAME_BYTES + size])
                del data[: _FRAME_BYTES + size]
                yield message
                if method.client_streaming:
                    # The others stay with their call.
                    holding.give(_FRAME_BYTES + size)
        if data:
            raise InvalidRequest.of("request", f"breaks off: {len(data)} bytes are no whole frame")

    async def one(self, call: Any, answer: Awaitable[bytes]) -> None:
        """Answers with the one message of a call."""
        message = await answer
        await self._begin(await call.initial_metadata())
        await self.exchange.write(_framed(0, message))
        await self._end(0, "", await call.trailing_metadata())

    async def stream(self, call: Any) -> None:
        """Answers with the messages of a call as they come."""
        first, initial = await _head(call)
        await self._begin(initial)
        try:
            async for message in _messages(call, first):
                await self.exchange.write(_framed(0, message))
        except grpc.aio.AioRpcError as error:
            await self._tell(error)
            return
        await self._end(0, "", await call.trailing_metadata())

    async def fail(self, error: CollageError | grpc.aio.AioRpcError) -> None:
        """Answers with how a call failed."""
        await self._begin(
            error.initial_metadata() if isinstance(error, grpc.aio.AioRpcError) else ()
        )
        await self._tell(error)

    async def _tell(self, error: CollageError | grpc.aio.AioRpcError) -> None:
        told = status.told(error)
        if isinstance(error, grpc.aio.AioRpcError) and error.trailing_metadata():
            trailing: Any = error.trailing_metadata()
        else:
            trailing = (("grpc-status-details-bin", told.SerializeToString()),)
        await self._end(told.code, told.message, trailing)

    async def _begin(self, metadata: Any) -> None:
        await self.exchange.begin(200, [("content-type", WEB_MEDIA_TYPE), *_headers(metadata)])

    async def _end(self, code: int, message: str, metadata: Any) -> None:
        lines = [("grpc-status", str(code))]
        if message:
            lines.append(
                (
                    "grpc-message",
                    percent_encoded(message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"),
                )
            )
        text = "".join(f"{key}: {value}\r\n" for key, value in [*lines, *_headers(metadata)])
        await self.exchange.write(_framed(_TRAILERS, text.encode("latin-1")))
        await self.exchange.end()


class _Json:
    """JSON: messages by their own types, a failure as google.rpc.Status, streams as server-sent events."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._kind: type[Message] = Message
        self._resumption = events.Resumption("")

    async def messages(self, method: MethodDescriptor, holding: Holding) -> AsyncIterator[bytes]:
        """The one message of the body."""
        if method.client_streaming:
            raise NotSupported(
                f"{method.name} takes a stream of messages, which JSON has none of; PUT /blobs/SHA256 uploads",
                reason="CLIENT_STREAM",
            )
        self._kind = GetMessageClass(method.output_type)
        self._resumption = events.Resumption(self.exchange.headers.get("last-event-id", ""))
        body = await self.exchange.body(JSON_BYTES, holding)
        if body is None:
            told = self.exchange.announced_bytes()
            raise TooLarge(str(told) if told > 0 else "more", JSON_BYTES)
        request = await _beside(len(body), _parse, body, GetMessageClass(method.input_type))
        self._resumption.ask(request)
        yield request.SerializeToString()

    async def one(self, call: Any, answer: Awaitable[bytes]) -> None:
        """Answers with the one message of a call."""
        data = await answer
        text = await _beside(len(data), _render, data, self._kind)
        headers = _headers(await call.initial_metadata())
        await self.exchange.answer(200, text.encode(), JSON_MEDIA_TYPE, headers)

    async def stream(self, call: Any) -> None:
        """Answers with the messages of a call as events."""
        first, initial = await _head(call)
        if first.done() and not first.cancelled():
            # A failure before anything was told has an HTTP status of its own.
            first.result()
        own = (("content-type", events.MEDIA_TYPE), ("cache-control", "no-store"))
        await self.exchange.begin(200, [*own, *_headers(initial)])
        try:
            async for data in _messages(call, first, silence_s=events.KEEPALIVE_S):
                if data is None:
                    await self.exchange.write(events.KEEPALIVE)
                    continue
                message = self._kind.FromString(data)
                if not self._resumption.is_told(message):
                    await self.exchange.write(events.rendered_message(message))
        except grpc.aio.AioRpcError as error:
            await self.exchange.write(events.rendered_error(status.told(error)))
        await self.exchange.end()

    async def fail(self, error: CollageError | grpc.aio.AioRpcError) -> None:
        """Answers with how a call failed."""
        await refuse(self.exchange, status.told(error))


async def refuse(exchange: Exchange, told: status_pb2.Status) -> None:
    """Answers with a status, in JSON."""
    body = status.rendered(told).encode()
    await exchange.answer(status.http_status(told), body, JSON_MEDIA_TYPE)


def _framed(kind: int, data: bytes) -> bytes:
    return bytes([kind]) + len(data).to_bytes(4, "big") + data


def _headers(metadata: Any) -> list[tuple[str, str]]:
    """Metadata as headers, without what is HTTP's or gRPC's own."""
    return [
        (key, status.metadata_value(key, value))
        for key, value in metadata or ()
        if key not in ("grpc-status", "grpc-message", "content-type", "content-length", "date")
    ]


async def _head(call: Any) -> tuple["asyncio.Task[Any]", Iterable[tuple[str, Any]]]:
    """The first message being read, and the call's metadata, if they are told soon."""
    first: asyncio.Task[Any] = asyncio.create_task(call.read())
    await asyncio.wait((first,), timeout=_HEAD_S)
    return first, await call.initial_metadata() if first.done() else ()


async def _messages(
    call: Any, first: "asyncio.Task[Any]", *, silence_s: float | None = None
) -> AsyncIterator[Any]:
    """The messages of a stream, from the one being read on; None for each span of silence."""
    reading = first
    try:
        while True:
            await asyncio.wait((reading,), timeout=silence_s)
            if not reading.done():
                yield None
                continue
            message = reading.result()
            if message is grpc.aio.EOF:
                return
            yield message
            reading = asyncio.create_task(call.read())
    finally:
        reading.cancel()


async def _beside(size_bytes: int, work: Any, *args: Any) -> Any:
    """The work's result, done in a thread where it takes a while."""
    if size_bytes > _LARGE_BYTES:
        return await asyncio.to_thread(work, *args)
    return work(*args)


def _parse(body: bytes, kind: type[Message]) -> Message:
    try:
        # A list would be taken for a message without fields.
        if body and not body.lstrip().startswith(b"{"):
            raise json_format.ParseError("no object")
        return json_format.Parse(body or b"{}", kind())
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest.of(
            "request", f"is no JSON of this method's message: {error}"
        ) from None


def _render(data: bytes, kind: type[Message]) -> str:
    return json_format.MessageToJson(kind.FromString(data), indent=None)
