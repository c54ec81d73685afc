"""The second stage: denoiser, text encoder and edge ControlNet together on latents of scenes; exports the model.

Half of every batch has control pictures, so that the U-Net learns to draw with them and without. In the same way every
second caption is heard in its place only: see `HeardInPlace`.
"""

import math
import tempfile
import threading
from pathlib import Path
from typing import Any

import controlnet
import networks
import numpy as np
import torch
import words
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from PIL import Image
from scenes import MOST, VECTORS
from torch import Tensor, nn
from torch.nn import functional
from training import (
    HELD_OUT,
    Average,
    Course,
    Maker,
    Pool,
    Run,
    exported,
    noised,
    squared_error,
    token_ids,
    write_halved,
)
from transformers import CLIPTextModel, CLIPTokenizer

POOL = 20_000
# Of the networks, and of the table of words. Its values are large (0.3) and a word that means nothing yet has a small
# gradient: at the networks' rate no word for a look or a colour meant anything after 800 steps.
LEARNING_RATE, WORD_RATE = 8e-4, 1e-2
# What starts from nothing learns faster: pictures' own words, the ControlNet's way in and its zeros' way out.
NEW_RATE = 2e-3
# Of the noise added to a picture's own word, as a share of the words' spread: neighbours are to mean nearly the same.
WORD_BLUR = 0.3
# The text encoder learns besides, with this weight, to say at the end of a name what the thing looks like: its picture,
# so small, as CLIP's was taught with pictures. From noise alone it learns for thousands of steps not to hear of looks:
# what a word without a meaning does to a picture is wrong, and to say nothing is the nearest remedy.
RECALL, RECALLED_SIDE = 0.3, 12
# What is added to the scores of a name's tokens where nothing of the thing is seen; between, the share's logarithm.
UNHEARD = -8.0
HELD_OUT_COUNT = 32
CAPTION_DROPOUT = 0.1
AVERAGE = 0.998
# What a thing looks like is decided in the noisier half of the steps, so these are met more often.
POWER = 2.0
PROMPTS = (
    "a sushi on a wooden table",
    "a bento box on a white table cloth",
    "a birthday cake on a checkered cloth",
    "a coffee cup on a wooden table",
    "a house on grass",
    "a sailboat in a blue sky",
    "a cat on sand",
    "a sushi and a carrot on a white table cloth",
    "a mountain, a cloud and a pine tree in a landscape with green grass",
    "an apple",
    "strawberry",
    "a bento box, a sushi, a broccoli, an avocado and a rice ball on a wooden table",
)


