import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from services.diffusion.networks import load
from services.diffusion.text import TextStates
from services.generator.attention import (
    STEERING,
    Control,
    ControlledAttention,
    ControlSlot,
    gain,
    grid_of,
)
from services.generator.call import LAYERS_MULTIPLE, Given, Rows, Steering
from services.generator.stages import TorchStages
from testing import toy

TOKENS = 7
# Two layers of two and one tokens, and one that steers nothing.
POSITIONS = ((1, 2), (4,), (5,))
DIALS = ((0.7, 0.4), (0.0, 1.0), (0.0, 0.0))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = toy.sd1(tmp_path_factory.mktemp("attention") / "sd1")
    return TorchStages(load(folder, dtype=torch.float32, device=torch.device("cpu")))


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def visible(height=8, width=8, layers=3):
    return torch.rand((layers, height, width), generator=torch.Generator().manual_seed(9))


def steering(positions=POSITIONS, dials=DIALS, masks=None, window=TOKENS):
    return Steering.of(
        positions,
        [dict(zip(STEERING, pair, strict=True)) for pair in dials],
        visible() if masks is None else masks,
        window=window,
    )


def control(*jobs, **options):
    """Of jobs, each its steering, its rows and g."""
    made = Control([job[:2] for job in jobs], device=torch.device("cpu"), **options)
    made.gain(torch.tensor([g for _, rows, g in jobs for _ in range(rows)]))
    return made


def biased(made, query, key):
    return made.bias_B1QT(query, made.looked_at(key))


def expected_bias(query, key, sigma, control_visible, positions=POSITIONS, dials=DIALS):
    """The formula as the paper has it, token by token, for one row; query [H, Q, d], key [H, T, d]."""
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    bias = torch.zeros(scores.shape[1:])
    g = math.log(math.log(sigma + 1.01) + 1)
    for layer, tokens in enumerate(positions):
        attract, repel = dials[layer]
        v = control_visible[layer].flatten()
        for token in tokens:
            top = max(0.0, scores[:, :, token].max().item())
            bias[:, token] += attract * v * g * top - repel * (1 - v) * g * top
    return bias


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_bias_is_the_papers(sigma, multiple):
    query, key = rand(4, 2, 64, 5), rand(4, 2, TOKENS, 5, seed=1)
    masks = visible()
    made = control((steering(masks=masks), 2, gain(sigma)), tokens_multiple=multiple)
    bias = biased(made, query, key)
    assert bias.shape == (4, 1, 64, TOKENS)
    # The first two rows are those without the prompt.
    assert not bias[:2].any()
    for row in (2, 3):
        expected = expected_bias(query[row], key[row], sigma, masks)
        torch.testing.assert_close(bias[row, 0], expected, rtol=1e-5, atol=1e-6)
    # Padding, begin, free words, and a layer whose dials are 0.
    assert not bias[..., [0, 3, 5, 6]].any()


def test_what_one_attention_was_told_does_not_reach_the_next():
    masks = visible()
    made = control((steering(masks=masks), 1, gain(1.0)))
    for seed in range(3):
        query, key = rand(3, 2, 64, 5, seed=seed), rand(3, 2, TOKENS, 5, seed=seed + 9)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
            bias = biased(made, query.to(dtype), key.to(dtype))
            assert not bias[:2].any() and bias.dtype == dtype
            expected = expected_bias(query[2], key[2], 1.0, masks)
            torch.testing.assert_close(bias[2, 0].float(), expected, rtol=tolerance, atol=tolerance)


def test_rows_of_two_jobs_get_what_each_would_get_alone():
    query, key = rand(5, 2, 16, 5), rand(5, 2, TOKENS, 5, seed=1)
    one = steering(masks=visible(4, 4))
    # More layers than one's, so that one's are padded.
    other = steering([(2, 6)] + [()] * 9, [(1.0, 1.0)] * 10, visible(4, 4, layers=10))
    assert len(other.speaks_LT) > len(one.speaks_LT) == LAYERS_MULTIPLE
    together = biased(control((one, 1, 0.5), (other, 3, 1.2)), query, key)
    assert not together[0].any()
    alone = biased(control((one, 1, 0.5)), query[1:2], key[1:2])
    torch.testing.assert_close(together[1:2], alone)
    alone = biased(control((other, 3, 1.2)), query[2:], key[2:])
    torch.testing.assert_close(together[2:], alone)


def test_scores_below_zero_do_not_turn_attract_into_repel():
    query, key = torch.ones(1, 1, 4, 2), -torch.ones(1, 1, TOKENS, 2)
    made = control((steering([(1,)], [(1.0, 1.0)], visible(2, 2, layers=1)), 1, 1.0))
    assert not biased(made, query, key).any()


def test_two_layers_of_one_text_stay_two():
    masks = torch.zeros(2, 2, 2)
    masks[0, 0], masks[1, 1] = 1, 1
    (weight,) = control((steering([(1,), (3,)], [(1.0, 1.0)] * 2, masks), 1, 1.0)).weight_RQT(4)
    assert weight[:, 1].tolist() == [1, 1, -1, -1]
    assert weight[:, 3].tolist() == [-1, -1, 1, 1]


def test_a_token_that_two_layers_share_hears_both():
    masks = torch.ones(2, 1, 1)
    shared = steering([(1,), (1, 2)], [(0.25, 0.0), (0.5, 0.0)], masks, window=3)
    assert control((shared, 1, 1.0)).weight_RQT(1).tolist() == [[[0.0, 0.75, 0.5]]]


