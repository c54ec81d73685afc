"""What a server takes on at once, and what an edge refuses that other servers pass over. A real server on loopback."""

import asyncio
import contextlib
import gc
import weakref
from dataclasses import replace

import grpc
import pytest

from collage.v1 import collage_pb2, compositor_service_pb2, compositor_service_pb2_grpc
from gateway.uploads import Blobs
from services.common import rpc
from services.common.admission import EDGE, Admission
from services.common.blobs import FolderBlobStore
from services.common.errors import InvalidRequest, NotFound, Overloaded, from_rpc
from testing.system import upload
from testing.waiting import until

METHOD = "/collage.v1.CompositorService/Compose"
DATA = b"some bytes"
BIG = collage_pb2.Collage(prompt="x" * 100_000)


class Compositor(compositor_service_pb2_grpc.CompositorServiceServicer):
    """Counts its calls, and waits at a gate."""

    def __init__(self) -> None:
        self.running = 0
        self.gate = asyncio.Event()

    async def Compose(self, request, context):
        self.running += 1
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        return compositor_service_pb2.ComposeResponse(largest_noise=0.5)


@contextlib.asynccontextmanager
async def serving(*, is_edge=True):
    server = rpc.Server("test", "127.0.0.1:0", is_edge=is_edge)
    servicer = Compositor()
    compositor_service_pb2_grpc.add_CompositorServiceServicer_to_server(servicer, server.grpc)
    await server.start()
    yield server, servicer
    servicer.gate.set()
    await server.stop(drain_s=1)


def stranger(server):
    """A connection of its own: gRPC shares one among the channels of a process otherwise."""
    return grpc.aio.insecure_channel(
        server.address, options=[("grpc.use_local_subchannel_pool", 1)]
    )


def compose(channel, collage=None, **options):
    stub = compositor_service_pb2_grpc.CompositorServiceStub(channel)
    request = compositor_service_pb2.ComposeRequest(collage=collage)
    return stub.Compose(request, timeout=20, **options)


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc(caught.value)


@pytest.fixture
def small(monkeypatch):
    """An edge that takes on little."""
    limits = replace(EDGE, calls=6, peer_calls=4, held_bytes=900_000, peer_held_bytes=350_000)
    monkeypatch.setattr(rpc, "EDGE", limits)


async def test_calls_beyond_what_a_connection_may_have_are_refused_and_others_are_served(small):
    async with serving() as (server, servicer), stranger(server) as one, stranger(server) as other:
        admitted = [compose(one) for _ in range(4)]
        await until(lambda: servicer.running == 4)
        error = await refused(compose(one))
        assert isinstance(error, Overloaded)
        assert "has 4 calls under way and asks for 1; allowed: 4" in error.message
        assert error.retry_after_s == 1.0
        admitted += [compose(other), compose(other)]
        await until(lambda: servicer.running == 6)
        error = await refused(compose(other))
        assert "6 calls are under way, and 1 asked for; allowed: 6" in error.message
        servicer.gate.set()
        await asyncio.gather(*admitted)
        # What was taken is given back: as much is admitted again.
        await asyncio.gather(*(compose(one) for _ in range(4)))


async def test_what_messages_hold_is_bounded_and_given_back(small):
    async with serving() as (server, servicer), stranger(server) as one, stranger(server) as other:
        admitted = [compose(one, BIG) for _ in range(3)]
        await until(lambda: servicer.running == 3)
        error = await refused(compose(one, BIG))
        assert isinstance(error, Overloaded)
        assert "; allowed: 350000" in error.message
        small_call = compose(other, BIG)
        await until(lambda: servicer.running == 4)
        servicer.gate.set()
        await asyncio.gather(*admitted, small_call)
        await compose(one, BIG)


async def test_calls_that_are_given_up_hold_nothing(small):
    async with serving() as (server, servicer), stranger(server) as channel:
        for _ in range(3):
            calls = [compose(channel, BIG) for _ in range(3)]
            await until(lambda: servicer.running == 3)
            for call in calls:
                call.cancel()
            await until(lambda: servicer.running == 0)


async def test_a_message_that_does_not_arrive_ends_its_call(monkeypatch):
    monkeypatch.setattr(rpc, "MESSAGE_S", 0.3)
    async with serving() as (server, servicer), stranger(server) as slow, stranger(server) as other:
        # To a server a call is a stream: this one never sends its message, and does not end.
        call = slow.stream_unary(METHOD)()
        await call.wait_for_connection()
        assert (await refused(call)).message == "the message did not arrive within 0.3 s"
        empty = slow.stream_unary(METHOD)()
        await empty.done_writing()
        error = await refused(empty)
        assert isinstance(error, InvalidRequest)
        assert [each.field for each in error.violations] == ["request"]
        servicer.gate.set()
        await compose(other)


