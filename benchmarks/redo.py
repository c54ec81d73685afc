"""Twenty redo rounds on random layers: which bytes change.

    python -m benchmarks.redo [--rounds 20] [--steps 10] [--example examples/bento] [--out DIR]

Each round draws one or two random layers of the last picture again, through the service, each with a random feather and
now and then from its cut-out. Exits 1 if a byte outside the visible masks of those layers differs from the parent, or
if nothing ever changed inside them.
"""

import argparse
import asyncio
import io
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from collage.v1 import collage_pb2
from collage_client import AsyncCollageClient
from collage_client.files import attach, load
from local import embedded
from services.common.telemetry import start_logging


def pixels(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)))


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--example", type=Path, default=Path("examples/bento"))
    parser.add_argument("--out", type=Path, help="keep every round's picture here")
    args = parser.parse_args()
    start_logging("redo", level="ERROR")
    choose = random.Random(0)
    collage = attach(load(args.example))
    names = [layer.name for layer in collage.layers]
    outside_total = inside_total = 0
    with tempfile.TemporaryDirectory() as data:
        server = await embedded.start(Path(data))
        async with AsyncCollageClient(server.address) as client:
            sampling = collage_pb2.Sampling(steps=args.steps, seed=0)
            drawing = await client.generate(collage, sampling)
            parent = (await drawing.result()).images[0]
            for number in range(args.rounds):
                layers = choose.sample(names, choose.choice((1, 1, 2)))
                for layer in collage.layers:
                    layer.noise = choose.uniform(0.3, 1)
                drawing = await client.redo(
                    collage,
                    parent,
                    layers,
                    collage_pb2.Sampling(steps=args.steps, seed=number + 1),
                    feather=choose.choice((0, 2, 4)),
                    restore_cutout=choose.random() < 0.3,
                )
                result = await drawing.result()
                picture = result.images[0]
                allowed_HW = np.zeros((collage.size.height, collage.size.width), bool)
                for plan in result.job.plan.layers:
                    if plan.name in layers:
                        allowed_HW |= pixels(await client.fetch(plan.mask)) > 0
                differs_HWC = pixels(picture) != pixels(parent)
                outside = int(differs_HWC[~allowed_HW].sum())
                inside = int(differs_HWC[allowed_HW].any(axis=1).sum())
                told = result.job.images[0].changed_pixels
                print(
                    f"round {number + 1:2d}  {' + '.join(layers):20s} "
                    f"{outside} bytes differ outside, {inside} of {int(allowed_HW.sum())} pixels inside"
                )
                if told != int(differs_HWC.any(axis=2).sum()):
                    print(f"  the service told {told} changed pixels")
                    outside += 1
                outside_total += outside
                inside_total += inside
                parent = picture
                if args.out:
                    args.out.mkdir(parents=True, exist_ok=True)
                    (args.out / f"round-{number + 1:02d}.png").write_bytes(picture)
        await server.stop()
    print(f"{outside_total} bytes differ outside the masks over {args.rounds} rounds")
    return 0 if outside_total == 0 and inside_total > 0 else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
