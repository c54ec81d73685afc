"""Learned words: what a training step costs beside diffusers' way, what a stored word costs, and what a crash costs.

Ours against the arithmetic of diffusers' `examples/textual_inversion`, which trains a copy of the whole embedding
table: the table grown by the new token is AdamW's parameter, its other rows are put back after each step, and every
step encodes its pictures anew. Both learn one word from the same draws with the same loss, steps in turns, in single
precision; on a GPU in bfloat16, as the service does. Printed: CPU seconds of a step, seconds on a GPU (medians), and
their ratio on one canvas; the same with our smaller default canvas; peak memory beyond the loaded networks, each in a
process of its own; the last held-out loss of both. Then four layers in one batch against four alone, and the time until
a stored word is answered by a running system.

    python -m benchmarks.inversion                  the bundled model
    python -m benchmarks.inversion --model sd15     a random U-Net of Stable Diffusion 1.5's size, few steps
    python -m benchmarks.inversion --device cuda    either on a GPU
    python -m benchmarks.inversion --kills 10       so many runs of the inversion process, each killed once

The last one learns three words, two together and one after them. Its kills are spread over the whole of it; every other
one comes when some of the words are stored and others are not. It fails (exit code 1) where a run's vectors are not
those of an undisturbed one, byte for byte, where it repeats more than a checkpoint's interval, or where no kill came
between two words.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from collage.v1 import blob_pb2, collage_pb2
from collage.v1 import inversion_service_pb2 as pb
from collage.v1 import inversion_service_pb2_grpc as pb_grpc
from collage_client import AsyncCollageClient
from local import embedded
from local.layout import check_health
from local.processes import Process, free_port
from services.common.blobs import FolderBlobStore, put_blob
from services.common.collage import Extent
from services.common.models_file import BUNDLED
from services.common.pictures import decode
from services.diffusion.facts import read_facts
from services.diffusion.networks import LoadedModel, load
from services.diffusion.text import TextStates
from services.inversion.learn import Recipe, Trainer
from services.inversion.networks import Networks, dtype_on
from services.inversion.subject import Subject

ART = Path(__file__).parents[1] / "examples" / "art"
CUTOUTS = {
    "sushi-noto.png": "sushi",
    "castle-fluent.png": "castle",
    "carrot-flat.png": "carrot",
    "cupcake-twemoji.png": "cupcake",
}
# Weight decay of the example's AdamW.
DECAY = 1e-2
# Canvas of the large U-Net on a CPU, pixels: at its native 512 a step takes minutes on a core.
LARGE_SIDE = 256
# Of the killed runs: words, rows trained together (four a word), steps of a word, seconds between checkpoints.
KILLED_WORDS, KILLED_ROWS, KILLED_STEPS, KILLED_CHECKPOINT_S = 3, 8, 40, 1.0


def subjects(count: int) -> list[Subject]:
    """Layers to learn, of four artists."""
    pairs = list(CUTOUTS.items())[:count]
    return [
        Subject.of(Image.fromarray(decode((ART / name).read_bytes())), text) for name, text in pairs
    ]


def bundled(device: torch.device) -> Networks:
    return Networks.of(
        load(BUNDLED, dtype=dtype_on(device), device=device, vae_dtype=torch.float32)
    )


def sd15(device: torch.device) -> Networks:
    """Networks of Stable Diffusion 1.5's sizes with random weights, around the bundled tokenizer."""
    torch.manual_seed(0)
    (tokenizer,) = read_facts(BUNDLED).tokenizers
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    for part in (unet, vae, text_encoder):
        part.eval().to(device)
    for part in (unet, text_encoder):
        part.to(dtype_on(device))
    facts = replace(
        read_facts(BUNDLED),
        native=Extent(width=512, height=512),
        latent_factor=8,
        size_multiple=64,
        text_widths=(768,),
        scheduler_config={
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
        },
    )
    return Networks.of(
        LoadedModel(
            facts=facts,
            unet=unet,
            vae=vae,
            text_encoders={"text_encoder": text_encoder},
            dtype=dtype_on(device),
            device=device,
        )
    )


