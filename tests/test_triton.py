"""The stages on NVIDIA Triton: how they cross, what a host does with them, and a real server that is treated badly."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import pytest_asyncio
import torch
import tritonclient.grpc as client
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from local import triton
from services.common.collage import Adapter
from services.common.errors import Internal, ModelUnusable, Unavailable
from services.common.settings import GeneratorSettings, InvalidSetting
from services.diffusion.text import Text, TextStates
from services.diffusion.word import Word
from services.generator.__main__ import networks
from services.generator.call import ControlPicture, Given, Hint, NotWanted, Rows, Steering
from services.generator.folder_card import load_stages, read_catalog
from services.generator.triton import repository, wire
from services.generator.triton.host import Asked, Failure, Host, Spec
from services.generator.triton.servers import Servers
from services.generator.triton.stages import TritonStages, as_served, probe
from testing import toy
from testing.servers import triton_server

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("one_thread"),
]
HELD = 2**20


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = toy.mini(tmp_path_factory.mktemp("toy") / "mini")
    toy.controlnet(folder, "canny")
    return read_catalog(f"mini={folder}").cards[0]


@pytest.fixture(scope="module")
def here(card):
    return load_stages(card)


@pytest.fixture
def rows(here):
    return drawn_rows(here)


def drawn_rows(stages, *, seed=0, count=1):
    """A step's rows as a generator asks for them: without the prompt, and with it, steering; a ControlNet in both."""
    random = torch.Generator().manual_seed(seed)
    text = stages.encode_text(
        [Text(ids_ET=stages.facts.tokenize(each).ids_ET) for each in ("", "a cake")]
    )
    picture = ControlPicture(kind="canny", rgb_3HW=torch.rand(3, 32, 32, generator=random))
    hints = (Hint(picture=picture, scale_hw=torch.rand(8, 8, generator=random)),)
    steering = Steering.of(
        [(1,), (2,)],
        [{"attract": 0.5, "repel": 0.2}, {"attract": 0.1, "repel": 0.9}],
        torch.rand(2, 8, 8, generator=random),
        window=text.hidden_BTD.shape[1],
    )
    x_NChw = torch.randn(count, 4, 8, 8, generator=random)
    return [
        Rows(given=given, x_NChw=x_NChw, timestep=601.0, gain=0.7)
        for given in (
            Given(count=count, text=text.rows(slice(0, 1)), hints=hints),
            Given(count=count, text=text.rows(slice(1, 2)), hints=hints, steering=steering),
        )
    ]


def asked(rows, *, digest, may_share=False, with_items=True):
    """What `predict` gets of these rows."""
    packed = [wire.pack_given(each.given, wire.pack_picture) for each in rows]
    items = [*(data for each in packed for data in each.pictures.values())]
    items += [each.data for each in packed]
    counts = torch.tensor([each.given.count for each in rows])
    return Asked(
        digest=digest,
        x_BChw=torch.cat([each.x_NChw for each in rows]),
        timestep_B=torch.tensor([each.timestep for each in rows]).repeat_interleave(counts),
        gain_B=torch.tensor([each.gain for each in rows]).repeat_interleave(counts),
        key_BK=wire.keys_of(rows, [each.digest for each in packed]),
        items=wire.pack_items(items, int(counts.sum())) if with_items else None,
        may_share=may_share,
    )


def spec_of(card, stage="predict", *, kept_bytes=HELD):
    return Spec(
        stage=stage,
        folder=str(card.folder),
        digest=card.digest,
        dtype="float32",
        device="cpu",
        controlnets={kind: str(each) for kind, each in card.controlnet_folders.items()},
        adapters={},
        arithmetic=card.arithmetic,
        device_bytes=card.device_bytes,
        unet_value_bytes=4,
        vae_value_bytes=4,
        threads=1,
        kept_bytes=kept_bytes,
    )


# How they cross.


