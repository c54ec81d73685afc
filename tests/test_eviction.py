"""Models under a memory budget: who gives way, that nothing fails, and that memory is really handed back.

The service as a process of its own, with a hundred requests, is benchmarks/eviction.py.
"""

import asyncio
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from services.common.settings import InvalidSetting
from services.diffusion.memory import give_back
from services.generator.engine import Engine
from services.generator.folder_card import load_stages, read_catalog
from services.generator.job import ImageMade
from services.generator.scheduler import Scheduler
from services.inversion import engine as inversion
from services.inversion import networks
from services.inversion.learn import Recipe
from services.inversion.subject import Subject
from testing import plates, toy

WAIT_S = 60.0


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return read_catalog(str(toy.models_file(tmp_path_factory.mktemp("small"), models=3, width=16)))


class Watched:
    """An engine with room for so many models, and the names of those it loads, in order."""

    def __init__(self, catalog, *, room, **policy):
        self.loaded = []

        def load(card):
            self.loaded.append(card.name.removeprefix("toy-"))
            return load_stages(card)

        self.engine = Engine(
            catalog,
            load=load,
            scheduler=Scheduler(**policy),
            threads=1,
            memory_bytes=room * catalog.cards[0].weights_bytes,
        )

    async def draw(self, index, **changes):
        pixels = None
        async for event in self.engine.generate(plates.job(model=f"toy-{index}", **changes)):
            if isinstance(event, ImageMade):
                pixels = event.pixels_HWC
        return pixels


async def test_the_model_used_least_recently_gives_way(catalog):
    watched = Watched(catalog, room=2)
    for index in (0, 1, 0, 2, 0, 1, 2):
        await watched.draw(index, steps=2)
    # 2 comes in 1's place, 1 in 2's, 2 in 0's.
    assert "".join(watched.loaded) == "01212"
    await watched.engine.drain()


async def test_jobs_of_a_model_in_memory_go_first(catalog):
    watched = Watched(catalog, room=1.5)
    order = (0, 1, 2, 0, 2, 1)
    await asyncio.gather(*(watched.draw(model, steps=2) for model in order))
    assert "".join(watched.loaded) == "012"
    await watched.engine.drain()


async def test_pictures_do_not_depend_on_the_room(catalog):
    order = (0, 1, 2, 0, 2, 1)
    drawn = {}
    for room in (1.5, 99):
        # No patience: in the small room every step is of another model than the one before, in the midst of jobs.
        watched = Watched(catalog, room=room, slice_s=0, patience_s=0)
        drawn[room] = await asyncio.wait_for(
            asyncio.gather(
                *(watched.draw(model, steps=6, seed=seed) for seed, model in enumerate(order))
            ),
            WAIT_S,
        )
        assert len(watched.loaded) > 12 if room < 2 else len(watched.loaded) == 3
        await watched.engine.drain()
    assert all(map(np.array_equal, drawn[1.5], drawn[99]))


def test_a_budget_that_one_model_breaks_stops_the_start(catalog):
    card = catalog.cards[0]
    catalog.check_memory(card.weights_bytes)
    with pytest.raises(InvalidSetting, match=r"toy-0: its weights, .* COLLAGE_MODEL_MEMORY is"):
        catalog.check_memory(card.weights_bytes - 1)


async def test_learning_keeps_to_its_budget_too(tmp_path, monkeypatch):
    file = toy.models_file(tmp_path, models=3, width=16)
    catalog, loaded = networks.read_catalog(str(file)), []

    def load(card):
        loaded.append(card.name.removeprefix("toy-"))
        return networks.load(card)

    monkeypatch.setattr(inversion, "load", load)
    recipe = Recipe(
        steps=1, rows=1, canvas=0.5, placements=1, held_out=1, check_every=1, patience=9
    )
    engine = inversion.Engine(
        catalog, recipe=recipe, threads=1, memory_bytes=2 * catalog.cards[0].weights_bytes
    )
    subject = Subject.of(Image.new("RGBA", (9, 9), "red"), "sushi")
    words = []
    for index in (0, 1, 0, 2, 0, 1):
        async with engine.turn() as wait:
            async for _ in wait:
                pass
            deadline_s = time.monotonic() + WAIT_S
            events = engine.learn(
                catalog.cards[index], [subject], state=None, deadline_s=deadline_s
            )
            words += [word async for event in events for word in event.words.values()]
    # 2 comes in 1's place, 1 in 2's.
    assert "".join(loaded) == "0121"
    # What was learned with a model does not hang on whether it was there before.
    first, again = (words[at].vectors[0] for at in (1, 5))
    assert torch.equal(first, again)
    await engine.close()


async def test_memory_is_handed_back(tmp_path):
    """In bfloat16, so that weights are this process' own memory and no view of the files."""
    file = toy.models_file(tmp_path, models=3, width=96)
    file.write_text(file.read_text().replace("device: cpu", "device: cpu, dtype: bfloat16"))
    catalog = read_catalog(str(file))
    watched = Watched(catalog, room=2)

    def own_bytes():
        give_back()
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024

    empty = own_bytes()
    for index in (0, 1):
        await watched.draw(index, steps=2)
    full = own_bytes()
    weights_bytes = catalog.cards[0].weights_bytes
    assert full - empty > 1.5 * weights_bytes, "the weights would not be seen"
    # After many other tests the allocator grows by itself, half a model's weights in the first round and little later.
    for index in (2, 0, 1):
        await watched.draw(index, steps=2)
    settled = own_bytes()
    for index in (2, 0, 1, 2, 0, 1):
        await watched.draw(index, steps=2)
    assert len(watched.loaded) == 11
    assert own_bytes() - settled < 0.5 * weights_bytes, "six were loaded since"
    assert settled - full < weights_bytes, "three were loaded since"
    await watched.engine.drain()
