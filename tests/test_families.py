"""SDXL beside the older families: what the text encoders give, parity with diffusers, what is refused, and all
families with everything on at once through the public face.
"""

import json
import shutil

import numpy as np
import pytest
import pytest_asyncio
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save

from collage.v1 import collage_pb2, collage_service_pb2_grpc
from collage.v1 import collage_service_pb2 as pb
from local import embedded
from services.common.collage import Dials
from services.common.models_file import ModelSource
from services.common.rpc import connect
from services.common.weights import ModelError
from services.diffusion import networks
from services.diffusion.facts import read_facts
from services.diffusion.word import Word
from services.generator.conditioning import LayerControl, prepare
from services.generator.folder_card import FolderCard
from services.generator.stages import TorchStages
from testing import toy
from testing.parity import STRUCTURES, Case
from testing.system import LIMIT_S, System, cutout, upload

PROMPT = "a sushi on a table"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.sdxl(tmp_path_factory.mktemp("families") / "sdxl")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def load(folder, *, dtype=torch.float32):
    return TorchStages(networks.load(folder, dtype=dtype, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def stages(folder):
    return load(folder)


def conditioned(stages, *, negative_prompt="a box", word=None):
    layer = LayerControl(
        text_start=2, text_end=7, dials=Dials(noise=1.0, attract=0.5, repel=0.5), word=word
    )
    return prepare(
        stages,
        prompt=PROMPT,
        negative_prompt=negative_prompt,
        guidance_scale=5.0,
        layers=[layer],
    )


def states(conditioning):
    """In the order of diffusers' encode_prompt."""
    prompt, negative = conditioning.prompt, conditioning.negative
    return prompt.hidden_BTD, negative.hidden_BTD, prompt.pooled_BP, negative.pooled_BP


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("told", "theirs"), [("a box", "a box"), ("", None)])
def test_sdxl_texts_are_diffusers_own(stages, pipeline, told, theirs):
    """A negative prompt that is left out is zeros, as SDXL was trained, and not the encoding of no text."""
    with torch.inference_mode():
        expected = pipeline.encode_prompt(PROMPT, device="cpu", negative_prompt=theirs)
    for ours, stock in zip(
        states(conditioned(stages, negative_prompt=told)), expected, strict=True
    ):
        assert (ours - stock).abs().max() == 0


def test_a_folder_may_say_that_no_text_is_text(copy, pipeline):
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    with torch.inference_mode():
        expected = pipeline.encode_prompt(PROMPT, device="cpu", negative_prompt="")
    for ours, stock in zip(
        states(conditioned(load(copy), negative_prompt="")), expected, strict=True
    ):
        assert (ours - stock).abs().max() == 0


def word_file():
    generator = torch.Generator().manual_seed(0)
    return {
        "clip_l": torch.randn((2, 32), generator=generator),
        "clip_g": torch.randn((2, 48), generator=generator),
    }


def test_a_learned_word_goes_to_both_encoders_as_in_diffusers(folder, stages):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    vectors = word_file()
    for name, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(
            vectors[name], token="<pink>", text_encoder=encoder, tokenizer=tokenizer
        )
    with torch.inference_mode():
        (hidden, *rest), (sushi, *_) = (
            pipeline.encode_prompt(text, device="cpu", negative_prompt="a box")
            for text in ("a sushi on a table", "<pink> sushi")
        )
    ours = conditioned(stages, word=Word.from_bytes(save(vectors), (32, 48)))
    assert ours.positions == ((2, 3, 4),)
    # Its layer's words as a text of their own; all else, the pooled text too, as the prompt has it without.
    expected = torch.cat([hidden[:, :2], sushi[:, 1:4], hidden[:, 3:-2]], dim=1)
    for one, other in zip(states(ours), (expected, *rest), strict=True):
        assert (one - other).abs().max() == 0


def test_the_pooled_text_is_of_the_end_mark_in_old_folders_too(copy, stages):
    """Published SDXL folders name no end mark; the highest id is taken for it, which a new token's id would be."""
    for part in ("text_encoder", "text_encoder_2"):
        edit(copy / part / "config.json", eos_token_id=2)
    word = Word.from_bytes(save(word_file()), (32, 48))
    ours, plain = conditioned(load(copy), word=word), conditioned(stages, word=word)
    assert torch.equal(ours.prompt.pooled_BP, plain.prompt.pooled_BP)


def test_sdxl_equals_the_stock_pipelines(tmp_path):
    """The whole table, with more samplers, strengths and scales, is benchmarks/parity.py."""
    case = Case(toy.sdxl(tmp_path))
    strength_hw = np.full(case.grid, 0.3)
    latents, pictures = case.ours("euler", strength_hw, 5.0)
    assert (latents - case.stock("euler", 0.3, 5.0)).abs().max() == 0
    theirs = case.stock("euler", 0.3, 5.0, output_type="np")
    assert np.array_equal(pictures, (theirs * 255).round())
    structures = STRUCTURES["controls"]
    controlled, _ = case.ours("euler", strength_hw, 5.0, structures)
    assert (controlled - case.stock_controlled("euler", 0.3, 5.0, structures)).abs().max() == 0
    assert (controlled - latents).abs().max() > 1e-3


def test_the_size_of_the_canvas_is_told(stages):
    text = conditioned(stages).prompt
    beside = stages._beside_time(text, 4, 8)
    assert beside["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]]


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_in_half_stays_single(copy, upcast):
    edit(copy / "vae" / "config.json", force_upcast=upcast)
    stages = load(copy, dtype=torch.float16)
    assert stages._model.unet.dtype == torch.float16
    assert stages._model.vae.dtype == (torch.float32 if upcast else torch.float16)
    rgb_BHWC = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    assert stages.decode_image(stages.encode_image(rgb_BHWC)).shape == (1, 64, 64, 3)


def test_sdxl_is_named_and_sized_by_its_folder(folder):
    card = FolderCard.read(ModelSource(name="xl", source=folder))
    assert card.family == "sdxl"
    assert (card.facts.size_multiple, card.min_side, card.max_side) == (32, 32, 256)
    assert card.tokens_limit == toy.WINDOW
    assert card.defaults().guidance_scale == 5.0


def _no_second_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer_2")


def _other_tokens(copy):
    file = copy / "tokenizer_2" / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["sushi</w>"], vocabulary["cake</w>"] = (
        vocabulary["cake</w>"],
        vocabulary["sushi</w>"],
    )
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda copy: edit(copy / "model_index.json", tokenizer_2=None), "names no tokenizer_2"),
        (_no_second_tokenizer, "tokenizer_2"),
        (lambda copy: shutil.rmtree(copy / "text_encoder_2"), "text_encoder_2"),
        (_other_tokens, "the two tokenizers know different tokens"),
        # A refiner reads one number less beside the time.
        (
            lambda copy: edit(
                copy / "unet" / "config.json", projection_class_embeddings_input_dim=80
            ),
            "takes text_time beside the time, 80 numbers wide; .* 88 wide",
        ),
        (
            lambda copy: edit(copy / "vae" / "config.json", latents_mean=[0, 0, 0, 0]),
            "the autoencoder shifts its latents",
        ),
        (
            lambda copy: edit(copy / "model_index.json", text_encoder_2=None, tokenizer_2=None),
            "takes text_time beside the time",
        ),
    ],
)
def test_what_is_no_whole_sdxl_says_why(copy, spoil, told):
    spoil(copy)
    with pytest.raises(ModelError, match=told):
        read_facts(copy)