async def test_what_crosses_comes_back_as_it_was(rows):
    for each in rows:
        packed = wire.pack_given(
            replace(each.given, guidance_scale=7.1, adapters=(Adapter(name="ink", weight=-0.3),)),
            wire.pack_picture,
        )
        pictures = {key: wire.unpack_picture(data) for key, data in packed.pictures.items()}
        back = wire.unpack_given(packed.data, pictures)
        assert back.guidance_scale == 7.1
        assert back.adapters == (Adapter(name="ink", weight=-0.3),)
        assert torch.equal(back.text.hidden_BTD, each.given.text.hidden_BTD)
        (hint,), (own,) = back.hints, each.given.hints
        assert torch.equal(hint.picture.rgb_3HW, own.picture.rgb_3HW)
        assert torch.equal(hint.scale_hw, own.scale_hw)
        assert (back.steering is None) == (each.given.steering is None)
        if back.steering is not None:
            assert torch.equal(back.steering.visible_Lhw, each.given.steering.visible_Lhw)
            assert torch.equal(back.steering.speaks_LT, each.given.steering.speaks_LT)
            assert list(back.steering.dials) == list(each.given.steering.dials)
    assert wire.runs_of(wire.keys_of(rows, [b"a" * 32, b"b" * 32])) == [
        (b"a" * 32, 1),
        (b"b" * 32, 1),
    ]
    word = Word(vectors=(torch.randn(2, 32),))
    texts = [Text(ids_ET=((1, 2, 3),)), Text(ids_ET=((4, 5, 6),), word=word, positions=(1, 2))]
    (plain, learned), adapters = wire.unpack_texts(wire.pack_texts(texts, [Adapter(name="ink")]))
    assert plain.ids_ET == ((1, 2, 3),)
    assert plain.word is None
    assert torch.equal(learned.word.vectors[0], word.vectors[0])
    assert learned.positions == (1, 2)
    assert adapters == (Adapter(name="ink"),)


async def test_rows_that_are_not_one_jobs_stay_apart():
    text = TextStates(hidden_BTD=torch.zeros(1, 1, 1))
    given = [Given(count=2, text=text), Given(count=1, text=text), Given(count=1, text=text)]
    rows = [Rows(given=each, x_NChw=torch.zeros(each.count, 1, 1, 1), timestep=0) for each in given]
    # The third is of the same job as the second: two pictures, each its own rows.
    keys = wire.keys_of(rows, [b"a" * 32, b"b" * 32, b"b" * 32])
    assert wire.runs_of(keys) == [(b"a" * 32, 2), (b"b" * 32, 1), (b"b" * 32, 1)]


@pytest.mark.parametrize("data", [b"", b"x" * 40, b"\xff" * 9, (10**6).to_bytes(8, "little") * 3])
async def test_bytes_that_are_nothing_are_refused(data):
    for read in (
        wire.unpack,
        lambda data: wire.unpack_items(
            torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
        ),
    ):
        with pytest.raises(ValueError, match=r"."):
            read(data)


# What a host does.


async def test_a_host_answers_as_the_process_itself(card, here, rows):
    host = Host(spec_of(card))
    for count in (1, 3):
        more = drawn_rows(here, seed=count, count=count)
        (answer,) = host.predict([asked(more, digest=card.digest)])
        assert torch.equal(answer, here.predict(more))
        # The second time it is held.
        (again,) = host.predict([asked(more, digest=card.digest, with_items=False)])
        assert torch.equal(again, answer)
    assert host._stages._model.vae.device.type == "meta", "a stage has the networks that it needs"


async def test_a_host_computes_together_only_what_may_be(card, here):
    host = Host(spec_of(card))
    several = [drawn_rows(here, seed=seed) for seed in range(3)]
    alone = [here.predict(each) for each in several]
    calls = []
    inner = host._stages.predict
    host._stages.predict = lambda rows: calls.append(len(rows)) or inner(rows)
    answers = host.predict([asked(each, digest=card.digest) for each in several])
    assert calls == [2, 2, 2]
    assert all(map(torch.equal, answers, alone))
    calls.clear()
    answers = host.predict([asked(each, digest=card.digest, may_share=True) for each in several])
    assert calls == [6]
    for answer, own in zip(answers, alone, strict=True):
        torch.testing.assert_close(answer, own, rtol=1e-4, atol=1e-4)


