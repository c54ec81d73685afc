"""Serving and calling over gRPC, the same way everywhere.

Main types: `Server` (health with Watch, reflection, error mapping, limits, drain) and `connect` (retries, keepalive,
request id, deadline). A servicer raises errors from `services.common.errors`; the interceptor here turns them into
statuses, and bytes that are no message into INVALID_ARGUMENT. Every call is received here as a stream, so that it is
counted before its message is read, and one that is sent slowly is seen. This module knows no service.
"""

import asyncio
import functools
import json
import math
import re
import signal
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_status import rpc_status
from prometheus_client import Counter, Histogram

from services.common.admission import EDGE, WITHIN, Admission
from services.common.blobs import (
    BlobCorrupt,
    BlobMissing,
    BlobStoreDenied,
    BlobStoreFull,
    BlobStoreUnavailable,
    digest_in_key,
)
from services.common.errors import (
    Cancelled,
    CollageError,
    DataLoss,
    DeadlinePassed,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
    Violation,
    from_rpc,
    storage_full,
)
from services.common.telemetry import log, request_id

# gRPC's own default, kept on purpose: larger things are blobs.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# What a server reads of a message all the same, so that it can say in words that it is too large.
READ_MESSAGE_BYTES = 2 * MAX_MESSAGE_BYTES
# Time a draining server gives admitted calls before it cuts them.
DRAIN_S = 25.0
# The same after a part that the server cannot work without has failed: only calls that do not need it can still end.
FAILED_DRAIN_S = 2.0
# Longest that the one message of a call may take to arrive: the largest one at a quarter of a megabit a second.
MESSAGE_S = 120.0
# How long health says NOT_SERVING before new calls are refused, so that balancers hear of it.
LAME_DUCK_S = 0.2
# How long a service of ours keeps a connection of another: who connects anew looks the name up anew, and finds servers
# that have come since. Calls under way on the old connection go on there to their end.
CONNECTION_AGE_S = 120.0
REQUEST_ID_KEY = "x-request-id"
# For whom a service of ours calls another: what its own caller is known by. Strangers are known by their connection.
CALLER_KEY = "x-collage-caller"
# What is taken over from a caller: it goes into every log line and into the headers of the calls made for it.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}", re.ASCII)
# Messages of a repeated field that are searched for an unknown field: more than any right request has, so that whoever
# sends more is refused for that.
_SEARCHED_PARTS = 64
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
# Methods of our own contract.
OURS = "/collage.v1."

# gRPC takes any name and drops those it does not know: a test holds these and the channels' against its own.
_SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", READ_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A caller may ask so often whether a quiet stream is alive, and a connection without one.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # More than a connection may have under way, so that what is over is refused in words instead of kept waiting.
    ("grpc.max_concurrent_streams", 2 * EDGE.peer_calls),
    # What lies unread is bounded by 64 KiB a call; with this gRPC takes in megabytes of each before anybody reads.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.so_reuseport", 0),
]
# Only UNAVAILABLE, and only where a call may be repeated (AIP-194): every call of ours is idempotent but PutBlob's
# stream, which gRPC never retries once it has sent more than its buffer.
_SERVICE_CONFIG = json.dumps(
    {
        # Of several that do the same each is asked in its turn, and one that is gone is left out.
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)
_CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Services of one deployment are reached directly, whatever proxy the environment names for the world outside.
    ("grpc.enable_http_proxy", 0),
]

CALLS = Counter("collage_rpc_calls_total", "Calls answered", ["method", "code"])
CALL_SECONDS = Histogram("collage_rpc_seconds", "Time to answer a call", ["method"])

# A warm-up or self-check: returns when the service can do real work, raises when it cannot.
Probe = Callable[[], Awaitable[None]]


# When the call being answered must have ended, on the monotonic clock; infinity outside calls and for no deadline.
_deadline_s: ContextVar[float] = ContextVar("deadline_s", default=math.inf)
# Who the call being answered is worked for; empty outside calls.
caller: ContextVar[str] = ContextVar("caller", default="")


