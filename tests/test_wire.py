"""Messages to values: what is accepted, what is refused and how it is told."""

import math

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from collage.v1 import collage_pb2, collage_service_pb2
from services.common import wire
from services.common.collage import Appearance, Extent, Transform
from services.common.errors import (
    CollageError,
    Internal,
    InvalidRequest,
    MissingBlobs,
    NotFound,
    Overloaded,
    Violation,
    from_status,
)

DIGEST = "0" * 64


def message(**layer) -> collage_pb2.Collage:
    """A small right collage, its one layer changed."""
    base = {"name": "a", "image": {"data": "eA=="}, "text": "a cat"}
    return json_format.ParseDict(
        {"size": {"width": 128, "height": 64}, "prompt": "x", "layers": [{**base, **layer}]},
        collage_pb2.Collage(),
    )


def refused(collage: collage_pb2.Collage) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        wire.parse_collage(collage)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_what_is_unset_is_not_zero():
    layer = wire.parse_collage(message()).layers[0]
    assert (layer.noise, layer.attract, layer.repel, layer.seed) == (None, None, None, None)
    assert layer.opacity == 1.0
    assert layer.visible
    assert layer.transform == Transform()
    layer = wire.parse_collage(message(noise=0, seed=0, opacity=0, visible=False)).layers[0]
    assert (layer.noise, layer.seed, layer.opacity, layer.visible) == (0.0, 0, 0.0, False)


def test_every_field_comes_back_from_the_message_it_is_rendered_to():
    collage = message(
        image={"blob": {"sha256": DIGEST, "sizeBytes": "7", "mediaType": "image/png"}},
        transform={"x": 1.5, "y": -2, "scale": 0.25, "rotation": -30, "flipVertical": True},
        opacity=0.5,
        noise=0.1,
        attract=0.2,
        repel=0.3,
        structure=[{"kind": "canny", "scale": 0.5, "start": 0.1, "end": 0.9, "emphasis": 0.3}],
        appearance={"word": "words/1", "weight": 0.5},
        seed="18446744073709551615",
    )
    collage.background.image.data = b"y"
    collage.negative_prompt = "blurry"
    value = wire.parse_collage(collage)
    assert value.size == Extent(width=128, height=64)
    assert value.layers[0].appearance == Appearance(word="words/1", weight=0.5)
    assert value.layers[0].seed == 2**64 - 1
    assert wire.parse_collage(wire.render_collage(value)) == value


@pytest.mark.parametrize(
    ("change", "field", "told"),
    [
        ({"name": "../x"}, "collage.layers[0].name", "'../x'"),
        ({"name": ""}, "collage.layers[0].name", "A-Z"),
        ({"name": "a" * 65}, "collage.layers[0].name", "64"),
        ({"text": " "}, "collage.layers[0].text", "empty"),
        ({"text": "x" * 301}, "collage.layers[0].text", "301 characters"),
        ({"text": "a\u0000b"}, "collage.layers[0].text", "control"),
        ({"image": {}}, "collage.layers[0].image", "required"),
        ({"image": {"path": "/etc/passwd"}}, "collage.layers[0].image.path", "opens no paths"),
        ({"image": {"data": ""}}, "collage.layers[0].image.data", "0 bytes"),
        ({"image": {"blob": {"sha256": "xyz"}}}, "collage.layers[0].image.blob.sha256", "64"),
        ({"noise": "NaN"}, "collage.layers[0].noise", "nan"),
        ({"noise": 1.01}, "collage.layers[0].noise", "1.01"),
        ({"attract": -0.1}, "collage.layers[0].attract", "-0.1"),
        ({"repel": "Infinity"}, "collage.layers[0].repel", "inf"),
        ({"opacity": 2}, "collage.layers[0].opacity", "2"),
        ({"transform": {"scale": 0}}, "collage.layers[0].transform.scale", "above 0"),
        ({"transform": {"rotation": 361}}, "collage.layers[0].transform.rotation", "361"),
        ({"transform": {"x": "NaN"}}, "collage.layers[0].transform.x", "nan"),
        ({"structure": [{"scale": 1}]}, "collage.layers[0].structure[0].kind", "empty"),
        (
            {"structure": [{"kind": "canny", "start": 0.9, "end": 0.1}]},
            "collage.layers[0].structure[0].end",
            "before start",
        ),
        (
            {"structure": [{"kind": "canny", "emphasis": 1.5}]},
            "collage.layers[0].structure[0].emphasis",
            "1.5",
        ),
        ({"appearance": {}}, "collage.layers[0].appearance", "empty"),
        (
            {"appearance": {"learn": True, "weight": 3}},
            "collage.layers[0].appearance.weight",
            "from 0 to 2",
        ),
    ],
)
def test_a_wrong_layer_field_is_named_with_its_value(change, field, told):
    violations = refused(message(**change))
    assert list(violations) == [field]
    assert told in violations[field]


