"""A text as the eye sees it, so that the same words are found however they are encoded.

Main type: `Folded`. Texts that look alike fold to the same characters: whatever their normal form (NFC, NFD, NFKC,
NFKD), case, white space, quotes and dashes, and whether invisible characters stand among them. This module knows no
layers.
"""

import re
import unicodedata
from collections.abc import Iterator

# Scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, the smaller ones of South-East Asia,
# Han, kana, Bopomofo and Yi.
_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007"
    "\u3021-\u302f\u3031-\u3035\u3038-\u303b\u3041-\u309f\u30a1-\u30fa\u30fc-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U0001aff0-\U0001b16f"
    "\U00020000-\U0003ffff]"
)
# What may stand directly behind a Korean noun: "plural", then particles and forms of "to be".
_PLURAL = "들"
_PARTICLES = (
    "은 는 이 가 을 를 과 와 의 에 에서 에게 에게서 한테 한테서 께 께서 로 으로 로서 으로서 로써 "
    "으로써 도 만 부터 까지 마저 조차 처럼 같이 보다 밖에 뿐 하고 이랑 랑 이나 나 이며 며 이고 고 이라 "
    "라 이다 다 인 이라는 라는 마다 대로 만큼 커녕 이여 여 아 야 요 "
)
_HANGUL = re.compile("[\u1100-\u11ff\ua960-\ua97f\uac00-\ud7ff]")
# Vowels and final consonants that join the Hangul before them.
_JOINING_JAMO = re.compile("[\u1160-\u11ff\ud7b0-\ud7ff]")
# Below these (Khmer, Burmese) the next letter is written; an emoji behind a joiner is one with that before.
_STACKERS, _JOINER, _SKIN_TONES = (
    "\u17d2\u1039",
    "\u200d",
    "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff",
)
# They choose a form of the character before, as emoji or as text.
_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_ALIKE = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u02bc\u2032"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"), "-"),
}


def _fold(cluster: str) -> str:
    """What is left of a cluster; nothing where it cannot be seen."""
    if cluster.isascii():
        return cluster.lower().strip()
    plain = unicodedata.normalize("NFKD", cluster).casefold()
    plain = unicodedata.normalize("NFKD", plain).translate(_ALIKE)
    return "".join(
        each for each in plain if unicodedata.category(each) != "Cf" and not _SELECTORS.match(each)
    )


_PARTICLE = "|".join(map(_fold, sorted(_PARTICLES.split(), key=len, reverse=True)))
_BEHIND_NOUN = re.compile(rf"(?:{_fold(_PLURAL)})?(?:{_PARTICLE}){{0,3}}(?!{_HANGUL.pattern})")


class Folded:
    """A text, folded.

    `text` holds what is left: white space between words is one space, between letters of a script without spaces and at
    the ends none. Its clusters (a letter with its marks, a Hangul syllable) are matched whole.
    """

    def __init__(self, original: str) -> None:
        # Where each cluster begins in `text`, and what it stands for in the original; and for where it ends, the end.
        self._spans: dict[int, tuple[int, int]] = {}
        self._ends: dict[int, int] = {}
        # What the cluster before each cluster begins with.
        self._before: dict[int, str] = {}
        # Begins of clusters before which white space was dropped.
        self._apart: set[int] = set()
        self.text = ""
        parts: list[str] = []
        length, last, gap = 0, "", False
        for start, end in _clusters(original):
            folded = _fold(original[start:end])
            if original[start].isspace():
                gap = True
                continue
            if not folded:
                continue
            if gap and last:
                if _SPACELESS.match(last) and _SPACELESS.match(folded):
                    self._apart.add(length)
                else:
                    # No cluster, but words may end before it.
                    self._before[length] = last[0]
                    parts.append(" ")
                    length += 1
                    last = " "
            self._spans[length] = start, end
            self._before[length] = last[:1]
            length += len(folded)
            self._ends[length] = end
            parts.append(folded)
            last, gap = folded, False
        self.text = "".join(parts)

    def find(self, words: "Folded") -> Iterator[tuple[int, int]]:
        """Where whole words stand in the original, as half-open ranges of its characters.

        Those that stand apart come first, then those with a Korean particle or within a run of a script without spaces.
        """
        joined = []
        start = self.text.find(words.text) if words.text else -1
        while start >= 0:
            end = start + len(words.text)
            if start in self._spans and end in self._ends:
                span = self._spans[start][0], self._ends[end]
                parted = self._parts(start), self._parts(end)
                is_behind_noun = _HANGUL.match(self.text, end) and _BEHIND_NOUN.match(
                    self.text, end
                )
                if parted == (True, True):
                    yield span
                elif parted[0] is not None and (parted[1] is not None or is_behind_noun):
                    joined.append(span)
            start = self.text.find(words.text, start + 1)
        yield from joined

    def _parts(self, place: int) -> bool | None:
        """Whether words part between two clusters: True for yes, False for perhaps, None for no."""
        if place in (0, len(self.text)) or place in self._apart:
            return True
        # Marks make no word of their own: the letter that a cluster begins with tells.
        before, behind = self._before[place], self.text[place]
        if not (_is_of_word(before) and _is_of_word(behind)):
            return True
        is_spaceless = bool(_SPACELESS.match(before)), bool(_SPACELESS.match(behind))
        if not any(is_spaceless):
            return None
        return not all(is_spaceless) or _script(before) != _script(behind)


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Half-open ranges of what is read as one: a letter with its marks and what cannot be seen behind it."""
    start = 0
    for index in range(1, len(text) + 1):
        if index < len(text) and _joins(text[index - 1], text[index]):
            continue
        yield start, index
        start = index


def _joins(before: str, character: str) -> bool:
    if before.isspace() or character.isspace():
        return False
    # A half-width sound mark is a letter of its own, and a mark when decomposed.
    first = unicodedata.normalize("NFKD", character)[:1]
    if unicodedata.category(first) in ("Mn", "Mc", "Me", "Cf") or character in _SKIN_TONES:
        return True
    if _JOINING_JAMO.match(first):
        return bool(_HANGUL.match(unicodedata.normalize("NFKD", before)[-1:]))
    return before in _STACKERS or (before == _JOINER and not character.isalnum())


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


def _script(character: str) -> str:
    """HIRAGANA, CJK, THAI ..."""
    return unicodedata.name(character, "").partition(" ")[0]