class HeardInPlace:
    """Cross-attention in which the tokens of a thing's name are heard where the thing is seen.

    Where a caption names several things, noise hides which is where, and every name learns from all of them. Heard in
    place a word answers for its own cells alone, as attention control has it when a collage is drawn.
    """

    def __init__(self, stock: AttnProcessor | AttnProcessor2_0) -> None:
        self._stock = stock
        # The parts of a batch are worked on side by side, each in its thread.
        self._now = threading.local()

    def tell(self, owner_BT: Tensor, seen_BKhw: Tensor) -> None:
        """From now on, in this thread: whose name each token is part of, -1 for none, and what is seen of each."""
        self._now.told = owner_BT, seen_BKhw.float() / 255
        self._now.bias: dict[int, Tensor] = {}

    def _bias_BQT(self, queries: int) -> Tensor:
        if queries not in self._now.bias:
            owner_BT, seen_BKhw = self._now.told
            share_BKQ = functional.adaptive_avg_pool2d(seen_BKhw, math.isqrt(queries)).flatten(2)
            log_BKQ = share_BKQ.clamp(min=math.exp(UNHEARD)).log()
            everywhere_B1Q = torch.zeros_like(log_BKQ[:, :1])
            log_BKQ = torch.cat([everywhere_B1Q, log_BKQ], dim=1)
            which_BTQ = (owner_BT.long() + 1)[..., None].expand(-1, -1, queries)
            self._now.bias[queries] = log_BKQ.gather(1, which_BTQ).transpose(1, 2)
        bias_BQT: Tensor = self._now.bias[queries]
        return bias_BQT

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, Q, inner], encoder_hidden_states [B, T, C] -> [B, Q, inner]."""
        if encoder_hidden_states is not None:
            assert attention_mask is None, "the text has no mask of its own"
            attention_mask = self._bias_BQT(hidden_states.shape[1]).to(hidden_states.dtype)
        mixed: Tensor = self._stock(attn, hidden_states, encoder_hidden_states, attention_mask)
        return mixed


class Model(nn.Module):
    """The networks that learn together, so that one optimiser and one average hold all."""

    def __init__(self, run: Run, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = run.size.denoiser()
        self.text = run.size.text_encoder(len(tokenizer), tokenizer.eos_token_id)
        if run.start:
            self.unet = exported(UNet2DConditionModel, run.start, "unet")
            self.text = exported(CLIPTextModel, run.start, "text_encoder")
        self.control = networks.controlnet(self.unet)
        if run.start and (run.start / controlnet.NAME).exists():
            self.control = exported(ControlNetModel, run.start, controlnet.NAME)
        width = self.text.config.hidden_size
        self.describer = networks.Describer(width, max(VECTORS))
        self.recaller = nn.Linear(width, 4 * RECALLED_SIDE**2)
        self._composer = run.composer
        # What is heard now: the parts of a batch are heard side by side, each in its thread.
        self._own = threading.local()
        self.text.get_input_embeddings().register_forward_hook(self._put_own)
        stock = AttnProcessor2_0()
        if run.device.type == "cpu":
            # There the backward pass of fused attention takes longer than plain products of matrices.
            stock = AttnProcessor()
        self._in_place = HeardInPlace(stock)
        self.unet.set_attn_processor(self._in_place)
        self.control.set_attn_processor(stock)

    def hear(self, ids_BT: Tensor, shown_BK2: Tensor, blur_BKVC: Tensor) -> Tensor:
        """The text's states [B, T, C].

        Ids below 0 are vectors of words of their own of the renderings shown_BK2 (which, turn); blur_BKVC is added to
        them.
        """
        place_BT = -1 - ids_BT
        rows, columns = (place_BT >= 0).nonzero(as_tuple=True)
        if len(rows):
            used_BK = torch.zeros(shown_BK2.shape[:2], dtype=torch.bool, device=ids_BT.device)
            used_BK[rows, place_BT[rows, columns] // max(VECTORS)] = True
            vectors_BKVC = blur_BKVC.clone()
            vectors_BKVC[used_BK] += self.describer(self._composer.portraits(shown_BK2[used_BK]))
            self._own.word = (
                rows,
                columns,
                vectors_BKVC.flatten(1, 2)[rows, place_BT[rows, columns]],
            )
        states_BTC: Tensor = self.text(input_ids=ids_BT.clamp(min=0)).last_hidden_state
        self._own.word = None
        return states_BTC

    def recall(self, states_BTC: Tensor, owner_BT: Tensor, shown_BK2: Tensor) -> Tensor:
        """How badly the states at the ends of names, where there are any, recall the renderings: a squared error."""
        place_T = torch.arange(owner_BT.shape[1], device=owner_BT.device)
        number_K1 = torch.arange(MOST, device=owner_BT.device)[:, None]
        ends_BK = ((owner_BT[:, None] == number_K1) * place_T).amax(dim=2)
        told_BK = ends_BK > 0
        if not told_BK.any():
            return states_BTC.new_zeros(())
        states_BKC = states_BTC.gather(1, ends_BK[..., None].expand(-1, -1, states_BTC.shape[-1]))
        recalled_MD = self.recaller(states_BKC[told_BK]).float()
        portraits_M4HW = self._composer.portraits(shown_BK2[told_BK])
        small_M4hw = functional.adaptive_avg_pool2d(portraits_M4HW, RECALLED_SIDE)
        return functional.mse_loss(recalled_MD, small_M4hw.flatten(1))

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        states_BTC: Tensor,
        edges_AHW: Tensor,
        counts_AHW: Tensor,
        owner_BT: Tensor,
        seen_BKhw: Tensor,
    ) -> Tensor:
        """Predicted noise [B, 4, H, W] of noisy latents at steps t_B; the first A have control pictures.

        Tokens with an owner are heard where it is seen, the others everywhere.
        """
        inputs = (x_BCHW, t_B, states_BTC)
        self._in_place.tell(owner_BT, seen_BKhw)
        *downs, mid = controlnet.residuals(self.control, *inputs, edges_AHW, counts_AHW)
        predicted_BCHW: Tensor = self.unet(
            *inputs, down_block_additional_residuals=downs, mid_block_additional_residual=mid
        ).sample
        return predicted_BCHW

    def _put_own(self, module: nn.Module, args: Any, embedded_BTC: Tensor) -> Tensor:
        """Puts pictures' own words where they stand; as a hook, the way learned words are put in place later."""
        word = getattr(self._own, "word", None)
        if word is None:
            return embedded_BTC
        rows, columns, vectors_NC = word
        embedded_BTC = embedded_BTC.clone()
        embedded_BTC[rows, columns] = vectors_NC.to(embedded_BTC.dtype)
        return embedded_BTC


