"""Learning words: what is learned, from what, and that nothing else is touched."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load as load_tensors

from services.common.errors import (
    DeadlinePassed,
    DeviceLost,
    Internal,
    Overloaded,
    Unavailable,
)
from services.common.pictures import decode
from services.diffusion import device
from services.diffusion import networks as folders
from services.diffusion.word import Word
from services.inversion.engine import Engine
from services.inversion.learn import Recipe, Trainer, learn, seeds_in
from services.inversion.networks import Networks, prompt, read_catalog
from services.inversion.subject import InvalidSubject, Subject
from testing import toy
from testing.system import cutout

RECIPE = Recipe(
    steps=6, rows=2, canvas=0.5, placements=3, held_out=2, check_every=2, patience=9, rate=0.3
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.mini(tmp_path_factory.mktemp("toy"))


def load(folder) -> Networks:
    return Networks.of(folders.load(folder, dtype=torch.float32, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def networks(folder):
    return load(folder)


@pytest.fixture(scope="module")
def predicts_v(tmp_path_factory):
    folder = toy.sd2(tmp_path_factory.mktemp("toy"))
    return load(folder)


def shown(data):
    """An encoded picture as a subject is made of it."""
    return Image.fromarray(decode(data))


def subject(seed=0, text="sushi", vectors=1) -> Subject:
    return Subject.of(shown(cutout(seed)), text, vectors=vectors)


def trained(networks, subjects, recipe=RECIPE) -> Trainer:
    trainer = Trainer(networks, subjects, recipe)
    while not trainer.is_done:
        trainer.advance()
    return trainer


def test_the_held_out_loss_falls_and_the_best_vectors_are_taken(networks):
    trainer = Trainer(networks, [subject()], replace(RECIPE, steps=20))
    losses = []
    while not trainer.is_done:
        trainer.advance()
        losses.append(trainer.progress()[0].loss)
    seen = [loss for loss in losses if math.isfinite(loss)]
    assert min(seen) < seen[0]
    # Learning nothing but the best: an own look at the words taken gives the least loss seen.
    again = Trainer(networks, [subject()], replace(RECIPE, steps=20))
    again._pupils[0].vectors = trainer.words()[0].vectors
    while not math.isfinite(again.progress()[0].loss):
        again.advance()
    assert again.progress()[0].loss == min(seen)


def test_no_weight_changes_and_none_gets_a_gradient(networks):
    parts = (networks.model.unet, networks.model.vae, *networks.model.text_encoders.values())
    before = [weight.clone() for part in parts for weight in part.parameters()]
    trained(networks, [subject()])
    after = [weight for part in parts for weight in part.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not any(weight.requires_grad or weight.grad is not None for weight in after)


def test_a_run_taken_up_from_any_unit_ends_with_the_same_bits(networks):
    subjects = [subject(), subject(1, "cake", vectors=3)]
    undisturbed = Trainer(networks, subjects, RECIPE)
    states = []
    while not undisturbed.is_done:
        undisturbed.advance()
        states.append(undisturbed.state())
    for state in states[::4]:
        assert seeds_in(state) == [each.seed for each in subjects]
        resumed = Trainer(networks, subjects, RECIPE, state=state)
        while not resumed.is_done:
            resumed.advance()
        for one, other in zip(undisturbed.words(), resumed.words(), strict=True):
            assert torch.equal(one.vectors[0], other.vectors[0])


def test_a_word_is_the_same_but_for_rounding_whoever_is_learned_beside_it(networks):
    subjects = [subject(), subject(1, "cake", vectors=3), subject(2, "lemon")]
    # The vectors of the last step: the best ones may be the first.
    for one, beside in zip(subjects, trained(networks, subjects)._pupils, strict=True):
        (alone,) = trained(networks, [one])._pupils
        torch.testing.assert_close(alone.vectors[0], beside.vectors[0], atol=1e-3, rtol=1e-2)
        start = networks.first_word(one.text, one.vectors).vectors[0]
        assert (beside.vectors[0] - start).abs().max() > 0.1


def test_a_subject_that_gets_no_better_stops_and_the_others_go_on(networks):
    trainer = Trainer(networks, [subject(), subject(1)], replace(RECIPE, steps=40, patience=2))
    # No loss is below this one.
    trainer._pupils[0].best_loss = 0.0
    while not trainer.is_done:
        trainer.advance()
    first, second = trainer.progress()
    assert first.step < second.step


def test_only_the_object_is_learned(networks, monkeypatch):
    """Neither what is predicted outside the alpha nor how large the object is counts in the loss."""
    trainer = Trainer(networks, [subject()], replace(RECIPE, tilt=0.0))
    while not trainer.progress()[0].loss < math.inf:
        trainer.advance()
    (pupil,) = trainer._pupils
    draws = trainer._draw(pupil, "step", 0, 2)
    target_BChw = networks.target(draws.latents_BChw, draws.noise_BChw, draws.timesteps_B)
    outside = (draws.alpha_B1hw == 0).expand_as(target_BChw)
    assert outside.any()
    assert not outside.all()

    def loss(predicted_BChw, alpha_B1hw=draws.alpha_B1hw):
        monkeypatch.setattr(Networks, "predict", lambda *_: predicted_BChw)
        (found,) = trainer._losses([pupil], [replace(draws, alpha_B1hw=alpha_B1hw)])
        return found

    predicted_BChw = torch.randn(target_BChw.shape).requires_grad_()
    (gradient_BChw,) = torch.autograd.grad(loss(predicted_BChw), predicted_BChw)
    assert not gradient_BChw[outside].any()
    assert (gradient_BChw[~outside] != 0).all()
    # An error of 3 everywhere is a loss of 9, of the whole object, of half its alpha, or of one cell of it.
    off_BChw = target_BChw + 3
    one_B1hw = draws.alpha_B1hw * (draws.alpha_B1hw == draws.alpha_B1hw.amax((2, 3), keepdim=True))
    for alpha_B1hw in (draws.alpha_B1hw, draws.alpha_B1hw / 2, one_B1hw):
        assert float(loss(off_BChw, alpha_B1hw)) == pytest.approx(9, rel=1e-4)
    # Twice the alpha is twice the weight.
    error_B1hw = torch.rand(draws.alpha_B1hw.shape)
    weighed_B = (error_B1hw * draws.alpha_B1hw).sum((1, 2, 3)) / draws.alpha_B1hw.sum((1, 2, 3))
    assert float(loss(target_BChw + error_B1hw.sqrt())) == pytest.approx(
        float(weighed_B.mean()), 1e-4
    )


def test_the_loss_is_the_noises_error_times_the_noise_level(networks, predicts_v):
    """Whatever a model predicts, the same error of its noise counts the same."""
    latents, noise, off = torch.randn(3, 3, 4, 4, 4)
    timesteps = torch.tensor([250, 500, 999])
    for each in (networks, predicts_v):
        alpha = each.alphas_T[timesteps].view(-1, 1, 1, 1)
        noisy = each.noised(latents, noise, timesteps)
        # What the model would say if it took the noise for one that is `off`.
        told = noise + off
        if each is predicts_v:
            told = (told - (1 - alpha).sqrt() * noisy) / alpha.sqrt()
        error = (told - each.target(latents, noise, timesteps)).square().mean(dim=(1, 2, 3))
        sigma = ((1 - alpha) / alpha).sqrt().flatten()
        for tilt in (0.0, 1.0, 2.0):
            torch.testing.assert_close(
                each.share_of_loss(timesteps, tilt) * error,
                sigma**tilt * off.square().mean(dim=(1, 2, 3)),
            )


def test_noise_and_targets_are_those_of_diffusers(networks, predicts_v):
    latents, noise = torch.randn(2, 3, 4, 4, 4)
    timesteps = torch.tensor([0, 500, 999])
    for each in (networks, predicts_v):
        scheduler = DDPMScheduler.from_config(each.facts.scheduler_config)
        expected = scheduler.add_noise(latents, noise, timesteps)
        torch.testing.assert_close(each.noised(latents, noise, timesteps), expected)
        wanted = noise
        if each is predicts_v:
            wanted = scheduler.get_velocity(latents, noise, timesteps)
        torch.testing.assert_close(each.target(latents, noise, timesteps), wanted)


def test_a_model_that_predicts_v_is_learned_for_too(predicts_v):
    trainer = trained(predicts_v, [subject()], replace(RECIPE, steps=8, rate=0.1))
    start = predicts_v.first_word("sushi", 1).vectors[0]
    assert not torch.equal(trainer.words()[0].vectors[0], start)


def test_the_exported_word_is_ours_in_stock_diffusers(networks, folder, tmp_path):
    (word,) = learn(networks, [(shown(cutout()), "sushi")], vectors=3, recipe=RECIPE)
    digest = "0123456789abcdef" * 4
    file = tmp_path / "word.safetensors"
    file.write_bytes(word.to_bytes(digest))
    read = Word.from_bytes(file.read_bytes(), networks.facts.text_widths)
    assert torch.equal(read.vectors[0], word.vectors[0])
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_textual_inversion(str(file))
    token = "<01234567>"
    for before, after in (("a", "sushi on the table"), ("", "sushi")):
        text = f"{before} {token} {after}".strip()
        theirs = pipeline.encode_prompt(text, torch.device("cpu"), 1, False)[0]
        tokens = prompt(networks.facts, before, 3, after)
        assert torch.equal(networks.encode_text([tokens], [word]).hidden_BTD, theirs)


def test_with_two_text_encoders_both_are_learned_for(tmp_path):
    folder = toy.sdxl(tmp_path)
    networks = load(folder)
    trainer = trained(networks, [subject(vectors=2)], replace(RECIPE, steps=2))
    (word,) = trainer.words()
    start = networks.first_word("sushi", 2)
    for learned, first in zip(trainer._pupils[0].vectors, start.vectors, strict=True):
        assert not torch.equal(learned, first)
    file = word.to_bytes("0" * 64)
    assert sorted(load_tensors(file)) == ["clip_g", "clip_l"]
    read = Word.from_bytes(file, networks.facts.text_widths)
    assert all(map(torch.equal, word.vectors, read.vectors))
    # Stock diffusers, with each encoder given its own part of the file.
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    for name, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(
            load_tensors(file)[name], token="<w>", text_encoder=encoder, tokenizer=tokenizer
        )
    theirs, _, pooled, _ = pipeline.encode_prompt(
        "a <w> sushi", device=torch.device("cpu"), do_classifier_free_guidance=False
    )
    ours = networks.encode_text([prompt(networks.facts, "a", 2, "sushi")], [word])
    assert torch.equal(ours.hidden_BTD, theirs)
    assert torch.equal(ours.pooled_BP, pooled)


def test_placements_differ_and_hold_the_whole_object():
    one = subject()
    placed = [one.place(number, 64) for number in range(6)]
    areas = {float(each.alpha_HW.sum()) for each in placed}
    assert len(areas) > 4
    assert all(np.array_equal(one.place(k, 64).pixels_HW3, placed[k].pixels_HW3) for k in range(6))
    # The object is opaque but for its rim, whatever its ground.
    aspect = one.pixels_HW4[..., 3].mean() / 255
    for each in placed:
        rows = np.flatnonzero(each.alpha_HW.any(axis=1))
        columns = np.flatnonzero(each.alpha_HW.any(axis=0))
        extent = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert each.alpha_HW.sum() / extent == pytest.approx(aspect, abs=0.1)
    corners = {tuple(each.pixels_HW3[0, 0]) for each in placed if each.alpha_HW[0, 0] == 0}
    assert len(corners) > 2


def test_a_picture_without_anything_to_see_is_refused():
    with pytest.raises(InvalidSubject, match="transparent everywhere"):
        Subject.of(Image.new("RGBA", (9, 9), (9, 9, 9, 0)), "sushi")


def test_a_text_that_leaves_no_room_for_its_word_is_known(networks):
    # 75 tokens are the window without its marks.
    assert Trainer.fits(networks.facts, subject(text="cake " * 74))
    assert not Trainer.fits(networks.facts, subject(text="cake " * 75))
    trained(networks, [subject(text="cake " * 74)], replace(RECIPE, steps=1))


# The engine


@contextlib.asynccontextmanager
async def engine(tmp_path, **options):
    model = toy.mini(tmp_path / "toy")
    made = Engine(
        read_catalog(f"toy={model}"),
        # No early stop either: on a fast machine 20 steps without a gain end before any deadline.
        **{
            "recipe": replace(RECIPE, steps=10_000, patience=10_000),
            "threads": 1,
            "progress_s": 0.0,
            **options,
        },
    )
    try:
        yield made
    finally:
        await made.close()


@contextlib.asynccontextmanager
async def held(made):
    """The engine's device, once it is free."""
    async with made.turn() as wait:
        async for _ in wait:
            pass
        yield


