"""What the service adds: `GenerateImages` over loopback against the same work called in process, interleaved.

    python -m benchmarks.latency [--rounds 15] [--steps 10] [--example examples/bento]

Both sides decode, compose, bind, encode, denoise, decode and write the PNG, with the same model, threads and seed, and
must come to the same bytes; the service side also stores, queues, logs every event durably, crosses gRPC four times and
hands the picture's bytes back. Exits 1 if the median difference is above 50 ms or a picture differs.
"""

import argparse
import asyncio
import hashlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from collage.v1 import collage_pb2
from collage_client import AsyncCollageClient
from collage_client.files import attach, load
from gateway.prompt import bind
from local import embedded
from services.common import wire
from services.common.collage import Sampling
from services.common.models_file import BUNDLED
from services.common.pictures import encode_png
from services.common.plate import Plate
from services.common.telemetry import start_logging
from services.compositor.making import make
from services.compositor.work import Work
from services.diffusion.networks import load as load_model
from services.generator.conditioning import LayerControl, prepare
from services.generator.folder_card import read_catalog
from services.generator.sampler import Run, step
from services.generator.stages import Stages, TorchStages

LIMIT_MS = 50.0


def in_process(stages: Stages, message: collage_pb2.Collage, sampling: Sampling) -> bytes:
    """The picture of a collage whose layers are inline, by plain calls."""
    collage = wire.parse_collage(message)
    work = Work(collage=collage, latent_factor=stages.facts.latent_factor, redo=None)
    pictures = work.pictures()
    files = make(
        work, {path: picture for path, picture in pictures.items() if isinstance(picture, bytes)}
    )
    bound = bind(collage.prompt, collage.layers)
    conditioning = prepare(
        stages,
        prompt=bound.text,
        negative_prompt=collage.negative_prompt,
        guidance_scale=sampling.guidance_scale,
        layers=[
            LayerControl(
                text_start=start,
                text_end=end,
                dials=layer.dials,
                seed=layer.layer.seed,
                structures=layer.layer.structure,
            )
            for layer, (start, end) in zip(files.composition.layers, bound.spans, strict=True)
        ],
    )
    plate = Plate.from_bytes(files.plate)
    run = Run.begin(stages, plate=plate, conditioning=conditioning, sampling=sampling)
    while not run.is_done:
        step(stages, [run])
    return encode_png(next(iter(run.finish(stages))))


async def over_loopback(
    client: AsyncCollageClient, message: collage_pb2.Collage, sampling: collage_pb2.Sampling
) -> bytes:
    """The same picture from the service."""
    blob = None
    async for event in await client.generate(message, sampling):
        if event.HasField("image"):
            blob = event.image.blob
    assert blob is not None, "a job that is done has a picture"
    return await client.fetch(blob)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--example", type=Path, default=Path("examples/bento"))
    args = parser.parse_args()
    start_logging("latency", level="ERROR")
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    (card,) = read_catalog("").cards
    controlnets = card.controlnet_folders
    stages = TorchStages(
        load_model(BUNDLED, dtype=card.dtype, device=card.device, controlnets=controlnets)
    )
    message = attach(load(args.example))
    differences, services, calls = [], [], []
    with tempfile.TemporaryDirectory() as data:
        server = await embedded.start(Path(data))
        async with AsyncCollageClient(server.address) as client:
            model = (await client.models())[0]
            for seed in range(-2, args.rounds):
                asked = collage_pb2.Sampling(steps=args.steps, seed=seed % 2**64)
                sampling = wire.parse_sampling(asked, model, fallback_seed=0)
                start = time.perf_counter()
                theirs = await over_loopback(client, message, asked)
                middle = time.perf_counter()
                ours = in_process(stages, message, sampling)
                end = time.perf_counter()
                if theirs != ours:
                    print(f"seed {seed}: the pictures differ")
                    return 1
                if seed >= 0:  # the first two rounds warm both sides up
                    services.append((middle - start) * 1000)
                    calls.append((end - middle) * 1000)
                    differences.append(services[-1] - calls[-1])
        await server.stop()
    print(f"{args.example}, {args.steps} steps, {args.rounds} rounds, {threads} threads; medians")
    print(f"  in process      {statistics.median(calls):8.1f} ms")
    print(f"  GenerateImages  {statistics.median(services):8.1f} ms")
    overhead = statistics.median(differences)
    print(f"  the service adds {overhead:7.1f} ms (median of differences; allowed {LIMIT_MS:g})")
    print(
        f"  last picture    sha256 {hashlib.sha256(ours).hexdigest()[:16]}, the same on both sides"
    )
    return 0 if overhead <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
