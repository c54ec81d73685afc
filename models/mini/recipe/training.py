"""What the stages of training share.

Main types: `Run`, what is trained, on what and where; `Course`, the steps of one stage by the clock, with checkpoints;
`Average`, the weights that are kept; `Maker` and `Pool`, encoded scenes to learn from.
"""

import json
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
import words
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from scenes import BOUND, BOUNDS, MARKS, MOST, OWN_WORD, VECTORS, Composer, Scene, scene
from torch import Tensor, nn
from transformers import CLIPTokenizer

# Seconds of work between two lines of the log, and between two checkpoints.
LOG_EVERY, SAVE_EVERY = 60, 240
# A process that was stopped for a while has not worked meanwhile: no step takes longer.
LONGEST_STEP = 30.0
WARM_UP = 100
# An error in the picture counts by the signal-to-noise ratio, but no more than at the second of these (Min-SNR, Hang et
# al. 2023) and no less than at the first: what a thing looks like is decided where little of it can be seen, and in the
# predicted noise hardly any error is left of it there.
SNR_RANGE = (0.05, 5.0)
OFFSET_NOISE = 0.1
HELD_OUT = 10_000_000
# Steps that the processes beside a GPU may be ahead of it, and where they find the art.
AHEAD = 24
GALLERY = "gallery.npy"


class Run:
    """One training: the model's size, what paints its scenes, the folders of checkpoints and of the exported model.

    On a CPU each of `threads` works on a part of a batch with one core: they meet once a step instead of at every
    operation, which matters on a machine that is busy with other things. A GPU takes the batch as a whole, and scenes
    are made for it by processes, see `Pool`.
    """

    def __init__(
        self,
        size: networks.Size,
        composer: Composer,
        work: Path,
        *,
        threads: int = 2,
        weights: Path | None = None,
        start: Path | None = None,
        resume: bool = False,
    ) -> None:
        self.size, self.composer, self.device = size, composer, composer.device
        self.work, self.start, self.resume = work, start, resume
        self.weights = weights or work / "weights"
        # So many keep a large GPU as busy as the core that feeds it.
        self.batch = 32 if self.device.type == "cpu" else 384
        # Of every batch an eighth is new.
        self.new = self.batch // 8
        self.parts = threads if self.device.type == "cpu" else 1
        self.workers = ThreadPoolExecutor(threads)
        self.has_painters = self.device.type != "cpu"
        self._painters: ProcessPoolExecutor | None = None
        self.is_stopped = False
        work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        # The same shapes come again and again.
        torch.backends.cudnn.benchmark = True
        # Its backward pass has given NaN for masked attention on H100 and H200 (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)

    def scenes(self, seeds: Sequence[int]) -> list[Scene]:
        """The scenes of these seeds."""
        return [scene(seed, self.size.names, self.composer.palette) for seed in seeds]

    def painters(
        self, control: Callable[..., tuple[np.ndarray, np.ndarray]]
    ) -> ProcessPoolExecutor:
        """The processes that make scenes, with this `Maker.control`; started when first asked for."""
        if self._painters is None:
            # By way of a file: what is sent to a process waits until that has imported everything, one after another.
            np.save(self.work / GALLERY, self.composer.gallery_NLHWC)
            self._painters = ProcessPoolExecutor(
                max(1, len(os.sched_getaffinity(0)) - 1),
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self.size, self.work, control),
            )
        return self._painters

    def stop_on_signal(self) -> None:
        """From now on SIGTERM and SIGINT end the stage after its step, with a checkpoint."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "is_stopped", True))

    def gradients(self, loss_of: Callable[..., Tensor], *batch_B: Tensor) -> Tensor:
        """Adds the gradients of a batch's mean loss; the loss."""

        def part(inputs: tuple[Tensor, ...]) -> Tensor:
            torch.set_num_threads(1)
            with halved(self.device):
                loss = loss_of(*inputs) * (len(inputs[0]) / len(batch_B[0]))
            loss.backward()
            return loss.detach()

        chunks = zip(*(whole_B.chunk(self.parts) for whole_B in batch_B), strict=True)
        if self.parts == 1:
            return sum(map(part, chunks), torch.zeros((), device=self.device))
        return sum(self.workers.map(part, chunks), torch.zeros(()))


class Average:
    """Exponential moving average of a model's weights, quick to follow at the start."""

    def __init__(self, model: nn.Module, keep: float) -> None:
        self.values = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self._keep = keep

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        """Move towards the model as it stands after `step`."""
        rate = 1 - min(self._keep, (step + 1) / (step + 10))
        pairs = [
            (self.values[key], value)
            for key, value in model.state_dict().items()
            if value.is_floating_point()
        ]
        torch._foreach_lerp_([mine for mine, _ in pairs], [other for _, other in pairs], rate)