FAMILIES = {"sd1": toy.sd1, "sd2": toy.sd2, "sdxl": toy.sdxl}
# Two vectors for the text encoders of each.
WORDS = {
    "sd1": {"<it>": torch.linspace(-1, 1, 64).reshape(2, 32)},
    "sd2": {"<it>": torch.linspace(-1, 1, 96).reshape(2, 48)},
    "sdxl": word_file(),
}
SIZES = {"portrait": (64, 128), "landscape": (128, 64)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory):
    """One server with a model of each family, each with a ControlNet and an adapter."""
    root = tmp_path_factory.mktemp("system")
    entries = []
    for name, make in FAMILIES.items():
        model = make(root / name)
        toy.controlnet(model, "canny")
        adapter = toy.lora(root / f"{name}-ink.safetensors", model)
        entries.append({"name": name, "source": str(model), "adapters": {"ink": str(adapter)}})
    (root / "models.yaml").write_text(json.dumps({"models": entries}))
    server = await embedded.start(root / "data", model=str(root / "models.yaml"), threads=1)
    async with connect(server.address) as channel:
        yield System(channel=channel, stub=collage_service_pb2_grpc.CollageServiceStub(channel))
    await server.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def words(system):
    """A learned word of each family, by family."""
    found = {}
    for name, vectors in WORDS.items():
        put = await system.stub.PutBlob(upload(save(vectors)), timeout=LIMIT_S)
        request = pb.ImportWordRequest(text="sushi", model=name, vectors=put.blob)
        found[name] = (await system.stub.ImportWord(request, timeout=LIMIT_S)).word
    return found


