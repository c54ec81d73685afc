"""Every scheduler that diffusers has, as a folder's own, with every sampler of ours: it draws, or says why not."""

import importlib.util
import inspect
import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin

from services.common.weights import ModelError
from services.diffusion.facts import read_facts
from services.diffusion.schedule import read_schedule
from services.generator import schedule
from services.generator.schedule import SAMPLERS
from testing import toy

pytestmark = pytest.mark.usefixtures("one_thread")

# What they are built with: Stable Diffusion's, so that a default taken in its place would show.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What may stand in a config beside the betas, where the class takes it.
FLAGS = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    {"use_karras_sigmas": True, "use_exponential_sigmas": True},
    {"use_dynamic_shifting": True},
    {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist()},
    {"num_train_timesteps": 40},
    {"final_sigmas_type": "sigma_min"},
    {"lower_order_final": False},
    {"solver_order": 3},
    {"solver_type": "heun"},
    {"interpolation_type": "log_linear"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"clip_sample": True, "thresholding": True},
    {"set_alpha_to_one": True},
    {"variance_type": "learned_range"},
]
# Why one may be refused, by what its config says; each message must say the class or the key.
HAS_SCIPY = importlib.util.find_spec("scipy") is not None
REFUSED = [
    {"use_flow_sigmas": True},
    {"use_dynamic_shifting": True},
    {"timestep_type": "continuous"},
    {"prediction_type": "sample"},
    {"beta_schedule": "sigmoid"},
    {"use_karras_sigmas": True, "use_exponential_sigmas": True},
    *([] if HAS_SCIPY else [{"use_beta_sigmas": True}]),
]


def classes():
    """All that diffusers exports, those whose own libraries are missing here among them."""
    names = (name for name in dir(diffusers) if name.endswith("Scheduler"))
    return sorted(name for name in names if inspect.isclass(getattr(diffusers, name, None)))


def parameters(name):
    """What a class takes and by itself has; None where its own libraries are missing."""
    kind = getattr(diffusers, name)
    if not issubclass(kind, SchedulerMixin):
        return None
    return {
        each.name: each.default for each in inspect.signature(kind.__init__).parameters.values()
    }


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return read_facts(toy.mini(tmp_path_factory.mktemp("schedules") / "mini"))


def told(tmp_path, facts, config):
    """The facts of a folder with this scheduler, as a start reads and checks them."""
    (tmp_path / "scheduler").mkdir(exist_ok=True)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    read = replace(facts, scheduler_config=read_schedule(tmp_path))
    read = replace(read, prediction_type=read.scheduler_config.get("prediction_type", "epsilon"))
    schedule.check(read)
    return read


def draw(facts, sampler, steps, first=0):
    """Latents from steps over a prediction that is the noise itself, or v."""
    made, levels = schedule.timed(facts, sampler, steps, first=first)
    generator = torch.Generator().manual_seed(1)
    options = schedule.step_options(made, [generator])
    noise = torch.randn((1, 4, 4, 4), generator=generator)
    x = levels.noised(torch.full_like(noise, 0.5), noise, first)
    for timestep in made.timesteps[first:]:
        made.scale_model_input(x, timestep)
        x = made.step(noise, timestep, x, **options, return_dict=False)[0]
    return x


def is_in(part, whole):
    return all(whole.get(key) == value for key, value in part.items())


@pytest.mark.parametrize("name", classes())
def test_every_scheduler_with_every_sampler(tmp_path, facts, name):
    known = parameters(name)
    is_of_betas = "beta_start" in known if known else name[:3] in ("LMS", "DPM")
    if not is_of_betas:
        config = {"_class_name": name, **{key: 1 for key in known or {} if key == "shift"}}
        with pytest.raises(ModelError, match=name):
            told(tmp_path, facts, config)
        return
    for flags in FLAGS:
        if known is not None and not set(flags) <= set(known):
            continue
        config = {"_class_name": name, "num_train_timesteps": 1000, **BETAS, **flags}
        is_altered = known is not None and known.get("snr_shift_scale", 1) != 1
        if is_altered or any(is_in(each, config) for each in REFUSED):
            key = "snr_shift_scale" if is_altered else "|".join((name, *flags))
            with pytest.raises(ModelError, match=key):
                told(tmp_path, facts, config if not is_altered else config | {"snr_shift_scale": 3})
            continue
        own = own_alphas(config)
        try:
            read = told(tmp_path, facts, config)
        except ModelError as error:
            # What its own class cannot do, nobody's folder can have been drawn with.
            assert name in str(error), f"{flags}: {error}"
            with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
                draw_as_it_is(config)
            continue
        for sampler in SAMPLERS:
            for steps, first in ((7, 0), (20, 13)):
                assert draw(read, sampler, steps, first).isfinite().all(), (flags, sampler, steps)
            if own is not None:
                # It is the folder's noise that is taken away, whatever takes it away.
                ours = schedule.scheduler(read, sampler).alphas_cumprod
                assert torch.allclose(own, ours, atol=1e-6), (flags, sampler)


