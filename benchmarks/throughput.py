"""What is asked together costs less than what is asked one after the other.

Eight clients send collages of 1 to 12 layers, with different dials, numbers of steps and samplers, to one system whose
networks are on one Triton server; the same jobs are drawn one after the other too, in the same run and by turns, each
time by a system that has stored nothing:

    ratio     together they never take longer: at least 1.0 times the throughput, in every round
    rows      the mean U-Net call of the server has more than 3 rows

Every client's longest wait is printed. On a GPU: `--model FOLDER --device cuda`.

    python -m benchmarks.throughput --clients 8 --jobs 4 --rounds 3
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tritonclient.grpc.aio as triton_client

from benchmarks.chaos import ART, CUTOUTS
from collage.v1 import blob_pb2, collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client import AsyncCollageClient
from local import embedded
from services.common.settings import variable
from services.generator.schedule import SAMPLERS
from testing.servers import triton_server

RATIO_BAR, ROWS_BAR = 1.0, 3.0
MAX_LAYERS = 12


def works(count: int, rng: random.Random, *, side: int) -> list[pb.GenerateWork]:
    """Collages that differ in everything a row may differ in."""
    made = []
    for _ in range(count):
        layers = [
            collage_pb2.Layer(
                name=f"layer{number}",
                text=text,
                image=blob_pb2.Image(data=(ART / file).read_bytes()),
                transform=collage_pb2.Transform(
                    x=rng.uniform(0.1, 0.9) * side,
                    y=rng.uniform(0.1, 0.9) * side,
                    scale=rng.uniform(0.1, 0.3) * side / 128,
                ),
                noise=rng.uniform(0.3, 1),
                attract=rng.uniform(0, 1),
                repel=rng.uniform(0, 1),
            )
            for number, (file, text) in enumerate(
                rng.choices(sorted(CUTOUTS.items()), k=rng.randint(1, MAX_LAYERS))
            )
        ]
        collage = collage_pb2.Collage(
            size=collage_pb2.Size(width=side, height=side), prompt="on a table", layers=layers
        )
        sampling = collage_pb2.Sampling(
            steps=rng.randint(6, 14),
            sampler=rng.choice(sorted(SAMPLERS)),
            seed=rng.getrandbits(32),
            guidance_scale=rng.uniform(3, 9),
        )
        made.append(pb.GenerateWork(collage=collage, sampling=sampling))
    return made


async def drawn(address: str, shares: Sequence[Sequence[pb.GenerateWork]]) -> list[float]:
    """Draws each client's share, all clients at once; the longest wait of each, seconds."""

    async def client(share: Sequence[pb.GenerateWork]) -> float:
        longest_s = 0.0
        async with AsyncCollageClient(address) as client:
            for work in share:
                start_s = time.monotonic()
                await (await client.generate(work.collage, work.sampling)).result()
                longest_s = max(longest_s, time.monotonic() - start_s)
        return longest_s

    return await asyncio.gather(*map(client, shares))


async def rows_and_calls(server: str, name: str) -> tuple[int, int]:
    """Rows that a server's model has computed, and in how many calls."""
    async with triton_client.InferenceServerClient(server) as client:
        told = await client.get_inference_statistics(name, as_json=True)
    (each,) = told["model_stats"]
    return int(each.get("inference_count", 0)), int(each.get("execution_count", 0))


def served(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """The model that is served, as `COLLAGE_MODELS` has it, and its name."""
    if not args.model:
        return "", "mini"
    file = folder / "models.yaml"
    told = {"name": "chosen", "source": str(args.model.resolve()), "device": args.device}
    file.write_text(json.dumps({"models": [told]}))
    return str(file), "chosen"


async def run(args: argparse.Namespace, folder: Path) -> int:
    """The whole benchmark; answers the exit code."""
    rng = random.Random(args.seed)
    model, name = served(args, folder)
    ratios, waits = [], [0.0] * args.clients
    rows = calls = 0
    async with triton_server(folder / "triton", model) as server:
        os.environ |= {
            variable("stages"): f"triton:{server.url}",
            variable("max_rows"): str(args.rows),
            variable("slots"): str(args.clients),
        }
        for number in range(args.rounds + 1):
            jobs = works(args.clients * args.jobs, rng, side=args.side)
            together = [jobs[start :: args.clients] for start in range(args.clients)]
            seconds = {}
            for kind, shares in (("in turns", [jobs]), ("together", together)):
                system = await embedded.start(folder / f"{number}-{kind}", model=model, threads=1)
                try:
                    before = await rows_and_calls(server.url, f"{name}.predict")
                    start_s = time.monotonic()
                    longest = await drawn(system.address, shares)
                    seconds[kind] = time.monotonic() - start_s
                    after = await rows_and_calls(server.url, f"{name}.predict")
                finally:
                    await system.stop()
                # The first round warms up.
                if kind == "together" and number:
                    waits = [max(pair) for pair in zip(waits, longest, strict=True)]
                    rows, calls = rows + after[0] - before[0], calls + after[1] - before[1]
            if number:
                ratios.append(seconds["in turns"] / seconds["together"])
                print(
                    f"round {number}: in turns {seconds['in turns']:.1f} s, together "
                    f"{seconds['together']:.1f} s, {ratios[-1]:.3f} times",
                    flush=True,
                )
    print(f"throughput: median {statistics.median(ratios):.3f}, least {min(ratios):.3f} times")
    print(f"rows of a U-Net call: mean {rows / calls:.2f} of {calls} calls")
    print("longest wait of each client: " + ", ".join(f"{each:.1f}" for each in waits) + " s")
    held = min(ratios) >= RATIO_BAR and rows / calls > ROWS_BAR
    print("every bar holds" if held else "a bar is missed")
    return 0 if held else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=4, help="of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="of a U-Net call at most")
    parser.add_argument("--side", type=int, default=128, help="canvas side, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="model folder; default: bundled")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
