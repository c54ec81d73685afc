"""Learning words: textual inversion (Gal et al. 2022) of one cut-out each, for many layers in one batch.

Main type: `Trainer`; `learn` is the whole of it in one call. The only parameters are the new vectors. Each step draws,
for each subject, timesteps, noise, placements and a template; the loss is the squared error of the predicted noise
where the object is, divided by the object's area, so that neither its ground nor its size is learned, times the noise
level, because a word has most to say where the picture says least:

    loss_b = sigma_b^tilt sum_p alpha_p |predicted noise_p - noise_p|^2 / (C sum_p alpha_p)

All draws follow from the subject and the number of the step, so a run taken up from a checkpoint ends with the same
vectors, bit for bit, and a subject learns the same, but for rounding, whoever it shares its batch with. Learning stops
when the loss over fixed held-out draws has not got better for a while. This module knows no storage and no server.

Suffixes: S subjects, B rows, V vectors, D text width, N placements, C latent channels, h, w latent cells.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn import functional

from services.diffusion.facts import ModelFacts
from services.diffusion.text import TextStates
from services.diffusion.tokens import Tokens
from services.diffusion.word import Word
from services.inversion.networks import Networks, prompt
from services.inversion.subject import Subject

# What stands around the word and its layer's text, before and after. The first one is what held-out draws use.
TEMPLATES = (
    ("", ""),
    ("a", ""),
    ("a picture of a", ""),
    ("a photo of the", ""),
    ("one", "in the middle"),
    ("a", "on a plain ground"),
)
# Adam (Kingma and Ba 2015), its usual constants.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
# Rows of one pass of the autoencoder.
ENCODED_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How words are learned; part of what a word is named by.

    steps: at most. rows: draws a step for each subject. rate: Adam's step, as a fraction of the root mean square of the
    embedding table's values, so that one number fits models of any scale; it falls to a tenth along half a cosine.
    lowest: least timestep drawn, as a fraction of all; at lower ones the picture itself says what the word would.
    tilt: power of the noise level sigma in the loss; 0 is the plain loss of Ho et al. (2020), 2 that of the picture.
    canvas: side of the training canvas as a fraction of the model's own. placements: pictures to draw from.
    check_every: steps between two looks at the held-out loss, over `held_out` draws. patience: looks without a gain of
    `gain` (a fraction) after which a subject has learned what it can.
    """

    steps: int = 200
    rows: int = 4
    rate: float = 0.1
    lowest: float = 0.25
    tilt: float = 1.0
    canvas: float = 0.75
    placements: int = 16
    held_out: int = 8
    check_every: int = 20
    patience: int = 3
    gain: float = 0.002

    @property
    def fewest_steps(self) -> int:
        """After so many steps, at the soonest, a subject may have learned what it can."""
        return min(self.steps, self.patience * self.check_every)

    def inputs(self) -> str:
        """The recipe as part of a digest."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a subject stands. loss: of the held-out draws at the last look, not finite if it broke."""

    step: int
    loss: float
    is_done: bool

    @property
    def is_broken(self) -> bool:
        """The loss is not finite: no word comes of it."""
        return not math.isfinite(self.loss)


@dataclass(slots=True, kw_only=True, eq=False)
class _Pupil:
    """A subject and what it has learned. Tensors are VD, one a text encoder; mean and square are Adam's moments."""

    subject: Subject
    prompts: list[Tokens]
    vectors: tuple[Tensor, ...]
    best: tuple[Tensor, ...]
    mean: tuple[Tensor, ...]
    square: tuple[Tensor, ...]
    step: int = 0
    checked: int = -1
    loss: float = math.inf
    best_loss: float = math.inf
    stale: int = 0
    is_done: bool = False
    latents: list[Tensor] = field(default_factory=list)
    alphas: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Draws:
    """Rows of one subject: which placements, what noise, which timesteps, and the template of all of them."""

    chosen: Sequence[int]
    latents_BChw: Tensor
    alpha_B1hw: Tensor
    noise_BChw: Tensor
    timesteps_B: Tensor
    prompt: Tokens