def bounded(limit_s: float) -> float:
    """The timeout of a call made on behalf of the current one: its own limit, or what the caller has left."""
    return max(0.0, min(limit_s, _deadline_s.get() - time.monotonic()))


class Malformed:
    """Stands for request bytes that are no message of the method's type, and says why."""

    def __init__(self, field: str, description: str, *, reason: str | None = None) -> None:
        self.violation = Violation(field=field, description=description)
        self.reason = reason


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Gives every call a request id, a metric, a log line on failure, and the status its error maps to.

    Args:
        is_edge: whether callers are strangers. Theirs is refused what this server does not know, and would drop; parts
            of one system know more or less of the contract while it is upgraded, and pass over it.
    """

    def __init__(self, *, is_edge: bool) -> None:
        self._is_edge = is_edge
        self._admission = Admission(EDGE if is_edge else WITHIN)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Wraps the handler of one call."""
        handler = await continuation(details)
        # Health and reflection answer for themselves.
        if handler is None or not details.method.startswith(OURS):
            return handler
        metadata = dict(details.invocation_metadata or ())
        given = str(metadata.get(REQUEST_ID_KEY, ""))
        request = given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        behaviour = next(
            found
            for found in (
                handler.unary_unary,
                handler.unary_stream,
                handler.stream_unary,
                handler.stream_stream,
            )
            if found
        )
        serve = _serve_stream if handler.response_streaming else _serve_unary
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )

        told = "" if self._is_edge else str(metadata.get(CALLER_KEY, ""))

        def begin(context: Any) -> _Call:
            return _Call(details.method, request, told, context, self._admission)

        return make(
            serve(behaviour, begin, is_streamed=handler.request_streaming),
            request_deserializer=_forgiving(handler.request_deserializer, is_edge=self._is_edge),
            response_serializer=handler.response_serializer,
        )


@dataclass(frozen=True, slots=True)
class _Received:
    """A message, or `Malformed`, and the bytes it came in."""

    message: Any
    size_bytes: int


def _forgiving(
    deserialize: Callable[[bytes], Any], *, is_edge: bool
) -> Callable[[bytes], _Received]:
    """A deserializer that gives `Malformed` where gRPC would answer INTERNAL and log a traceback.

    At the edge a field of a newer contract is malformed too: the caller asks for something that would be dropped
    silently.
    """

    def read(data: bytes) -> Any:
        if len(data) > MAX_MESSAGE_BYTES:
            return Malformed(
                "request",
                f"has {len(data)} bytes; allowed: {MAX_MESSAGE_BYTES} a message; upload pictures with PutBlob and "
                "name them by their digests, in chunks of at most 1 MiB",
                reason="MESSAGE_TOO_LARGE",
            )
        try:
            message = deserialize(data)
        except Exception:
            return Malformed("request", "holds bytes that are not a message of this method")
        unknown = _unknown_field(message) if is_edge else None
        if unknown is None:
            return message
        return Malformed(
            unknown, "is a field number that this server does not know; allowed: its contract's"
        )

    return lambda data: _Received(read(data), len(data))


