"""A model's noise schedule, as its folder tells it: the betas that it was trained with, and what goes with them.

Main function: `read_schedule`. A folder names a scheduler of diffusers, of which there are dozens; what counts here is
not how that one solves but which noise it is for. This module knows no sampler.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from services.common.weights import NotAModel
from services.diffusion.folder import UnsupportedModel, read_config

# What every scheduler of a discrete diffusion (Ho et al. 2020) is made of. Classes differ in what they take where a
# folder is silent, so its own class is asked.
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SPACINGS = ("leading", "linspace", "trailing")
_OFFSETS = (0, 1)
_PREDICTION_TYPES = ("epsilon", "v_prediction")
# A thousand everywhere; each takes a few numbers in memory.
_MAX_TIMESTEPS = 100_000
# What makes another schedule of the betas, and the value at which it makes none.
_ALTERING = {
    "snr_shift_scale": 1.0,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "timestep_type": "discrete",
}


def read_schedule(folder: Path) -> Mapping[str, Any]:
    """A model's scheduler config, all that makes its betas in it.

    Raises:
        NotAModel: it is missing, or says something that is no schedule.
        UnsupportedModel: the scheduler is for another kind of noise (flow matching, continuous time, tokens), or the
            network predicts something else than the noise or v.
    """
    config = read_config(folder / "scheduler" / "scheduler_config.json")
    name = config.get("_class_name")
    told = f"{folder.name}: the scheduler is a {name}"
    if name is not None and not (isinstance(name, str) and name.endswith("Scheduler")):
        raise NotAModel(f"{told}, which is no scheduler")
    own = _defaults(name)
    if own is not None and "beta_start" not in own:
        raise UnsupportedModel(
            f"{told}, which is for another kind of noise; known: those with betas (DDIM, Euler, ...)"
        )
    config = {**{key: own[key] for key in _BETAS if own and key in own}, **config}
    if config.get("trained_betas") is None and (
        missing := [key for key in _BETAS[:-1] if config.get(key) is None]
    ):
        raise UnsupportedModel(f"{told} and says no {missing[0]}: its noise is not known")
    for key, plain in _ALTERING.items():
        if config.get(key, plain) not in (plain, None):
            raise UnsupportedModel(f"{told} with {key} {config[key]!r}; known: {plain!r}")
    _check_betas(config, f"{folder.name}: scheduler/scheduler_config.json")
    if (predicts := config.get("prediction_type", "epsilon")) not in _PREDICTION_TYPES:
        raise UnsupportedModel(
            f"{told} of prediction type {predicts!r}; known: {', '.join(_PREDICTION_TYPES)}"
        )
    return config


def _defaults(name: str | None) -> dict[str, Any] | None:
    """What a scheduler of diffusers takes by itself, by its parameters' names; None for what is not known here."""
    kind = getattr(diffusers, name, None) if name else None
    # Those whose own libraries are not installed are there by name alone.
    if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin)):
        return None
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {
        each.name: None if each.default is inspect.Parameter.empty else each.default
        for each in parameters
    }


def _check_betas(config: Mapping[str, Any], where: str) -> None:
    """Refuses values of which no scheduler makes a schedule."""
    timesteps, betas = config.get("num_train_timesteps"), config.get("trained_betas")
    if type(timesteps) is not int or not 1 <= timesteps <= _MAX_TIMESTEPS:
        raise NotAModel(
            f"{where}: num_train_timesteps is {timesteps!r}; allowed: 1 to {_MAX_TIMESTEPS}"
        )
    if betas is None:
        betas = [config["beta_start"], config["beta_end"]]
        names = "beta_start and beta_end are"
        if config["beta_schedule"] not in _BETA_SCHEDULES:
            raise UnsupportedModel(
                f"{where}: beta_schedule is {config['beta_schedule']!r}; "
                f"known: {', '.join(_BETA_SCHEDULES)}"
            )
    else:
        names = "trained_betas are"
        if not isinstance(betas, list) or len(betas) != timesteps:
            raise NotAModel(f"{where}: trained_betas must be {timesteps} numbers, one a timestep")
    if wrong := [beta for beta in betas if not _is_between(beta)]:
        raise NotAModel(f"{where}: {names} {wrong[0]!r} in part; allowed: between 0 and 1")
    for key, known in (("timestep_spacing", _SPACINGS), ("steps_offset", _OFFSETS)):
        if config.get(key, known[0]) not in known:
            raise UnsupportedModel(
                f"{where}: {key} is {config[key]!r}; known: {', '.join(map(str, known))}"
            )


def _is_between(beta: Any) -> bool:
    return type(beta) in (int, float) and math.isfinite(beta) and 0 < beta < 1
