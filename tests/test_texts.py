"""Texts on their way in: white space, whose words are too many, other tools' syntax, and seeds."""

import sys
import unicodedata

import grpc
import pytest
import pytest_asyncio

from collage.v1 import collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client import Layer, Sampling, files
from collage_client._errors import InvalidInput
from gateway.syntax import foreign
from services.common import wire
from services.common.errors import InvalidRequest, from_rpc
from testing.system import LIMIT_S, collage, layer, running

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory):
    async with running(tmp_path_factory.mktemp("texts")) as system:
        yield system


async def plan(system, **changes) -> pb.Plan:
    scene = collage(**changes)
    return (
        await system.stub.PlanCollage(pb.PlanCollageRequest(collage=scene), timeout=LIMIT_S)
    ).plan


async def refused(system, **changes) -> InvalidRequest:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await plan(system, **changes)
    told = from_rpc(caught.value)
    assert isinstance(told, InvalidRequest)
    return told


async def test_white_space_is_taken_everywhere_and_other_controls_nowhere():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character) not in ("Cc", "Zs", "Zl", "Zp"):
            continue
        check = wire.Checker()
        check.text("prompt", f"a{character}b", 10)
        assert bool(check.violations) == (not character.isspace() or 0x1C <= code <= 0x1F), code


async def test_a_prompt_with_carriage_returns_and_tabs_is_planned(system):
    scene = {
        "prompt": "a red\tcat\r\non\u3000a table",
        "negative_prompt": "blur\r\n\tnoise",
        "layers": [layer("one", text="red\r\ncat"), layer("two", text="\ta\u00a0table\r\n")],
    }
    made = await plan(system, **scene)
    assert [(each.text_start, each.text_end) for each in made.layers] == [(2, 9), (14, 21)]
    assert "TEXT_NOT_FOUND" not in {warning.reason for warning in made.warnings}


async def test_a_long_prompt_is_told_as_the_prompts_fault(system):
    told = await refused(system, prompt="cat " * 100, layers=[layer("one", text="cat")])
    assert (told.reason, [each.field for each in told.violations]) == (
        "PROMPT_TOO_LONG",
        ["collage.prompt"],
    )
    assert "takes" in told.message


@pytest.mark.parametrize(("prompt", "own"), [("", 2), ("a table", None)])
async def test_texts_that_were_appended_are_told_as_the_layers(system, prompt, own):
    layers = [layer(f"layer{n}", text=f"thing number {n} of many") for n in range(20)]
    told = await refused(system, prompt=prompt, layers=layers)
    assert told.reason == "PROMPT_TOO_LONG"
    fields = [each.field for each in told.violations]
    assert fields[:2] == ["collage.layers", "collage.layers[0].text"]
    assert "20 texts" in told.message
    assert own is None or f"its own {own} tokens" in told.message
    count = int(told.violations[1].description.split()[1])
    alone = await plan(system, prompt="thing number 0 of many", layers=layers[:1])
    assert count == alone.prompt_tokens - 2


async def test_of_a_prompt_too_long_by_itself_both_are_told(system):
    told = await refused(system, prompt="cat " * 100, layers=[layer("one", text="dog")])
    fields = [each.field for each in told.violations]
    assert fields == ["collage.prompt", "collage.layers[0].text"]


SYNTAX = {
    "(word:1.3)": "attract",
    "((word))": "attract",
    "[word]": "attract",
    "word++": "attract",
    "(a b)--": "attract",
    "<lora:x:0.8>": "--adapter",
    "<lyco:x>": "--adapter",
    "BREAK": "layer",
    "AND": "layer",
    "embedding:x": "appearance.word",
    "<cat-toy>": "appearance.word",
    "[cat:dog:0.5]": "one prompt",
    "[cat|dog]": "one prompt",
    "--ar 16:9": "size",
    "\\(x\\)": "backslash",
}


@pytest.mark.parametrize("syntax", SYNTAX)
async def test_the_syntax_of_other_tools_is_told_by_name(syntax):
    (told,) = foreign(f"a red {syntax} on a table")
    assert SYNTAX[syntax] in told


@pytest.mark.parametrize(
    "text",
    ["a cat (black) on a table", "a well-known co-op -- really", "3:4, see: 5", "a and b", "a, b."],
)
async def test_plain_words_are_not_taken_for_syntax(text):
    assert list(foreign(text)) == []


async def test_the_plan_warns_of_syntax_and_leaves_the_text_alone(system):
    prompt = "a (cat:1.3) BREAK <lora:ink:0.8> and ((table))"
    made = await plan(
        system,
        prompt=prompt,
        negative_prompt="embedding:bad",
        layers=[layer("one", text="(cat:1.3)"), layer("two", text="((table))")],
    )
    assert made.prompt == prompt
    told = [(each.field, each.message) for each in made.warnings if each.reason == "PROMPT_SYNTAX"]
    assert [field for field, _ in told] == [
        *["collage.prompt"] * 3,
        "collage.negative_prompt",
        "collage.layers[0].text",
        "collage.layers[1].text",
    ]


async def test_a_seed_of_minus_one_is_told_to_be_left_out(tmp_path):
    with pytest.raises(ValueError, match="left out for a drawn one"):
        Sampling(seed=-1)
    with pytest.raises(ValueError, match="left out for a drawn one"):
        Layer("one", b"x", text="x", seed=-1)
    file = tmp_path / "collage.yaml"
    file.write_text("layers: [{name: one, seed: -1}]")
    with pytest.raises(InvalidInput, match="collage file") as caught:
        files.load(file)
    assert "leave it out" in caught.value.field_violations[0].description
    assert collage_pb2.Layer(seed=0).HasField("seed")