def test_no_dials_no_control():
    assert steering([(1,), ()], [(0.0, 0.0), (1.0, 1.0)], visible(layers=2)) is None


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 24), (40, 8), (16, 56)])
def test_masks_are_averaged_over_each_levels_cells(height, width):
    masks = visible(height, width, layers=1)
    made = control((steering([(1,)], [(1.0, 0.0)], masks), 1, 1.0))
    for cell in (1, 2, 4, 8):
        grid = (height // cell, width // cell)
        assert grid_of(grid[0] * grid[1], height, width) == grid
        expected = masks[0].reshape(grid[0], cell, grid[1], cell).mean(dim=(1, 3))
        weight = made.weight_RQT(grid[0] * grid[1])
        torch.testing.assert_close(weight[0, :, 1].reshape(grid), expected)
        assert made.weight_RQT(grid[0] * grid[1]) is weight


def test_gain_falls_with_sigma_and_never_below_zero():
    gains = [gain(sigma) for sigma in (0, 0.03, 0.53, 1.1, 2.2, 5.0, 14.6)]
    assert gains == sorted(gains)
    # Measured on Stable Diffusion's schedule, see the docstring's source.
    assert gains[0] == pytest.approx(0.01, abs=1e-3)
    assert gains[-1] == pytest.approx(1.32, abs=0.01)


def rows(steered=None, g=1.0):
    """Two rows of one job, the second one with the prompt."""
    x, text = rand(2, 4, 8, 16), rand(2, toy.WINDOW, 32, seed=1)
    return [
        Rows(
            given=Given(
                count=1,
                text=TextStates(hidden_BTD=text[index : index + 1]),
                steering=steered if index else None,
            ),
            x_NChw=x[index : index + 1],
            timestep=501.0,
            gain=g,
        )
        for index in range(2)
    ]


def over(height=8, width=16):
    return steering(masks=visible(height, width), window=toy.WINDOW)


def test_without_control_the_stock_path_runs_bit_for_bit(stages, tmp_path):
    stock = load(toy.sd1(tmp_path), dtype=torch.float32, device=torch.device("cpu")).unet
    with torch.inference_mode():
        expected = stock(
            rand(2, 4, 8, 16), 501, encoder_hidden_states=rand(2, toy.WINDOW, 32, seed=1)
        ).sample
    assert torch.equal(stages.predict(rows()), expected)
    stages.predict(rows(over()))
    # A controlled call leaves nothing behind.
    assert torch.equal(stages.predict(rows()), expected)


def test_what_is_given_is_prepared_once_and_forgotten_with_it(stages, monkeypatch):
    """And a call's answer does not depend on the calls before it."""
    prepared = []
    made = stages._made
    monkeypatch.setattr(stages, "_made", lambda *args: prepared.append(args) or made(*args))
    called, before = rows(over()), len(stages._calls)
    first = stages.predict(called)
    later = [replace(each, x_NChw=each.x_NChw + 1, timestep=17.0, gain=0.2) for each in called]
    second = stages.predict(later)
    # Others between them, of which one part is the same.
    stages.predict([called[0]])
    assert len(prepared) == 2
    assert torch.equal(stages.predict(called), first)
    assert torch.equal(stages.predict(rows(over(), 1.0)), first)
    assert not torch.equal(first, second)
    prepared.clear()
    del called, later
    assert len(stages._calls) == before


def test_control_changes_the_prompted_rows_only(stages):
    plain, controlled = stages.predict(rows()), stages.predict(rows(over(), gain(14.6)))
    torch.testing.assert_close(controlled[0], plain[0], rtol=1e-4, atol=1e-5)
    assert (controlled[1] - plain[1]).abs().max() > 1e-3


def test_every_level_is_controlled(stages):
    unet = stages._model.unet
    attentions = [m for name, m in unet.named_modules() if name.endswith(".attn2")]
    assert len(attentions) == 10
    assert all(isinstance(attn.processor, ControlledAttention) for attn in attentions)
    others = [m for name, m in unet.named_modules() if name.endswith(".attn1")]
    assert not any(isinstance(attn.processor, ControlledAttention) for attn in others)
    called = rows(over())
    stages.predict(called)
    assert stages._call(called).control._weights.keys() == {128, 32, 8, 2}


def test_controlled_attention_is_softmax_of_the_biased_scores(stages):
    name, attn = next(
        (name, m) for name, m in stages._model.unet.named_modules() if name.endswith(".attn2")
    )
    cells, text = rand(1, 128, attn.to_q.in_features), rand(1, TOKENS, 32, seed=1)
    masks = visible(8, 16)
    slot = ControlSlot()
    slot.control = control((steering(masks=masks), 1, gain(5.0)))
    with torch.inference_mode():
        mixed = ControlledAttention(slot)(attn, cells, text)
        heads = [
            x.unflatten(-1, (attn.heads, -1)).transpose(0, 1)
            for x in (attn.to_q(cells[0]), attn.to_k(text[0]), attn.to_v(text[0]))
        ]
        query, key, value = heads
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
        scores = scores + expected_bias(query, key, 5.0, masks)
        expected = attn.to_out[0]((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))
    torch.testing.assert_close(mixed[0], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_full_repel_takes_attention_out_of_the_mask(stages):
    """What the control is for: a layer's words act inside its mask."""
    query, key = rand(1, 2, 64, 8) * 3, rand(1, 2, TOKENS, 8, seed=1) * 3
    masks = torch.zeros(1, 8, 8)
    masks[0, :4] = 1
    made = control((steering([(1, 2)], [(1.0, 1.0)], masks), 1, gain(14.6)))

    def share(bias):
        mass = (query @ key.transpose(2, 3) / math.sqrt(8) + bias).softmax(-1)[..., 1:3]
        return float((mass * masks.flatten()[:, None]).sum() / mass.sum())

    bias = biased(made, query, key)
    assert share(0.0) < 0.7 and share(bias) > 0.9
    assert np.isfinite(bias.numpy()).all()
