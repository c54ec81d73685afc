"""Binding the prompt's words to layers."""

import time
import unicodedata
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


def seen(text: str) -> str:
    return " ".join(text.lower().split())


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


FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# White_Space of Unicode.
SPACES = [
    chr(code)
    for first, last in ((9, 13), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680))
    for code in range(first, last + 1)
] + [chr(code) for code in (*range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)]
# Prompt, layer's text, other layer's text: both stand in it.
WITH_SPACES = {
    "Latin": ("une crème brûlée à côté d'un gâteau", "crème brûlée", "gâteau"),
    "Vietnamese": ("một tô phở bò và cà phê sữa", "phở bò", "cà phê sữa"),
    "Cyrillic": ("чёрный ёж и белый йогурт на столе", "белый йогурт", "чёрный ёж"),
    "Greek": ("ΜΙΑ ΜΑΎΡΗ ΓΆΤΑ και ένα σπίτι", "μαύρη γάτα", "σπίτι"),
    "Armenian": ("սև կատու և սպիտակ շուն", "սև կատու", "սպիտակ շուն"),
    "Hebrew": ("חָתוּל שָׁחוֹר ליד בית לבן", "חָתוּל שָׁחוֹר", "בית לבן"),
    "Arabic": ("قِطٌّ أَسْوَد بجانب بيت أبيض", "قِطٌّ أَسْوَد", "بيت أبيض"),
    "Devanagari": ("मेज़ पर काली बिल्ली और लाल क़मीज़", "काली बिल्ली", "लाल क़मीज़"),
    "Tamil": ("ஒரு கருப்பு பூனை மற்றும் வெள்ளை நாய்", "கருப்பு பூனை", "வெள்ளை நாய்"),
    "Hangul": ("탁자 위의 검은 고양이와 하얀 강아지들이 있다", "검은 고양이", "하얀 강아지"),
    "Emoji": ("a ❤️ red 👩\u200d🍳 beside 🍣", "❤ red", "🍣"),
}
WITHOUT_SPACES = {
    "Japanese": ("テーブルの上のガラスのビンと赤い寿司がある", "ガラスのビン", "赤い寿司"),
    "Chinese": ("桌子上有一只黑猫和一个红苹果。", "黑猫", "红苹果"),
    "Thai": ("แมวดำนั่งอยู่ข้างบ้านสีขาวบนภูเขา", "แมวดำ", "บ้านสีขาว"),
    "Lao": ("ແມວສີດຳນັ່ງຢູ່ຂ້າງເຮືອນສີຂາວ", "ແມວສີດຳ", "ເຮືອນສີຂາວ"),
    "Khmer": ("ឆ្មាខ្មៅអង្គុយក្បែរផ្ទះពណ៌ស", "ឆ្មាខ្មៅ", "ផ្ទះពណ៌ស"),
    "Burmese": ("ကြောင်နက်သည်အိမ်ဖြူဘေးမှာထိုင်နေသည်", "ကြောင်နက်", "အိမ်ဖြူ"),
}
ALL = {**WITH_SPACES, **WITHOUT_SPACES}


def alike(one: str, other: str) -> bool:
    """Whether two texts look the same, by another way than the code's."""
    plain = [
        "".join(unicodedata.normalize("NFKD", text).casefold().split()).replace("\ufe0f", "")
        for text in (one, other)
    ]
    return plain[0] == plain[1]


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other_form", FORMS)
def test_words_are_found_in_any_script_and_normal_form(script, form, other_form):
    prompt, *texts = ALL[script]
    prompt = unicodedata.normalize(form, prompt)
    bound = bind(prompt, layers(*(unicodedata.normalize(other_form, text) for text in texts)))
    assert bound.not_found == ()
    assert bound.text == prompt
    assert all(map(alike, words(bound), texts))
    # No mark of the last letter is left behind.
    for _, end in bound.spans:
        assert not unicodedata.category(bound.text[end : end + 1] or " ").startswith("M")


@pytest.mark.parametrize("space", SPACES, ids=lambda space: f"{ord(space):04x}")
@pytest.mark.parametrize("script", ALL)
def test_words_are_found_over_any_white_space(script, space):
    prompt, *texts = ALL[script]
    for run in (space, 2 * space, f" {space}\n", f"\r\n{space}"):
        bound = bind(prompt.replace(" ", run), layers(*texts))
        assert bound.not_found == ()
        assert all(map(alike, words(bound), texts))
        assert bind(prompt, layers(*(text.replace(" ", run) for text in texts))).not_found == ()


@pytest.mark.parametrize("script", WITHOUT_SPACES)
@pytest.mark.parametrize("space", ["", *SPACES], ids=lambda space: space and f"{ord(space):04x}")
def test_in_scripts_without_spaces_a_space_changes_nothing(script, space):
    prompt, *texts = WITHOUT_SPACES[script]
    spaced = prompt
    for text in texts:
        middle = text[:2] + space + text[2:] if script in ("Japanese", "Chinese") else text
        spaced = spaced.replace(text, f"{space}{middle}{space}")
    bound = bind(spaced, layers(*texts))
    assert bound.not_found == ()
    assert all(map(alike, words(bound), texts))
    assert not any(word != word.strip() for word in words(bound))


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("cats and a cat", "cat", (11, 14)),
        ("STRASSE", "straße", (0, 7)),
        ("the cook’s knife", "cook's knife", (4, 16)),
        ("a semi\u2010detached house", "semi-detached", (2, 15)),
        ("soft\u00adware", "software", (0, 9)),
        ("cat\u200bfish", "catfish", (0, 8)),
        ("ｃａｔ ﬁsh", "cat fish", (0, 7)),
        ("ｶﾞﾗｽと", "ガラス", (0, 4)),
        # A word that stands apart goes before one within another.
        ("パンダと、パン", "パン", (5, 7)),
        ("사과와 사", "사", (4, 5)),
        ("cat과 dog", "cat", (0, 3)),
        ("고양이들에게는", "고양이", (0, 3)),
    ],
)
def test_words_are_found_as_the_eye_sees_them(prompt, text, found):
    assert bind(prompt, layers(text)).spans == (found,)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a category", "cat"),
        ("résumé", "re"),
        ("resume\u0301", "resume"),
        ("résumé", "resume"),
        ("고양이집사", "고양이"),
        ("한국", "하"),
        (unicodedata.normalize("NFD", "한국"), "하"),
        ("बिल्ली", "बिल"),
        ("ﬁsh", "f"),
        ("กำ", "ก"),
        ("ខ្មៅ", "ខ"),
        ("x", "\u200b"),
    ],
)
def test_what_the_eye_does_not_see_is_not_found(prompt, text):
    assert bind(prompt, layers(text)).not_found == (0,)


def test_a_hostile_prompt_takes_no_time():
    start = time.monotonic()
    for prompt, text in (
        ("a " * 2000, "a"),
        ("가" * 4000, "가"),
        ("\ufdfa" * 4000, "\ufdfa"),
        ("a" + "\u0301" * 3999, "a"),
        ("寿" * 4000, "寿" * 300),
    ):
        bind(prompt, layers(*[text] * 32))
    assert time.monotonic() - start < 10


TEXT = st.text(alphabet="ab c.(", min_size=1, max_size=6).filter(str.strip)


@given(st.text(alphabet="ab c.(", max_size=30), st.lists(TEXT, min_size=1, max_size=5))
def test_every_visible_layer_has_its_own_words(prompt, texts):
    bound = bind(prompt, layers(*texts))
    assert [seen(word) for word in words(bound)] == [seen(text) for text in texts]
    ordered = sorted(bound.spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(ordered))
