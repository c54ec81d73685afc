"""Complete, tiny, untrained model folders in diffusers format, for tests: made on the spot, the same ones every time.

They differ where real models differ: `sd1` is shaped like Stable Diffusion 1.x (four U-Net levels, 8x autoencoder,
predicts noise), `sd2` like 2.x (predicts v, wider text, linear projections, heads of equal width), `sdxl` like XL (two
text encoders, pooled text and sizes beside the time, three levels with attention in the deeper two), `mini` like the
bundled model (three levels, 4x).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

# Words that are one token each; any other text is spelt in bytes.
WORDS = ("a", "of", "on", "the", "and", "box", "table", "sushi", "cake", "rice", "lemon", "photo")
WINDOW = 77


def sd1(folder: Path, *, text_width: int = 32) -> Path:
    """Stable Diffusion 1.x in small: canvas 64 px."""
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    return _save(folder, levels=4, vae_levels=4, text_width=text_width, scheduler=scheduler)


def sd2(folder: Path) -> Path:
    """Stable Diffusion 2.x in small: canvas 64 px, v-prediction."""
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction")
    return _save(
        folder,
        levels=4,
        vae_levels=4,
        text_width=48,
        scheduler=scheduler,
        use_linear_projection=True,
        attention_head_dim=(2, 4, 4, 4),
    )


def mini(folder: Path, *, width: int = 16, seed: int = 0) -> Path:
    """The bundled model in small: canvas 32 px, three levels, 4x autoencoder; `width` channels at full resolution."""
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    return _save(
        folder,
        levels=3,
        vae_levels=3,
        text_width=32,
        scheduler=scheduler,
        seed=seed,
        block_out_channels=(width, 2 * width, 2 * width),
    )


def sdxl(folder: Path) -> Path:
    """Stable Diffusion XL in small: canvas 64 px, text encoders of widths 32 and 48, pooled text of width 40."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizers = [
            save_tokenizer(folder),
            # The second pads with an exclamation mark.
            save_tokenizer(folder, "tokenizer_2", pad_token="!"),
        ]
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(levels=4, force_upcast=True, scaling_factor=0.13025),
            text_encoder=_text_encoder(tokenizers[0], 32),
            text_encoder_2=_text_encoder(
                tokenizers[1], 48, kind=CLIPTextModelWithProjection, projection_dim=40
            ),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32, 32),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                transformer_layers_per_block=(1, 1, 2),
                attention_head_dim=(2, 4, 4),
                use_linear_projection=True,
                cross_attention_dim=32 + 48,
                norm_num_groups=8,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 40,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
            ),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def lcm(folder: Path) -> Path:
    """A latent consistency model in small: `mini`, distilled, with the guidance scale as an input of the U-Net."""
    return _save(
        folder,
        levels=3,
        vae_levels=3,
        text_width=32,
        scheduler=LCMScheduler(**SCHEDULE),
        time_cond_proj_dim=16,
    )


