"""The samplers, each a scheduler of diffusers over a model's own noise schedule.

Main functions: `scheduler` and `most_steps`.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from services.diffusion.facts import ModelFacts
from services.generator.noise import HoldingUniPC

SAMPLERS: Mapping[str, Any] = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": HoldingUniPC,
    "lcm": LCMScheduler,
}


def scheduler(facts: ModelFacts, sampler: str) -> Any:
    """A new diffusers scheduler, one of `SAMPLERS`, over the model's noise schedule."""
    kind = SAMPLERS[sampler]
    # Latents have no bounds to clip to, and a folder whose scheduler does not clip has no reason to say so.
    options = {"clip_sample": False} if kind is DDIMScheduler else {}
    return kind.from_config(facts.scheduler_config, **options)


def native_sampler(facts: ModelFacts) -> str | None:
    """The sampler that the folder's own scheduler is, where it is one that few-step models are distilled for."""
    return "lcm" if facts.scheduler_config.get("_class_name") == "LCMScheduler" else None


def most_steps(facts: ModelFacts, sampler: str) -> int:
    """How many steps the schedule can be cut into; LCM's are a choice of those it was distilled from."""
    config = scheduler(facts, sampler).config
    return int(config.original_inference_steps if sampler == "lcm" else config.num_train_timesteps)
