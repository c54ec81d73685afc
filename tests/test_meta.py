"""A step never waits for the device: it runs where there is no device to wait for.

On torch's meta device tensors have shapes and no values, so whatever would have to look at one raises: .item(),
float(tensor), `if tensor`, .cpu(). What comes the other way, from the host to the device, is counted.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from services.common.collage import Structure
from services.common.models_file import BUNDLED
from services.diffusion.networks import load
from services.generator.conditioning import prepare
from services.generator.sampler import Run, step
from services.generator.schedule import SAMPLERS
from services.generator.stages import TOKENS_MULTIPLE, TorchStages
from testing import plates, toy

META = torch.device("meta")
STEPS = 6
KINDS = ("canny", "depth")
# diffusers' samplers in whose steps the host waits, beside what every step is sent, and what for.
WAITING = {
    "euler_ancestral": "noise, which generators on the CPU draw, so that one seed is one picture everywhere",
    "lcm": "noise, as above",
    "unipc": "numbers of its schedule, one by one, for the equations that it solves on the device",
}


class Crossings(TorchDispatchMode):
    """Notes what goes from the host to the device, and whether the host waits until it is there."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        given = {each.device.type for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        made = {each.device.type for each in tree_leaves(answer) if isinstance(each, torch.Tensor)}
        # A number beside a tensor of the device goes with the call.
        if given == {"cpu"} and "meta" in made:
            is_waiting = not (kwargs.get("non_blocking") or any(each is True for each in args))
            self.found.append((str(func), is_waiting))
        return answer


@pytest.fixture(scope="module", params=["mini", "sd1", "sd2", "sdxl", "lcm", "bundled"])
def stages(request, tmp_path_factory):
    folder = BUNDLED
    networks = {}
    if request.param != "bundled":
        folder = getattr(toy, request.param)(tmp_path_factory.mktemp("meta") / request.param)
        networks = {kind: toy.controlnet(folder, kind) for kind in KINDS}
    else:
        networks = {"canny": BUNDLED / "controlnet-canny"}
    return TorchStages(load(folder, dtype=torch.float32, device=META, controlnets=networks))


def begin(stages, sampler, *, structures=(), dial=0.5, preview=None, images=1):
    """A run of two layers on a canvas of 16 cells, released at different steps."""
    factor = stages.facts.latent_factor
    plate = plates.plate(side=16 * factor, factor=factor)
    rng = np.random.default_rng(0)
    control = {
        part.kind: rng.integers(0, 256, plate.composite_HWC.shape, dtype=np.uint8)
        for part in structures
    }
    layers = [
        replace(layer, structures=structures) for layer in plates.controls(attract=dial, repel=dial)
    ]
    conditioning = prepare(
        stages, prompt=plates.PROMPT, negative_prompt="", guidance_scale=5.0, layers=layers
    )
    return Run.begin(
        stages,
        plate=replace(plate, control=control),
        conditioning=conditioning,
        sampling=plates.sampling(sampler=sampler, steps=STEPS, images=images),
    )


def crossings(stages, runs):
    """Of each step, until all are done."""
    found = []
    while left := [run for run in runs if not run.is_done]:
        with Crossings() as noted:
            step(stages, left)
        found.append(noted.found)
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["plain", "steered", "structure", "emphasis"])
def test_no_step_waits_for_the_device(stages, sampler, kind):
    kinds = sorted(stages._model.controlnets)
    emphasis = 0.5 if kind == "emphasis" else 0.0
    structures = {
        "structure": tuple(Structure(kind=each, scale=0.7) for each in kinds),
        "emphasis": tuple(Structure(kind=each, emphasis=emphasis) for each in kinds),
    }.get(kind, ())
    dial = 0.0 if kind == "plain" else 0.5
    found = crossings(stages, [begin(stages, sampler, structures=structures, dial=dial)])
    assert len(found) > 3
    # The first step is sent what does not change; from then on each is sent its timesteps and gains.
    for each in found[1:-1]:
        waits = [is_waiting for _, is_waiting in each]
        assert waits.count(False) == 1
        assert any(waits) == (sampler in WAITING), each


def test_what_structure_changes_on_its_way_is_sent_when_it_changes(stages):
    window = (Structure(kind="canny", end=0.5),)
    found = crossings(stages, [begin(stages, "ddim", structures=window)])
    sent = [len(each) for each in found]
    middle = len(sent) // 2
    assert sent[1:middle] == [1] * (middle - 1) and sent[middle + 1 :] == [1] * (
        len(sent) - middle - 1
    )
    assert sent[0] > 1


def test_jobs_share_a_step_without_waiting(stages):
    runs = [
        begin(stages, "euler"),
        begin(stages, "ddim", images=2, structures=(Structure(kind="canny"),)),
    ]
    for each in crossings(stages, runs)[1:-1]:
        assert [is_waiting for _, is_waiting in each] == [False]


def test_shapes_do_not_depend_on_words(stages):
    run = begin(stages, "euler")
    step(stages, [run])
    (call,) = (stages._call(list(run.rows().values())[::-1]),)
    assert len(call.control._token_U) % TOKENS_MULTIPLE == 0


def test_what_looks_at_a_value_raises():
    """That the above can fail."""
    value = torch.zeros(2, device=META)
    for look in (
        torch.Tensor.tolist,
        torch.Tensor.cpu,
        lambda it: float(it[0]),
        lambda it: bool(it[0]),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            look(value)
