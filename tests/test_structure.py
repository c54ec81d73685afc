import itertools
import json
import shutil
import uuid
from dataclasses import replace

import cv2
import grpc
import numpy as np
import pytest
import pytest_asyncio
import safetensors.numpy
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from collage.v1 import collage_service_pb2 as pb
from collage.v1 import compositor_service_pb2
from services.common.collage import Collage, Extent, Layer, Structure, Transform
from services.common.errors import InvalidRequest, MissingBlobs, from_rpc
from services.common.plate import Plate
from services.common.settings import InvalidSetting
from services.compositor.compose import compose
from services.compositor.structure import ControlPicture, canny
from services.compositor.work import parse
from services.diffusion.networks import load
from services.generator.conditioning import prepare
from services.generator.controlnet import load_controlnet
from services.generator.engine import Engine
from services.generator.folder_card import load_stages, read_catalog
from services.generator.runner import STAGE_SECONDS
from services.generator.sampler import Run, step
from services.generator.scheduler import Scheduler
from services.generator.stages import TorchStages
from services.generator.structure import StructureControl, acts_within, is_active
from testing import plates, toy
from testing import system as system_tools

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("canny", "depth")
WAIT_S = 60
EVERYWHERE = (slice(0, 12), slice(0, 16))


def layer(colour, *, hidden=(0, 0, 0), box=(slice(3, 9), slice(4, 12)), shape=(12, 16)):
    """A rectangle of one colour; `hidden` is the colour kept under its transparent surroundings."""
    pixels_HW4 = np.zeros((*shape, 4), np.uint8)
    pixels_HW4[..., :3] = hidden
    pixels_HW4[box] = (*colour, 255)
    return pixels_HW4


def outline(box, shape=(12, 16)):
    """The outermost pixels of a rectangle."""
    edges = np.zeros(shape, bool)
    edges[box] = True
    rows, columns = box
    edges[rows.start + 1 : rows.stop - 1, columns.start + 1 : columns.stop - 1] = False
    return edges


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_silhouette_is_an_edge_whatever_its_colour_and_never_outside(grey, hidden):
    box = (slice(3, 9), slice(4, 12))
    edges = canny(layer((grey,) * 3, hidden=hidden, box=box))
    assert edges.dtype == np.uint8 and set(np.unique(edges)) == {0, 255}
    assert np.array_equal(edges, np.repeat(outline(box)[..., None] * np.uint8(255), 3, axis=2))


def test_what_lies_under_transparent_pixels_has_no_edges():
    pixels = layer((200, 200, 200))
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    noisy = np.where(pixels[..., 3:] == 0, noise, pixels)
    noisy[..., 3] = pixels[..., 3]
    assert np.array_equal(canny(noisy), canny(pixels))


def test_the_canvas_border_is_no_edge():
    edges = canny(layer((255, 255, 255), box=(slice(0, 9), slice(4, 16))))[..., 0] > 0
    assert edges[8, 4:].all() and edges[:9, 4].all()
    assert edges.sum() == 12 + 8
    assert not canny(layer((90, 90, 90), box=EVERYWHERE)).any()


def test_an_opaque_layer_gives_the_edges_of_its_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    grey = cv2.cvtColor(np.ascontiguousarray(pixels[..., :3]), cv2.COLOR_RGB2GRAY)
    expected = cv2.Canny(grey, 100, 200)
    assert 0 < (expected > 0).mean() < 1
    assert np.array_equal(canny(pixels)[..., 0], expected)


def test_a_soft_silhouette_is_drawn_where_it_is_half_opaque_and_a_fading_one_not_at_all():
    y, x = np.mgrid[:40, :40]
    away = np.hypot(x - 19.5, y - 19.5)
    for width, is_drawn in ((1, True), (4, True), (60, False)):
        alpha = np.clip(0.5 + (12.3 - away) / width, 0, 1)
        pixels = np.full((40, 40, 4), 128, np.uint8)
        pixels[..., 3] = np.rint(alpha * 255)
        edges = canny(pixels)[..., 0] > 0
        assert edges.any() == is_drawn
        if is_drawn:
            assert np.abs(away[edges] - 12.3).max() < 1.3 + width / 4