class Course:
    """The steps of one stage: how far it is, how fast it learns, what is kept for taking it up again.

    groups: the optimiser's parameter groups with their rates, reached after a warm-up and falling to 0 as a cosine.
    """

    def __init__(self, run: Run, name: str, minutes: float, groups: list[dict[str, Any]]) -> None:
        self._run, self.name = run, name
        self._limit = 60 * minutes
        self._path = run.work / f"{name}.pt"
        self.step, self.worked = 0, 0.0
        self._rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)

    @property
    def is_done(self) -> bool:
        """Whether its time is up."""
        return self.worked >= self._limit

    def resumed(self) -> dict[str, Any]:
        """What the last checkpoint holds, empty without one; the clock and the optimiser follow it."""
        if not (self._run.resume and self._path.exists()):
            return {}
        saved: dict[str, Any] = torch.load(
            self._path, map_location=self._run.device, weights_only=True
        )
        self.optimizer.load_state_dict(saved.pop("optimizer"))
        self.step, self.worked = saved.pop("step"), saved.pop("worked")
        return saved

    def save(self, **state: Any) -> None:
        """Write a checkpoint whole or not at all."""
        partial = self._path.with_suffix(".part")
        clock = {"step": self.step, "worked": self.worked}
        torch.save({**state, **clock, "optimizer": self.optimizer.state_dict()}, partial)
        partial.replace(self._path)

    def attend(
        self,
        learn: Callable[[int], Tensor],
        save: Callable[[], dict[str, Any]],
        followers: Sequence[tuple[Average, nn.Module]] = (),
    ) -> None:
        """Work until the time is up or the run is stopped.

        learn: adds the gradients of a step and gives its loss; the step is made here. save: makes a checkpoint and
        tells what is to be logged with it; called at the end, too. followers: averages of models, moved every step.
        """
        shown = saved = self.worked
        losses: list[Tensor] = []
        weights = [value for group in self.optimizer.param_groups for value in group["params"]]
        while not (self.is_done or self._run.is_stopped):
            start = time.monotonic()
            share = 0.5 + 0.5 * math.cos(math.pi * self.worked / self._limit)
            share *= min(1.0, (self.step + 1) / WARM_UP)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * share
            self.optimizer.zero_grad()
            losses.append(learn(self.step))
            nn.utils.clip_grad_norm_(weights, 1.0)
            self.optimizer.step()
            for average, model in followers:
                average.follow(model, self.step)
            self.step += 1
            # On a GPU this waits for it, too.
            if self.step % 16 == 0 and not losses[-1].isfinite():
                raise FloatingPointError(f"the loss of step {self.step - 1} is not finite")
            self.worked += min(time.monotonic() - start, LONGEST_STEP)
            if self.worked - shown > LOG_EVERY:
                self.log(loss=round(float(torch.stack(losses).mean()), 4))
                shown, losses = self.worked, []
            if self.worked - saved > SAVE_EVERY:
                saved = self.worked
                self.log(**save())
        self.log(**save())

    def log(self, **line: Any) -> None:
        """One JSON line on standard output."""
        minutes = round(self.worked / 60, 1)
        print(
            json.dumps({"stage": self.name, "step": self.step, "minutes": minutes, **line}),
            flush=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """Makes scenes of seeds; `control` makes of a scene and its layers a control picture and where it counts."""

    size: networks.Size
    composer: Composer
    tokenizer: CLIPTokenizer
    control: Callable[[Scene, Tensor, Tensor], tuple[np.ndarray, np.ndarray]]

    @torch.no_grad()
    def make(self, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """The pictures, uint8 [B, 3, H, W], and beside them what is in `Pool.kept` after the latents."""
        torch.set_num_threads(1)
        scenes = [scene(seed, self.size.names, self.composer.palette) for seed in seeds]
        layers = self.composer.layers(scenes)
        pixels_B3HW = self.composer.paint(scenes, layers)
        ids_BT, owner_BT = token_ids(self.tokenizer, [each.caption for each in scenes])
        shown_BK2 = torch.zeros(len(scenes), MOST, 2, dtype=torch.int16)
        shown_BK2[layers.of_M, layers.slot_M] = layers.shown_M2.short()
        seen_BKhw = layers.visible(len(scenes), self.size.side // networks.FACTOR // 2)
        counts = [len(each.placements) for each in scenes]
        drawn = map(self.control, scenes, layers.paint_M4HW.split(counts), pixels_B3HW)
        edges_BHW, counts_BHW = (
            torch.from_numpy(np.stack(each)) for each in zip(*drawn, strict=True)
        )
        seen_BKhw = (255 * seen_BKhw).round().byte()
        return pixels_B3HW, ids_BT.short(), shown_BK2, owner_BT, seen_BKhw, edges_BHW, counts_BHW


# A process that makes scenes has one of its own, because a composer is soon built and large to send.
_maker: Maker


def _begin(
    size: networks.Size, work: Path, control: Callable[..., tuple[np.ndarray, np.ndarray]]
) -> None:
    global _maker
    # The one that started it saves what there is and then ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    gallery_NLHWC = np.load(work / GALLERY, mmap_mode="c")
    composer = Composer(size.side, size.names, gallery_NLHWC, torch.device("cpu"))
    tokenizer = words.make_tokenizer(work / "tokenizer", size.names, composer.palette)
    _maker = Maker(size=size, composer=composer, tokenizer=tokenizer, control=control)


def _make(seeds: range) -> tuple[np.ndarray, ...]:
    return tuple(made.numpy() for made in _maker.make(seeds))


class Pool:
    """Scenes to learn from, encoded: a scene's place is its seed modulo the size, so the oldest are forgotten.

    On a CPU the run's threads make them when they are asked for; beside a GPU all other cores make them ahead of it.
    `kept` is all there is of them.
    """

    def __init__(self, run: Run, vae: AutoencoderKL, maker: Maker, size: int) -> None:
        self._run, self._vae, self._maker = run, vae, maker
        side = run.size.side
        latent_side, device = side // networks.FACTOR, run.device
        self.size = size
        # Scenes before the first step's new ones, and the oldest that is there.
        self.first = self.oldest = 0
        self.latents_NCHW = torch.zeros(
            size, 4, latent_side, latent_side, dtype=torch.float16, device=device
        )
        self.ids_NT = torch.zeros(size, 77, dtype=torch.int16, device=device)
        # Which renderings a scene shows, and their turns.
        self.shown_NK2 = torch.zeros(size, MOST, 2, dtype=torch.int16, device=device)
        self.owner_NT = torch.zeros(size, 77, dtype=torch.int8, device=device)
        # What is seen of each, at the finest level that has cross-attention.
        self.seen_NKhw = torch.zeros(
            size, MOST, latent_side // 2, latent_side // 2, dtype=torch.uint8, device=device
        )
        self.edges_NHW = torch.zeros(size, side, side, dtype=torch.uint8, device=device)
        self.counts_NHW = torch.zeros(size, side, side, dtype=torch.uint8, device=device)
        self.kept = (
            self.latents_NCHW,
            self.ids_NT,
            self.shown_NK2,
            self.owner_NT,
            self.seen_NKhw,
            self.edges_NHW,
            self.counts_NHW,
        )
        # By their first seed.
        self._asked: dict[int, Future[tuple[np.ndarray, ...]]] = {}

    def add(self, seeds: range) -> None:
        """Compose and encode the scenes of these seeds, some at a time."""
        if self._run.has_painters:
            self._ask(seeds)
            for some in self._pieces(seeds):
                made = self._asked.pop(some.start).result()
                self._keep(some, tuple(map(torch.from_numpy, made)))
            return
        for start in range(0, len(seeds), 64):
            some = seeds[start : start + 64]
            parts = [some[part :: self._run.parts] for part in range(self._run.parts)]
            list(self._run.workers.map(self._add, filter(len, parts)))

    def _add(self, seeds: range) -> None:
        self._keep(seeds, self._maker.make(seeds))

    def _pieces(self, seeds: range) -> Iterator[range]:
        """A step's new ones at a time."""
        new = self._run.new
        return (seeds[start : start + new] for start in range(0, len(seeds), new))

    def _ask(self, seeds: range) -> None:
        """Has the processes make those that they were not asked for."""
        for some in self._pieces(seeds):
            if some.start not in self._asked:
                painters = self._run.painters(self._maker.control)
                self._asked[some.start] = painters.submit(_make, some)

    @torch.no_grad()
    def _keep(self, seeds: range, made: tuple[Tensor, ...]) -> None:
        torch.set_num_threads(1)
        device = self._run.device
        places = torch.tensor([seed % self.size for seed in seeds], device=device)
        pixels_B3HW, *others = made
        self.latents_NCHW[places] = encode(self._vae, pixels_B3HW.to(device)).half()
        for kept, values in zip(self.kept[1:], others, strict=True):
            kept[places] = values.to(device)

    def batch(self, step: int, rng: np.random.Generator) -> Tensor:
        """Places of a batch: the newest scenes once, the rest drawn from all."""
        new = self._run.new
        first = self.first + new * step
        newest = range(first, first + new)
        if self._run.has_painters:
            self._ask(range(first, first + AHEAD * new))
        self.add(newest)
        self.oldest = max(self.oldest, newest.stop - self.size)
        old = rng.integers(self.oldest, first, self._run.batch - new)
        return torch.from_numpy(np.concatenate([newest, old]) % self.size).to(self._run.device)


def halved(device: torch.device) -> torch.autocast:
    """Computing in bfloat16 where the device has it; a CPU without takes ten times as long as in float32."""
    has_half = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_half)


def to_range(pixels: Tensor) -> Tensor:
    """From uint8 to float in -1..1."""
    return pixels.float() / 127.5 - 1


def encode(vae: AutoencoderKL, pixels_B3HW: Tensor) -> Tensor:
    """Mean latents, not scaled, of uint8 pictures."""
    x_B3HW = to_range(pixels_B3HW).contiguous(memory_format=torch.channels_last)
    with halved(x_B3HW.device):
        return torch.cat([vae.encode(part).latent_dist.mean for part in x_B3HW.split(16)])


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Padded token ids, int64 [B, 77]; vector v of the word of mark k is -1 - k max(VECTORS) - v.

    Beside them whose name a token is part of, int8 [B, 77]: the placement's number, -1 for none.
    """
    length = tokenizer.model_max_length
    rows, owner_BT = [], torch.full((len(captions), length), -1, dtype=torch.int8)
    for number, caption in enumerate(captions):
        row = [tokenizer.bos_token_id]
        began: dict[str, int] = {}
        for part in re.split(f"({OWN_WORD}|{BOUND})", caption):
            if part[:1] in MARKS:
                first = -1 - MARKS.index(part[0]) * max(VECTORS)
                row.extend(range(first, first - len(part), -1))
            elif part[:1] in BOUNDS:
                if part in began:
                    name = slice(began[part], min(len(row), length - 1))
                    owner_BT[number, name] = BOUNDS.index(part)
                began[part] = len(row)
            else:
                row.extend(tokenizer(part, add_special_tokens=False).input_ids)
        row = [*row[: length - 1], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
    return torch.tensor(rows), owner_BT


@cache
def _alphas(device: torch.device) -> Tensor:
    alphas_T: Tensor = networks.scheduler().alphas_cumprod.to(device)
    return alphas_T


def noised(
    x_BCHW: Tensor, step: int, rng: np.random.Generator, power: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents with noise: noisy_BCHW, the noise, its timesteps t_B, and the loss' weights_B.

    Timesteps are evenly spread over the schedule with one common shift, so that the loss varies less, and denser among
    the noisy ones with a higher `power`. The weights are those of SNR_RANGE.
    """
    count, device = len(x_BCHW), x_BCHW.device
    # On the device: a CPU core would take as long for it as a GPU for the step.
    noise_rng = torch.Generator(device).manual_seed(step)
    noise_BCHW = torch.randn(x_BCHW.shape, generator=noise_rng, device=device)
    # Hides what the last steps still show of a picture's mean colour: the text must tell it.
    noise_BCHW += OFFSET_NOISE * torch.randn((count, 4, 1, 1), generator=noise_rng, device=device)
    alphas_T = _alphas(device)
    spread = (rng.permutation(count) + rng.random()) / count
    t_B = torch.from_numpy((1 - spread**power) * len(alphas_T)).long().to(device)
    t_B = t_B.clamp(0, len(alphas_T) - 1)
    signal_B111 = alphas_T[t_B].view(-1, 1, 1, 1)
    noisy_BCHW = signal_B111.sqrt() * x_BCHW + (1 - signal_B111).sqrt() * noise_BCHW
    snr_B = (signal_B111 / (1 - signal_B111)).flatten()
    weights_B = snr_B.clamp(*SNR_RANGE) / snr_B
    return noisy_BCHW.contiguous(memory_format=torch.channels_last), noise_BCHW, t_B, weights_B


def squared_error(predicted_BCHW: Tensor, noise_BCHW: Tensor, weights_B: Tensor) -> Tensor:
    """The mean of the weighted squared errors of predicted noise."""
    error_B = (predicted_BCHW.float() - noise_BCHW).square().mean(dim=(1, 2, 3))
    return (weights_B * error_B).mean()


def write_halved(made: Path, folder: Path) -> None:
    """Move a diffusers folder into another in half precision; each file appears whole or not at all.

    Only the stored numbers are halved: the configs still say float32, the type to load as.
    """
    for path in made.rglob("*.safetensors"):
        halved = {name: value.half() for name, value in load_file(path).items()}
        save_file(halved, path, metadata={"format": "pt"})
    for path in made.rglob("config.json"):
        config = json.loads(path.read_text())
        # Where a network that was begun with came from is a path of this machine.
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    for path in sorted(made.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)
            path.replace(target)


def exported(kind: type[Any], folder: Path, part: str) -> Any:
    """A part of an exported folder, in float32."""
    return kind.from_pretrained(folder, subfolder=part).float()