def _unknown_field(message: Message, root: str = "") -> str | None:
    """The path of the first field that the message's type does not have, its number standing for its name."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        return f"{root}{unknown[0].field_number}"
    for name, is_repeated in _message_fields(message.DESCRIPTOR):
        parts = {}
        if is_repeated:
            for index, part in enumerate(getattr(message, name)[:_SEARCHED_PARTS]):
                parts[f"{root}{name}[{index}]."] = part
        elif message.HasField(name):
            parts[f"{root}{name}."] = getattr(message, name)
        for path, part in parts.items():
            if found := _unknown_field(part, path):
                return found
    return None


@functools.cache
def _message_fields(kind: Descriptor) -> tuple[tuple[str, bool], ...]:
    """Name and repeatedness of the fields of a message type that hold messages."""
    return tuple(
        (field.name, field.is_repeated) for field in kind.fields if field.message_type is not None
    )


# An abort is raised where no frame holds the message: gRPC keeps the error, and with it whatever its frames hold.
def _serve_unary(behaviour: Any, begin: Callable[[Any], "_Call"], *, is_streamed: bool) -> Any:
    async def serve(_: Any, context: Any) -> Any:
        call = begin(context)
        answer = await call.answer(behaviour, is_streamed)
        if call.status is not None:
            await context.abort_with_status(call.status)
        return answer

    return serve


def _serve_stream(behaviour: Any, begin: Callable[[Any], "_Call"], *, is_streamed: bool) -> Any:
    async def serve(_: Any, context: Any) -> Any:
        call = begin(context)
        async with aclosing(call.answers(behaviour, is_streamed)) as answers:
            async for answer in answers:
                yield answer
        if call.status is not None:
            await context.abort_with_status(call.status)

    return serve


def _checked(received: _Received) -> Any:
    if isinstance(received.message, Malformed):
        raise InvalidRequest([received.message.violation], reason=received.message.reason)
    return received.message


# Messages are read from the context: gRPC's own iterator, left before its end, keeps what it read for good.
async def _each_checked(context: Any) -> AsyncIterator[Any]:
    while (received := await context.read()) is not grpc.aio.EOF:
        yield _checked(received)


async def _only(context: Any) -> _Received:
    """The one message of a call."""
    try:
        async with asyncio.timeout(MESSAGE_S):
            received: _Received = await context.read()
    except TimeoutError:
        raise DeadlinePassed(f"the message did not arrive within {MESSAGE_S:g} s") from None
    if received is grpc.aio.EOF:
        raise InvalidRequest.of("request", "is missing; required: one message")
    return received


class _Call:
    """The span of one call: admits it, sets the request id, and turns what is raised inside into a status."""

    def __init__(
        self, method: str, request_id: str, caller: str, context: Any, admission: Admission
    ) -> None:
        self.method = method
        self.request_id = request_id
        self.context = context
        self.peer = str(context.peer())
        self.caller = caller or self.peer
        self.start = time.monotonic()
        # How it failed, once it has.
        self.status: Any = None
        self._admission = admission

    async def answer(self, behaviour: Any, is_streamed: bool) -> Any:
        """The one answer of a behaviour; None where it failed."""
        async with self._span(), self._request(is_streamed) as request:
            return await behaviour(request, self.context)

    async def answers(self, behaviour: Any, is_streamed: bool) -> AsyncGenerator[Any, None]:
        """The answers of a behaviour, until it fails."""
        async with (
            self._span(),
            self._request(is_streamed) as request,
            aclosing(behaviour(request, self.context)) as answers,
        ):
            async for answer in answers:
                yield answer

    @asynccontextmanager
    async def _span(self) -> AsyncIterator[None]:
        request_id.set(self.request_id)
        caller.set(self.caller)
        left_s = self.context.time_remaining()
        _deadline_s.set(math.inf if left_s is None else self.start + left_s)
        code = "OK"
        try:
            yield
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception as error:
            # What it is told as is none of this frame's: the error's trace holds the frame, and that what it knows.
            code = self._fail(error)
        finally:
            CALL_SECONDS.labels(self.method).observe(time.monotonic() - self.start)
            CALLS.labels(self.method, code).inc()

    def _fail(self, error: Exception) -> str:
        """Takes note of how it failed; the code's name."""
        told = told_error(error)
        self.status = rpc_status.to_status(told.to_status())
        level = log.error if isinstance(told, Internal) else log.info
        # Whoever floods a server must not flood its log: the metric counts them.
        level = log.debug if isinstance(told, Overloaded) else level
        level("call failed", method=self.method, reason=told.reason, message=told.message)
        if isinstance(told, Internal):
            log.error("traceback", exc_info=error)
        return str(grpc_code(told.code).name)

    @asynccontextmanager
    async def _request(self, is_streamed: bool) -> AsyncIterator[Any]:
        """What the behaviour is given: the one message, or the messages as they come.

        Raises:
            Overloaded: too many calls, or too much held by them.
            InvalidRequest: no message of the method's type.
            DeadlinePassed: the one message did not arrive in time.
        """
        with self._admission.call(self.peer):
            if is_streamed:
                yield _each_checked(self.context)
                return
            async with self._admission.reading(self.peer):
                received = await _only(self.context)
            with self._admission.message(self.peer, received.size_bytes):
                yield _checked(received)