def test_each_pixel_shows_the_layer_seen_most_there():
    joined = ControlPicture(Extent(width=16, height=12))
    front, back = (np.full((12, 16, 3), value, np.uint8) for value in (1, 2))
    v_front = np.tile(np.repeat(np.float32([1, 0.5, 0.25, 0]), 2), (12, 1))
    joined.slide_under(front, (slice(0, 12), slice(4, 12)), v_front)
    joined.slide_under(back, (slice(0, 12), slice(4, 14)), 1 - np.pad(v_front, ((0, 0), (0, 2))))
    expected = [0] * 4 + [1] * 4 + [2] * 6 + [0] * 2
    assert np.array_equal(joined.pixels_HW3, np.tile(np.uint8(expected)[:, None], (12, 1, 3)))


# Of a composition.


def placed(name="one", *, structure=("canny",), image=None, **fields):
    transform = {key: fields.pop(key) for key in list(fields) if key in Transform.__slots__}
    parts = tuple(Structure(kind=kind, image=image) for kind in structure)
    return Layer(
        name=name,
        image=b"",
        text="a thing",
        transform=Transform(**transform),
        structure=parts,
        **fields,
    )


def composed(layers, pixels, supplied=None):
    """The plate of layers on a canvas of 48 x 32, a cell each 4 pixels."""
    collage = Collage(size=Extent(width=48, height=32), prompt="", layers=tuple(layers))
    under = np.full((32, 48, 3), 150, np.uint8)
    return compose(collage, reversed(pixels), under, latent_factor=4, supplied=supplied).plate