async def test_a_request_that_fails_fails_alone(card, here):
    host = Host(spec_of(card))
    good, other = drawn_rows(here, seed=1), drawn_rows(here, seed=2)
    bad = [replace(each, x_NChw=each.x_NChw[..., :5]) for each in drawn_rows(here, seed=3)]
    answers = host.predict(
        [asked(each, digest=card.digest, may_share=True) for each in (good, bad, other)]
    )
    assert isinstance(answers[1], Failure)
    for answer, own in zip(answers[::2], (good, other), strict=True):
        torch.testing.assert_close(answer, here.predict(own), rtol=1e-4, atol=1e-4)
    (refused,) = host.predict([asked(good, digest="0" * 64)])
    assert wire.failure_of(str(refused))["reason"] == wire.OTHER_MODEL


async def test_what_is_held_is_bounded_and_asked_for_again(card, here):
    first, second = drawn_rows(here, seed=1), drawn_rows(here, seed=2)
    size = asked(first, digest=card.digest).items.numel()
    host = Host(spec_of(card, kept_bytes=size))
    for each in (first, second):
        host.predict([asked(each, digest=card.digest)])
        assert host.kept_bytes <= size
    (answer,) = host.predict([asked(first, digest=card.digest, with_items=False)])
    failed = wire.failure_of(str(answer))
    assert failed["reason"] == wire.NOT_HELD
    own = {wire.pack_given(each.given, wire.pack_picture).digest.hex() for each in first}
    assert set(failed["missing"]) <= own
    assert failed["missing"]


# The repository, and who is to be asked.


async def test_the_repository_is_what_triton_reads(card, tmp_path):
    names = repository.write([card], tmp_path, threads=2, instances={"predict": 3})
    assert names == ["mini.encode_text", "mini.encode_image", "mini.predict", "mini.decode_image"]
    for name in names:
        config = model_config_pb2.ModelConfig()
        text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), config)
        assert config.name == name
        spec = Spec.from_json(config.parameters["collage"].string_value)
        assert (spec.folder, spec.digest) == (str(card.folder.resolve()), card.digest)
        assert config.HasField("dynamic_batching") == (name == "mini.predict")
        assert config.instance_group[0].count == (3 if name == "mini.predict" else 1)
        assert (
            tmp_path / name / "1" / "model.py"
        ).read_bytes() == repository.MODEL_FILE.read_bytes()


@pytest.mark.parametrize("stages", ["", "cuda", "triton", "triton:", "triton:host", "triton:a:1,b"])
async def test_who_runs_the_networks_is_told_right_or_refused(stages):
    with pytest.raises(
        InvalidSetting, match=r"COLLAGE_STAGES is .*; allowed: torch, triton:HOST:PORT"
    ):
        networks(GeneratorSettings(stages=stages))


