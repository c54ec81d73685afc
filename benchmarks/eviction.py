"""Bar 6: models come and go under a memory budget, and neither a request nor the machine suffers.

    python -m benchmarks.eviction [--requests 100] [--width 160] [--models 3] [--budget 2]

Model folders of about 140 MiB are made on the spot and served by a generator process of its own, with a budget for
fewer than there are. Requests for models, sizes and steps drawn at random go in over gRPC, eight at a time. The
process' resident memory is read ten times a second. It may take what it takes at rest with one model, less that model,
plus the budget, plus a working allowance: the largest request's memory by the generator's own estimate, and one model
more, for what loading one takes. Then every model draws again: the bytes must be those of a generator without a
budget. Exits 1 if a request fails, memory exceeds this, a picture differs, or no model was unloaded.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from collage.v1 import generator_service_pb2, generator_service_pb2_grpc
from local.processes import Process, ProcessFailed, free_port
from services.common import wire
from services.common.blobs import FolderBlobStore, put_blob
from services.common.collage import Extent
from services.common.rpc import connect
from services.generator.folder_card import read_catalog
from testing import plates, toy

MIB = 2**20
IN_FLIGHT = 8
TIMEOUT_S = 300.0
LOOK_S = 0.1


@dataclass(kw_only=True)
class Served:
    """A generator process, and what was seen of its memory."""

    process: Process
    stub: generator_service_pb2_grpc.GeneratorServiceStub
    blobs: FolderBlobStore
    peak_bytes: int = 0

    def resident_bytes(self) -> int:
        """What the process has in memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    async def watch(self) -> None:
        """Notes the most it ever has, until cancelled."""
        while True:
            self.peak_bytes = max(self.peak_bytes, self.resident_bytes())
            await asyncio.sleep(LOOK_S)

    async def draw(self, model: str, seed: int, side: int = 32, steps: int = 2) -> str:
        """Draws one picture; its digest."""
        plate = plates.plate(side=side)
        ref = await put_blob(self.blobs, plate.to_bytes(), media_type="application/octet-stream")
        request = generator_service_pb2.GenerateRequest(
            plate=wire.render_blob(ref),
            prompt=plates.PROMPT,
            layers=[
                generator_service_pb2.LayerControl(
                    plan={"text_start": start, "text_end": end, "attract": 0.5}
                )
                for start, end in plates.SPANS
            ],
            sampling=wire.render_sampling(plates.sampling(model=model, seed=seed, steps=steps)),
        )
        answers = self.stub.Generate(request, timeout=TIMEOUT_S)
        (image,) = [answer.image async for answer in answers if answer.HasField("image")]
        return str(image.blob.sha256)


@asynccontextmanager
async def serving(data: Path, models: Path, *, budget_bytes: float) -> AsyncIterator[Served]:
    """A generator process over these models; a budget of 0 is none."""
    address = f"127.0.0.1:{free_port()}"
    process = Process(
        "generator",
        [sys.executable, "-m", "services.generator"],
        log=data / "log",
        environment={
            **os.environ,
            "COLLAGE_ADDRESS": address,
            "COLLAGE_BLOBS": f"folder:{data / 'blobs'}",
            "COLLAGE_MODELS": str(models),
            "COLLAGE_MODEL_MEMORY": str(budget_bytes / 2**30),
            "COLLAGE_THREADS": "1",
        },
    )
    async with connect(address) as channel:
        stub = generator_service_pb2_grpc.GeneratorServiceStub(channel)

        async def probe() -> None:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=5
            )
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise ProcessFailed("its first model is not loaded yet")

        await process.start(probe, timeout_s=TIMEOUT_S)
        try:
            yield Served(process=process, stub=stub, blobs=FolderBlobStore(data / "blobs"))
        finally:
            await process.terminate()


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--budget", type=int, default=2, help="in models")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        models = toy.models_file(data, models=args.models, width=args.width)
        cards = read_catalog(str(models)).cards
        weights_bytes = cards[0].weights_bytes
        budget_bytes = args.budget * weights_bytes
        rng = random.Random(0)
        asked = [
            (rng.choice(cards).name, seed, rng.choice((32, 64)), rng.randint(1, 4))
            for seed in range(args.requests)
        ]
        work_bytes = max(
            card.memory_bytes(
                Extent(width=64, height=64),
                plates.sampling(model=card.name),
                max_rows=1,
                has_structure=False,
                has_emphasis=False,
            )
            for card in cards
        )
        failures: Counter[str] = Counter()
        async with serving(data / "tight", models, budget_bytes=budget_bytes) as tight:
            rest_bytes = tight.resident_bytes() - weights_bytes
            watching = asyncio.create_task(tight.watch())
            places = asyncio.Semaphore(IN_FLIGHT)

            async def one(model: str, seed: int, side: int, steps: int) -> None:
                async with places:
                    try:
                        await tight.draw(model, seed, side, steps)
                    except Exception as error:  # each is counted, whatever it is
                        failures[str(error)[:200]] += 1

            await asyncio.gather(*(one(*each) for each in asked))
            again = [await tight.draw(card.name, 2**40) for card in cards]
            watching.cancel()
            log = tight.process.log.read_text()
        async with serving(data / "free", models, budget_bytes=0) as free:
            unbound = [await free.draw(card.name, 2**40) for card in cards]
    loads, unloads = log.count('"model loaded"'), log.count('"model unloaded"')
    allowed_bytes = rest_bytes + budget_bytes + work_bytes + weights_bytes
    print(f"{args.requests} requests, {args.models} models of {weights_bytes / MIB:.0f} MiB each")
    print(f"  failures          {sum(failures.values())} {dict(failures) or ''}")
    print(f"  loads, unloads    {loads}, {unloads}")
    print(f"  memory at rest    {rest_bytes / MIB:.0f} MiB without a model")
    print(f"  budget            {budget_bytes / MIB:.0f} MiB of weights")
    print(f"  allowance         {(work_bytes + weights_bytes) / MIB:.0f} MiB (request and loading)")
    print(f"  peak              {tight.peak_bytes / MIB:.0f} of {allowed_bytes / MIB:.0f} MiB")
    print(f"  bytes             {'the same' if again == unbound else 'NOT those'} without a budget")
    is_kept = not failures and tight.peak_bytes <= allowed_bytes and again == unbound and unloads
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