async def first_of(made, **options):
    """Begins to learn; the open stream and its first item."""
    card = made.catalog.find("", field="model")
    events = made.learn(
        card, [subject()], **{"state": None, "deadline_s": time.monotonic() + 60, **options}
    )
    return events, await anext(events)


async def test_a_batch_that_nobody_reads_ends_within_a_unit(tmp_path, monkeypatch):
    units, advance = [], Trainer.advance
    reached, going = threading.Event(), threading.Event()

    def gated(trainer) -> None:
        units.append(trainer)
        if len(units) == 5:
            reached.set()
            going.wait()
        advance(trainer)

    monkeypatch.setattr(Trainer, "advance", gated)
    async with engine(tmp_path) as made:
        async with held(made):
            events, _ = await first_of(made)
            await asyncio.to_thread(reached.wait)
            closing = asyncio.create_task(events.aclose())
            await asyncio.wait((closing,), timeout=0.1)
            # The device is not free before the unit under way has ended.
            assert not closing.done()
            going.set()
            await closing
            # The trainer that ran has begun no other.
            assert len(units) == 5
        # Another one can.
        async with held(made):
            events, _ = await first_of(made)
            await events.aclose()
        assert units[-1] is not units[0]


async def test_the_queue_is_bounded_and_says_when_to_come_back(tmp_path):
    async with engine(tmp_path, max_waiting=1) as made, held(made):
        waiting = asyncio.create_task(_turn(made))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await _turn(made)
        assert caught.value.retry_after_s >= 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        # Its place is free again.
        task = asyncio.create_task(_turn(made))
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _turn(made) -> None:
    async with held(made):
        pass