class Stock:
    """Diffusers' way, over the draws of a `Trainer` that learns beside it."""

    def __init__(self, networks: Networks, beside: Trainer) -> None:
        self.networks = networks
        self.beside = beside
        (self.pupil,) = beside._pupils
        # The example keeps what it trains in single precision and computes in half.
        self.encoder = copy.deepcopy(networks.model.text_encoders["text_encoder"]).float()
        vocabulary = self.encoder.config.vocab_size
        self.start = networks.first_word(self.pupil.subject.text, 1).vectors[0][0]
        self.encoder.resize_token_embeddings(vocabulary + 1)
        table = self.encoder.get_input_embeddings().weight
        table.data[vocabulary] = self.start
        table.requires_grad_(True)
        self.token = vocabulary
        self.others = torch.ones(vocabulary + 1, dtype=torch.bool, device=networks.device)
        self.others[vocabulary] = False
        self.original = table.data.clone()
        self.optimizer = torch.optim.AdamW([table], lr=beside._rates[0], weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: beside.fall(step / beside._recipe.steps)
        )
        placed = [
            self.pupil.subject.place(number, beside._side).pixels_HW3
            for number in range(beside._recipe.placements)
        ]
        self.pixels = [
            torch.from_numpy(each).permute(2, 0, 1).to(networks.device) / 127.5 - 1
            for each in placed
        ]
        self.rng = torch.Generator().manual_seed(0)
        self.step_number = 0

    def loss(self, purpose: str, number: int, *, encodes: bool) -> Tensor:
        """The loss over the trainer's own draws, its latents or latents encoded for it."""
        networks, rows = self.networks, self.beside._recipe.rows
        draws = self.beside._draw(self.pupil, purpose, number, rows)
        latents_BChw = draws.latents_BChw
        if encodes:
            # What making the pictures costs is not held against it.
            pixels_BCHW = torch.stack([self.pixels[index] for index in draws.chosen])
            posterior = networks.model.vae.encode(pixels_BCHW).latent_dist
            scale = networks.model.vae.config.scaling_factor
            latents_BChw = posterior.sample(self.rng).detach() * scale
        (ids_T,) = draws.prompt.ids_ET
        ids = torch.tensor(ids_T)
        ids[draws.prompt.words[0][0]] = self.token
        device, dtype = networks.device, networks.model.dtype
        with torch.autocast(device.type, dtype, enabled=device.type != "cpu"):
            hidden_BTD = self.encoder(ids.to(device).expand(rows, -1))[0]
        text = TextStates(hidden_BTD=hidden_BTD.to(dtype))
        noisy = networks.noised(latents_BChw, draws.noise_BChw, draws.timesteps_B)
        predicted = networks.predict(noisy, draws.timesteps_B, text)
        target = networks.target(latents_BChw, draws.noise_BChw, draws.timesteps_B)
        error_B1hw = (predicted - target).square().mean(dim=1, keepdim=True)
        area_B = draws.alpha_B1hw.sum(dim=(1, 2, 3))
        share_B = networks.share_of_loss(draws.timesteps_B, self.beside._recipe.tilt)
        return (share_B * (error_B1hw * draws.alpha_B1hw).sum(dim=(1, 2, 3)) / area_B).mean()

    def step(self) -> None:
        """One training step."""
        self.loss("step", self.step_number, encodes=True).backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        table = self.encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[self.others] = self.original[self.others]
        self.step_number += 1

    def vector(self) -> Tensor:
        """The new token's row."""
        row: Tensor = self.encoder.get_input_embeddings().weight[self.token].detach()
        return row

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss over the held-out draws."""
        recipe = self.beside._recipe
        groups = range(recipe.held_out // recipe.rows)
        return statistics.mean(
            float(self.loss("held-out", number, encodes=False)) for number in groups
        )


def recipe(args: argparse.Namespace, networks: Networks, *, canvas: float | None = None) -> Recipe:
    if canvas is None:
        canvas = LARGE_SIDE / networks.facts.native.width if args.is_slow else 1.0
    return Recipe(
        steps=args.steps,
        rows=args.rows,
        canvas=canvas,
        placements=max(4, args.rows),
        held_out=args.rows * (1 if args.is_slow else 4),
        # The first and the last step only: looks are no part of a step.
        check_every=args.steps,
    )


def prepared(networks: Networks, these: list[Subject], how: Recipe) -> Trainer:
    """A trainer whose next unit is its first step."""
    trainer = Trainer(networks, these, how)
    while any(progress.loss == float("inf") for progress in trainer.progress()):
        trainer.advance()
    return trainer


def timed(work: Callable[[], None], device: torch.device) -> float:
    """CPU seconds, so that what other processes do meanwhile does not count; on a GPU, seconds until it is done."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(args: argparse.Namespace) -> None:
    """Steps in turns."""
    device = args.device
    networks = NETWORKS[args.model](device)
    how = recipe(args, networks)
    ours = prepared(networks, subjects(1), how)
    stock = Stock(networks, ours)
    side = ours._side
    # The first step of both pays for allocation.
    ours.advance()
    stock.step()
    spent: dict[str, list[float]] = {"ours": [], "stock": []}
    for _ in range(args.steps - 1):
        spent["ours"].append(timed(ours.advance, device))
        spent["stock"].append(timed(stock.step, device))
    while not ours.is_done:
        ours.advance()
    mine, theirs = (statistics.median(spent[name]) for name in ("ours", "stock"))
    is_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if is_gpu else "CPU"
    print(
        f"{args.model} on {machine}, {networks.model.dtype}, {how.rows} rows a step, {side} px, "
        f"{args.steps} steps, medians"
    )
    print(f"  a step      ours {mine:.4f} s, diffusers' way {theirs:.4f} s: {theirs / mine:.2f} x")
    loss = ours.progress()[0].loss
    print(f"  final loss  ours {loss:.5f}, diffusers' way {stock.held_out():.5f} (held out)")
    apart = float((ours._pupils[0].vectors[0][0] - stock.vector()).norm())
    moved = float((stock.vector() - stock.start).norm())
    print(f"  vectors     {apart:.3f} apart, after moving {moved:.3f}", flush=True)
    if args.model == "mini":
        small = prepared(networks, subjects(1), recipe(args, networks, canvas=Recipe().canvas))
        small.advance()
        seconds = statistics.median(timed(small.advance, device) for _ in range(args.steps // 2))
        print(f"  a step      ours at {small._side} px {seconds:.4f} s: {theirs / seconds:.2f} x")


def together(args: argparse.Namespace) -> None:
    """Four layers in one batch against one layer, step by step in turns."""
    networks = NETWORKS[args.model](args.device)
    how = recipe(args, networks)
    one, four = (prepared(networks, subjects(count), how) for count in (1, 4))
    one.advance()
    four.advance()
    spent: dict[str, list[float]] = {"one": [], "four": []}
    for _ in range(min(10, args.steps - 1)):
        spent["one"].append(timed(one.advance, args.device))
        spent["four"].append(timed(four.advance, args.device))
    alone, batch = (statistics.median(spent[name]) for name in ("one", "four"))
    print(f"  four layers together {batch:.4f} s a step, four alone {4 * alone:.4f} s: ", end="")
    print(f"{4 * alone / batch:.2f} x", flush=True)


def memory(args: argparse.Namespace) -> None:
    """Peak memory of a few steps beyond the networks, each way in a process of its own."""
    found = {}
    for way in ("ours", "stock"):
        command = [sys.executable, "-m", "benchmarks.inversion", "--model", args.model]
        command += ["--device", str(args.device), "--rows", str(args.rows), "--peak-of", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    mine, theirs = found["ours"] / 2**20, found["stock"] / 2**20
    print(f"  peak memory ours {mine:.0f} MiB beyond the networks, diffusers' way {theirs:.0f} MiB")


def peak(args: argparse.Namespace) -> None:
    """Prints the bytes that two steps take at their peak beyond the networks."""
    networks = NETWORKS[args.model](args.device)
    args.steps = 4
    trainer = Trainer(networks, subjects(1), recipe(args, networks))
    is_gpu = args.device.type == "cuda"
    before = torch.cuda.memory_allocated(args.device) if is_gpu else _memory("VmRSS")
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    if args.peak_of == "ours":
        while trainer.steps_done < 2:
            trainer.advance()
    else:
        side = trainer._side // networks.facts.latent_factor
        trainer._pupils[0].latents = [torch.zeros(4, side, side, device=args.device)] * 64
        trainer._pupils[0].alphas = [torch.ones_like(trainer._pupils[0].latents[0][:1])] * 64
        stock = Stock(networks, trainer)
        stock.step()
        stock.step()
    most = torch.cuda.max_memory_allocated(args.device) if is_gpu else _memory("VmHWM")
    print(most - before)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


async def stored(folder: Path) -> None:
    """Seconds from a request to its word, learned before, through a whole running system."""
    server = await embedded.start(folder, threads=1, word_steps=8)
    name, text = next(iter(CUTOUTS.items()))
    picture = blob_pb2.Image(data=(ART / name).read_bytes())
    layer = collage_pb2.Layer(
        name="layer", image=picture, text=text, appearance=collage_pb2.Appearance(learn=True)
    )
    size = collage_pb2.Size(width=128, height=128)
    collage = collage_pb2.Collage(size=size, prompt=text, layers=[layer])
    try:
        async with AsyncCollageClient(server.address) as client:
            seconds, steps = [], []
            for _ in range(6):
                start = time.monotonic()
                async for event in await client.learn(collage):
                    if event.word.word:
                        seconds.append(time.monotonic() - start)
                        steps.append(event.word.total)
    finally:
        await server.stop()
    print(
        f"a word learned in {steps[0]} steps, {seconds[0]:.1f} s with reading the model, is ",
        end="",
    )
    print(f"answered again after {1000 * statistics.median(seconds[1:]):.0f} ms", end="")
    print(
        f" and {max(steps[1:])} steps (medians of {len(seconds) - 1}, storage and queue included)"
    )


class Told(NamedTuple):
    """One message of a call that learns."""

    at_s: float
    layer: str
    step: int
    is_word: bool


class Inversion:
    """The inversion process over a blob folder, and a call to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        settings = {
            "ADDRESS": self.address,
            "BLOBS": f"folder:{folder / 'blobs'}",
            "THREADS": "1",
            "WORD_STEPS": str(KILLED_STEPS),
            "CHECKPOINT_S": str(KILLED_CHECKPOINT_S),
            "JOINT_ROWS": str(KILLED_ROWS),
        }
        environment = {**os.environ, **{f"COLLAGE_{key}": each for key, each in settings.items()}}
        self.process = Process(
            "inversion",
            (sys.executable, "-m", "services.inversion"),
            log=folder / "inversion.log",
            environment=environment,
        )

    async def start(self) -> None:
        """Starts the process, or starts it again."""
        await self.process.start(lambda: check_health(self.address), timeout_s=180)

    async def learn(self, seen: list[Told]) -> dict[str, str]:
        """The digests of the vectors by layer; notes what was told."""
        blobs = FolderBlobStore(self.folder / "blobs")
        request = pb.LearnWordsRequest(job="bench")
        for name, text in list(CUTOUTS.items())[:KILLED_WORDS]:
            ref = await put_blob(blobs, (ART / name).read_bytes(), media_type="image/png")
            image = blob_pb2.BlobRef(sha256=ref.sha256, size_bytes=ref.size_bytes)
            request.subjects.add(layer=text, image=image, text=text, vectors=2)
        await blobs.close()
        words = {}
        async with grpc.aio.insecure_channel(
            self.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            stub: Any = pb_grpc.InversionServiceStub(channel)  # type: ignore[no-untyped-call]
            async for answer in stub.LearnWords(request, wait_for_ready=True):
                told = answer.progress
                seen.append(Told(time.monotonic(), told.layer, told.step, bool(told.word)))
                if answer.HasField("word"):
                    words[told.layer] = answer.word.vectors.sha256
        return words


def steps_of(seen: list[Told]) -> dict[str, int]:
    """The last step told of each layer."""
    return {told.layer: told.step for told in seen}


async def killed(runs: int, seed: int, folder: Path) -> int:
    """Runs that are killed once each."""
    rng, failures, between = random.Random(seed), 0, 0
    calm = Inversion(folder / "calm")
    await calm.start()
    seen: list[Told] = []
    expected = await calm.learn(seen)
    await calm.process.terminate()
    duration_s = seen[-1].at_s - seen[0].at_s
    # Steps of all words together, as a measure of how far a call is: unlike time, it is the same in every run.
    total = sum(steps_of(seen).values())
    pace_s = duration_s / total
    first_word = next(number for number, told in enumerate(seen, 1) if told.is_word)
    apart = sum(steps_of(seen[:first_word]).values())
    print(f"undisturbed: {len(expected)} words, {total} steps, {duration_s:.1f} s", flush=True)
    for run in range(runs):
        # Every other run between the first word and the last, the others in turn over the whole.
        low, high = (
            (apart, total)
            if run % 2 == 0
            else (total * (run - 1) // runs, total * (run + 1) // runs)
        )
        target = rng.randrange(low, high)
        one = Inversion(folder / f"run-{run}")
        await one.start()
        before: list[Told] = []
        call = asyncio.create_task(one.learn(before))
        # Another task fills the list.
        while not before or sum(steps_of(before).values()) < target:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        was_learning = not call.done()
        one.process.kill()
        await asyncio.gather(call, return_exceptions=True)
        reached = steps_of(before)
        ended = {told.layer for told in before if told.is_word}
        between += 0 < len(ended) < len(expected)
        await one.start()
        after: list[Told] = []
        words = await one.learn(after)
        await one.process.terminate()
        # Where each layer was taken up; a word that was stored lost nothing.
        resumed = {told.layer: told for told in reversed(after)}
        lost = sum(
            max(0, step - resumed[layer].step)
            for layer, step in reached.items()
            if not resumed[layer].is_word
        )
        repeated_s = lost * pace_s
        is_equal = words == expected
        # A step is not cut in two, and a killed process may have been about to write.
        is_short = repeated_s <= KILLED_CHECKPOINT_S + 2 * KILLED_WORDS * pace_s or not was_learning
        failures += not (is_equal and is_short)
        print(
            f"run {run}: killed at step {sum(reached.values())} of {total}, {len(ended)} words stored; "
            f"{lost} steps, {repeated_s:.1f} s repeated; vectors {'equal' if is_equal else 'DIFFER'}",
            flush=True,
        )
    if not between:
        print("no kill came between two words")
    is_good = between and not failures
    print(
        f"PASSED: {runs} kills, {between} between two words, all vectors equal"
        if is_good
        else "FAILED"
    )
    return 0 if is_good else 1


NETWORKS = {"mini": bundled, "sd15": sd15}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=NETWORKS, default="mini")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--steps", type=int, help="to compare (60; sd15 on a CPU: 4)")
    parser.add_argument("--rows", type=int, help="a step (4; sd15 on a CPU: 1)")
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-of", choices=("ours", "stock"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.is_slow = args.model == "sd15" and args.device.type == "cpu"
    args.steps = args.steps or (4 if args.is_slow else 60)
    args.rows = args.rows or (1 if args.is_slow else 4)
    if args.peak_of:
        peak(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            return asyncio.run(killed(args.kills, args.seed, Path(folder)))
        compare(args)
        memory(args)
        if not args.is_slow:
            together(args)
        if args.model == "mini":
            asyncio.run(stored(Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