def cutout(shade=200, side=12):
    """A square with a darker square in its middle."""
    pixels_HW4 = np.full((side, side, 4), shade, np.uint8)
    pixels_HW4[side // 3 : -side // 3, side // 3 : -side // 3, :3] = shade // 4
    pixels_HW4[..., 3] = 255
    return pixels_HW4


def test_without_structure_a_plate_is_what_it_was():
    plate = composed([placed(structure=())], [cutout()])
    names = ("composite_HWC", "visible_Lhw", "strength_hw", "release_HW")
    assert plate.to_bytes() == safetensors.numpy.save({n: getattr(plate, n) for n in names})


def test_a_control_picture_is_of_the_layers_own_pixels_where_it_lies():
    # What lies under and above has no part in it, except for what it hides.
    back = placed("back", structure=(), x=24, y=16, scale=4)
    one = placed("one", x=14, y=16)
    veil = placed("veil", structure=(), x=14, y=16, opacity=0.7)
    busy = np.random.default_rng(0).integers(0, 256, (12, 12, 4), dtype=np.uint8)
    plate = composed([back, one, veil], [busy, cutout(), busy])
    on_canvas = np.zeros((32, 48, 4), np.uint8)
    on_canvas[10:22, 8:20] = cutout()
    assert canny(on_canvas).any()
    assert np.array_equal(plate.control["canny"], canny(on_canvas))
    again = Plate.from_bytes(plate.to_bytes())
    assert np.array_equal(again.control["canny"], plate.control["canny"])


def test_what_is_covered_has_no_edges_and_what_covers_has_its_own():
    one, cover = placed("one", x=14, y=16), placed("cover", structure=(), x=20, y=16)
    plate = composed([one, cover], [cutout(), cutout()])
    edges = plate.control["canny"][..., 0] > 0
    assert edges[:, 8:14].any() and not edges[:, 14:].any()
    both = composed([one, placed("cover", x=20, y=16)], [cutout(), cutout()])
    assert np.array_equal(both.control["canny"][:, :14], plate.control["canny"][:, :14])
    assert (both.control["canny"][10:22, 14] == 255).all()


def test_a_hidden_layer_leaves_its_kind_black():
    plate = composed([placed(visible=False)], [cutout()])
    assert not plate.control["canny"].any()


def test_a_picture_that_came_with_the_request_is_placed_as_the_layer_is():
    drawing = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    pixels = np.full((6, 6, 4), 90, np.uint8)
    pixels[..., 3] = 255
    pixels[:2, :3, 3] = 0
    one = placed(structure=("depth",), image=b"", x=14, y=16, rotation=90, flip_horizontal=True)
    asked = []

    def supplied(index, number):
        asked.append((index, number))
        return drawing

    plate = composed([one], [pixels], supplied)
    expected = np.zeros((32, 48, 3), np.uint8)
    seen = np.where(pixels[..., 3:] > 0, drawing, 0)
    expected[13:19, 11:17] = np.rot90(seen[:, ::-1], -1)
    assert asked == [(0, 0)]
    assert np.array_equal(plate.control["depth"], expected)


def test_a_picture_of_another_size_is_stretched_over_the_layers_own():
    flat = np.full((3, 30, 3), (9, 99, 199), np.uint8)
    one = placed(structure=("pose",), image=b"", x=14, y=16)
    plate = composed([one], [cutout()], lambda *_: flat)
    expected = np.zeros((32, 48, 3), np.uint8)
    expected[10:22, 8:20] = (9, 99, 199)
    assert np.array_equal(plate.control["pose"], expected)


def compose_request(*structures, **changes):
    image = {"blob": {"sha256": "0" * 64, "size_bytes": 1}}
    layers = [
        {"name": f"l{index}", "image": image, "text": "x", "structure": parts}
        for index, parts in enumerate(structures)
    ]
    return compositor_service_pb2.ComposeRequest(
        latent_factor=8,
        collage={"size": {"width": 64, "height": 64}, "layers": layers, **changes},
    )


def test_a_plates_digest_knows_kinds_and_pictures_but_neither_scales_nor_windows():
    def digest(*structures):
        return parse(compose_request(*structures)).digest()

    picture = {"blob": {"sha256": "1" * 64, "size_bytes": 9}}
    plain = digest([])
    # Frozen, so that plates that are stored are found again: another one needs another `VERSION`.
    assert plain == "c199603b4abbc18fc8ffb975c7bd927f4694bf5d7a504bf3acdfdfc43d95cced"
    canny = digest([{"kind": "canny"}])
    assert canny == digest([{"kind": "canny", "scale": 0.25, "start": 0.5, "end": 0.75}])
    pose = {"kind": "pose", "image": picture}
    assert digest([pose, {"kind": "canny"}]) == digest([{"kind": "canny"}, pose])
    assert len({plain, canny, digest([pose]), digest([{"kind": "canny", "image": picture}])}) == 4


def test_a_kind_that_nobody_here_can_draw_needs_an_image():
    with pytest.raises(InvalidRequest) as refused:
        parse(compose_request([], [{"kind": "canny"}, {"kind": "depth"}]))
    (violation,) = refused.value.violations
    assert violation.field == "collage.layers[1].structure[1].kind"
    assert "depth" in violation.description and "needs an image" in violation.description
    assert "canny" in violation.description


# Of a job.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = toy.mini(tmp_path_factory.mktemp("structure") / "mini")
    for kind in KINDS:
        toy.controlnet(folder, kind)
    return folder


@pytest.fixture(scope="module")
def stages(folder):
    return TorchStages(
        load(
            folder,
            dtype=torch.float32,
            device=torch.device("cpu"),
            controlnets={kind: folder / f"controlnet-{kind}" for kind in KINDS},
        )
    )


@pytest.fixture
def calls(stages):
    """What each U-Net call was given beside its input: the residuals, None for none."""
    given = []

    def note(_, args, options):
        down = options["down_block_additional_residuals"]
        given.append(down and (*down, options["mid_block_additional_residual"]))

    hook = stages._model.unet.register_forward_pre_hook(note, with_kwargs=True)
    yield given
    hook.remove()


@pytest.fixture
def passed(stages):
    """The rows and the kind of each ControlNet's call."""
    rows = []
    hooks = [
        stages._controlnets.network(kind).register_forward_pre_hook(
            lambda _, args, kind=kind: rows.append((kind, len(args[0])))
        )
        for kind in KINDS
    ]
    yield rows
    for hook in hooks:
        hook.remove()


def halves(*, columns=4):
    """Two layers side by side on a canvas of 32 x 32, 8 x 8 cells, with a control picture of each kind."""
    plate = plates.plate(strengths=(1.0, 1.0))
    visible_Lhw = np.zeros((2, 8, 8), np.float32)
    visible_Lhw[0, :, :columns] = 1
    visible_Lhw[1, :, columns:] = 1
    rng = np.random.default_rng(5)
    control = {kind: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for kind in KINDS}
    return replace(plate, visible_Lhw=visible_Lhw, control=control)


def begin(stages, *structures, plate=None, **changes):
    """A run whose layers have these structures."""
    sampling = plates.sampling(steps=6, **changes)
    layers = [
        replace(control, structures=parts)
        for control, parts in zip(plates.controls(), structures, strict=True)
    ]
    conditioning = prepare(
        stages,
        prompt=plates.PROMPT,
        negative_prompt="",
        guidance_scale=sampling.guidance_scale,
        layers=layers,
    )
    return Run.begin(stages, plate=plate or halves(), conditioning=conditioning, sampling=sampling)


def latents(stages, run):
    while not run.is_done:
        step(stages, [run])
    return run.latents_NChw


FULL = (Structure(kind="canny"),)
NONE = (Structure(kind="canny", scale=0.0),)


def test_scale_0_beside_scale_1_leaves_exactly_nothing(stages, calls):
    for structures in ((FULL, FULL), (FULL, NONE), (FULL, ())):
        step(stages, [begin(stages, *structures)])
    everywhere, beside, alone = calls
    assert len(everywhere) == 7
    for whole, one, other in zip(everywhere, beside, alone, strict=True):
        middle = whole.shape[3] // 2
        assert one.abs().amax(dim=(0, 1))[:, :middle].min() > 0
        assert torch.equal(one[..., :middle], whole[..., :middle])
        assert not one[..., middle:].any()
        assert torch.equal(one, other)
    assert {residual.shape[3] for residual in beside} == {8, 4, 2}


def test_a_cell_on_a_border_has_the_scales_by_their_shares(stages, calls):
    plate = halves(columns=3)
    for structures in ((FULL, FULL), (FULL, (Structure(kind="canny", scale=0.5),))):
        step(stages, [begin(stages, *structures, plate=plate)])
    for whole, mixed in zip(*calls, strict=True):
        cells = 8 // whole.shape[3]
        share = np.repeat([1, 0.5], [3, 5]).reshape(-1, cells).mean(axis=1)
        torch.testing.assert_close(mixed, whole * torch.from_numpy(share).float())


def test_every_step_counts_only_the_layers_active_in_it_and_idle_steps_cost_nothing(
    stages, calls, passed
):
    late = (Structure(kind="canny", start=0.5),)
    early = (Structure(kind="canny", end=0.34), Structure(kind="depth", start=0.1, end=0.6))
    latents(stages, begin(stages, late, early))
    left = [given is not None and given[0][..., :4].any().item() for given in calls]
    right = [given is not None and given[0][..., 4:].any().item() for given in calls]
    assert left == [False] * 3 + [True] * 3
    assert right == [True] * 3 + [False] * 3
    kinds = ["canny", "canny", "depth", "depth", "canny", "canny", "canny"]
    assert sorted(passed[:4]) == sorted((kind, 2) for kind in kinds[:4])
    assert passed[4:] == [("canny", 2)] * 3
    calls.clear()
    passed.clear()
    latents(stages, begin(stages, (Structure(kind="canny", start=0.4, end=0.5),), NONE))
    assert calls == [None] * 6 and not passed


def test_without_structure_it_is_the_stock_path_bit_for_bit(stages, calls):
    plain = latents(stages, begin(stages, (), (), plate=replace(halves(), control={})))
    assert torch.equal(latents(stages, begin(stages, NONE, ())), plain)
    assert calls == [None] * 12
    assert not torch.equal(latents(stages, begin(stages, FULL, ())), plain)


def test_a_control_picture_is_embedded_once_a_job(stages):
    """Though what acts changes twice on the way."""
    stages.load_controlnets(["canny"])
    embedded = []
    hook = stages._controlnets._embeddings["canny"].register_forward_hook(
        lambda *_: embedded.append(1)
    )
    late = (Structure(kind="canny", start=0.5),)
    latents(stages, begin(stages, late, (Structure(kind="canny", end=0.7),)))
    hook.remove()
    assert embedded == [1]
    # And forgotten with the job.
    assert not stages._controlnets._embedded


def test_eight_layers_of_one_kind_share_one_pass(stages, passed):
    plate = halves()
    visible_Lhw = np.repeat(plate.visible_Lhw / 4, 4, axis=0)
    conditioning = prepare(
        stages,
        prompt=plates.PROMPT,
        negative_prompt="",
        guidance_scale=5.0,
        layers=[replace(plates.controls()[0], structures=FULL)] * 8,
    )
    run = Run.begin(
        stages,
        plate=replace(plate, visible_Lhw=visible_Lhw),
        conditioning=conditioning,
        sampling=plates.sampling(images=2),
    )
    step(stages, [run])
    assert passed == [("canny", 4)]


def test_runs_with_and_without_share_a_step(stages, calls, passed):
    """Kinds, maps, windows, guidance and pictures differ; each run ends as it would alone."""

    def runs():
        return [
            begin(stages, FULL, (), images=2),
            begin(stages, (), (), seed=1),
            begin(stages, (Structure(kind="depth", scale=0.7),), FULL, guidance_scale=1.0),
            begin(stages, (), (Structure(kind="depth", end=0.5),), sampler="ddim"),
        ]

    alone = [latents(stages, run) for run in runs()]
    calls.clear()
    passed.clear()
    together = runs()
    step(stages, together)
    # Rows without the prompt: two, one, one; with it: two, one, one, one. The second run's has none.
    assert passed == [("canny", 5), ("depth", 3)]
    assert len(calls) == 1
    for residual in calls[0]:
        acts = [bool(row.any()) for row in residual]
        assert acts == [True, True, False, True, True, True, False, True, True]
    while not all(run.is_done for run in together):
        step(stages, together)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other.latents_NChw, rtol=1e-3, atol=1e-4)


