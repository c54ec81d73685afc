"""Binding the prompt's words to layers."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prompt import bind
from services.common.collage import Layer
from services.common.errors import InvalidRequest


def layers(*texts: str, hidden: tuple[int, ...] = ()) -> list[Layer]:
    return [
        Layer(name=f"layer{index}", image=b"x", text=text, visible=index not in hidden)
        for index, text in enumerate(texts)
    ]


def words(bound) -> list[str]:
    return [bound.text[start:end] for start, end in bound.spans]


def test_a_placeholder_is_replaced_and_its_span_known():
    bound = bind("a box with {layer0} and {layer1}", layers("sushi", "ginger"))
    assert bound.text == "a box with sushi and ginger"
    assert words(bound) == ["sushi", "ginger"]
    assert bound.not_found == ()


def test_doubled_braces_are_literal_and_shift_no_span():
    bound = bind("{{a}} {layer0} {{", layers("sushi"))
    assert bound.text == "{a} sushi {"
    assert words(bound) == ["sushi"]


def test_a_longer_text_is_not_robbed_by_a_shorter_one():
    bound = bind("a birthday cake beside a cake", layers("cake", "birthday cake"))
    assert bound.spans == ((25, 29), (2, 15))


def test_two_layers_of_one_text_stay_two_spans():
    bound = bind("a cat and a cat", layers("cat", "cat"))
    assert bound.spans == ((2, 5), (12, 15))


def test_only_whole_words_are_found():
    bound = bind("a category", layers("cat"))
    assert bound.text == "a category, cat"
    assert bound.not_found == (0,)


def test_a_text_not_found_is_appended_once_for_each_layer():
    bound = bind("a table", layers("cat", "cat"))
    assert bound.text == "a table, cat, cat"
    assert words(bound) == ["cat", "cat"]
    assert bound.not_found == (0, 1)


def test_an_empty_prompt_takes_the_texts_without_complaint():
    bound = bind("", layers("cat", "dog"))
    assert bound.text == "cat, dog"
    assert bound.not_found == ()


def test_a_hidden_layer_binds_nothing():
    bound = bind("{layer0} and cat", layers("dog", "cat", "fox", hidden=(0, 2)))
    assert bound.text == "dog and cat"
    assert bound.spans == ((0, 0), (8, 11), (0, 0))


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a {nobody}", "names no layer"),
        ("{layer0} {layer0}", "stands twice"),
        ("a { b", "lone '{'"),
        ("a } b", "lone '}'"),
    ],
)
def test_a_wrong_placeholder_is_refused_with_the_field(prompt, told):
    with pytest.raises(InvalidRequest, match=told) as caught:
        bind(prompt, layers("sushi"))
    assert caught.value.violations[0].field == "collage.prompt"


TEXT = st.text(alphabet="ab c.(", min_size=1, max_size=6).filter(str.strip)


@given(st.text(alphabet="ab c.(", max_size=30), st.lists(TEXT, min_size=1, max_size=5))
def test_every_visible_layer_has_its_own_words(prompt, texts):
    bound = bind(prompt, layers(*texts))
    assert [word.lower() for word in words(bound)] == [text.lower() for text in texts]
    ordered = sorted(bound.spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(ordered))
