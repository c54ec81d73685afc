"""The samplers, each a scheduler of diffusers over a model's own noise schedule.

Main functions: `scheduler`, one as diffusers makes it, `timed`, one whose steps are set, and `check`, which tries all
of them on a folder's schedule.
"""

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from services.diffusion.facts import ModelFacts
from services.diffusion.folder import UnsupportedModel
from services.generator.noise import MIN_ALPHA_BAR, HoldingUniPC, Levels
from services.generator.single import tabulate

SAMPLERS: Mapping[str, Any] = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": HoldingUniPC,
    "lcm": LCMScheduler,
}
# How a scheduler solves, as its folder says it for that class alone: of the same names others mean something else.
_SOLVING = frozenset(
    {
        "algorithm_type",
        "disable_corrector",
        "euler_at_final",
        "lambda_min_clipped",
        "lower_order_final",
        "predict_x0",
        "solver_order",
        "solver_p",
        "solver_type",
        "use_lu_lambdas",
        "variance_type",
    }
)
# Clipping is for pixels; latents have no bounds, and a folder whose scheduler does not clip has no reason to say so.
_CLIPPING = ("clip_sample", "thresholding")
# So many steps are tried of each sampler, and the most there are.
_TRIED = (1, 2, 5)


def scheduler(facts: ModelFacts, sampler: str) -> Any:
    """A new diffusers scheduler, one of `SAMPLERS`, over the model's noise schedule."""
    kind = SAMPLERS[sampler]
    config = dict(facts.scheduler_config)
    if config.get("_class_name") not in [base.__name__ for base in kind.__mro__]:
        config = {key: value for key, value in config.items() if key not in _SOLVING}
    parameters = inspect.signature(kind.__init__).parameters
    config |= {key: False for key in _CLIPPING if key in parameters}
    if kind is LCMScheduler:
        # A choice of the timesteps, of which there may be fewer than the class takes by itself.
        most = config["num_train_timesteps"]
        config["original_inference_steps"] = min(config.get("original_inference_steps", 50), most)
    made = kind.from_config(config)
    if kind in (DDIMScheduler, LCMScheduler) and facts.prediction_type == "epsilon":
        # As the others have it: from noise that holds nothing of a picture, no picture can be told by the noise.
        made.alphas_cumprod = made.alphas_cumprod.clamp(min=MIN_ALPHA_BAR)
    return made


def timed(facts: ModelFacts, sampler: str, steps: int, *, first: int = 0) -> tuple[Any, Levels]:
    """A scheduler set to so many steps, of which `first` is taken first, and the levels of its states.

    Its numbers stay on the CPU, see `tabulate`: a schedule on the device would be asked for them in every step.
    """
    made = scheduler(facts, sampler)
    made.set_timesteps(steps, device="cpu")
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(first)
    levels = Levels.of(made)
    tabulate(made)
    return made, levels


def step_options(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """What a scheduler's `step` is given beside the state: a generator a picture, where it draws noise."""
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": list(generators)} if takes_generator else {}


def native_sampler(facts: ModelFacts) -> str | None:
    """The sampler that the folder's own scheduler is, where it is one that few-step models are distilled for."""
    return "lcm" if facts.scheduler_config.get("_class_name") == "LCMScheduler" else None


# Asked for every request, and the answer takes up to three schedules of all steps.
@functools.lru_cache(maxsize=256)
def most_steps(facts: ModelFacts, sampler: str) -> int:
    """How many steps the schedule can be cut into; LCM's are a choice of those it was distilled from."""
    config = scheduler(facts, sampler).config
    if sampler == "lcm":
        return int(config.original_inference_steps)
    most = int(config.num_train_timesteps)
    # Cut into single timesteps, some spacings begin a timestep or two beyond the last one, or stay where they are.
    counts = (most, most - 1, most - 2)
    return next((each for each in counts if each > 0 and _is_whole(facts, sampler, each)), 1)


def _is_whole(facts: ModelFacts, sampler: str, steps: int) -> bool:
    """Whether each of so many steps starts at a timestep that there is, and at a lower level than the one before."""
    try:
        made, levels = timed(facts, sampler, steps)
    # Beyond the last timestep DDIM has no alpha.
    except IndexError:
        return False
    starts = list(zip(levels.scales, levels.sigmas, strict=True))[:-1]
    return max(made.timesteps) < made.config.num_train_timesteps and all(
        sigma * next_scale > next_sigma * scale
        for (scale, sigma), (next_scale, next_sigma) in pairwise(starts)
    )


def check(facts: ModelFacts) -> None:
    """Looks whether every sampler takes steps on the model's noise schedule.

    Raises:
        UnsupportedModel: naming the folder's scheduler, the sampler and what is wrong.
    """
    name = facts.scheduler_config.get("_class_name")
    for sampler in SAMPLERS:
        try:
            most = most_steps(facts, sampler)
            for steps in (*(few for few in _TRIED if few < most), most):
                _try(facts, sampler, steps)
        # Whatever a scheduler says of a config that it cannot take: diffusers documents no closed set.
        except Exception as error:
            raise UnsupportedModel(
                f"scheduler/scheduler_config.json: of this {name}, sampler {sampler} makes no schedule: "
                f"{str(error).strip() or type(error).__name__}"
            ) from error


@torch.inference_mode()
def _try(facts: ModelFacts, sampler: str, steps: int) -> None:
    """Makes the schedule and, where the steps are few, draws noise from noise.

    Raises:
        Exception: it cannot be.
    """
    made, levels = timed(facts, sampler, steps)
    if not all(map(math.isfinite, (*levels.scales, *levels.sigmas, *levels.true_sigmas))):
        raise ValueError("levels of noise that are not finite")
    if steps > _TRIED[-1]:
        return
    generator = torch.Generator().manual_seed(0)
    noise_1Chw = torch.randn((1, facts.latent_channels, 2, 2), generator=generator)
    options = step_options(made, [generator])
    x_1Chw = levels.noised(torch.zeros_like(noise_1Chw), noise_1Chw, 0)
    for timestep in made.timesteps:
        made.scale_model_input(x_1Chw, timestep)
        x_1Chw = made.step(noise_1Chw, timestep, x_1Chw, **options, return_dict=False)[0]
    if x_1Chw.shape != noise_1Chw.shape or not bool(x_1Chw.isfinite().all()):
        raise ValueError("a step to values that are not finite")
