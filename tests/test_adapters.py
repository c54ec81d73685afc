"""Adapters: bit-equal to diffusers with some, bit-equal to the bare model without, and never mixed up."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from collage.v1 import collage_pb2, collage_service_pb2
from services.common import wire
from services.common.collage import Adapter
from services.common.errors import InvalidRequest
from services.common.settings import InvalidSetting
from services.diffusion.networks import load
from services.diffusion.text import Text
from services.generator import adapters as adapters_module
from services.generator.call import Given, Rows
from services.generator.engine import Engine
from services.generator.folder_card import read_catalog
from services.generator.job import ImageMade
from services.generator.scheduler import Scheduler
from services.generator.stages import TorchStages
from testing import plates, toy
from testing.parity import Case

CHALK, INK = Adapter(name="chalk", weight=0.7), Adapter(name="ink", weight=-0.5)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.mini(tmp_path_factory.mktemp("adapters") / "mini")


@pytest.fixture(scope="module")
def files(folder):
    """A LoRA in diffusers' form, one in kohya's, one of the U-Net only, and one of the text encoder only."""
    return {
        "ink": toy.lora(folder / "ink.safetensors", folder, seed=1),
        "chalk": toy.lora(folder / "chalk.safetensors", folder, seed=2, form="kohya"),
        "bare": toy.lora(folder / "bare.safetensors", folder, seed=3, parts=["unet"]),
        "words": toy.lora(folder / "words.safetensors", folder, seed=4, parts=["text_encoder"]),
    }


def fresh(folder, files):
    return TorchStages(
        load(folder, dtype=torch.float32, device=torch.device("cpu"), adapters=files)
    )


@pytest.mark.parametrize(
    "adapters",
    [{"chalk": 0.7, "ink": -0.5}, {"bare": 1.5}, {"bare": 1.0, "words": 0.8}],
    ids=str,
)
def test_equals_diffusers_bit_for_bit(folder, files, adapters):
    case = Case(folder)
    case.stages = fresh(folder, files)
    strength = np.full(case.grid, 0.7)
    plain, _ = case.ours("euler", strength, 5.0)
    # What is loaded and off must not show.
    case.adapters = tuple(Adapter(name=name) for name in files)
    case.ours("euler", strength, 5.0)
    case.adapters = tuple(Adapter(name=name, weight=weight) for name, weight in adapters.items())
    ours, _ = case.ours("euler", strength, 5.0)
    for name in adapters:
        case.pipeline.load_lora_weights(files[name], adapter_name=name)
    case.pipeline.set_adapters(list(adapters), list(adapters.values()))
    assert torch.equal(ours, case.stock("euler", 0.7, 5.0))
    assert (ours - plain).abs().max() > 1e-2
    # And off again.
    case.adapters = ()
    assert torch.equal(case.ours("euler", strength, 5.0)[0], plain)


def test_equals_diffusers_with_two_text_encoders(tmp_path):
    folder = toy.sdxl(tmp_path / "sdxl")
    files = {
        "chalk": toy.lora(tmp_path / "chalk.safetensors", folder, seed=1, form="kohya"),
        "ink": toy.lora(tmp_path / "ink.safetensors", folder, seed=2),
    }
    (card,) = catalog(tmp_path, folder, files).cards
    case = Case(folder)
    case.stages = fresh(folder, card.adapter_files)
    case.adapters = (CHALK, INK)
    for name, file in files.items():
        case.pipeline.load_lora_weights(file, adapter_name=name)
    case.pipeline.set_adapters(["chalk", "ink"], [CHALK.weight, INK.weight])
    ours, _ = case.ours("euler", np.full(case.grid, 0.3), 5.0)
    assert torch.equal(ours, case.stock("euler", 0.3, 5.0))


@pytest.mark.parametrize("name", ["ink.v2", "half", "update"])
def test_an_operator_may_call_an_adapter_anything(folder, files, name):
    stages = fresh(folder, {name: files["ink"], "chalk": files["chalk"]})
    text = Text(ids_ET=stages.facts.tokenize("a cake").ids_ET)
    named = fresh(folder, files)
    one, other = (
        each.encode_text([text], [Adapter(name=adapter)])
        for each, adapter in ((stages, name), (named, "ink"))
    )
    assert torch.equal(one.hidden_BTD, other.hidden_BTD)


def test_an_adapter_that_failed_to_load_loads_the_next_time(folder, files, monkeypatch):
    case = Case(folder)
    case.stages = fresh(folder, files)
    strength = np.full(case.grid, 0.7)
    plain, _ = case.ours("euler", strength, 5.0)

    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(adapters_module.Loader, "load_lora_into_text_encoder", fail)
        case.adapters = (INK,)
        case.ours("euler", strength, 5.0)
    case.adapters = ()
    assert torch.equal(case.ours("euler", strength, 5.0)[0], plain)
    case.adapters = (INK,)
    again, _ = case.ours("euler", strength, 5.0)
    case.stages = fresh(folder, files)
    assert torch.equal(case.ours("euler", strength, 5.0)[0], again)


def test_layers_of_different_scales_keep_theirs(folder, tmp_path):
    """diffusers alone gives all layers the most common alpha / rank."""
    file = toy.lora(tmp_path / "even.safetensors", folder, form="kohya")
    tensors = load_file(file)
    alphas = [name for name in tensors if name.endswith(".alpha")]
    for name, alpha in zip(alphas, torch.linspace(0.5, 3, len(alphas)), strict=True):
        # The same change, said with other numbers.
        up = name.replace(".alpha", ".lora_up.weight")
        tensors[up] = tensors[up] * tensors[name] / alpha
        tensors[name] = alpha
    save_file(tensors, tmp_path / "uneven.safetensors")
    found = {}
    for kind in ("even", "uneven"):
        stages = fresh(folder, {"one": tmp_path / f"{kind}.safetensors"})
        on = (Adapter(name="one"),)
        ids = stages.facts.tokenize("a sushi").ids_ET
        given = Given(count=1, text=stages.encode_text([Text(ids_ET=ids)], on), adapters=on)
        x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
        found[kind] = stages.predict([Rows(given=given, x_NChw=x, timestep=500.0)])
    assert torch.allclose(found["even"], found["uneven"], atol=1e-5)


def spoil(files, tmp_path, change):
    tensors = load_file(files["ink"])
    change(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    return tmp_path / "spoilt.safetensors"


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"unet.x.dora_scale": torch.ones(1)}),
            r"is DoRA \(it holds unet\.x\.dora_scale",
        ),
        (
            lambda t: t.update({"unet.x.hada_w1_a": torch.ones(1)}),
            "is LoHa .*; known: LoRA as diffusers, PEFT",
        ),
        (lambda t: t.update({"unet.x.lora_A.weight": torch.ones(2, 4)}), r"unet\.x.* has no place"),
        (
            lambda t: t.update({"transformer.x.lora_A.weight": torch.ones(2, 4)}),
            "changes transformer; supported: unet, text_encoder",
        ),
        (
            lambda t: t.update({first(t, "lora_A.weight"): torch.ones(2, 7)}),
            "is for a layer of width 7; the model's has",
        ),
        (
            lambda t: t.update({"text_encoder_2.x.lora_A.weight": torch.ones(2, 4)}),
            "is for a text_encoder_2, which the model does not have",
        ),
        (
            lambda t: t.update(
                {first(t, "lora_B.weight").replace("lora_B.weight", "lora_B.bias"): torch.ones(4)}
            ),
            "is LoRA with biases",
        ),
        (lambda t: t.pop(first(t, "lora_B.weight")), "lora_A.weight lacks its other half"),
        (
            lambda t: t.update({first(t, "lora_A.weight"): t[first(t, "lora_A.weight")] / 0}),
            "holds what is no finite number",
        ),
    ],
)
def test_files_that_do_not_fit_stop_the_start(folder, files, tmp_path, change, message):
    file = spoil(files, tmp_path, change)
    with pytest.raises(InvalidSetting, match=rf"models: toy: adapters\.odd: .*{message}"):
        catalog(tmp_path, folder, {"odd": file})


def test_a_file_that_is_none_stops_the_start(folder, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(
        InvalidSetting, match=r"adapters\.cut: .*/cut\.safetensors is no safetensors"
    ):
        catalog(tmp_path, folder, {"cut": tmp_path / "cut.safetensors"})


def catalog(tmp_path, folder, files):
    lines = "".join(f"      {name}: {file}\n" for name, file in files.items())
    (tmp_path / "models.yaml").write_text(
        f"models:\n  - name: toy\n    source: {folder}\n    adapters:\n{lines}"
    )
    return read_catalog(str(tmp_path / "models.yaml"))


def test_a_request_is_checked_by_field():
    model = collage_service_pb2.Model(
        name="toy", adapters=["ink", "chalk"], defaults=collage_pb2.Sampling(steps=5)
    )
    sampling = collage_pb2.Sampling()
    for name, weight in (("ink", None), ("inc", 1), ("chalk", 2.1), ("ink", -2), ("chalk", 0)):
        sampling.adapters.add(name=name, weight=weight)
    with pytest.raises(InvalidRequest) as told:
        wire.parse_sampling(sampling, model, fallback_seed=0)
    assert {v.field: v.description for v in told.value.violations} == {
        "sampling.adapters[1].name": "is 'inc'; model toy takes: ink, chalk",
        "sampling.adapters[2].weight": "is 2.1; allowed: from -2 to 2",
        "sampling.adapters[3].name": "is 'ink' again; allowed: each adapter once",
        "sampling.adapters[4].name": "is 'chalk' again; allowed: each adapter once",
    }
    del sampling.adapters[1:]
    sampling.adapters.add(name="chalk", weight=0)
    parsed = wire.parse_sampling(sampling, model, fallback_seed=0)
    assert parsed.adapters == (Adapter(name="chalk", weight=0.0), Adapter(name="ink"))
    assert parsed.active_adapters == (Adapter(name="ink"),)
    assert wire.parse_sampling(wire.render_sampling(parsed), model, fallback_seed=0) == parsed
    sampling.adapters.extend([sampling.adapters[0]] * 8)
    with pytest.raises(InvalidRequest, match=r"sampling\.adapters: has 10 adapters; allowed: at"):
        wire.parse_sampling(sampling, model, fallback_seed=0)


async def test_requests_never_see_one_anothers_adapters(tmp_path, folder, files):
    """Six jobs of four adapter sets at once, in a generator that joins what it may: each picture as if alone."""
    found = catalog(tmp_path, folder, files)
    sets = [(), (INK,), (CHALK, INK), (), (Adapter(name="words"),), (replace(INK, weight=0.0),)]

    async def draw(engine, adapters):
        pixels = None
        async for event in engine.generate(plates.job(model="toy", steps=2, adapters=adapters)):
            if isinstance(event, ImageMade):
                pixels = event.pixels_HWC
        return pixels

    def engine(**limits):
        return Engine(
            found, load=lambda _: fresh(folder, files), scheduler=Scheduler(**limits), threads=1
        )

    alone = []
    for adapters in sets:
        one = engine()
        alone.append(await draw(one, adapters))
        await one.drain()
    together = engine(max_rows=1)
    drawn = await asyncio.gather(*(draw(together, adapters) for adapters in sets * 2))
    await together.drain()
    assert all(map(np.array_equal, drawn, alone * 2))
    assert np.array_equal(alone[0], alone[3]) and np.array_equal(alone[0], alone[5])
    assert not any(np.array_equal(alone[0], alone[index]) for index in (1, 2, 4))
    joined = engine(max_rows=16)
    drawn = await asyncio.gather(*(draw(joined, adapters) for adapters in sets * 2))
    await joined.drain()
    # Joined rows are equal to rounding.
    for one, other in zip(drawn, alone * 2, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