async def test_who_waits_hears_of_the_batch_at_work_only_while_it_gets_on(tmp_path, monkeypatch):
    monkeypatch.setattr("services.inversion.engine.WAIT_TOLD_S", 0.05)
    going, advance = threading.Event(), Trainer.advance
    going.set()

    def gated(trainer) -> None:
        going.wait()
        advance(trainer)

    monkeypatch.setattr(Trainer, "advance", gated)
    async with engine(tmp_path) as made:
        async with held(made):
            events, _ = await first_of(made)
            async with made.turn() as wait, asyncio.timeout(30):
                for _ in range(3):
                    await anext(wait)
                going.clear()
                hearing = asyncio.ensure_future(anext(wait))
                # The unit that was under way may still be told.
                await asyncio.wait((hearing,), timeout=0.5)
                if hearing.done():
                    hearing = asyncio.ensure_future(anext(wait))
                    await asyncio.wait((hearing,), timeout=0.5)
                assert not hearing.done()
                hearing.cancel()
                await asyncio.gather(hearing, return_exceptions=True)
            going.set()
            await events.aclose()
        # Its place in the line was given up.
        await _turn(made)


async def test_a_deadline_ends_the_work(tmp_path):
    async with engine(tmp_path) as made, held(made):
        events, _ = await first_of(made, deadline_s=time.monotonic() + 0.5)
        with pytest.raises(DeadlinePassed):
            async for _ in events:
                pass


