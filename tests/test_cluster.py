"""The production shape as processes: what survives a crash, what a failed start says, and what a stop leaves behind.

And that no proxy stands between its parts, and nobody without credentials before its storage and queue.
"""

import asyncio
import contextlib
import json
import os
import socket
import stat
import urllib.error
import urllib.request
from pathlib import Path

import nats
import nats.errors
import pytest

from collage.v1 import blob_pb2, collage_pb2
from collage_client import AsyncCollageClient
from local import edge
from local.cluster import Cluster
from local.layout import Web
from local.processes import ProcessFailed, free_port
from services.common.blobs import blob_key
from services.common.settings import open_blobs
from testing import toy

CUTOUT = Path(__file__).parents[1] / "examples" / "art" / "sushi-noto.png"
COLLAGE = collage_pb2.Collage(
    size=collage_pb2.Size(width=64, height=64),
    prompt="a {sushi} on the table",
    layers=[
        collage_pb2.Layer(
            name="sushi",
            text="sushi",
            image=blob_pb2.Image(data=CUTOUT.read_bytes()),
            transform=collage_pb2.Transform(x=32, y=32, scale=0.3),
        )
    ],
)
# Long enough to be killed twice in the middle.
SAMPLING = collage_pb2.Sampling(steps=60, images=2, seed=3)


def is_alive(pid):
    try:
        # The whole group: a child of a child would count.
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def digests(events):
    return [event.image.blob.sha256 for event in events if event.WhichOneof("kind") == "image"]


async def test_a_job_survives_the_gateway_and_the_generator_with_the_same_pictures(tmp_path):
    # With one gateway it is certain who works on the job.
    place = f"127.0.0.1:{free_port()}"
    cluster = Cluster(
        tmp_path / "data",
        models=f"toy={toy.mini(tmp_path / 'model')}",
        threads=1,
        http=Web(address=place),
    )
    await cluster.start()
    try:
        with pytest.raises(OSError, match="runs on this folder already"):
            await Cluster(tmp_path / "data").start()
        assert stat.S_IMODE((tmp_path / "data" / "cluster.json").stat().st_mode) == 0o600
        async with AsyncCollageClient(cluster.addresses[0]) as client:
            calm = [event async for event in await client.generate(COLLAGE, SAMPLING)]
            assert len(digests(calm)) == 2
            await forget_results(cluster)
            # By Envoy, and by Envoy and our door.
            await asyncio.to_thread(edge.check, place)
            page = await asyncio.to_thread(urllib.request.urlopen, f"http://{place}/")
            assert b"Collage Studio" in page.read()

            seen, to_kill = [], ["generator", "gateway-1"]
            async for event in await client.generate(COLLAGE, SAMPLING):
                seen.append(event)
                if to_kill and event.WhichOneof("kind") == "step":
                    cluster.kill(to_kill.pop(0))

            assert not to_kill
            assert digests(seen) == digests(calm)
            # A place in the queue is no part of the log.
            logged = [event for event in seen if event.WhichOneof("kind") != "queued"]
            assert [event.sequence for event in logged] == list(range(1, len(logged) + 1))
            assert [event.WhichOneof("kind") for event in seen].count("done") == 1
            assert seen[-1].WhichOneof("kind") == "done"
            job = await client.job(seen[-1].job)
            assert job.attempts == 2
            assert len(await client.jobs()) == 2
            # The pictures are there again, not only their names.
            for digest in digests(seen):
                await client.fetch(digest)
        await cluster.working()
        assert {name for name, times in cluster.restarts.items() if times} == {
            "generator",
            "gateway-1",
        }
    finally:
        pids = [cluster.pid(name) for name in cluster.names]
        await cluster.stop()
    assert len(pids) == 8
    assert not any(map(is_alive, pids))


def free_ports(count):
    """The first of so many free ports in a row."""
    while True:
        first = free_port()
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


def fetched(address):
    """Status and body of an address, asked without a proxy and without credentials."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()
    except OSError:
        # It speaks something else than HTTP.
        return 0, b""


async def test_behind_a_dead_proxy_it_works_and_keeps_to_itself(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        for each in (name, name.upper()):
            monkeypatch.setenv(each, f"http://127.0.0.1:{free_port()}")
    for each in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(each, raising=False)
    metrics = free_ports(4)
    monkeypatch.setenv("COLLAGE_METRICS_PORT", str(metrics))
    data = tmp_path / "data"
    cluster = Cluster(data, models=f"toy={toy.mini(tmp_path / 'model')}", threads=1)
    await cluster.start()
    try:
        async with AsyncCollageClient(cluster.addresses[0]) as client:
            job = await client.generate(COLLAGE, collage_pb2.Sampling(steps=2, seed=1))
            events = [event async for event in job]
            (digest,) = digests(events)
            picture = await client.fetch(digest)
        # No address is offered that only the inside knows.
        assert not any(event.image.download_url for event in events)
        for number in range(4):
            status, body = await asyncio.to_thread(
                fetched, f"http://127.0.0.1:{metrics + number}/metrics"
            )
            assert status == 200 and b"collage_rpc_calls_total" in body

        ports = json.loads((data / "cluster.json").read_text())["ports"]
        key = blob_key(digest)
        for name, port in ports.items():
            if name.startswith("seaweedfs"):
                for path in (f"buckets/collage/{key}", f"collage/{key}", "buckets/collage/"):
                    address = f"http://127.0.0.1:{port}/{path}"
                    status, body = await asyncio.to_thread(fetched, address)
                    assert status != 200 and picture not in body, (name, path)
        with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
            await nats.connect(
                f"nats://127.0.0.1:{ports['nats']}", allow_reconnect=False, connect_timeout=5
            )
        secrets = ("cluster.json", "nats/nats.conf", "seaweedfs/s3.json")
        for file in (*map(data.joinpath, secrets), *(data / "logs").iterdir()):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        for folder in ("nats", "seaweedfs"):
            assert stat.S_IMODE((data / folder).stat().st_mode) == 0o700
    finally:
        await cluster.stop()


async def forget_results(cluster):
    """Removes what is known of finished work, so that the same request is worked on once more."""
    store = await open_blobs(cluster.blobs)
    try:
        for prefix in ("results/", "plates/"):
            for key in await store.list(prefix):
                await store.delete(key)
    finally:
        await store.close()


async def test_a_failed_start_says_why_and_leaves_nothing(tmp_path):
    cluster = Cluster(tmp_path / "data", models=f"none={tmp_path / 'none'}")
    with pytest.raises(ProcessFailed, match=r"(?s)(generator|inversion) ended: .*models: none"):
        await cluster.start()
    assert not any(is_alive(cluster.pid(name)) for name in cluster.names if cluster.pid(name))