def controlnet(folder: Path, kind: str) -> Path:
    """A ControlNet for the model in `folder`, which finds it there; made so that it acts, unlike an untrained one."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    vae = AutoencoderKL.load_config(folder, subfolder="vae")
    channels = (4, 4, 8, 8)[: len(vae["block_out_channels"])]
    with torch.random.fork_rng():
        torch.manual_seed(sum(kind.encode()))
        network = ControlNetModel.from_unet(
            unet,
            conditioning_embedding_out_channels=channels,
            # ControlNets take no guidance scale, so the time's weights of such a U-Net would not fit.
            load_weights_from_unet=unet.config.time_cond_proj_dim is None,
        )
        for parameter in network.parameters():
            if not parameter.any():
                # Its last layers and biases start at 0.
                parameter.data.normal_(std=0.1)
    target = folder / f"controlnet-{kind}"
    network.save_pretrained(target)
    return target


def models_file(folder: Path, *, models: int, width: int) -> Path:
    """A models.yaml of so many different models of one size."""
    lines = ["models:"]
    for index in range(models):
        mini(folder / f"toy-{index}", width=width, seed=index)
        lines.append(f"  - {{name: toy-{index}, source: toy-{index}, device: cpu}}")
    (folder / "models.yaml").write_text("\n".join(lines) + "\n")
    return folder / "models.yaml"


# The schedule that Stable Diffusion was trained with.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def _save(folder, *, levels, vae_levels, text_width, scheduler, seed=0, **unet_options):
    with torch.random.fork_rng():
        # The networks take their first weights from the global generator and offer no other.
        torch.manual_seed(seed)
        tokenizer = save_tokenizer(folder)
        text_encoder = _text_encoder(tokenizer, text_width)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            layers_per_block=1,
            cross_attention_dim=text_width,
            norm_num_groups=8,
            **{
                "block_out_channels": (16, 32, 32, 32)[:levels],
                "attention_head_dim": 4,
                **unet_options,
            },
        )
        vae = _vae(levels=vae_levels)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _text_encoder(tokenizer, width, *, kind=CLIPTextModel, projection_dim=None):
    text_encoder = kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=projection_dim or width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=WINDOW,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # The stock start is so narrow that all words look alike.
    text_encoder.get_input_embeddings().weight.data.normal_(std=0.5)
    return text_encoder


def _vae(*, levels, **options):
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        **options,
    )


def save_tokenizer(folder, part="tokenizer", **options):
    """CLIP's byte-level BPE with 256 bytes, their word-final forms, and merges that make up `WORDS`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + index) for index in range(256 - len(printable))]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            # From the end, so that a word's last letter joins first and other words stay as they are.
            right, left = pieces.pop(), pieces.pop()
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            pieces.append(left + right)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    source = folder / part
    source.mkdir(parents=True, exist_ok=True)
    (source / "vocab.json").write_text(
        json.dumps({piece: index for index, piece in enumerate(vocabulary)})
    )
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (source / "merges.txt").write_text("\n".join(lines) + "\n")
    return CLIPTokenizer.from_pretrained(source, model_max_length=WINDOW, **options)


# Layers of text encoders that adapters change.
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")


def lora(
    file: Path,
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 2,
    form: str = "diffusers",
    parts: Sequence[str] = ("unet", "text_encoder", "text_encoder_2"),
) -> Path:
    """A LoRA of rank `rank` for the attentions of a folder's U-Net and text encoder, in diffusers' or kohya's form."""
    generator = torch.Generator().manual_seed(seed)
    is_xl = (folder / "text_encoder_2").is_dir()
    weights = {}
    for part, prefix, names in (
        ("unet", "lora_unet", ("to_q", "to_k", "to_v", "to_out.0")),
        ("text_encoder", "lora_te1" if is_xl else "lora_te", _TEXT_LAYERS),
        ("text_encoder_2", "lora_te2", _TEXT_LAYERS),
    ):
        if part not in parts or not (folder / part).is_dir():
            continue
        (source,) = (folder / part).glob("*.safetensors")
        for name, tensor in load_file(source).items():
            module = name.removesuffix(".weight")
            if not module.endswith(names) or name == module:
                continue
            if part != "unet":
                # As files everywhere have it, whatever the installed transformers calls its modules.
                module = f"text_model.{module.removeprefix('text_model.')}"
            down = torch.randn((rank, tensor.shape[1]), generator=generator) * 0.3
            up = torch.randn((tensor.shape[0], rank), generator=generator) * 0.3
            if form == "kohya":
                key = f"{prefix}_{module.replace('.', '_')}"
                weights[f"{key}.lora_down.weight"], weights[f"{key}.lora_up.weight"] = down, up
                weights[f"{key}.alpha"] = torch.tensor(rank / 2)
            else:
                weights[f"{part}.{module}.lora_A.weight"] = down
                weights[f"{part}.{module}.lora_B.weight"] = up
    save_file(weights, file)
    return file
