"""Models of real sizes load and draw within 24 GiB of memory. Slow, so not in `make test`:

    python -m pytest -m slow tests/test_sizes.py

A folder of the published shape with random weights in half precision is made in a child process, served from a
`models.yaml` by `collage serve` in another, and asked for a collage; the most memory that process ever had is printed.

On the CPU, with dtype unset, arithmetic and weights are in single precision: without instructions of its own for half
precision a CPU takes about sixty times as long for a convolution (measured on AVX2: 86 ms, 4.9 s in half). The canvas
is small, so that a run ends in minutes also where others work: the memory is nearly all the weights'. The operator's
`max_side` says so too, and the warm-up heeds it. What the generator reckons with on the model's own canvas is added.
"""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from collage.v1 import collage_pb2
from collage_client import AsyncCollageClient
from local.layout import check_health
from local.processes import Process, free_port
from services.common.models_file import ModelSource
from services.common.weights import find_all
from services.generator.folder_card import FolderCard
from testing.fullsize import NUMBERS
from testing.system import cutout

LIMIT_GIB = 24
SIDE = 128
# Vectors of a word, by the names that files everywhere have.
WIDTHS = {"sd15": {"emb_params": 768}, "sdxl": {"clip_l": 768, "clip_g": 1280}}
STEPS = 2
# On a busy machine.
START_LIMIT_S = 1800
ROOT = Path(__file__).parents[1]


@pytest.fixture(params=NUMBERS)
def folder(request, tmp_path):
    made = tmp_path / request.param
    # In a process of its own: what it takes must not count.
    subprocess.run(
        [sys.executable, "-m", "testing.fullsize", made.name, made], check=True, cwd=ROOT
    )
    yield made
    # Pytest keeps its folders for a while.
    shutil.rmtree(made)


def collage(word):
    """Two layers that overlap, every dial used; the first has a learned word."""
    common = {"scale": SIDE / 40, "rotation": 10}
    return collage_pb2.Collage(
        size={"width": SIDE, "height": SIDE},
        prompt="a {a} and a {b} on the table",
        layers=[
            collage_pb2.Layer(
                name="a",
                image={"data": cutout(0)},
                text="sushi",
                transform={"x": SIDE * 0.4, "y": SIDE * 0.4, **common},
                noise=1.0,
                attract=0.8,
                repel=0.6,
                seed=1,
                appearance={"word": word, "weight": 0.9},
            ),
            collage_pb2.Layer(
                name="b",
                image={"data": cutout(1)},
                text="cake",
                transform={"x": SIDE * 0.65, "y": SIDE * 0.65, **common},
                noise=0.5,
                attract=0.6,
                repel=0.8,
            ),
        ],
    )


def peak_gib(process):
    """The most memory the process ever had, files that it has mapped included."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**20


@pytest.mark.slow
@pytest.mark.timeout(2 * START_LIMIT_S)
async def test_a_model_of_real_size_draws_within_24_gib(folder, tmp_path, capsys):
    name = folder.name
    assert sum(part.count for part in find_all(folder).values()) == NUMBERS[name]
    models = tmp_path / "models.yaml"
    entry = {"name": name, "source": name, "device": "cpu", "limits": {"max_side": SIDE}}
    models.write_text(json.dumps({"models": [entry]}))
    address = f"127.0.0.1:{free_port()}"
    serve = ("serve", "--address", address, "--model", models, "--data", tmp_path / "data")
    server = Process(
        "collage serve",
        [sys.executable, "-m", "collage_client.cli", *map(str, serve)],
        log=tmp_path / "log",
    )
    await server.start(lambda: check_health(address), timeout_s=START_LIMIT_S)
    try:
        started_gib = peak_gib(server)
        generator = torch.Generator().manual_seed(0)
        vectors = {
            key: torch.randn((2, width), generator=generator) * 0.05
            for key, width in WIDTHS[name].items()
        }
        async with AsyncCollageClient(address) as client:
            word = await client.import_word("sushi", save(vectors))
            sampling = collage_pb2.Sampling(steps=STEPS, guidance_scale=5.0, seed=0)
            job = await client.generate(collage(word.name), sampling)
            events = [event async for event in job]
            result = await job.result()
        drawn_gib = peak_gib(server)
    finally:
        await server.terminate()
    # A step that the next one has overtaken is not logged.
    steps = [(event.step.step, event.step.total) for event in events if event.HasField("step")]
    assert steps[-1] == (STEPS, STEPS)
    with Image.open(io.BytesIO(result.images[0])) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (SIDE, SIDE))
        # Random weights draw noise; what overflowed anywhere would be one colour.
        assert np.asarray(picture).std() > 1
    card = FolderCard.read(ModelSource(name=name, source=folder, device="cpu"))
    native = card.facts.native
    working_gib = (
        card.memory_bytes(
            native,
            card.defaults(),
            max_rows=1,
            has_structure=False,
            has_emphasis=False,
        )
        / 2**30
    )
    with capsys.disabled():
        print(  # noqa: T201 the figures are what this is run for
            f"\n{name}: {SIDE} x {SIDE}, {STEPS} steps in {result.stage_seconds['generate']:.0f} s, {card.dtype}; peak "
            f"memory of the server {started_gib:.1f} GiB when it served, {drawn_gib:.1f} GiB with the picture drawn; "
            f"{native.width} x {native.height} would add at most {working_gib:.1f} GiB"
        )
    assert drawn_gib + working_gib < LIMIT_GIB
