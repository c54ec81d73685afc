"""Serving and calling: errors, malformed bytes, health, request ids, drain. A real server on loopback."""

import asyncio
import math
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collage.v1 import (
    collage_service_pb2,
    compositor_service_pb2,
    compositor_service_pb2_grpc,
    inversion_service_pb2,
    inversion_service_pb2_grpc,
)
from local.embedded import Embedded
from services.common import errors, rpc, telemetry
from services.common.blobs import (
    BlobCorrupt,
    BlobMissing,
    BlobStoreDenied,
    BlobStoreFull,
    BlobStoreUnavailable,
)

SERVICE = "collage.v1.CompositorService"


class Compositor(compositor_service_pb2_grpc.CompositorServiceServicer):
    """Raises what it is told to, or waits."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.request_id = ""

    async def Compose(self, request, context):
        self.request_id = telemetry.request_id.get()
        await self.gate.wait()
        if self.error:
            raise self.error
        return compositor_service_pb2.ComposeResponse()


class Inversion(inversion_service_pb2_grpc.InversionServiceServicer):
    """Streams one message, then fails."""

    async def LearnWords(self, request, context):
        yield inversion_service_pb2.LearnWordsResponse(
            progress=collage_service_pb2.WordProgress(step=1)
        )
        raise errors.NotFound("no model")


@pytest.fixture
async def served():
    server = rpc.Server("test", "127.0.0.1:0")
    servicer = Compositor()
    compositor_service_pb2_grpc.add_CompositorServiceServicer_to_server(servicer, server.grpc)
    inversion_service_pb2_grpc.add_InversionServiceServicer_to_server(Inversion(), server.grpc)
    server.add(SERVICE)
    await server.start()
    async with rpc.connect(server.address) as channel:
        yield server, servicer, channel
    await server.stop(drain_s=1)


async def compose(channel, **options):
    stub = compositor_service_pb2_grpc.CompositorServiceStub(channel)
    return await stub.Compose(compositor_service_pb2.ComposeRequest(), timeout=10, **options)


@pytest.mark.parametrize(
    ("raised", "code", "kind"),
    [
        (errors.InvalidRequest.of("a.b", "is 1"), "INVALID_ARGUMENT", errors.InvalidRequest),
        (errors.MissingBlobs({"a": "0" * 64}), "FAILED_PRECONDITION", errors.MissingBlobs),
        (errors.Overloaded("full", retry_after_s=3), "RESOURCE_EXHAUSTED", errors.Overloaded),
        (errors.NotSupported("later"), "UNIMPLEMENTED", errors.NotSupported),
        (errors.DeadlinePassed("late"), "DEADLINE_EXCEEDED", errors.DeadlinePassed),
        (BlobMissing("blobs/1"), "NOT_FOUND", errors.NotFound),
        (BlobStoreUnavailable("secret"), "UNAVAILABLE", errors.Unavailable),
        (BlobStoreDenied("secret"), "UNAVAILABLE", errors.Unavailable),
        (BlobStoreFull("secret"), "RESOURCE_EXHAUSTED", errors.Overloaded),
        (BlobCorrupt("blobs/" + "0" * 64), "DATA_LOSS", errors.DataLoss),
        (errors.DataLoss.of({"a.b": "0" * 64}), "DATA_LOSS", errors.DataLoss),
        (ZeroDivisionError("secret"), "INTERNAL", errors.Internal),
    ],
)
async def test_what_is_raised_reaches_the_caller_as_the_same_error(served, raised, code, kind):
    _, servicer, channel = served
    servicer.error = raised
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await compose(channel)
    assert caught.value.code().name == code
    told = errors.from_rpc(caught.value)
    assert type(told) is kind
    assert "secret" not in told.message
    if isinstance(raised, errors.CollageError):
        assert told.to_status() == raised.to_status()


async def test_every_error_kind_has_a_code_of_its_own():
    kinds = [errors.InvalidRequest, errors.MissingBlobs, errors.Overloaded, *errors._KINDS.values()]
    # Those that the door adds never cross to another service.
    every = errors.CollageError.__subclasses__()
    assert {kind for kind in every if kind.__module__ == errors.__name__} == set(kinds)
    # The two that the operator and the caller mend beforehand are told apart by their details.
    told_apart = [kind for kind in kinds if kind is not errors.MissingBlobs]
    assert len({kind.code for kind in told_apart}) == len(told_apart)
    for error in (errors.MissingBlobs({"x": "0" * 64}), errors.ModelUnusable("model x is damaged")):
        again = errors.from_status(error.to_status())
        assert type(again) is type(error) and str(again) == str(error)


async def test_bytes_that_are_no_message_are_the_callers_fault(served):
    _, _, channel = served
    for method, make in (
        ("/collage.v1.CompositorService/Compose", channel.unary_unary),
        ("/collage.v1.InversionService/LearnWords", channel.unary_stream),
    ):
        call = make(method)(b"\xff\xff\xff", timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if make == channel.unary_unary:
                await call
            else:
                async for _ in call:
                    pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_delivers_what_came_before_its_error(served):
    _, _, channel = served
    stub = inversion_service_pb2_grpc.InversionServiceStub(channel)
    call = stub.LearnWords(inversion_service_pb2.LearnWordsRequest(), timeout=10)
    got = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for answer in call:
            got.append(answer)
    assert len(got) == 1
    assert isinstance(errors.from_rpc(caught.value), errors.NotFound)


async def test_the_request_id_travels(served):
    _, servicer, channel = served
    await compose(channel, metadata=((rpc.REQUEST_ID_KEY, "abc"),))
    assert servicer.request_id == "abc"
    await compose(channel)
    assert servicer.request_id not in ("", "abc")


async def test_a_drain_says_not_serving_and_lets_the_admitted_call_end(served):
    server, servicer, channel = served
    health = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    servicer.gate.clear()
    admitted = asyncio.create_task(compose(channel))
    await asyncio.sleep(0.05)
    stopping = asyncio.create_task(server.stop(drain_s=5))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await asyncio.sleep(rpc.LAME_DUCK_S + 0.1)
    servicer.gate.set()
    assert await admitted == compositor_service_pb2.ComposeResponse()
    watch.cancel()
    await stopping


async def test_health_waits_for_the_probe():
    server = rpc.Server("slow", "127.0.0.1:0")
    server.add(SERVICE)
    gate = asyncio.Event()

    async def probe() -> None:
        await gate.wait()

    server.before_serving(probe)
    starting = asyncio.create_task(server.start())
    async with rpc.connect(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        answer = await check(request, timeout=5, wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        gate.set()
        await starting
        assert (await check(request, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(drain_s=0)


def test_a_server_whose_part_fails_says_not_serving_and_ends_with_an_error():
    statuses = []

    async def main() -> None:
        server = rpc.Server("test", "127.0.0.1:0")
        server.add(SERVICE)
        fails = asyncio.Event()

        async def part() -> None:
            await fails.wait()
            raise errors.DeviceLost("the device is gone")

        server.depends_on(part)
        running = asyncio.create_task(server.run())
        async with rpc.connect(server.address) as channel:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                request, timeout=10, wait_for_ready=True
            )
            while (status := (await watch.read()).status) != health_pb2.HealthCheckResponse.SERVING:
                assert not running.done()
            fails.set()
            statuses.extend([status, (await watch.read()).status])
            watch.cancel()
            async with asyncio.timeout(10):
                await running

    with pytest.raises(SystemExit) as ended:
        asyncio.run(main())
    assert ended.value.code == 1
    assert statuses == [
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    ]


async def test_a_part_that_fails_while_the_server_starts_leaves_it_not_serving():
    server = rpc.Server("test", "127.0.0.1:0")
    server.add(SERVICE)

    async def part() -> None:
        raise errors.DeviceLost("the device is gone")

    server.depends_on(part)
    server.before_serving(server.failed)
    await server.start()
    async with rpc.connect(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for name in ("", SERVICE):
            answer = await check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    # Of several in one process, the one that failed ends the wait for all.
    other = rpc.Server("other", "127.0.0.1:0")
    await asyncio.wait_for(Embedded([other, server]).failed(), 5)
    await server.stop(drain_s=0)


@pytest.mark.parametrize(("left_s", "expected_s"), [(0.0, 0.0), (-1.0, 0.0), (math.inf, 3600.0)])
def test_no_time_left_is_no_missing_deadline(left_s, expected_s):
    token = rpc._deadline_s.set(time.monotonic() + left_s)
    try:
        assert rpc.bounded(3600.0) == expected_s
    finally:
        rpc._deadline_s.reset(token)


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
async def test_a_tool_learns_the_contract_by_reflection_old_and_new(served, protocol):
    server, _, _ = served
    process = await asyncio.create_subprocess_exec(
        *("buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"),
        *("--reflect", "--reflect-protocol", protocol, "-d", "{}"),
        f"http://{server.address}/{SERVICE}/Compose",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, out.strip()) == (0, b"{}"), err
