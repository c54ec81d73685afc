"""Which picture each of 24 requests gives: a change that should leave pictures alone leaves these digests alone.

    python -m benchmarks.digests            # compares with digests.json; exit code 1 where one differs
    python -m benchmarks.digests --write    # draws the list anew, after a change that is meant to be seen

Families of models by samplers, layers, dials, structure, learned words, adapters and redo, each sent to a whole system
over gRPC; one thread. The last bits depend on the processor and on torch: the list says which it was made with, and
elsewhere every digest may differ (then write one at the commit before, and compare with that).
"""

import argparse
import asyncio
import json
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collage.v1 import collage_pb2, collage_service_pb2_grpc
from collage.v1 import collage_service_pb2 as pb
from local import embedded
from services.common.models_file import BUNDLED
from services.common.rpc import connect
from services.common.telemetry import start_logging
from testing import toy
from testing.system import cutout, png

LIST = Path(__file__).with_suffix(".json")
TIMEOUT_S = 600.0
WORD_STEPS = 4
TEXTS = ("sushi", "cake", "rice", "lemon")
# An opaque picture, as a control picture must be.
DEPTH = png(np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3))
FAMILIES = ("mini", "sd1", "sd2", "sdxl", "lcm")


def layers(count: int, side: int, **changes: Any) -> list[collage_pb2.Layer]:
    """So many cut-outs over a canvas of `side`, each a little different; `changes` are of the first."""
    made = []
    for index in range(count):
        layer = collage_pb2.Layer(
            name=f"l{index}",
            image={"data": cutout(index, side=side // 2)},
            text=TEXTS[index % len(TEXTS)],
            transform={
                "x": side * (0.3 + 0.4 * (index % 2)),
                "y": side * (0.3 + 0.1 * (index % 5)),
                "rotation": 11.0 * index,
                "flip_horizontal": index % 3 == 2,
            },
            opacity=1.0 if index % 2 == 0 else 0.8,
            noise=(0.4, 0.7, 0.0, 0.9)[index % 4],
        )
        if index == 0:
            layer.MergeFrom(collage_pb2.Layer(**changes))
        made.append(layer)
    return made


def work(
    model: str,
    *,
    count: int = 2,
    side: int = 64,
    prompt: str = "",
    first: dict[str, Any] | None = None,
    **sampling: Any,
) -> pb.GenerateWork:
    """A generation of `model`; `first` are changes of the first layer, `sampling` of the settings."""
    return pb.GenerateWork(
        collage=collage_pb2.Collage(
            size={"width": side, "height": 128},
            prompt=prompt or "a photo of {l0} on the table",
            negative_prompt="a box",
            layers=layers(count, side, **(first or {})),
        ),
        sampling=collage_pb2.Sampling(
            **{"model": model, "steps": 4, "seed": 7, "images": 1, **sampling}
        ),
    )


def requests() -> dict[str, pb.GenerateWork]:
    """What is drawn, by name; names that end in `redo` are then redone on their last layer."""
    canny = {"structure": [{"kind": "canny", "scale": 0.8, "end": 0.75}]}
    both = {
        "structure": [
            {"kind": "canny", "emphasis": 0.7},
            {"kind": "depth", "image": {"data": DEPTH}},
        ]
    }
    learn = {"appearance": {"learn": True, "vectors": 2}}
    control = {"attract": 0.9, "repel": 0.6, "seed": 0}
    return {
        "mini ddim": work("mini", sampler="ddim"),
        "mini euler, 8 layers": work("mini", count=8, sampler="euler"),
        "mini euler_a, control": work("mini", sampler="euler_ancestral", first=control),
        "mini unipc, canny": work("mini", sampler="unipc", first=canny),
        "mini dpmpp, two kinds": work("mini", sampler="dpmpp_2m", first=both),
        "mini, word": work("mini", first=learn),
        "mini, word, canny, redo": work("mini", first={**learn, **canny}),
        "mini, no guidance": work("mini", guidance_scale=1.0, images=2),
        "mini, 32 layers": work("mini", count=32, side=96),
        "mini, adapter": work("mini", adapters=[{"name": "ink", "weight": 0.7}]),
        "sd1 unipc": work("sd1", sampler="unipc"),
        "sd1 ddim, control, redo": work("sd1", sampler="ddim", first=control),
        "sd1, two kinds": work("sd1", sampler="euler", first=both, images=2),
        "sd1, word": work("sd1", first=learn),
        "sd2 ddim": work("sd2", sampler="ddim"),
        "sd2 dpmpp, 8 layers, redo": work("sd2", count=8, sampler="dpmpp_2m"),
        "sd2, canny": work("sd2", first=canny),
        "sdxl euler": work("sdxl", sampler="euler"),
        "sdxl, word, two kinds, redo": work("sdxl", first={**learn, **both}),
        "sdxl, no guidance": work("sdxl", guidance_scale=1.0),
        "lcm": work("lcm", sampler="lcm", guidance_scale=4.0),
        "lcm, canny, redo": work("lcm", sampler="lcm", first=canny),
        "bundled": work("bundled", side=128, steps=6),
        "bundled, control, canny, redo": work(
            "bundled", side=128, steps=6, first={**control, **canny}
        ),
    }


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[collage_service_pb2_grpc.CollageServiceStub]:
    """A whole system over the families, its data in `folder`."""
    entries: list[dict[str, Any]] = []
    for family in FAMILIES:
        source = getattr(toy, family)(folder / family)
        for kind in ("canny", "depth"):
            toy.controlnet(source, kind)
        entries.append({"name": family, "source": str(source)})
    adapter = toy.lora(folder / "ink.safetensors", folder / "mini")
    entries[0]["adapters"] = {"ink": str(adapter)}
    entries.append({"name": "bundled", "source": str(BUNDLED)})
    models = folder / "models.yaml"
    models.write_text(json.dumps({"models": entries}))
    server = await embedded.start(
        folder / "data", model=str(models), threads=1, word_steps=WORD_STEPS
    )
    try:
        async with connect(server.address) as channel:
            yield collage_service_pb2_grpc.CollageServiceStub(channel)
    finally:
        await server.stop()


async def drawn(
    stub: collage_service_pb2_grpc.CollageServiceStub, **body: Any
) -> list[pb.GeneratedImage]:
    """The pictures of a job."""
    request = pb.CreateJobRequest(request_id=str(uuid.uuid4()), **body)
    created = await stub.CreateJob(request, timeout=TIMEOUT_S)
    images = []
    async for answer in stub.WatchJob(pb.WatchJobRequest(name=created.job.name), timeout=TIMEOUT_S):
        event = answer.event
        if event.HasField("image"):
            images.append(event.image)
        if event.HasField("failed"):
            raise RuntimeError(event.failed.message)
    return images


async def draw() -> dict[str, list[str]]:
    """The digests of every request's pictures, by name."""
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with serving(Path(folder)) as stub:
            for name, each in requests().items():
                images = await drawn(stub, generate=each)
                if name.endswith("redo"):
                    redo = pb.RedoWork(
                        collage=each.collage,
                        parent={"blob": images[0].blob},
                        layers=[each.collage.layers[-1].name],
                        sampling=each.sampling,
                        restore_cutout=True,
                    )
                    redo.collage.layers[-1].noise = 0.8
                    images += await drawn(stub, redo=redo)
                found[name] = [image.blob.sha256 for image in images]
    return found


def arithmetic() -> str:
    """What the last bits depend on beside the code, as far as it can be told: another kind of CPU differs too."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    start_logging("digests", level="ERROR")
    found = asyncio.run(draw())
    if arguments.write:
        LIST.write_text(json.dumps({"arithmetic": arithmetic(), "digests": found}, indent=1) + "\n")
    kept = json.loads(LIST.read_text())
    if kept["arithmetic"] != arithmetic():
        print(f"the list is of {kept['arithmetic']}, this is {arithmetic()}: digests may differ")
    differing = 0
    for name in sorted({*found, *kept["digests"]}):
        is_same = found.get(name) == kept["digests"].get(name)
        differing += not is_same
        told = " ".join(digest[:12] for digest in found.get(name, ()))
        print(f"{name:32} {told:28} {'same' if is_same else 'DIFFERS'}")
    if differing:
        print(
            "on another kind of CPU than the list's, compare with what the commit before prints here"
        )
    print(f"{len(found) - differing} of {len(found)} requests have the listed pictures")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