class Trainer:
    """Learns the words of some subjects together. Call `advance` until `is_done`, then take `words`.

    Args:
        networks: the model, frozen.
        subjects: at least one.
        recipe: how.
        state: of an earlier trainer over the same subjects, see `state`.

    Raises:
        ValueError: the state is of other subjects.
    """

    def __init__(
        self,
        networks: Networks,
        subjects: Sequence[Subject],
        recipe: Recipe,
        *,
        state: bytes | None = None,
    ) -> None:
        assert subjects, "a trainer has something to learn"
        self._networks = networks
        self._recipe = recipe
        self._side = self.side(networks.facts, recipe)
        self._rates = tuple(recipe.rate * spread for spread in networks.spread())
        self._pupils = [self._pupil(subject) for subject in subjects]
        if state is not None:
            self._load(state)

    @staticmethod
    def side(facts: ModelFacts, recipe: Recipe) -> int:
        """Of the training canvas, pixels."""
        multiple = facts.size_multiple
        native_side = min(facts.native.width, facts.native.height)
        return max(multiple, round(native_side * recipe.canvas / multiple) * multiple)

    @staticmethod
    def fits(facts: ModelFacts, subject: Subject) -> bool:
        """Whether the subject's words, its vectors and the two marks fit the text encoder's window."""
        return prompt(facts, "", subject.vectors, subject.text) is not None

    @property
    def is_done(self) -> bool:
        """Nothing is left to learn."""
        return all(pupil.is_done for pupil in self._pupils)

    @property
    def steps_done(self) -> int:
        """Training steps of the subject that has most."""
        return max(pupil.step for pupil in self._pupils)

    def advance(self) -> None:
        """One unit of work: some pictures encoded, or one look at the held-out loss, or one training step."""
        active = [pupil for pupil in self._pupils if not pupil.is_done]
        assert active, "a trainer that is done is left alone"
        wanted = self._recipe.placements + self._recipe.held_out
        for pupil in active:
            if len(pupil.latents) < wanted:
                self._encode(pupil, min(ENCODED_ROWS, wanted - len(pupil.latents)))
                return
        due = [pupil for pupil in active if self._is_due(pupil)]
        if due:
            self._check(due)
        else:
            self._step(active)

    def progress(self) -> list[Progress]:
        """Where each subject stands."""
        return [
            Progress(step=pupil.step, loss=pupil.loss, is_done=pupil.is_done)
            for pupil in self._pupils
        ]

    def words(self) -> list[Word]:
        """Each subject's word of the least held-out loss, on the CPU."""
        return [
            Word(vectors=tuple(value_VD.clone().cpu() for value_VD in pupil.best))
            for pupil in self._pupils
        ]

    def state(self) -> bytes:
        """Everything that later steps depend on, as a safetensors file."""
        tensors = {}
        for number, pupil in enumerate(self._pupils):
            for kind, values in _tensors(pupil).items():
                for encoder, value_VD in enumerate(values):
                    tensors[f"{number}.{kind}.{encoder}"] = value_VD.contiguous().cpu()
        told = [
            {
                "seed": pupil.subject.seed.hex(),
                "step": pupil.step,
                "checked": pupil.checked,
                # JSON has no infinity; the shortest form of a float reads back as the same float.
                "loss": repr(pupil.loss),
                "best_loss": repr(pupil.best_loss),
                "stale": pupil.stale,
                "is_done": pupil.is_done,
            }
            for pupil in self._pupils
        ]
        metadata = {"recipe": self._recipe.inputs(), "subjects": json.dumps(told)}
        file: bytes = save_tensors(tensors, metadata)
        return file

    def _load(self, state: bytes) -> None:
        try:
            metadata = _metadata(state)
            told = json.loads(metadata["subjects"])
            tensors = load_tensors(state)
            seeds = [pupil.subject.seed.hex() for pupil in self._pupils]
            if metadata["recipe"] != self._recipe.inputs() or seeds != [t["seed"] for t in told]:
                raise ValueError("it is of other subjects or another recipe")
            for number, (pupil, values) in enumerate(zip(self._pupils, told, strict=True)):
                for kind, held in _tensors(pupil).items():
                    for encoder, value_VD in enumerate(held):
                        value_VD.copy_(tensors[f"{number}.{kind}.{encoder}"])
                pupil.step, pupil.checked = int(values["step"]), int(values["checked"])
                pupil.loss, pupil.best_loss = float(values["loss"]), float(values["best_loss"])
                pupil.stale, pupil.is_done = int(values["stale"]), bool(values["is_done"])
        except (KeyError, TypeError, RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"not a state of these subjects: {error}") from error

    def _pupil(self, subject: Subject) -> _Pupil:
        made = [
            prompt(self._networks.facts, before, subject.vectors, f"{subject.text} {after}".strip())
            for before, after in TEMPLATES
        ]
        # A long text has room for short templates only.
        prompts = [tokens for tokens in made if tokens is not None]
        assert prompts, "a subject fits, see `fits`"
        vectors = self._networks.first_word(subject.text, subject.vectors).vectors
        return _Pupil(
            subject=subject,
            prompts=prompts,
            vectors=vectors,
            best=tuple(map(torch.clone, vectors)),
            mean=tuple(map(torch.zeros_like, vectors)),
            square=tuple(map(torch.zeros_like, vectors)),
        )

    def _is_due(self, pupil: _Pupil) -> bool:
        """Its held-out loss is to be looked at before its next step."""
        at_mark = pupil.step % self._recipe.check_every == 0 or pupil.step == self._recipe.steps
        return at_mark and pupil.checked < pupil.step

    def _encode(self, pupil: _Pupil, count: int) -> None:
        """Adds placements, those to learn from first, those held out last."""
        first = len(pupil.latents)
        placed = [pupil.subject.place(first + k, self._side) for k in range(count)]
        latents_NChw = self._networks.encode_image(np.stack([each.pixels_HW3 for each in placed]))
        alpha_NHW = torch.from_numpy(np.stack([each.alpha_HW for each in placed]))
        factor = self._networks.facts.latent_factor
        alpha_N1hw = functional.avg_pool2d(alpha_NHW[:, None], factor).to(self._networks.device)
        pupil.latents += list(latents_NChw)
        pupil.alphas += list(alpha_N1hw)

    def _draw(self, pupil: _Pupil, purpose: str, number: int, rows: int) -> _Draws:
        """What follows from the subject, a purpose and a number: a training step's rows, or held-out ones."""
        name = hashlib.sha256(pupil.subject.seed + f"{purpose} {number}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(name[:8], "little") >> 1)
        recipe, held_out = self._recipe, purpose == "held-out"
        if held_out:
            chosen = [recipe.placements + number * rows + k for k in range(rows)]
        else:
            chosen = torch.randint(recipe.placements, (rows,), generator=rng).tolist()
        template = 0 if held_out else int(torch.randint(len(pupil.prompts), (), generator=rng))
        # One timestep from each of so many equal ranges: as uniform as independent draws, and steadier. Held-out rows
        # share the ranges among their groups.
        groups = recipe.held_out // rows if held_out else 1
        offset = number if held_out else 0
        place_B = torch.arange(rows) * groups + offset + torch.rand(rows, generator=rng)
        part_B = recipe.lowest + (1 - recipe.lowest) * place_B / (rows * groups)
        # In single precision the last range's end may round up to the whole.
        last = len(self._networks.alphas_T) - 1
        timesteps_B = (part_B * (last + 1)).long().clamp_max(last)
        latents_BChw = torch.stack([pupil.latents[index] for index in chosen])
        noise_BChw = torch.randn(latents_BChw.shape, generator=rng)
        device = self._networks.device
        return _Draws(
            chosen=chosen,
            latents_BChw=latents_BChw,
            alpha_B1hw=torch.stack([pupil.alphas[index] for index in chosen]),
            noise_BChw=noise_BChw.to(device),
            timesteps_B=timesteps_B.to(device),
            prompt=pupil.prompts[template],
        )

    def _losses(self, pupils: Sequence[_Pupil], draws: Sequence[_Draws]) -> Tensor:
        """The mean loss of each subject's rows, S."""
        networks = self._networks
        rows = len(draws[0].timesteps_B)
        text: TextStates = networks.encode_text(
            [each.prompt for each in draws], [Word(vectors=pupil.vectors) for pupil in pupils]
        )
        latents_BChw = torch.cat([each.latents_BChw for each in draws])
        noise_BChw = torch.cat([each.noise_BChw for each in draws])
        timesteps_B = torch.cat([each.timesteps_B for each in draws])
        alpha_B1hw = torch.cat([each.alpha_B1hw for each in draws])
        predicted_BChw = networks.predict(
            networks.noised(latents_BChw, noise_BChw, timesteps_B),
            timesteps_B,
            text.repeated(rows),
        )
        target_BChw = networks.target(latents_BChw, noise_BChw, timesteps_B)
        error_B1hw = (predicted_BChw - target_BChw).square().mean(dim=1, keepdim=True)
        weighted_B = (error_B1hw * alpha_B1hw).sum(dim=(1, 2, 3))
        area_B = alpha_B1hw.sum(dim=(1, 2, 3)).clamp_min(1e-6)
        loss_B = networks.share_of_loss(timesteps_B, self._recipe.tilt) * weighted_B / area_B
        return loss_B.view(len(draws), rows).mean(dim=1)

    def _step(self, pupils: Sequence[_Pupil]) -> None:
        leaves = [value_VD.requires_grad_() for pupil in pupils for value_VD in pupil.vectors]
        draws = [self._draw(pupil, "step", pupil.step, self._recipe.rows) for pupil in pupils]
        # Subjects share no parameter, so the sum gives each the gradient of its own loss.
        gradients = iter(torch.autograd.grad(self._losses(pupils, draws).sum(), leaves))
        for leaf_VD in leaves:
            leaf_VD.requires_grad_(False)
        for pupil in pupils:
            self._adam(pupil, [next(gradients) for _ in pupil.vectors])

    @staticmethod
    def fall(part: float) -> float:
        """What is left of the rate after that part of the steps."""
        return 0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2

    def _adam(self, pupil: _Pupil, gradients: Sequence[Tensor]) -> None:
        fall = self.fall(pupil.step / self._recipe.steps)
        pupil.step += 1
        of_encoders = zip(
            pupil.vectors, pupil.mean, pupil.square, gradients, self._rates, strict=True
        )
        for value_VD, mean_VD, square_VD, gradient_VD, rate in of_encoders:
            mean_VD.lerp_(gradient_VD, 1 - BETA_1)
            square_VD.lerp_(gradient_VD.square(), 1 - BETA_2)
            root_VD = (square_VD / (1 - BETA_2**pupil.step)).sqrt() + EPSILON
            value_VD -= fall * rate / (1 - BETA_1**pupil.step) * mean_VD / root_VD

    @torch.no_grad()
    def _check(self, pupils: Sequence[_Pupil]) -> None:
        """Looks at the held-out loss and decides who goes on."""
        recipe = self._recipe
        rows = min(recipe.rows, recipe.held_out)
        groups = recipe.held_out // rows
        sums_S = sum(
            self._losses(pupils, [self._draw(p, "held-out", number, rows) for p in pupils])
            for number in range(groups)
        )
        assert isinstance(sums_S, Tensor), "there is a held-out draw"
        for pupil, loss in zip(pupils, (sums_S / groups).tolist(), strict=True):
            pupil.checked, pupil.loss = pupil.step, loss
            if loss < pupil.best_loss * (1 - recipe.gain):
                pupil.stale = 0
            else:
                pupil.stale += 1
            if loss < pupil.best_loss:
                pupil.best_loss = loss
                pupil.best = tuple(map(torch.clone, pupil.vectors))
            pupil.is_done = (
                pupil.step >= recipe.steps
                or pupil.stale >= recipe.patience
                or not math.isfinite(loss)
            )


def seeds_in(state: bytes) -> list[bytes]:
    """The seeds of the subjects a state is of, in its order; none where it cannot be read."""
    try:
        return [bytes.fromhex(told["seed"]) for told in json.loads(_metadata(state)["subjects"])]
    except (KeyError, TypeError, ValueError):
        return []


def learn(
    networks: Networks,
    pairs: Sequence[tuple[Image.Image, str]],
    *,
    vectors: int = 1,
    recipe: Recipe | None = None,
) -> list[Word]:
    """The words of some (RGBA picture, text) pairs, learned in one batch: `Trainer.words`."""
    subjects = [Subject.of(picture, text, vectors=vectors) for picture, text in pairs]
    trainer = Trainer(networks, subjects, recipe or Recipe())
    while not trainer.is_done:
        trainer.advance()
    return trainer.words()


def _metadata(state: bytes) -> dict[str, str]:
    """The notes of a safetensors file."""
    length = int.from_bytes(state[:8], "little")
    notes: dict[str, str] = json.loads(state[8 : 8 + length])["__metadata__"]
    return notes


def _tensors(pupil: _Pupil) -> dict[str, tuple[Tensor, ...]]:
    return {
        "vectors": pupil.vectors,
        "best": pupil.best,
        "mean": pupil.mean,
        "square": pupil.square,
    }