def test_everything_wrong_is_told_at_once():
    collage = message(noise=2, name="a/b")
    collage.size.width = 0
    collage.prompt = "word " * 10_000
    assert set(refused(collage)) == {
        "collage.size.width",
        "collage.prompt",
        "collage.layers[0].name",
        "collage.layers[0].noise",
    }


def test_layers_are_from_1_to_32_and_named_once():
    none = message()
    del none.layers[:]
    assert "0 layers" in refused(none)["collage.layers"]
    many = message()
    for index in range(32):
        many.layers.add().CopyFrom(many.layers[0])
        many.layers[-1].name = f"n{index}"
    assert "33 layers" in refused(many)["collage.layers"]
    twice = message()
    twice.layers.add().CopyFrom(twice.layers[0])
    assert "layers[0]" in refused(twice)["collage.layers[1].name"]


MODEL = collage_service_pb2.Model(name="mini", samplers=["euler", "ddim"])
MODEL.defaults.sampler = "euler"
MODEL.defaults.steps = 30
MODEL.defaults.guidance_scale = 5


def test_sampling_takes_what_is_unset_from_the_model():
    sampling = wire.parse_sampling(collage_pb2.Sampling(), MODEL, fallback_seed=9)
    assert (sampling.sampler, sampling.steps, sampling.images) == ("euler", 30, 1)
    assert sampling.seed == 9
    assert wire.parse_sampling(collage_pb2.Sampling(seed=0), MODEL, fallback_seed=9).seed == 0
    rendered = wire.render_sampling(sampling)
    assert wire.parse_sampling(rendered, MODEL, fallback_seed=1) == sampling


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampler": "magic"}, "sampling.sampler"),
        ({"steps": 0}, "sampling.steps"),
        ({"steps": 1001}, "sampling.steps"),
        ({"guidance_scale": math.nan}, "sampling.guidance_scale"),
        ({"images": 17}, "sampling.images"),
        ({"images": 0}, "sampling.images"),
        ({"preview_every": 0}, "sampling.preview_every"),
    ],
)
def test_wrong_sampling_is_named(change, field):
    with pytest.raises(InvalidRequest) as caught:
        wire.parse_sampling(collage_pb2.Sampling(**change), MODEL, fallback_seed=0)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest([Violation(field="a.b[1]", description="is 2; allowed: 1")]),
        InvalidRequest.of("a", "is new", reason="OTHER"),
        MissingBlobs({"collage.layers[0].image": DIGEST}),
        NotFound("no job", metadata={"job": "x"}),
        Overloaded("full", retry_after_s=2.5),
        Internal("bug"),
    ],
)
def test_an_error_survives_the_way_through_other_services(error: CollageError):
    again = from_status(error.to_status())
    assert type(again) is type(error)
    assert again.to_status() == error.to_status()


NUMBER = st.floats(allow_nan=True, allow_infinity=True, width=64)
LAYER = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=70),
        "text": st.text(max_size=20),
        "noise": NUMBER,
        "attract": NUMBER,
        "repel": NUMBER,
        "opacity": NUMBER,
        "seed": st.integers(0, 2**64 - 1),
        "image": st.sampled_from([{}, {"data": b"x"}, {"path": "x"}, {"blob": {"sha256": "q"}}]),
        "transform": st.fixed_dictionaries(
            {}, optional={"x": NUMBER, "y": NUMBER, "scale": NUMBER, "rotation": NUMBER}
        ),
    },
)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(2**31), 2**31 - 1),
    st.text(max_size=50),
    st.lists(LAYER, max_size=4),
)
def test_any_collage_is_either_a_value_or_refused_by_field(width, height, prompt, layers):
    collage = collage_pb2.Collage(
        size={"width": width, "height": height}, prompt=prompt, layers=layers
    )
    try:
        value = wire.parse_collage(collage)
    except InvalidRequest as error:
        assert all(violation.field.startswith("collage.") for violation in error.violations)
    else:
        assert wire.parse_collage(wire.render_collage(value)) == value