def grpc_code(code: int) -> grpc.StatusCode:
    """The enum member of a google.rpc.Code number."""
    return next(member for member in grpc.StatusCode if member.value[0] == code)


def told_error(error: BaseException) -> CollageError:
    """The error a caller is told about, for anything that was raised; foreign errors become Internal."""
    if isinstance(error, CollageError):
        return error
    if isinstance(error, BlobMissing):
        return NotFound(str(error), reason="BLOB_NOT_FOUND")
    if isinstance(error, BlobCorrupt):
        return DataLoss.of({"": digest_in_key(error.key) or error.key})
    if isinstance(error, BlobStoreFull):
        return storage_full("object storage")
    if isinstance(error, BlobStoreDenied):
        return Unavailable(
            "the object storage refuses to be read or written; its operator has to restore the rights",
            reason="STORAGE_DENIED",
        )
    if isinstance(error, BlobStoreUnavailable):
        return Unavailable(
            "the object storage fails or does not answer", reason="STORAGE_UNAVAILABLE"
        )
    if isinstance(error, DecodeError):
        # What callers send is read elsewhere: this was stored.
        return DataLoss("what is stored of this is damaged", reason="RECORD_CORRUPT")
    if isinstance(error, grpc.RpcError):
        return from_rpc(error)
    if isinstance(error, TimeoutError):
        return DeadlinePassed("the deadline passed")
    if isinstance(error, asyncio.CancelledError):
        return Cancelled("cancelled")
    return Internal("internal error; the server's log has more under this request id")


