"""The pods of a manifest as processes: they find one another by what it says, answer its probes, and draw."""

import asyncio
import contextlib
from pathlib import Path

import grpc
import nats
import pytest
import yaml

from collage.v1 import blob_pb2, collage_pb2
from collage_client import AsyncCollageClient
from gateway.__main__ import open_jobs
from services.common.settings import GatewaySettings
from testing.pods import Pods

ROOT = Path(__file__).parents[1]
SECRETS = {"nats-password": "n0password", "s3-key": "k0key", "s3-secret": "s0secret"}
COLLAGE = collage_pb2.Collage(
    size=collage_pb2.Size(width=64, height=64),
    prompt="a {sushi} on the table",
    layers=[
        collage_pb2.Layer(
            name="sushi",
            text="sushi",
            image=blob_pb2.Image(data=(ROOT / "examples" / "art" / "sushi-noto.png").read_bytes()),
            transform=collage_pb2.Transform(x=32, y=32, scale=0.3),
        )
    ],
)


async def test_a_trial_draws_as_its_manifest_says(tmp_path):
    manifest = [*yaml.safe_load_all((ROOT / "deploy" / "k8s" / "cpu.yaml").read_text())]
    for each in manifest:
        if each["kind"] == "Deployment" and each["metadata"]["name"] == "collage-gateway":
            each["spec"]["replicas"] = 2
    pods = Pods(yaml.safe_dump_all(manifest), tmp_path, SECRETS, network="127.77.1")
    with contextlib.ExitStack() as stack:
        stack.callback(pods.kill)
        await pods.start()
        for pod in pods.pods.values():
            for each in pod.containers.values():
                await each.ask("livenessProbe")
        edge = pods.pods["collage-edge-0"]
        async with AsyncCollageClient(f"{edge.address}:8080") as client:
            sampling = collage_pb2.Sampling(steps=2, images=1, seed=3)
            events = [event async for event in await client.generate(COLLAGE, sampling)]
        assert events[-1].WhichOneof("kind") == "done"
        # What ends in its time ends well, and is ready no more.
        await pods.stop()
        for number in range(2):
            gateway = pods.pods[f"collage-gateway-{number}"].containers["gateway"]
            assert gateway.process.ending == "exit status 0"
            with pytest.raises(grpc.aio.AioRpcError):
                await gateway.ask("readinessProbe")


async def test_three_servers_of_the_queue_keep_jobs_while_one_is_away(tmp_path):
    whole = yaml.safe_load_all((ROOT / "deploy" / "k8s" / "fleet.yaml").read_text())
    queue = [
        each
        for each in whole
        if each["kind"] in ("ConfigMap", "Service", "StatefulSet")
        and each["metadata"]["name"].startswith("collage-queue")
    ]
    pods = Pods(yaml.safe_dump_all(queue), tmp_path, SECRETS, network="127.77.2")
    servers = list(pods.pods.values())
    assert len(servers) == 3
    at = [f"nats://collage:{SECRETS['nats-password']}@{each.address}:4222" for each in servers]
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(pods.kill)
        await pods.start()
        jobs = await open_jobs(GatewaySettings(jobs=at[0], job_replicas=len(servers)))
        stack.push_async_callback(jobs.close)
        client = await nats.connect(at[1])
        stack.push_async_callback(client.close)
        for stream in await client.jetstream().streams_info():
            assert stream.config.num_replicas == len(servers)
        kept = await jobs.submit("00000000-0000-4000-8000-000000000001", b"body")
        # The one that is talked to, and whatever it leads.
        servers[0].containers["nats"].process.kill()
        async with asyncio.timeout(60):
            assert (await jobs.get(kept.id)).body == b"body"
            claim = await jobs.claim("w", wait_s=30)
        assert claim is not None and claim.job.id == kept.id