@torch.no_grad()
def centre(vae: AutoencoderKL, mean_C: Tensor) -> None:
    """Move the latents' mean to zero inside the autoencoder; its reconstructions stay the same.

    The schedule's last step still holds 7 % of the latent. What is left of a mean there would be
    missing from the pure noise that sampling starts with, and the colours would drift.
    """
    vae.quant_conv.bias[: len(mean_C)] -= mean_C
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean_C


def export(run: Run, vae: AutoencoderKL, model: Model, tokenizer: CLIPTokenizer) -> None:
    """Write the model as a half-precision diffusers folder."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with tempfile.TemporaryDirectory(dir=run.work) as made:
        pipeline.save_pretrained(made)
        words.copy_vocabulary(run.work / "tokenizer", Path(made) / "tokenizer")
        model.control.save_pretrained(Path(made) / controlnet.NAME)
        write_halved(Path(made), run.weights)


def draw(run: Run, path: Path) -> None:
    """Draw PROMPTS with the exported folder, seed 0, as one sheet."""
    pipeline = StableDiffusionPipeline.from_pretrained(run.weights).to(run.device)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(0) for _ in PROMPTS]
    drawn = pipeline(
        list(PROMPTS), num_inference_steps=20, guidance_scale=4.0, generator=generators
    ).images
    side = run.size.side
    sheet = Image.new("RGB", (side * 6, side * 2))
    for index, picture in enumerate(drawn):
        sheet.paste(picture, (side * (index % 6), side * (index // 6)))
    sheet.save(path)


def _blur_shape(model: Model, count: int) -> tuple[int, ...]:
    return (count, MOST, max(VECTORS), model.text.config.hidden_size)


@torch.no_grad()
def gain(model: Model, pool: Pool, scale: float) -> dict[str, float]:
    """The error of predicted noise on a pool of held-out scenes: without control, with edges, with names in place."""
    x_BCHW = pool.latents_NCHW.float() * scale
    noisy_BCHW, noise_BCHW, t_B, _ = noised(x_BCHW, 0, np.random.default_rng(0), POWER)
    blur_BKVC = torch.zeros(_blur_shape(model, pool.size), device=x_BCHW.device)
    states_BTC = model.hear(pool.ids_NT.long(), pool.shown_NK2, blur_BKVC)
    errors = {"recalled": round(float(model.recall(states_BTC, pool.owner_NT, pool.shown_NK2)), 5)}
    nowhere_NHW, nobody_NT = 0 * pool.counts_NHW, torch.full_like(pool.owner_NT, -1)
    for name, counts_NHW, owner_NT in (
        ("without", nowhere_NHW, nobody_NT),
        ("with", pool.counts_NHW, nobody_NT),
        ("in place", nowhere_NHW, pool.owner_NT),
    ):
        place = (owner_NT, pool.seen_NKhw)
        predicted_BCHW = model(noisy_BCHW, t_B, states_BTC, pool.edges_NHW, counts_NHW, *place)
        errors[name] = round(float((predicted_BCHW - noise_BCHW).square().mean()), 5)
    return errors


def train(run: Run, minutes: float) -> None:
    """Train for so many minutes, or the rest of them, and export."""
    checkpoint = run.work / "autoencoder.pt"
    if checkpoint.exists():
        vae = run.size.autoencoder()
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        vae.load_state_dict(saved["model"])
    elif run.start:
        vae = exported(AutoencoderKL, run.start, "vae")
    else:
        raise FileNotFoundError(
            "the denoiser needs a trained autoencoder, or a folder to start with"
        )
    vae.to(run.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    tokenizer = words.make_tokenizer(
        run.work / "tokenizer", run.size.names, run.composer.palette, run.start
    )
    model = Model(run, tokenizer).to(run.device, memory_format=torch.channels_last)
    table = model.text.get_input_embeddings().weight
    untaught, taught = [], []
    for name, value in model.named_parameters():
        if value is not table:
            is_new = name.startswith(("control.controlnet_", "describer.", "recaller."))
            (untaught if is_new else taught).append(value)
    groups = [
        {"params": taught, "lr": LEARNING_RATE},
        {"params": untaught, "lr": NEW_RATE},
        {"params": [table], "lr": WORD_RATE, "weight_decay": 0.0},
    ]
    course = Course(run, "denoiser", minutes, groups)
    average = Average(model, AVERAGE)
    maker = Maker(
        size=run.size, composer=run.composer, tokenizer=tokenizer, control=controlnet.control
    )
    pool = Pool(run, vae, maker, POOL)
    pool.first = 96 * run.new
    saved = course.resumed()
    if saved:
        model.load_state_dict(saved["model"])
        average.values, mean_C, scale = saved["average"], saved["mean"], saved["scale"]
        centre(vae, mean_C)
        for kept, values in zip(pool.kept, saved["pool"], strict=True):
            kept[: len(values)] = values
    else:
        pool.add(range(pool.first))
        mean_C = pool.latents_NCHW[: pool.first].float().mean(dim=(0, 2, 3))
        centre(vae, mean_C)
        pool.latents_NCHW[: pool.first] -= mean_C.half().view(1, -1, 1, 1)
        scale = round(1 / float(pool.latents_NCHW[: pool.first].float().std()), 5)
    vae.register_to_config(scaling_factor=scale)
    course.log(
        scaling_factor=scale,
        params={
            name: sum(value.numel() for value in part.parameters())
            for name, part in (("vae", vae), ("unet", model.unet), ("text", model.text))
        },
    )
    empty_T = token_ids(tokenizer, [""])[0][0].to(run.device)
    frozen = Model(run, tokenizer).to(run.device)
    held_out = Pool(run, vae, maker, HELD_OUT_COUNT)
    held_out.add(range(HELD_OUT, HELD_OUT + HELD_OUT_COUNT))

    def loss_of(
        noise_BCHW: Tensor,
        weights_B: Tensor,
        edges_BHW: Tensor,
        counts_BHW: Tensor,
        noisy_BCHW: Tensor,
        t_B: Tensor,
        ids_BT: Tensor,
        owner_BT: Tensor,
        shown_BK2: Tensor,
        blur_BKVC: Tensor,
        seen_BKhw: Tensor,
    ) -> Tensor:
        controlled = len(noise_BCHW) // 2
        control = (edges_BHW[:controlled], counts_BHW[:controlled])
        # Of those with control pictures and of those without, every second is heard in place.
        heard_BT = owner_BT.clone()
        heard_BT[::2] = -1
        states_BTC = model.hear(ids_BT, shown_BK2, blur_BKVC)
        predicted_BCHW = model(noisy_BCHW, t_B, states_BTC, *control, heard_BT, seen_BKhw)
        error = squared_error(predicted_BCHW, noise_BCHW, weights_B)
        return error + RECALL * model.recall(states_BTC, owner_BT, shown_BK2)

    def learn(step: int) -> Tensor:
        rng = np.random.default_rng([3, step])
        # Which of them have control pictures must not depend on their age.
        places = pool.batch(step, rng)[torch.from_numpy(rng.permutation(run.batch))]
        ids_BT, owner_BT = pool.ids_NT[places].long(), pool.owner_NT[places]
        silent_B = torch.from_numpy(rng.random(run.batch) < CAPTION_DROPOUT)
        ids_BT[silent_B], owner_BT[silent_B] = empty_T, -1
        x_BCHW = pool.latents_NCHW[places].float() * scale
        noisy_BCHW, noise_BCHW, t_B, weights_B = noised(x_BCHW, step, rng, POWER)
        blur_rng = torch.Generator(run.device).manual_seed(step)
        shape = _blur_shape(model, run.batch)
        blur_BKVC = torch.randn(shape, generator=blur_rng, device=run.device)
        blur_BKVC *= WORD_BLUR * networks.WORD_SPREAD
        control = (pool.edges_NHW[places], pool.counts_NHW[places])
        said = (ids_BT, owner_BT, pool.shown_NK2[places], blur_BKVC, pool.seen_NKhw[places])
        return run.gradients(loss_of, noise_BCHW, weights_B, *control, noisy_BCHW, t_B, *said)

    def save() -> dict[str, Any]:
        filled = min(POOL, pool.first + run.new * course.step)
        course.save(
            model=model.state_dict(),
            average=average.values,
            mean=mean_C,
            scale=scale,
            pool=[kept[:filled].clone() for kept in pool.kept],
        )
        frozen.load_state_dict(average.values)
        export(run, vae, frozen, tokenizer)
        draw(run, run.work / "denoiser.png")
        controlnet.draw(run, held_out, run.work / "controlnet.png")
        return {"held_out": gain(frozen, held_out, scale)}

    course.attend(learn, save, [(average, model)])
