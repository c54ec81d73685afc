"""The parts of the small model, untrained, in the shapes that stock diffusers pipelines expect."""

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

SIDE = 128
LATENT_SIDE = 32
TEXT_WIDTH = 160


def autoencoder() -> AutoencoderKL:
    """Picture [B, 3, 128, 128] in -1..1 to latent [B, 4, 32, 32] and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=SIDE,
        force_upcast=False,
    )


def denoiser() -> UNet2DConditionModel:
    """Noise prediction for latents [B, 4, 32, 32]; seven cross-attention modules at 16 and 8."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # Diffusers' name for the number of heads. Few wide heads run fastest on a CPU.
        attention_head_dim=2,
        norm_num_groups=16,
    )


def text_encoder(words: int, end: int) -> CLIPTextModel:
    """Token ids [B, 77] to states [B, 77, TEXT_WIDTH]; `end` is the id of the last token."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    # CLIP's start (0.02) leaves the words nearly alike for the first thousand steps.
    model.get_input_embeddings().weight.data.normal_(std=0.3)
    return model


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x; any diffusers scheduler can be made from it."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