EMPHASISED = (Structure(kind="canny", emphasis=1.0),)


@pytest.fixture
def answers(stages):
    """What the U-Net said in each call."""
    given = []
    hook = stages._model.unet.register_forward_hook(lambda _, args, out: given.append(out[0]))
    yield given
    hook.remove()


def test_emphasis_has_guidance_turn_away_from_no_structure_inside_its_layer_only(
    stages, calls, passed, answers
):
    step(stages, [begin(stages, (), (), guidance_scale=5.0)])
    run = begin(stages, EMPHASISED, (), guidance_scale=5.0)
    step(stages, [run])
    assert passed == [("canny", 2)]
    for residual in calls[1]:
        bare, unprompted, prompted = residual
        assert not bare.any() and unprompted.any()
        assert not unprompted[..., unprompted.shape[2] // 2 :].any()
        assert unprompted.shape == prompted.shape and prompted.any()
    (plain, _), (bare, unprompted, prompted) = answers
    torch.testing.assert_close(bare, plain)
    assert (unprompted - bare).abs().amin(dim=0).max() > 1e-4
    away_from = torch.cat([bare[..., :4], unprompted[..., 4:]], dim=2)
    _, _, prediction = run._last
    torch.testing.assert_close(prediction[0], bare + 5.0 * (prompted - away_from))


def test_emphasis_everywhere_takes_no_third_prediction(stages, calls, passed):
    latents(stages, begin(stages, EMPHASISED, EMPHASISED))
    assert passed == [("canny", 1)] * 6
    for residuals in calls:
        assert all(not without.any() and with_it.any() for without, with_it in residuals)


def test_some_emphasis_leaves_the_rest_of_the_scale(stages, calls):
    some = (Structure(kind="canny", scale=0.8, emphasis=0.25), Structure(kind="depth", scale=0.5))
    for structures in ((some, ()), ((some[0],), ()), ((some[1],), ())):
        step(stages, [begin(stages, structures[0], structures[1])])
    both, canny_only, depth_only = calls
    for mixed, one, other in zip(both, canny_only, depth_only, strict=True):
        # The one without emphasis acts in the bare prediction as it does everywhere.
        torch.testing.assert_close(mixed[0], one[0] + other[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mixed[2], one[2] + other[1], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one[0], 0.75 * one[1], rtol=1e-3, atol=1e-5)


def test_without_guidance_emphasis_changes_nothing(stages):
    plain, emphasised = (
        latents(stages, begin(stages, parts, (), guidance_scale=1.0))
        for parts in (FULL, EMPHASISED)
    )
    assert torch.equal(plain, emphasised)


def test_emphasis_ends_with_its_window(stages, passed):
    early = (Structure(kind="canny", end=0.5, emphasis=1.0),)
    run = begin(stages, early, FULL)
    assert [step(stages, [run]) for _ in range(run.steps_total)] == [3, 3, 3, 2, 2, 2]
    assert passed == [("canny", 3)] * 3 + [("canny", 2)] * 3


def test_an_emphasised_run_shares_a_step(stages):
    def runs():
        return [
            begin(stages, (), FULL, images=2, seed=1),
            begin(stages, EMPHASISED, ()),
            begin(stages, EMPHASISED, EMPHASISED, sampler="ddim"),
            begin(stages, EMPHASISED, (), guidance_scale=1.0),
        ]

    alone = [latents(stages, run) for run in runs()]
    together = runs()
    while not all(run.is_done for run in together):
        step(stages, together)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other.latents_NChw, rtol=1e-3, atol=1e-4)


def test_a_layer_that_is_not_seen_asks_for_nothing():
    visible_Lhw = torch.zeros(1, 4, 4)
    assert StructureControl.of([FULL], {}, visible_Lhw) is None


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cross_attention_dim": 768}, "cross_attention_dim is 768, the U-Net's 32"),
        ({"conditioning_embedding_out_channels": [4, 4, 8, 8]}, "8 times as large"),
        ({"_class_name": "ControlNetUnionModel"}, "not a ControlNetModel"),
        ({"global_pool_conditions": True}, "not supported"),
    ],
)
def test_a_controlnet_for_another_model_is_found_at_the_start(folder, tmp_path, changes, told):
    copy = shutil.copytree(folder, tmp_path / "mini")
    edit(copy / "controlnet-canny" / "config.json", **changes)
    with pytest.raises(InvalidSetting, match=told):
        read_catalog(f"mini={copy}")