def own_alphas(config):
    """The noise of a folder as its own scheduler has it; None where that cannot be made here."""
    try:
        return getattr(diffusers, config["_class_name"]).from_config(config).alphas_cumprod
    # Its libraries are missing; or a config that none of its kind has been saved with.
    except (ImportError, NotImplementedError, ValueError, TypeError):
        return None


def draw_as_it_is(config):
    """Two steps by the folder's own scheduler."""
    own = getattr(diffusers, config["_class_name"]).from_config(config)
    own.set_timesteps(2)
    x = torch.ones((1, 4, 4, 4))
    for timestep in own.timesteps:
        x = own.step(torch.ones_like(x), timestep, x, return_dict=False)[0]
    if not x.isfinite().all():
        raise ValueError(x)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_most_steps_there_are_can_be_taken(tmp_path, facts, sampler, spacing):
    """Stable Diffusion 1.5's schedule in 1000 steps began beyond its last timestep, or stood still at the first."""
    config = {"_class_name": "PNDMScheduler", **toy.SCHEDULE, "timestep_spacing": spacing}
    read = told(tmp_path, facts, config)
    most = schedule.most_steps(read, sampler)
    assert most == 50 if sampler == "lcm" else most >= 998
    made, levels = schedule.timed(read, sampler, most)
    assert draw(read, sampler, most, most - 1).isfinite().all()
    assert min(made.timesteps) >= 0 and max(made.timesteps) < 1000
    noises = [
        sigma / max(scale, 1e-12) for scale, sigma in zip(levels.scales, levels.sigmas, strict=True)
    ]
    assert noises == sorted(noises, reverse=True) and len(set(noises[:-1])) == most


def test_what_a_folder_does_not_say_its_own_class_says(tmp_path, facts):
    """Heun's betas are Stable Diffusion's where nothing is said, Euler's are not."""
    read = told(tmp_path, facts, {"_class_name": "LCMScheduler"})
    for sampler in SAMPLERS:
        assert schedule.scheduler(read, sampler).config.beta_end == 0.012


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": 5}, "is a 5, which is no scheduler"),
        ({"_class_name": "utils"}, "is a utils, which is no scheduler"),
        (
            {"_class_name": "NovelScheduler", "num_train_timesteps": None},
            "a NovelScheduler and says no num_t",
        ),
        ({"beta_start": "low"}, "beta_start and beta_end are 'low' in part; allowed: between 0 a"),
        ({"beta_end": 1.5}, "beta_start and beta_end are 1.5 in part"),
        ({"beta_end": float("nan")}, "beta_start and beta_end are nan in part"),
        ({"trained_betas": [0.1]}, "trained_betas must be 1000 numbers"),
        ({"trained_betas": [0.1] * 999 + [7]}, "trained_betas are 7 in part"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; allowed: 1 to 100000"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps is 1000.0"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'; known: leading, linspace, tr"),
        ({"steps_offset": 7}, "steps_offset is 7; known: 0, 1"),
        ({"prediction_type": ["epsilon"]}, r"prediction type \['epsilon'\]"),
        (
            {"original_inference_steps": "few"},
            "of this DDIMScheduler, sampler lcm makes no schedule",
        ),
        ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace'; known: linear, scaled_linear"),
    ],
)
def test_a_config_that_is_no_schedule_is_told(tmp_path, facts, change, message):
    with pytest.raises(ModelError, match=message):
        told(tmp_path, facts, {"_class_name": "DDIMScheduler", **toy.SCHEDULE, **change})