def everything(size, count, word):
    """A collage of `count` layers in rows; noise falls from the first, which has a word and structure, to 0."""
    width, height = size
    columns = 8 if width > height else 4
    rows = -(-count // columns)
    return collage_pb2.Collage(
        size={"width": width, "height": height},
        prompt=" and ".join(f"{{layer{index}}}" for index in range(min(count, 8))),
        layers=[
            collage_pb2.Layer(
                name=f"layer{index}",
                image={"data": cutout(index)},
                text=("sushi", "cake", "lemon", "rice")[index % 4],
                transform={
                    "x": (index % columns + 0.5) * width / columns,
                    "y": (index // columns + 0.5) * height / rows,
                    "rotation": 10.0 * index,
                    "scale": 0.9 if count > 1 else 3.0,
                },
                noise=0.9 * (1 - index / max(1, count - 1)),
                attract=0.8,
                repel=0.6,
                seed=index,
                structure=[{"kind": "canny", "scale": 0.8}] if index % 2 == 0 else [],
                appearance={"word": word.name, "weight": 0.9} if index == 0 else None,
            )
            for index in range(count)
        ],
    )


def request_for(family, collage, **sampling):
    return pb.GenerateImagesRequest(
        collage=collage,
        sampling={
            "model": family,
            "steps": 3,
            "guidance_scale": 4.0,
            "seed": 5,
            "adapters": [{"name": "ink", "weight": 0.8}],
            **sampling,
        },
    )


async def drawn(system, request):
    events = await system.generate(request)
    assert events[-1].WhichOneof("kind") == "done", events[-1]
    (image,) = [event.image for event in events if event.HasField("image")]
    return await system.picture(image.blob)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
async def test_everything_at_once_in_every_family(system, words, family, side, count):
    width, height = SIZES[side]
    collage = everything(SIZES[side], count, words[family])
    picture = await drawn(system, request_for(family, collage))
    assert picture.shape == (height, width, 3)
    assert picture.std() > 1
    plan = await system.stub.PlanCollage(
        pb.PlanCollageRequest(collage=collage, sampling={"model": family}), timeout=LIMIT_S
    )
    composite = await system.picture(plan.plan.composite)
    assert (picture != composite).any()
    if count > 1:
        # The last layer has noise 0: its own pixels stay.
        mask = await system.picture(plan.plan.layers[-1].mask)
        y, x = np.argwhere(mask == 255).mean(axis=0).round().astype(int)
        assert np.array_equal(picture[y, x], composite[y, x])


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("family", FAMILIES)
async def test_each_of_them_matters(system, words, family):
    """The same request without the adapter, the word, the structure, the control or the noise is another picture."""

    async def without(**changes):
        collage = everything(SIZES["landscape"], 8, words[family])
        for layer in collage.layers:
            for name in changes.get("clear", ()):
                layer.ClearField(name)
            for name, value in changes.get("set", {}).items():
                setattr(layer, name, value)
        return await drawn(system, request_for(family, collage, **changes.get("sampling", {})))

    pictures = [
        await without(),
        await without(sampling={"adapters": []}),
        await without(clear=["appearance"]),
        await without(clear=["structure"]),
        await without(set={"attract": 0.0, "repel": 0.0}),
        await without(set={"noise": 0.5}),
        await without(clear=["seed"]),
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


@pytest.mark.asyncio(loop_scope="module")
async def test_families_are_listed_with_their_sizes(system):
    answer = await system.stub.ListModels(pb.ListModelsRequest(), timeout=LIMIT_S)
    told = {
        model.name: (model.size_multiple, model.min_side, model.max_side, model.native_side)
        for model in answer.models
    }
    assert told == {name: (32 if name == "sdxl" else 64,) * 2 + (256, 64) for name in FAMILIES}
    assert {model.name: model.family for model in answer.models}["sdxl"] == "sdxl"