def test_a_controlnet_has_a_digest_of_its_own(folder, tmp_path):
    (card,) = read_catalog(f"mini={folder}").cards
    assert list(card.controlnets) == sorted(KINDS)
    copy = shutil.copytree(folder, tmp_path / "mini")
    edit(copy / "controlnet-canny" / "config.json", note="changed")
    shutil.rmtree(copy / "controlnet-depth")
    (other,) = read_catalog(f"mini={copy}").cards
    assert other.digest == card.digest
    assert other.controlnets["canny"] != card.controlnets["canny"]


def test_a_controlnet_may_have_simpler_blocks_than_its_unet(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "mini")
    unet = UNet2DConditionModel.from_pretrained(copy, subfolder="unet")
    small = ControlNetModel.from_unet(
        unet, load_weights_from_unet=False, conditioning_embedding_out_channels=(4, 4, 8)
    )
    small = ControlNetModel.from_config({**small.config, "down_block_types": ["DownBlock2D"] * 3})
    small.save_pretrained(copy / "controlnet-small")
    (card,) = read_catalog(f"mini={copy}").cards
    assert list(card.controlnets) == [*sorted(KINDS), "small"]


# Of a whole system.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory):
    async with system_tools.running(tmp_path_factory.mktemp("system"), kinds=KINDS) as system:
        yield system


