import operator

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from services.diffusion.facts import read_facts
from services.generator import schedule
from services.generator.noise import Hold, HoldingUniPC, Levels, released_at, starting_noise
from services.generator.schedule import SAMPLERS
from services.generator.single import Single
from testing import toy

STEPS = 10
SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module", params=[toy.sd1, toy.sd2], ids=["epsilon", "v_prediction"])
def facts(request, tmp_path_factory):
    return read_facts(request.param(tmp_path_factory.mktemp("noise") / "model"))


def draw(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def scheduler_at(facts, sampler, step):
    scheduler = schedule.scheduler(facts, sampler)
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(step)
    return scheduler


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_state_has_the_level_diffusers_gives_it(facts, sampler):
    z0, noise = draw(0), draw(1)
    for state in range(STEPS):
        scheduler = scheduler_at(facts, sampler, state)
        theirs = scheduler.add_noise(z0, noise, scheduler.timesteps[state : state + 1])
        assert torch.equal(Levels.of(scheduler).noised(z0, noise, state), theirs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sigma_is_the_true_one_of_the_timestep(facts, sampler):
    scheduler = scheduler_at(facts, sampler, 0)
    alpha_bar = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
    expected = ((1 - alpha_bar) / alpha_bar) ** 0.5
    assert Levels.of(scheduler).true_sigmas == pytest.approx(expected.tolist(), rel=1e-6)


def test_sigma_stays_finite_where_the_schedule_ends_in_pure_noise(facts):
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    assert scheduler.alphas_cumprod[-1] == 0
    assert Levels.of(scheduler).true_sigmas[0] == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize(
    "compute",
    [
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        lambda one, other: 1 - one / 3,
        lambda one, other: 2.5 / (one**2 + 1) ** 0.5 - other,
        lambda one, other: torch.log(one) - torch.exp(-other),
        lambda one, other: one.sqrt() * 7,
        lambda one, other: torch.expm1(one - other),
    ],
)
def test_numbers_of_a_schedule_round_as_tensors_of_one_element(compute):
    draws = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 15
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for pair in draws:
        number, tensor = compute(*map(Single, pair.tolist())), compute(*pair)
        assert isinstance(number, Single) and number == tensor.item()
        assert torch.equal(x * number - number, x * tensor - tensor)
    for bad in (compute(Single(0.0), Single(0.0)), compute(Single(1e38), Single(1e-38))):
        assert isinstance(bad, Single), "it goes on as tensors do, with what is not finite"


def test_a_timestep_is_a_place_in_a_table():
    assert (10, 11, 12)[Single(2.0) - 1] == 11
    with pytest.raises(AssertionError):
        (10, 11, 12)[Single(1.5)]


def test_strength_counts_steps_as_diffusers_does():
    strengths = np.linspace(0, 1, 1001)
    for steps in (1, 7, 10, 20, 50, 1000):
        expected = [steps - int(steps * strength) for strength in strengths.tolist()]
        assert released_at(strengths, steps).tolist() == expected
    assert released_at(np.array([0.7]), 10).tolist() == [3]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_hold_lets_go_cell_by_cell_and_ends_at_the_latent_itself(facts, sampler):
    z0, noise, drawn = draw(0), draw(1), draw(2)
    released = torch.arange(64).reshape(8, 8) % (STEPS + 1)
    hold = Hold(
        z0_1Chw=z0,
        noise_NChw=noise,
        released_hw=released,
        levels=Levels.of(scheduler_at(facts, sampler, 0)),
        releases=tuple(range(STEPS + 1)),
    )
    for state in range(1, STEPS + 1):
        # A cell's last held state is the one that goes into its first free step.
        held = released >= state
        kept = z0 if state == STEPS else hold.levels.noised(z0, noise, state)
        assert torch.equal(hold.apply(drawn, state), torch.where(held, kept, drawn))


def test_nothing_is_touched_once_all_cells_are_free(facts):
    levels = Levels.of(scheduler_at(facts, "euler", 3))
    hold = Hold(
        z0_1Chw=draw(0),
        noise_NChw=draw(1),
        released_hw=torch.full((8, 8), 3),
        levels=levels,
        releases=(3,),
    )
    x = draw(2)
    assert hold.apply(x, 4) is x


def test_unipc_corrects_free_cells_only(facts):
    """The stock corrector recomputes a state from the one before and so forgets what was put back."""
    scheduler = scheduler_at(facts, "unipc", 0)
    assert isinstance(scheduler, HoldingUniPC)
    stock = scheduler_at(facts, "unipc", 0)
    held = torch.zeros(8, 8, dtype=torch.bool)
    held[:4] = True
    x = draw(0)
    for index in range(3):
        scheduler.held_hw = held
        kept = x + 1
        stepped = [
            each.step(draw(index), each.timesteps[index], kept, return_dict=False)[0]
            for each in (scheduler, stock)
        ]
        # `last_sample` is the corrected state.
        assert torch.equal(scheduler.last_sample[..., :4, :], kept[..., :4, :])
        assert torch.equal(scheduler.last_sample[..., 4:, :], stock.last_sample[..., 4:, :])
        assert torch.equal(stepped[0][..., 4:, :], stepped[1][..., 4:, :])
        x = stepped[0]
    assert not torch.equal(stock.last_sample[..., :4, :], kept[..., :4, :])


def test_noise_is_each_pictures_own_and_seed_0_is_a_seed():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 2**64 - 1)]
    noise = starting_noise(generators, np.zeros((0, 8, 8), np.float32), [], channels=4)
    assert torch.equal(noise[:1], draw(0))
    assert torch.equal(noise[1:], draw(2**64 - 1))


def test_a_layers_own_seed_rules_where_the_layer_is_seen():
    visible = np.zeros((3, 8, 8), np.float32)
    visible[0, :4], visible[1, 2:6], visible[2, 7] = 0.4, 0.9, 1.0
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = starting_noise(generators, visible, [11, 0, None], channels=4)
    for index, seed in enumerate((5, 6)):
        expected = draw(seed)
        expected[..., 2:6, :] = draw(0)[..., 2:6, :]
        assert torch.equal(noise[index : index + 1], expected)
