"""Binding words to layers: which characters of the scene prompt speak of which layer.

Main type: `BoundPrompt`. Two ways, in this order: `{name}` placeholders, then a search for the layer's text as whole
words, each occurrence used once, compared as the eye sees them (`gateway.folded`). What is not found is appended. Two
layers of the same text stay two spans. This module knows no tokenizer: spans are in characters, and the generator maps
them to tokens.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gateway.folded import Folded
from services.common.collage import Layer
from services.common.errors import InvalidRequest, Violation, quote
from services.common.field import Field

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundPrompt:
    """The prompt as the text encoder gets it.

    `spans[i]` is the half-open character range of layer i's words in `text`, (0, 0) for a hidden layer.
    `appended` holds the indices of layers whose text had to be appended, behind the first `own_length` characters;
    `not_found` the same ones, but none for an empty prompt: it asks for the layers' texts, so that is no news.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    own_length: int
    appended: tuple[int, ...]
    not_found: tuple[int, ...]


def bind(
    prompt: str, layers: Sequence[Layer], *, field: Field = Field("collage.prompt")
) -> BoundPrompt:
    """Binds each visible layer to its words.

    `{{` and `}}` are literal braces. A placeholder of a hidden layer is replaced by its text and binds nothing.

    Raises:
        InvalidRequest: a placeholder that names no layer, or one layer twice, or a lone brace.
    """
    text, spans = _fill(prompt, layers, field)
    searched = [index for index, layer in enumerate(layers) if layer.visible and index not in spans]
    # Longest first, so that "birthday cake" is not robbed of its "cake"; equal texts in the layers' order.
    folded = {index: Folded(layers[index].text) for index in searched}
    own = Folded(text)
    for index in sorted(searched, key=lambda index: -len(folded[index].text)):
        if found := _search(own, folded[index], spans.values()):
            spans[index] = found
    own_length, appended = len(text), []
    for index in searched:
        if index not in spans:
            appended.append(index)
            text = f"{text}, " if text else ""
            spans[index] = (len(text), len(text) + len(layers[index].text))
            text += layers[index].text
    visible = {index for index, layer in enumerate(layers) if layer.visible}
    return BoundPrompt(
        text=text,
        spans=tuple(spans[index] if index in visible else (0, 0) for index in range(len(layers))),
        own_length=own_length,
        appended=tuple(appended),
        not_found=tuple(appended) if prompt.strip() else (),
    )


def _fill(
    prompt: str, layers: Sequence[Layer], field: Field
) -> tuple[str, dict[int, tuple[int, int]]]:
    """The prompt with placeholders replaced, and the span of each layer that had one."""
    index_of = {layer.name: index for index, layer in enumerate(layers)}
    spans: dict[int, tuple[int, int]] = {}
    violations: list[Violation] = []
    parts: list[str] = []
    length = end = 0
    for match in _PLACEHOLDER.finditer(prompt):
        piece = prompt[end : match.start()]
        end = match.end()
        name = match.group(1)
        if match.group() in ("{{", "}}"):
            word = match.group()[0]
        elif name is None:
            violations.append(
                Violation(
                    field=str(field),
                    description=f"lone {match.group()!r} at character {match.start()}; "
                    "write it twice for a literal brace",
                )
            )
            continue
        elif name not in index_of or index_of[name] in spans:
            problem = "names no layer" if name not in index_of else "stands twice; once is allowed"
            allowed = ", ".join(sorted(index_of))
            violations.append(
                Violation(
                    field=str(field),
                    description=f"placeholder {quote('{' + name + '}')} {problem}; layers: {allowed}",
                )
            )
            continue
        else:
            word = layers[index_of[name]].text
            start = length + len(piece)
            spans[index_of[name]] = (start, start + len(word))
        parts += [piece, word]
        length += len(piece) + len(word)
    if violations:
        raise InvalidRequest(violations)
    return "".join([*parts, prompt[end:]]), spans


def _search(
    text: Folded, words: Folded, taken: Collection[tuple[int, int]]
) -> tuple[int, int] | None:
    """The first place of `words` that overlaps no taken span."""
    return next(
        (
            found
            for found in text.find(words)
            if all(found[1] <= start or found[0] >= end for start, end in taken)
        ),
        None,
    )