def scene(*structures, **changes):
    """Two layers with these structures."""
    layers = [
        system_tools.layer("a", structure=structures[0]),
        system_tools.layer("b", seed=1, x=22.5, y=30.25, structure=structures[1]),
    ]
    return system_tools.collage(layers=layers, **changes)


async def drawn(system, collage):
    """The picture's digest, by a request that names its seed."""
    request = pb.GenerateImagesRequest(collage=collage, sampling={"steps": 4, "seed": 1})
    (image,) = [e.image for e in await system.generate(request) if e.HasField("image")]
    return image.blob


async def refused(system, collage):
    with pytest.raises(grpc.RpcError) as caught:
        await system.stub.PlanCollage(pb.PlanCollageRequest(collage=collage), timeout=WAIT_S)
    return from_rpc(caught.value)


@pytest.mark.asyncio(loop_scope="module")
async def test_models_name_their_kinds(system):
    answer = await system.stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S)
    assert list(answer.models[0].control_kinds) == sorted(KINDS)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_plan_counts_what_a_controlnet_takes(system):
    async def bytes_for(parts):
        request = pb.PlanCollageRequest(collage=scene(parts, []))
        answer = await system.stub.PlanCollage(request, timeout=WAIT_S)
        return answer.plan.estimated_memory_bytes

    plain, structured, emphasised = [
        await bytes_for(parts)
        for parts in ([], [{"kind": "canny"}], [{"kind": "canny", "emphasis": 0.5}])
    ]
    assert plain < structured < emphasised


