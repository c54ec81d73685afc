"""Models of one server come and go, and only what asks for one that cannot be had is told so.

Three toy models, one with an adapter, are behind one Triton server. 60 jobs are drawn undisturbed; then, by a system
that has stored nothing, once more by eight clients, while stages of random models are unloaded and loaded all the time,
and requests come in between for an adapter that there is not, for a model whose weights at the server are damaged, and
for one of which the server has another version:

    digests   all 60 jobs end with the pictures of the undisturbed run
    told      each of the others fails in words that name the adapter, the model

    python -m benchmarks.unloading --jobs 60 --clients 8
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tritonclient.grpc.aio as triton_client
from tritonclient.utils import InferenceServerException

from benchmarks.chaos import distinct_works
from collage.v1 import collage_service_pb2 as pb
from collage_client import AsyncCollageClient, CollageError
from local import embedded
from services.common.settings import variable
from services.generator.folder_card import read_catalog
from services.generator.triton import repository
from testing import toy
from testing.servers import TritonServer, triton_server

MODELS = ("first", "second", "third")
DAMAGED, OTHER = "damaged", "changed"
STAGES = ("encode_text", "encode_image", "predict", "decode_image")
# How long the gateway goes on asking for a model that cannot be had now.
GIVEN_UP_S = 240.0


def models_file(folder: Path) -> str:
    """A models.yaml of five toys, no two alike."""
    told = []
    for number, name in enumerate((*MODELS, DAMAGED, OTHER)):
        made = toy.mini(folder / name, seed=number)
        told.append({"name": name, "source": str(made)})
    told[0]["adapters"] = {"ink": str(toy.lora(folder / "ink.safetensors", folder / MODELS[0]))}
    (folder / "models.yaml").write_text(json.dumps({"models": told}))
    return str(folder / "models.yaml")


def works(count: int, rng: random.Random) -> list[pb.GenerateWork]:
    """Works of the three models by turns, every sixth with the adapter."""
    made = distinct_works(count, rng, side=32)
    for number, work in enumerate(made):
        work.sampling.model = MODELS[number % 3]
        if number % 6 == 0:
            work.sampling.adapters.add(name="ink", weight=0.7)
    return made


async def drawn(
    address: str, jobs: Sequence[pb.GenerateWork], *, clients: int
) -> dict[int, list[str] | str]:
    """Digests of the pictures of each job, by its number; what it is told where it fails."""
    waiting = collections.deque(enumerate(jobs))
    found: dict[int, list[str] | str] = {}

    async def client() -> None:
        async with AsyncCollageClient(address) as client:
            while waiting:
                number, work = waiting.popleft()
                found[number] = await one(client, work)

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def one(client: AsyncCollageClient, work: pb.GenerateWork) -> list[str] | str:
    """Digests of a work's pictures; what it is told where it fails."""
    digests = []
    try:
        job = await client.generate(work.collage, work.sampling, timeout_s=GIVEN_UP_S)
        async for event in job:
            if event.HasField("image"):
                digests.append(event.image.blob.sha256)
            if event.HasField("failed"):
                return event.failed.message
    except CollageError as error:
        return str(error)
    return digests


async def come_and_go(server: str, rng: random.Random, done: collections.Counter[str]) -> None:
    """Unloads a stage of a model and loads it again, over and over, until cancelled."""
    async with triton_client.InferenceServerClient(server) as client:
        while True:
            name = f"{rng.choice(MODELS)}.{rng.choice(STAGES)}"
            # A generator may load it meanwhile.
            with contextlib.suppress(InferenceServerException):
                await client.unload_model(name)
                done["unloaded"] += 1
                await asyncio.sleep(rng.uniform(0, 1))
                await client.load_model(name)
                done["loaded"] += 1
            await asyncio.sleep(rng.uniform(0, 1))


async def refused(address: str, rng: random.Random) -> dict[str, str]:
    """What is told of each request that cannot be met."""
    (work,) = distinct_works(1, rng, side=32)
    wrong = {}
    for kind in ("adapter", DAMAGED, OTHER):
        copy = pb.GenerateWork()
        copy.CopyFrom(work)
        copy.sampling.model = MODELS[0] if kind == "adapter" else kind
        if kind == "adapter":
            copy.sampling.adapters.add(name="chalk", weight=1)
        wrong[kind] = copy

    async def told(work: pb.GenerateWork) -> str:
        async with AsyncCollageClient(address) as client:
            return str(await one(client, work))

    answers = await asyncio.gather(*map(told, wrong.values()))
    return dict(zip(wrong, answers, strict=True))


async def damage(server: TritonServer, folder: Path) -> None:
    """Has the server's own copy of one model damaged and of another changed, neither loaded."""
    for name in (DAMAGED, OTHER):
        own = folder / "of the server" / name
        shutil.copytree(folder / name, own)
        (weights,) = (own / "unet").glob("*.safetensors")
        if name == OTHER:
            shutil.copy(next((folder / MODELS[0] / "unet").glob("*.safetensors")), weights)
        cards = read_catalog(f"{name}={own}").cards
        repository.write(cards, server.repository, threads=1)
        if name == DAMAGED:
            weights.write_bytes(weights.read_bytes()[:-9])
    async with triton_client.InferenceServerClient(server.url) as client:
        for name in (DAMAGED, OTHER):
            for stage in STAGES:
                await client.unload_model(f"{name}.{stage}")


async def run(args: argparse.Namespace, folder: Path) -> int:
    """The whole benchmark; answers the exit code."""
    rng = random.Random(args.seed)
    models, jobs = models_file(folder), works(args.jobs, rng)
    wrong, done = [], collections.Counter[str]()
    async with triton_server(folder / "triton", models) as server:
        os.environ[variable("stages")] = f"triton:{server.url}"
        system = await embedded.start(folder / "calm", model=models, threads=1)
        try:
            expected = await drawn(system.address, jobs, clients=2)
        finally:
            await system.stop()
        system = await embedded.start(folder / "disturbed", model=models, threads=1)
        try:
            await damage(server, folder)
            coming = asyncio.create_task(come_and_go(server.url, rng, done))
            asking = asyncio.create_task(refused(system.address, rng))
            found = await drawn(system.address, jobs, clients=args.clients)
            coming.cancel()
            told = await asking
        finally:
            await system.stop()
    print(f"stages: {done['unloaded']} unloaded, {done['loaded']} loaded")
    for number in range(args.jobs):
        if not isinstance(expected[number], list) or found[number] != expected[number]:
            wrong.append(f"job {number}: {expected[number]} undisturbed, {found[number]}")
    print(f"{args.jobs - len(wrong)} of {args.jobs} jobs as undisturbed")
    for kind, name in (("adapter", "chalk"), (DAMAGED, DAMAGED), (OTHER, OTHER)):
        print(f"{kind}: {told[kind]}")
        if name not in told[kind] or told[kind].startswith("["):
            wrong.append(f"{kind} is not told by its name")
    print(*wrong or ["every bar holds"], sep="\n")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
