"""Channels between services and to a server: option names, pings on quiet streams, proxies, the size of a message."""

import asyncio
import itertools
import os
import re
import socket
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collage.v1 import (
    collage_pb2,
    collage_service_pb2,
    collage_service_pb2_grpc,
    inversion_service_pb2,
    inversion_service_pb2_grpc,
)
from collage_client import AsyncCollageClient, CollageError, MessageTooLarge, _calls
from local.layout import check_health
from services.common import errors, rpc

# Real intervals divided by it; a timeout stays what it is. No more: gRPC sends no two pings within a second.
SCALE = 20
QUIET_S = 200 / SCALE


class Inversion(inversion_service_pb2_grpc.InversionServiceServicer):
    """Says one thing, and the next after a long step."""

    async def LearnWords(self, request, context):
        yield inversion_service_pb2.LearnWordsResponse()
        await asyncio.sleep(QUIET_S)
        yield inversion_service_pb2.LearnWordsResponse()


class Gateway(collage_service_pb2_grpc.CollageServiceServicer):
    """Has no job."""

    async def ListJobs(self, request, context):
        return collage_service_pb2.ListJobsResponse()

    async def PlanCollage(self, request, context):
        return collage_service_pb2.PlanCollageResponse()


async def serve():
    server = rpc.Server("test", "127.0.0.1:0")
    inversion_service_pb2_grpc.add_InversionServiceServicer_to_server(Inversion(), server.grpc)
    collage_service_pb2_grpc.add_CollageServiceServicer_to_server(Gateway(), server.grpc)
    await server.start()
    return server


@pytest.fixture
async def server():
    served = await serve()
    yield served
    await served.stop(drain_s=0)


async def test_several_are_asked_by_turns_and_one_that_is_gone_is_left_out():
    calls = {}

    class Counted(Gateway):
        def __init__(self, name):
            self.name = name

        async def ListJobs(self, request, context):
            calls[self.name] = calls.get(self.name, 0) + 1
            return collage_service_pb2.ListJobsResponse()

    servers = []
    for number in range(2):
        server = rpc.Server(f"test-{number}", "127.0.0.1:0")
        collage_service_pb2_grpc.add_CollageServiceServicer_to_server(Counted(number), server.grpc)
        await server.start()
        servers.append(server)
    async with rpc.connect(",".join(server.address for server in servers)) as channel:
        stub = collage_service_pb2_grpc.CollageServiceStub(channel)
        while len(calls) < 2:
            await stub.ListJobs(collage_service_pb2.ListJobsRequest(), timeout=10)
        calls.clear()
        for _ in range(10):
            await stub.ListJobs(collage_service_pb2.ListJobsRequest(), timeout=10)
        assert calls == {0: 5, 1: 5}
        await servers.pop(0).grpc.stop(0)
        for _ in range(10):
            await stub.ListJobs(collage_service_pb2.ListJobsRequest(), timeout=10)
        assert calls == {0: 5, 1: 15}
    await servers[0].stop(drain_s=0)


@pytest.mark.parametrize("is_edge", [False, True])
async def test_a_connection_within_is_made_anew_now_and_then_and_no_call_on_it_is_cut(
    monkeypatch, is_edge
):
    monkeypatch.setattr(rpc, "CONNECTION_AGE_S", 0.3)
    monkeypatch.setitem(globals(), "QUIET_S", 1.5)
    peers = set()

    class Seen(Gateway):
        async def ListJobs(self, request, context):
            peers.add(context.peer())
            return collage_service_pb2.ListJobsResponse()

    server = rpc.Server("test", "127.0.0.1:0", is_edge=is_edge)
    inversion_service_pb2_grpc.add_InversionServiceServicer_to_server(Inversion(), server.grpc)
    collage_service_pb2_grpc.add_CollageServiceServicer_to_server(Seen(), server.grpc)
    await server.start()
    async with rpc.connect(server.address) as channel:
        quiet = inversion_service_pb2_grpc.InversionServiceStub(channel).LearnWords(
            inversion_service_pb2.LearnWordsRequest(), timeout=60
        )
        following = asyncio.create_task(_all(quiet))
        stub = collage_service_pb2_grpc.CollageServiceStub(channel)
        while not following.done():
            await stub.ListJobs(collage_service_pb2.ListJobsRequest(), timeout=10)
            await asyncio.sleep(0.02)
        assert len(await following) == 2
    assert (len(peers) > 1) is not is_edge
    await server.stop(drain_s=0)


async def _all(answers):
    return [each async for each in answers]


def test_grpc_knows_every_option_that_is_given():
    # It drops a name that it does not know, without a word.
    known = set(re.findall(rb"grpc\.[a-z0-9_.]+", Path(cygrpc.__file__).read_bytes()))
    assert b"grpc.http2.min_recv_ping_interval_without_data_ms" not in known
    sources = [
        file
        for folder in ("services", "gateway", "local", "collage_client")
        for file in Path(__file__).parents[1].joinpath(folder).rglob("*.py")
    ]
    named = set()
    for file in sources:
        found = re.findall(r"""["'](grpc\.[a-z0-9_.]+)["']""", file.read_text())
        assert {name.encode() for name in found} <= known, file
        named.update(found)
    assert {name for name, _ in (*rpc._SERVER_OPTIONS, *rpc._CHANNEL_OPTIONS)} <= named
    assert {name for name, _ in _calls._CHANNEL_OPTIONS} <= named