@pytest.mark.asyncio(loop_scope="module")
async def test_a_plan_says_every_number_of_structure(system):
    request = pb.PlanCollageRequest(collage=scene([], [{"kind": "canny", "start": 0.25}]))
    plan = (await system.stub.PlanCollage(request, timeout=WAIT_S)).plan
    assert not plan.layers[0].structure
    (part,) = plan.layers[1].structure
    numbers = {name.name: value for name, value in part.ListFields()}
    assert numbers == {"kind": "canny", "scale": 1.0, "start": 0.25, "end": 1.0, "emphasis": 0.0}


@pytest.mark.asyncio(loop_scope="module")
async def test_structure_changes_the_picture_and_only_where_it_may(system):
    plain = await drawn(system, scene([], []))
    canny = [{"kind": "canny"}]
    assert await drawn(system, scene([{"kind": "canny", "scale": 0.0}], [])) == plain
    both, one = [await drawn(system, scene(canny, other)) for other in (canny, [])]
    drawing = {"data": system_tools.png(np.full((4, 4, 3), 200, np.uint8))}
    depth = await drawn(system, scene(canny, [{"kind": "depth", "image": drawing}]))
    brief = await drawn(system, scene([{"kind": "canny", "end": 0.4}], []))
    guided = await drawn(system, scene([{"kind": "canny", "emphasis": 1.0}], []))
    assert len({blob.sha256 for blob in (plain, both, one, depth, brief, guided)}) == 6
    assert await drawn(system, scene(canny, [])) == one


@pytest.mark.asyncio(loop_scope="module")
async def test_a_redo_keeps_structure(system):
    parent = await drawn(system, scene([], []))

    async def redone(structure):
        work = pb.RedoWork(
            parent={"blob": parent},
            collage=scene(structure, []),
            sampling={"steps": 4, "seed": 2},
            layers=["a"],
        )
        request = pb.CreateJobRequest(request_id=str(uuid.uuid4()), redo=work)
        job = (await system.stub.CreateJob(request, timeout=WAIT_S)).job
        (image,) = [e.image for e in await system.watch(job.name) if e.HasField("image")]
        return await system.picture(image.blob)

    plain, held = await redone([]), await redone([{"kind": "canny"}])
    before = await system.picture(parent)
    changed = [(picture != before).any(axis=2) for picture in (plain, held)]
    assert (plain != held).any()
    # The lower right corner is far from the layer.
    assert not any(each[40:, 24:].any() for each in changed)


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_wrong_with_structure_is_told_by_field(system):
    path = "collage.layers[1].structure"

    async def fields(*parts):
        return [
            violation.field for violation in (await refused(system, scene([], parts))).violations
        ]

    photo = {"data": system_tools.png(np.full((4, 4, 3), 200, np.uint8))}
    assert await fields({"kind": "canny"}, {"kind": "canny"}) == [f"{path}[1].kind"]
    assert await fields({"kind": "pose"}) == [f"{path}[0].kind"]
    assert await fields({"kind": "depth"}) == [f"{path}[0].kind"]
    assert await fields({"kind": "a b", "image": photo}) == [f"{path}[0].kind"]
    assert await fields({"kind": "canny", "start": 0.6, "end": 0.5}) == [f"{path}[0].end"]
    assert await fields({"kind": "canny", "image": {"path": "x.png"}}) == [f"{path}[0].image.path"]
    assert await fields({"kind": "canny"}, {"kind": "depth", "image": {"data": b"no"}}) == [
        f"{path}[1].image"
    ]
    glass = {"data": system_tools.png(np.full((4, 4, 4), 100, np.uint8))}
    assert await fields({"kind": "depth", "image": glass}) == [f"{path}[0].image"]
    unknown = {"blob": {"sha256": "0" * 64, "size_bytes": 7}}
    error = await refused(system, scene([], [{"kind": "depth", "image": unknown}]))
    assert isinstance(error, MissingBlobs)
    assert error.missing == {f"{path}[0].image": "0" * 64}