async def test_shared_memory_of_servers_that_are_gone_is_freed(tmp_path):
    for name in ("collage_triton_999999999_a", "collage_triton_1_a", "somebodys"):
        (tmp_path / name).touch()
    assert triton.sweep(tmp_path) == ["collage_triton_999999999_a"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["collage_triton_1_a", "somebodys"]


# A real server.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(card, tmp_path_factory):
    if not triton.is_here():
        pytest.skip("no Triton server here: make triton")
    async with triton_server(tmp_path_factory.mktemp("triton"), f"mini={card.folder}") as server:
        yield server


@pytest.fixture
def there(card, server):
    servers = Servers([server.url])
    yield TritonStages(card, servers, may_share=False)
    servers.close()


async def test_a_server_answers_bit_for_bit_what_this_process_does(card, here, there, server):
    assert as_served(card, there._servers).arithmetic == card.arithmetic
    probe(card, there._servers)
    word = Word(vectors=(torch.randn(2, *card.facts.text_widths),))
    ids_ET = card.facts.tokenize("a cake").ids_ET
    texts = [Text(ids_ET=ids_ET), Text(ids_ET=ids_ET, word=word, positions=(1, 2))]
    assert torch.equal(there.encode_text(texts).hidden_BTD, here.encode_text(texts).hidden_BTD)
    rgb_BHWC = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    z_BChw = there.encode_image(rgb_BHWC)
    assert torch.equal(z_BChw, here.encode_image(rgb_BHWC))
    assert torch.equal(there.decode_image(z_BChw), here.decode_image(z_BChw))
    for count in (1, 2):
        rows = drawn_rows(here, seed=count, count=count)
        assert torch.equal(there.predict(rows), here.predict(rows))
        assert torch.equal(there.predict(rows), here.predict(rows))


async def test_a_server_that_holds_nothing_is_given_it(card, here, there, server, rows):
    there.predict(rows)
    # As a server that was started a moment ago, or let it go.
    with client.InferenceServerClient(server.url) as own:
        own.unload_model("mini.predict")
        own.load_model("mini.predict")
    assert torch.equal(there.predict(rows), here.predict(rows))


async def test_a_stage_whose_process_died_is_loaded_anew(here, there, server, rows):
    there.predict(rows)
    server.kill_stage("predict")
    assert torch.equal(there.predict(rows), here.predict(rows))


async def test_an_answer_that_nobody_wants_is_not_waited_for(there, server, rows):
    wanted = threading.Event()
    wanted.set()
    stages = there.while_wanted(wanted.is_set)
    stages.predict(rows)
    wanted.clear()
    with pytest.raises(NotWanted):
        stages.predict(rows)


async def test_rows_of_several_are_one_call_where_they_may(card, here, server):
    servers = Servers([server.url])
    stages = [TritonStages(card, servers, may_share=True) for _ in range(6)]
    rows = [drawn_rows(here, seed=seed) for seed in range(6)]
    with client.InferenceServerClient(server.url) as own:

        def calls():
            (stats,) = own.get_inference_statistics("mini.predict").model_stats
            return stats.execution_count

        before = calls()
        with ThreadPoolExecutor(6) as pool:
            for _ in range(5):
                answers = list(
                    pool.map(lambda each: each[0].predict(each[1]), zip(stages, rows, strict=True))
                )
                for answer, each in zip(answers, rows, strict=True):
                    torch.testing.assert_close(answer, here.predict(each), rtol=1e-4, atol=1e-4)
        assert calls() - before < 30
    servers.close()


async def test_a_call_that_a_model_refuses_fails_at_once(there, rows):
    wrong = [replace(each, x_NChw=each.x_NChw[..., :5]) for each in rows]
    with pytest.raises(Internal, match="the model server"):
        there.predict(wrong)


async def test_a_server_of_another_model_is_not_drawn_with(card, server, rows):
    servers = Servers([server.url], patience_s=1.0)
    other = TritonStages(replace(card, digest="0" * 64), servers, may_share=False)
    with pytest.raises(
        ModelUnusable, match=r"no model server can run mini\.predict: .*asked for 0000"
    ):
        other.predict(rows)
    servers.close()


async def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(card, server, rows, tmp_path):
    """A second model of the same server, whose weights are damaged; the first is drawn with meanwhile."""
    damaged = replace(card, name="damaged", folder=toy.mini(tmp_path / "damaged"))
    repository.write([damaged], server.repository, threads=1)
    (weights,) = (damaged.folder / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    servers = Servers([server.url], patience_s=2.0)
    with pytest.raises(ModelUnusable, match=r"can run damaged\.predict: .*unet") as told:
        TritonStages(damaged, servers, may_share=False).predict(rows)
    assert "cut short" in str(told.value) and "\n" not in str(told.value)
    whole = Servers([server.url])
    TritonStages(card, whole, may_share=False).predict(rows)
    for each in (servers, whole):
        each.close()


async def test_nobody_at_the_address_is_unavailable(card, rows):
    servers = Servers(["127.0.0.1:1"], patience_s=0.5)
    with pytest.raises(Unavailable, match=r"no model server answered for 0 s: 127\.0\.0\.1:1"):
        TritonStages(card, servers, may_share=False).predict(rows)
    servers.close()