def scaled(options, **more):
    """The options with all intervals divided by SCALE."""
    is_interval = re.compile(r"(ping|keepalive)\w*(?<!timeout)_ms$")
    return [
        (name, value // SCALE if is_interval.search(name) else value) for name, value in options
    ] + list(more.items())


async def pinged(address, ping_s):
    """Follows a quiet stream to its end, then uses the connection again, idle meanwhile."""
    options = [
        *scaled(rpc._CHANNEL_OPTIONS),
        ("grpc.keepalive_time_ms", ping_s * 1000 // SCALE),
        # As other languages' clients: a ping whenever it is time.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.enable_retries", 0),
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = inversion_service_pb2_grpc.InversionServiceStub(channel)
        call = stub.LearnWords(inversion_service_pb2.LearnWordsRequest(), timeout=60)
        assert len([answer async for answer in call]) == 2
        await asyncio.sleep(QUIET_S / 2)
        assert channel.get_state() is grpc.ChannelConnectivity.READY


async def test_a_step_of_200_s_does_not_break_a_quiet_stream(monkeypatch):
    monkeypatch.setattr(rpc, "_SERVER_OPTIONS", scaled(rpc._SERVER_OPTIONS))
    server = await serve()
    await asyncio.gather(*(pinged(server.address, ping_s) for ping_s in (20, 30, 60)))
    await server.stop(drain_s=0)


@pytest.fixture
def proxy(monkeypatch):
    """A port on which nobody answers, named as the proxy for everything."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for name in ("grpc_proxy", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed.getsockname()[1]}")
        for name in ("no_grpc_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield closed


async def test_no_proxy_stands_between_services_or_before_a_server_on_this_machine(server, proxy):
    port = server.address.rpartition(":")[2]
    await check_health(server.address)
    async with rpc.connect(server.address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    for host in ("127.0.0.1", "localhost", "LOCALHOST", "ipv4:127.0.0.1", "dns:///localhost"):
        async with AsyncCollageClient(f"{host}:{port}") as client:
            assert await client.jobs() == []


async def test_a_server_elsewhere_is_reached_as_grpc_reaches_it(monkeypatch, proxy):
    asked = asyncio.Queue()

    async def answer(reader, writer):
        asked.put_nowait(await reader.readline())
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    async with AsyncCollageClient("collage.invalid:50051") as client:
        with pytest.raises(CollageError):
            await client.jobs(timeout_s=2)
    assert (await asked.get()).startswith(b"CONNECT collage.invalid:50051")
    listener.close()


def request_of(size_bytes: int):
    """A plan's request of at least so many bytes: inline pictures of 1 MB."""
    count = -(-size_bytes // 10**6)
    layers = [
        collage_pb2.Layer(name=f"layer{n}", text="x", image={"data": b"x" * 10**6})
        for n in range(count)
    ]
    return collage_service_pb2.PlanCollageRequest(collage=collage_pb2.Collage(layers=layers))


@pytest.mark.parametrize("size_bytes", [5 * 10**6, 6 * 10**6, 8 * 10**6])
async def test_a_message_too_large_is_told_with_details_and_what_to_do(server, size_bytes):
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = collage_service_pb2_grpc.CollageServiceStub(channel)
        await stub.PlanCollage(request_of(4 * 10**6), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PlanCollage(request_of(size_bytes), timeout=10)
    told = errors.from_rpc(caught.value)
    assert isinstance(told, errors.InvalidRequest)
    assert (told.reason, told.violations[0].field) == ("MESSAGE_TOO_LARGE", "request")
    assert "PutBlob" in told.message
    assert str(rpc.MAX_MESSAGE_BYTES) in told.message


@pytest.mark.parametrize("size_bytes", [5 * 2**20, 12 * 2**20])
async def test_the_client_says_so_however_large_it_is(server, size_bytes):
    async with AsyncCollageClient(server.address) as client:
        with pytest.raises(MessageTooLarge, match="PutBlob") as caught:
            await client.plan(collage_pb2.Collage(prompt="x" * size_bytes))
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


def test_the_contract_says_the_limits():
    folder = Path(__file__).parents[1] / "protos" / "collage" / "v1"
    text = (folder / "collage_service.proto").read_text()
    for part in ("4 MiB", "8 MiB", "MESSAGE_TOO_LARGE", "every 10 seconds"):
        assert part in text
    options = dict(itertools.chain(rpc._SERVER_OPTIONS))
    assert rpc.MAX_MESSAGE_BYTES == 4 * 2**20
    assert options["grpc.max_receive_message_length"] == 8 * 2**20
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 10_000


@pytest.mark.parametrize("name", ["C# work", "what? now", "50%41", "ü"])
async def test_a_socket_lies_where_its_path_says(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("s") / name
    folder.mkdir()
    server = rpc.Server("test", f"unix:{folder / 'socket'}")
    collage_service_pb2_grpc.add_CollageServiceServicer_to_server(Gateway(), server.grpc)
    await server.start()
    assert os.listdir(folder) == ["socket"]
    await check_health(server.address)
    async with AsyncCollageClient(server.address) as client:
        assert await client.jobs() == []
    await server.stop(drain_s=0)