@pytest.mark.asyncio(loop_scope="module")
async def test_emphasis_without_guidance_is_warned_of(system):
    asked = scene([{"kind": "canny"}], [{"kind": "canny", "emphasis": 0.5}])

    async def warned(scale):
        request = pb.PlanCollageRequest(collage=asked, sampling={"guidance_scale": scale})
        plan = (await system.stub.PlanCollage(request, timeout=WAIT_S)).plan
        return {
            warning.field: warning.message
            for warning in plan.warnings
            if warning.reason == "STRUCTURE_EMPHASIS_UNUSED"
        }

    told = await warned(1.0)
    assert list(told) == ["collage.layers[1].structure[0].emphasis"]
    assert "at guidance scale 1 model" in told["collage.layers[1].structure[0].emphasis"]
    assert not await warned(5.0)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_window_without_a_whole_step_is_warned_of(system):
    # The freest layer's noise is 0.5: of 8 steps the picture takes 4, of 10 it takes 5.
    short = {"kind": "canny", "start": 0.2, "end": 0.4}
    drawing = {"data": system_tools.png(np.full((4, 4, 3), 200, np.uint8))}
    empty = {"kind": "depth", "start": 0.2, "end": 0.2, "image": drawing}
    layers = [
        system_tools.layer("a", noise=0.5, structure=[{"kind": "canny"}]),
        system_tools.layer("b", x=22.5, noise=0.3, structure=[empty, short]),
        system_tools.layer("c", visible=False, structure=[short]),
        system_tools.layer("d", x=40.0, noise=0.3, structure=[{**short, "scale": 0.0}]),
    ]
    asked = system_tools.collage(layers=layers)

    async def warned(steps):
        request = pb.PlanCollageRequest(collage=asked, sampling={"steps": steps})
        plan = (await system.stub.PlanCollage(request, timeout=WAIT_S)).plan
        return {
            warning.field: warning.message
            for warning in plan.warnings
            if warning.reason == "STRUCTURE_NEVER_ACTS"
        }

    assert await warned(8) == {
        "collage.layers[1].structure[0]": "never acts: with 8 steps the picture takes 4, and none of these "
        "lies wholly from 0.2 to 0.2 of them; widen the window, up to 1000 steps none does",
        "collage.layers[1].structure[1]": "never acts: with 8 steps the picture takes 4, and none of these "
        "lies wholly from 0.2 to 0.4 of them; widen the window, or take 10 steps",
    }
    assert set(await warned(10)) == {"collage.layers[1].structure[0]"}
    request = pb.GenerateImagesRequest(collage=asked, sampling={"steps": 8, "seed": 1})
    told = {e.warning.field for e in await system.generate(request) if e.HasField("warning")}
    assert set(await warned(8)) <= told


def test_a_window_acts_where_a_whole_step_lies_in_it():
    ends = [n / 20 for n in range(21)] + [1 / 3, 2 / 3, 0.1 + 0.2]
    for start, end in itertools.product(ends, ends):
        part = Structure(kind="canny", start=start, end=end)
        for steps in (1, 2, 3, 7, 10, 30, 49):
            looked = any(is_active(part, step, steps) for step in range(steps))
            assert acts_within(part, steps) == looked, (start, end, steps)


async def test_a_controlnet_is_loaded_before_the_first_step_and_timed_apart(folder, monkeypatch):
    catalog, order, kinds = read_catalog(f"mini={folder}"), [], []

    def load_one(*args, **options):
        order.append("load")
        kinds.append(args[0].name)
        return load_controlnet(*args, **options)

    monkeypatch.setattr("services.generator.residuals.load_controlnet", load_one)
    made = load_stages(catalog.cards[0])
    made._model.unet.register_forward_pre_hook(lambda *_: order.append("call"))

    def step_noted(*args):
        order.append("step")
        return step(*args)

    monkeypatch.setattr("services.generator.runner.step", step_noted)
    timed = STAGE_SECONDS.labels("load_controlnets")._sum.get
    before = timed()
    engine = Engine(catalog, load=lambda _: made, scheduler=Scheduler(), threads=1)
    job = plates.job(made_of=halves(), steps=2)
    never = Structure(kind="depth", start=0.1, end=0.2)
    layers = [replace(control, structures=(*FULL, never)) for control in job.layers]
    async for _ in engine.generate(replace(job, layers=tuple(layers))):
        pass
    await engine.drain()
    assert order == ["load", "step", "call", "step", "call"]
    # One that no step asks for stays on disk.
    assert kinds == ["controlnet-canny"]
    assert timed() > before
