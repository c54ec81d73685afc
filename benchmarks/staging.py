"""What it costs that the networks are elsewhere: bytes and milliseconds that a step takes beside its network.

    python -m benchmarks.staging [--steps 200] [--rounds 5]

First the seam alone: a step of Stable Diffusion 1.5's shapes at 512 x 512 (a picture with guidance: two rows, eight
layers, one ControlNet, a text of 77 x 768), asked of a real Triton server whose U-Net answers at once with what it was
given. Bars: at most 300 KB a picture and step; p50 at most 3 ms.

Then a whole picture of the bundled model, in process and by a server, interleaved. Bar: at most 1.15 times.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from local import triton
from local.processes import Process, free_port
from services.diffusion import device
from services.diffusion.text import TextStates
from services.generator.call import ControlPicture, Given, Hint, Rows, Steering
from services.generator.folder_card import FolderCard, load_stages, read_catalog
from services.generator.stages import Stages
from services.generator.triton import repository
from services.generator.triton.servers import CROSSED_BYTES, Servers
from services.generator.triton.stages import TritonStages

SIDE, CELLS, WINDOW, WIDTH, LAYERS = 512, 64, 77, 768, 8
BYTES_BAR, MILLISECONDS_BAR, RATIO_BAR = 300_000, 3.0, 1.15
# What is put before the U-Net's model: it says back what it was asked.
_ECHO = """
import torch
from services.generator.stages import TorchStages
TorchStages.predict = lambda self, rows: torch.cat([each.x_NChw for each in rows])
"""


def main() -> int:
    """Prints both and whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    device.own(1)
    (card,) = read_catalog("").cards
    with tempfile.TemporaryDirectory() as folder:
        with serving(Path(folder) / "echo", echo=True) as address:
            held = _seam(card, address, told.steps)
        with serving(Path(folder) / "true", echo=False) as address:
            held &= _pictures(card, address, told.rounds)
    print("every bar holds" if held else "a bar is missed")
    return 0 if held else 1


@contextmanager
def serving(data: Path, *, echo: bool) -> Iterator[str]:
    """A Triton server of the bundled model; with `echo` its U-Net answers at once."""
    port, folder = free_port(), data / "repository"
    names = repository.write(read_catalog("").cards, folder, threads=1)
    if echo:
        file = folder / "mini.predict" / "1" / "model.py"
        file.write_text(_ECHO + file.read_text())
    line = triton.command(folder, port=port, metrics_port=0, loaded=names)
    process = Process("triton", line, log=data / "log", environment=triton.environment())
    asyncio.run(process.start(lambda: triton.answers(f"127.0.0.1:{port}"), timeout_s=240))
    try:
        yield f"127.0.0.1:{port}"
    finally:
        asyncio.run(process.terminate())


def _seam(card: FolderCard, address: str, steps: int) -> bool:
    servers = Servers([address])
    stages = TritonStages(card, servers, may_share=False)
    rows = _step()
    stages.predict(rows)
    sent, got = (CROSSED_BYTES.labels("mini.predict", way) for way in ("sent", "got"))
    before = sent._value.get() + got._value.get()
    seconds = []
    for _ in range(steps):
        start_s = time.perf_counter()
        answer = stages.predict(rows)
        seconds.append(time.perf_counter() - start_s)
    assert torch.equal(answer, torch.cat([each.x_NChw for each in rows]))
    crossed = (sent._value.get() + got._value.get() - before) / steps
    p50, p99 = (1000 * value for value in (statistics.median(seconds), sorted(seconds)[-2]))
    print(f"a step of SD 1.5 at {SIDE} px: {crossed / 1000:.0f} KB (bar: {BYTES_BAR / 1000:.0f})")
    print(
        f"  p50 {p50:.2f} ms (bar: {MILLISECONDS_BAR:g}), next to slowest of {steps} {p99:.2f} ms"
    )
    servers.close()
    return crossed <= BYTES_BAR and p50 <= MILLISECONDS_BAR


def _pictures(card: FolderCard, address: str, rounds: int) -> bool:
    servers = Servers([address])
    kinds: dict[str, Stages] = {
        "in process": load_stages(card),
        "by Triton": TritonStages(card, servers, may_share=False),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(rounds + 1):
        for kind, stages in kinds.items():
            start_s = time.perf_counter()
            _draw(stages)
            # The first of each warms up.
            if index:
                seconds[kind].append(time.perf_counter() - start_s)
    servers.close()
    here, there = (statistics.median(each) for each in seconds.values())
    ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
    print(f"a picture of the bundled model: in process {here:.2f} s, by Triton {there:.2f} s")
    print(
        f"  {there / here:.3f} times (bar: {RATIO_BAR}); pairs {ratios[0]:.3f} to {ratios[-1]:.3f}, {rounds} rounds"
    )
    return there / here <= RATIO_BAR


def _draw(stages: Stages, steps: int = 20) -> None:
    """Encodes, takes steps of two rows with eight layers, decodes."""
    facts = stages.facts
    z_1Chw = stages.encode_image(
        torch.zeros(1, facts.native.height, facts.native.width, 3, dtype=torch.uint8)
    )
    rows = _step(
        cells=z_1Chw.shape[-1], width=facts.text_widths[0], has_picture=False, x_1Chw=z_1Chw
    )
    for _ in range(steps):
        stages.predict(rows)
    stages.decode_image(z_1Chw)


def _step(
    *,
    cells: int = CELLS,
    width: int = WIDTH,
    has_picture: bool = True,
    x_1Chw: torch.Tensor | None = None,
) -> list[Rows]:
    random = torch.Generator().manual_seed(0)
    picture = ControlPicture(kind="canny", rgb_3HW=torch.rand(3, SIDE, SIDE, generator=random))
    hint = Hint(picture=picture, scale_hw=torch.rand(cells, cells, generator=random))
    hints = (hint,) if has_picture else ()
    steering = Steering.of(
        [(1 + index,) for index in range(LAYERS)],
        [{"attract": 0.5, "repel": 0.5}] * LAYERS,
        torch.rand(LAYERS, cells, cells, generator=random),
        window=WINDOW,
    )
    x_NChw = torch.randn(1, 4, cells, cells, generator=random) if x_1Chw is None else x_1Chw
    texts = [
        TextStates(hidden_BTD=torch.randn(1, WINDOW, width, generator=random)) for _ in range(2)
    ]
    return [
        Rows(given=given, x_NChw=x_NChw, timestep=500.0, gain=0.7)
        for given in (
            Given(count=1, text=texts[0], hints=hints),
            Given(count=1, text=texts[1], hints=hints, steering=steering),
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