async def test_slow_senders_keep_only_their_own_connection_from_being_read(monkeypatch):
    monkeypatch.setattr(rpc, "EDGE", replace(EDGE, peer_reading=2))
    async with serving() as (server, servicer), stranger(server) as slow, stranger(server) as other:
        servicer.gate.set()
        calls = [slow.stream_unary(METHOD)() for _ in range(5)]
        for call in calls:
            await call.wait_for_connection()
        await compose(other)
        for call in calls:
            call.cancel()
        # Those that waited for their turn to be read have given it back as those that had one.
        await compose(slow)


async def test_a_burst_of_small_calls_over_one_connection_is_admitted_whole():
    async with serving() as (server, servicer), stranger(server) as channel:
        calls = [compose(channel) for _ in range(500)]
        await until(lambda: servicer.running == 500)
        servicer.gate.set()
        await asyncio.gather(*calls)


class Letter:
    """A message that can be watched; those of protobuf cannot."""

    def __init__(self, data):
        self.data = data


@pytest.mark.parametrize("error", ["", "nothing"])
@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary"])
async def test_no_message_outlives_its_call(kind, error):
    kept = []

    async def note(request):
        if kind == "stream_unary":
            # Left before its end.
            request = await anext(request)
        kept.append(weakref.ref(request))
        if error:
            raise NotFound(error)

    async def answer(request, context):
        await note(request)
        return b""

    async def answers(request, context):
        await note(request)
        yield b""

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    handler = make(
        answers if kind == "unary_stream" else answer,
        request_deserializer=Letter,
        response_serializer=bytes,
    )
    server = rpc.Server("test", "127.0.0.1:0")
    name = "collage.v1.Letters"
    server.grpc.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {"Send": handler}),)
    )
    await server.start()
    # What only a collection finds stays for minutes in a large process.
    gc.disable()
    try:
        async with stranger(server) as channel:
            for _ in range(3):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    call = channel.stream_stream(f"/{name}/Send")()
                    await call.write(b"x")
                    await call.write(b"y")
                    async for _ in call:
                        pass
            await until(lambda: len(kept) == 3 and not any(each() for each in kept))
    finally:
        gc.enable()
        await server.stop(drain_s=0)


async def test_admission_forgets_peers_that_have_gone():
    admission = Admission(EDGE)
    for number in range(100):
        with admission.call(f"peer {number}"), admission.message(f"peer {number}", 5):
            async with admission.reading(f"peer {number}"):
                pass
    assert not admission._calls._taken
    assert not admission._held._taken
    assert not admission._readers


async def test_what_a_server_does_not_know_is_refused_at_the_edge_and_passed_over_within():
    known = compositor_service_pb2.ComposeRequest(latent_factor=4).SerializeToString()
    # Field 999, of a contract to come, on top and in a message within.
    within = compositor_service_pb2.ComposeRequest(
        collage=collage_pb2.Collage.FromString(b"\xba\x3e\x01x")
    ).SerializeToString()
    for unknown, path in ((known + b"\xba\x3e\x01x", "999"), (within, "collage.999")):
        async with serving(is_edge=True) as (server, _), stranger(server) as channel:
            error = await refused(channel.unary_unary(METHOD)(unknown, timeout=20))
            assert isinstance(error, InvalidRequest)
            assert [each.field for each in error.violations] == [path]
        async with serving(is_edge=False) as (server, servicer), stranger(server) as channel:
            servicer.gate.set()
            answer = await channel.unary_unary(METHOD)(unknown, timeout=20)
            assert compositor_service_pb2.ComposeResponse.FromString(answer).largest_noise == 0.5


async def test_what_uploads_hold_is_bounded_by_connection_and_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("gateway.uploads.MAX_HELD_BYTES", 2 * len(DATA))
    monkeypatch.setattr("gateway.uploads.MAX_PEER_HELD_BYTES", len(DATA))
    blobs = Blobs(FolderBlobStore(tmp_path))
    budget = blobs._held

    async def some(gate=None):
        for message in upload(DATA):
            yield message
        if gate is not None:
            await gate.wait()

    gate = asyncio.Event()
    first = asyncio.create_task(blobs.put(some(gate), peer="one"))
    await until(lambda: budget.taken == len(DATA))
    with pytest.raises(Overloaded, match="this connection has"):
        await blobs.put(some(), peer="one")
    await blobs.put(some(), peer="other")
    gate.set()
    await first
    assert budget.taken == 0
    await blobs.put(some(), peer="one")
