"""The noise dial keeps its word: how much a layer changes against how much it may.

    python -m benchmarks.noise [--images 4] [--steps 30] [--out DIR]

1. Two layers side by side, noise 0.1 and 0.9, over six pairs of objects: the mean change inside the first's mask must
   be at least 5 times smaller.
2. One of them swept over five values, the other fixed: the correlation of the dial with the change inside its mask must
   be at least 0.95.
Change is the mean absolute difference of the 8-bit values over the pixels where the layer's visible mask is above one
half, from two anchors: the composite itself, and the composite once through the autoencoder, which is the least that
any picture of this model can differ from it. The bars are on the second; both are printed. Everything goes through
`collage generate`'s own path: the client, the gateway, all services.
"""

import argparse
import asyncio
import io
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from collage.v1 import collage_pb2
from collage_client import AsyncCollageClient
from local import embedded
from services.common.models_file import BUNDLED
from services.common.telemetry import start_logging
from services.diffusion.networks import load
from services.generator.stages import TorchStages

ART = Path(__file__).parents[1] / "examples" / "art"
RATIO, CORRELATION = 5.0, 0.95
# Each once beside the next, so that the ratio is of the dial and not of one object.
OBJECTS = {
    "sushi": "sushi-noto.png",
    "cupcake": "cupcake-twemoji.png",
    "house": "house-noto.png",
    "doughnut": "doughnut-flat.png",
    "castle": "castle-fluent.png",
    "strawberry": "strawberry-twemoji.png",
}
SWEEP = (0.1, 0.3, 0.5, 0.7, 0.9)


def collage(left: str, right: str, left_noise: float, right_noise: float) -> collage_pb2.Collage:
    """Two objects on a wooden-brown ground."""

    def layer(name: str, text: str, x: float, noise: float) -> collage_pb2.Layer:
        return collage_pb2.Layer(
            name=name,
            image={"data": (ART / OBJECTS[text]).read_bytes()},
            text=text,
            transform={"x": x, "y": 64, "scale": 0.45},
            noise=noise,
        )

    return collage_pb2.Collage(
        size={"width": 256, "height": 128},
        prompt="a {left} and a {right} on a wooden table",
        background={"color": {"red": 176, "green": 122, "blue": 72}},
        layers=[layer("left", left, 66, left_noise), layer("right", right, 190, right_noise)],
    )


def pixels(png: bytes) -> NDArray[np.float64]:
    return np.asarray(Image.open(io.BytesIO(png)), np.float64)


class Bench:
    """The service, and what its pictures are compared with."""

    def __init__(self, client: AsyncCollageClient, steps: int, images: int) -> None:
        self._client = client
        self._sampling = collage_pb2.Sampling(steps=steps, images=images, seed=0)
        self._stages = TorchStages(load(BUNDLED, dtype=torch.float32, device=torch.device("cpu")))
        self.pictures: list[bytes] = []

    async def changes(self, message: collage_pb2.Collage) -> list[tuple[float, float]]:
        """For each layer the change from the composite, and from its way through the autoencoder."""
        result = await (await self._client.generate(message, self._sampling)).result()
        composite_HWC = pixels(await self._client.fetch(result.job.plan.composite))
        z_1Chw = self._stages.encode_image(torch.from_numpy(composite_HWC.astype(np.uint8))[None])
        through_HWC = self._stages.decode_image(z_1Chw)[0].cpu().numpy().astype(np.float64)
        self.pictures.append(result.images[0])
        found = []
        for plan in result.job.plan.layers:
            inside_HW = pixels(await self._client.fetch(plan.mask)) > 127.5
            found.append(
                tuple(
                    statistics.mean(
                        float(np.abs(pixels(image) - anchor_HWC)[inside_HW].mean())
                        for image in result.images
                    )
                    for anchor_HWC in (composite_HWC, through_HWC)
                )
            )
        return found  # type: ignore[return-value]


def show(label: str, values: Sequence[float]) -> None:
    print(f"  {label:40s} {values[0]:8.3f} {values[1]:18.3f}")


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="keep the first picture of each setting here")
    args = parser.parse_args()
    start_logging("noise", level="ERROR")
    with tempfile.TemporaryDirectory() as data:
        server = await embedded.start(Path(data))
        async with AsyncCollageClient(server.address) as client:
            bench = Bench(client, args.steps, args.images)
            print(
                f"{'mean absolute change inside the mask':36s} from composite  through autoencoder"
            )
            names = list(OBJECTS)
            kept, freed = [], []
            for left, right in zip(names, names[1:] + names[:1], strict=True):
                first, second = await bench.changes(collage(left, right, 0.1, 0.9))
                kept.append(first)
                freed.append(second)
                show(f"{left}, noise 0.1", first)
                show(f"{right}, noise 0.9", second)
            first, second = (
                [statistics.mean(change[anchor] for change in changes) for anchor in (0, 1)]
                for changes in (kept, freed)
            )
            show("mean, noise 0.1", first)
            show("mean, noise 0.9", second)
            ratios = [after / before for before, after in zip(first, second, strict=True)]
            show(f"ratio (at least {RATIO:g})", ratios)
            swept = []
            for noise in SWEEP:
                swept.append(
                    (await bench.changes(collage("strawberry", "doughnut", 0.5, noise)))[1]
                )
                show(f"doughnut, noise {noise}", swept[-1])
            correlations = [
                float(np.corrcoef(SWEEP, [change[anchor] for change in swept])[0, 1])
                for anchor in (0, 1)
            ]
            show(f"correlation (at least {CORRELATION})", correlations)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                for number, picture in enumerate(bench.pictures):
                    (args.out / f"{number}.png").write_bytes(picture)
        await server.stop()
    return 0 if ratios[1] >= RATIO and correlations[1] >= CORRELATION else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