class Server:
    """One gRPC server with health, reflection and an orderly end.

    Args:
        name: what logs call it.
        address: host:port; port 0 takes a free one, see `address`. Or `unix:PATH`.
        drain: awaited on `stop` after health says NOT_SERVING; finishes what was admitted.
        is_edge: whether strangers call it, see `Interceptor`.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        drain: Callable[[], Awaitable[None]] | None = None,
        is_edge: bool = False,
    ) -> None:
        self.name = name
        self._drain = drain
        # Strangers are known by their connections, which they keep.
        age = [] if is_edge else [("grpc.max_connection_age_ms", int(CONNECTION_AGE_S * 1000))]
        self.grpc = grpc.aio.server(
            interceptors=[Interceptor(is_edge=is_edge)], options=[*_SERVER_OPTIONS, *age]
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._names: list[str] = []
        self._probes: list[Probe] = []
        self._parts: list[Probe] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._failed = asyncio.Event()
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._unable: set[str] = set()
        host, _, _ = address.rpartition(":")
        try:
            port = self.grpc.add_insecure_port(_target(address))
        except RuntimeError as error:
            raise OSError(f"{name}: cannot listen on {address}: {error}") from error
        self.address = address if address.startswith("unix:") else f"{host}:{port}"

    def add(self, full_name: str) -> None:
        """Announces a service that was added to `grpc`: `collage.v1.CollageService`, say."""
        self._names.append(full_name)

    def before_serving(self, probe: Probe) -> None:
        """Has health say SERVING only once `probe` has passed."""
        self._probes.append(probe)

    def depends_on(self, part: Probe) -> None:
        """Has the server give up when `part`, awaited from `start` on, raises: health says NOT_SERVING, `run` fails.

        It returns where the part has ended in order.
        """
        self._parts.append(part)

    async def able(self, full_name: str, is_able: bool) -> None:
        """Has health say NOT_SERVING of a service that cannot do its work now, and of the server itself what it said.

        Who asks for the server, as whoever restarts it or sends it calls does, is told that it answers.
        """
        if is_able:
            self._unable.discard(full_name)
        else:
            self._unable.add(full_name)
        await self._set_health(self._status)

    def on_stopped(self, close: Callable[[], Awaitable[None]]) -> None:
        """Has `close` awaited once the last call has ended; the latest first."""
        self._closers.append(close)

    async def start(self) -> None:
        """Listens at once, says SERVING when every probe has passed."""
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self.grpc)
        self.grpc.add_generic_rpc_handlers((_reflection_v1(names),))
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.grpc.start()
        log.info("listening", name=self.name, address=self.address)
        self._watchers = [asyncio.create_task(self._watch(part)) for part in self._parts]
        for probe in self._probes:
            await probe()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", name=self.name, address=self.address)

    async def failed(self) -> None:
        """Returns when a part that the server depends on has failed."""
        await self._failed.wait()

    async def stop(self, *, drain_s: float = DRAIN_S) -> None:
        """NOT_SERVING, then no new calls, then waits for admitted ones up to `drain_s` seconds."""
        log.info("draining", name=self.name)
        end = time.monotonic() + drain_s
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(LAME_DUCK_S)
        if self._drain is not None:
            try:
                await asyncio.wait_for(self._drain(), drain_s)
            except TimeoutError:
                log.warning("drain timed out", name=self.name, drain_s=drain_s)
        await self.grpc.stop(max(0.0, end - time.monotonic()))
        for watcher in self._watchers:
            watcher.cancel()
        for close in reversed(self._closers):
            await close()
        log.info("stopped", name=self.name)

    async def run(self) -> None:
        """Starts, serves until SIGTERM or SIGINT, drains.

        Raises:
            SystemExit: with status 1 once a part that the server depends on has failed, so that whoever keeps the
                process starts it again.
        """
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        starting = asyncio.create_task(self.start())
        ends = [asyncio.create_task(stopped.wait()), asyncio.create_task(self.failed())]
        await asyncio.wait((starting, *ends), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            if starting.exception() is not None:
                await self.stop(drain_s=0)
            starting.result()
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in (starting, *ends):
            task.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        has_failed = self._failed.is_set()
        await self.stop(drain_s=FAILED_DRAIN_S if has_failed else DRAIN_S)
        if has_failed:
            raise SystemExit(1)

    async def _watch(self, part: Probe) -> None:
        try:
            await part()
        except Exception as error:
            log.error("server failed", name=self.name, exc_info=error)
            self._failed.set()
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _set_health(self, status: Any) -> None:
        self._status = status
        for name in ("", *self._names):
            # A start under way does not overrule it.
            is_down = self._failed.is_set() or name in self._unable
            await self._health.set(
                name, health_pb2.HealthCheckResponse.NOT_SERVING if is_down else self._status
            )


def _reflection_v1(names: Sequence[str]) -> Any:
    """Reflection under its present name: on the wire it is what the library serves as v1alpha."""
    answer = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": answer})


def connect(address: str, *, is_probe: bool = False, passes_on: bool = False) -> grpc.aio.Channel:
    """A channel to another service of ours, with retries of UNAVAILABLE and never through a proxy.

    Args:
        address: host:port, the name standing for all its addresses; several of numbers, with commas; or `unix:PATH`.
        is_probe: asks once, over a connection of its own: one that failed before would wait before it tries again.
        passes_on: what others send is sent as it came: once, and whatever its size, for the server to judge.
    """
    more: dict[str, int] = {}
    if is_probe:
        more |= {"grpc.enable_retries": 0, "grpc.use_local_subchannel_pool": 1}
    if passes_on:
        more |= {"grpc.enable_retries": 0, "grpc.max_send_message_length": -1}
    options = {**dict(_CHANNEL_OPTIONS), **more}
    return grpc.aio.insecure_channel(_target(address), options=list(options.items()))


def _target(address: str) -> str:
    """An address as gRPC reads it: as a URI, in which a path's # or ? would end the path."""
    kind, _, path = address.partition(":")
    if kind == "unix":
        return f"unix:{quote(path)}"
    return f"ipv4:{address}" if "," in address else address


def outgoing() -> Sequence[tuple[str, str]]:
    """Metadata for a call made on behalf of the current one."""
    told = ((REQUEST_ID_KEY, request_id.get()), (CALLER_KEY, caller.get()))
    return tuple((key, value) for key, value in told if value)