async def test_a_drain_hands_out_a_state_to_go_on_from(tmp_path):
    async with engine(tmp_path) as made:
        async with held(made):
            events, _ = await first_of(made)
            draining = asyncio.create_task(made.drain())
            states = []
            with pytest.raises(Unavailable):
                async for item in events:
                    states.append(item.state)
        await draining
        assert seeds_in(states[-1]) == [subject().seed]
        with pytest.raises(Unavailable):
            await _turn(made)


async def test_a_state_of_something_else_is_left_aside(tmp_path):
    async with engine(tmp_path, recipe=RECIPE) as made, held(made):
        events, _ = await first_of(made, state=b"\x00" * 64)
        last = [item async for item in events][-1]
        assert last.progress[0].is_done
        assert set(last.words) == {0}


async def test_an_error_that_stays_with_the_device_ends_the_service(tmp_path, monkeypatch):
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def fail(*_):
        raise error

    async with engine(tmp_path) as made:
        working = asyncio.create_task(made.working())
        monkeypatch.setattr(Trainer, "advance", fail)
        async with made.turn():
            events, _ = await first_of(made)
            with pytest.raises(Internal):
                await anext(events)
        assert not working.done(), "the device still answers"

        async with made.turn():
            waiting = asyncio.create_task(_turn(made))
            # As the driver does: once there was such an error, everything answers with it.
            monkeypatch.setattr(device, "synchronize", fail)
            events, _ = await first_of(made)
            with pytest.raises(DeviceLost):
                await anext(events)
        with pytest.raises(DeviceLost):
            await asyncio.wait_for(working, 10)
        with pytest.raises(DeviceLost):
            await waiting
        with pytest.raises(DeviceLost):
            await _turn(made)
