"""The production shape as processes: what survives a crash, what a failed start says, and what a stop leaves behind."""

import os
import stat
from pathlib import Path

import pytest

from collage.v1 import blob_pb2, collage_pb2
from collage_client import AsyncCollageClient
from local.cluster import Cluster
from local.processes import ProcessFailed
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
    cluster = Cluster(tmp_path / "data", models=f"toy={toy.mini(tmp_path / 'model')}", threads=1)
    await cluster.start()
    try:
        with pytest.raises(OSError, match="runs on this folder already"):
            await Cluster(tmp_path / "data").start()
        assert stat.S_IMODE((tmp_path / "data" / "cluster.json").stat().st_mode) == 0o600
        async with AsyncCollageClient(cluster.addresses[0]) as client:
            calm = [event async for event in await client.generate(COLLAGE, SAMPLING)]
            assert len(digests(calm)) == 2
            await forget_results(cluster)

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
    assert len(pids) == 6
    assert not any(map(is_alive, pids))


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
