"""Binding words to layers: which characters of the scene prompt speak of which layer.

Main type: `BoundPrompt`. Two ways, in this order: `{name}` placeholders, then a search for the layer's text as whole
words, each occurrence used once. What is not found is appended. Two layers of the same text stay two spans. This
module knows no tokenizer: spans are in characters, and the generator maps them to tokens.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.common.collage import Layer
from services.common.errors import InvalidRequest, Violation, quote
from services.common.field import Field

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundPrompt:
    """The prompt as the text encoder gets it.

    `spans[i]` is the half-open character range of layer i's words in `text`, (0, 0) for a hidden layer.
    `not_found` holds the indices of layers whose text had to be appended.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
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
    for index in sorted(searched, key=lambda index: -len(layers[index].text)):
        if found := _search(text, layers[index].text, spans.values()):
            spans[index] = found
    not_found = []
    for index in searched:
        if index not in spans:
            not_found.append(index)
            text = f"{text}, " if text else ""
            spans[index] = (len(text), len(text) + len(layers[index].text))
            text += layers[index].text
    visible = {index for index, layer in enumerate(layers) if layer.visible}
    return BoundPrompt(
        text=text,
        spans=tuple(spans[index] if index in visible else (0, 0) for index in range(len(layers))),
        # An empty prompt asks for the layers' texts; that they were not found in it is no news.
        not_found=tuple(not_found) if prompt.strip() else (),
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


def _search(text: str, words: str, taken: Collection[tuple[int, int]]) -> tuple[int, int] | None:
    """The first whole-word occurrence of `words`, whatever its case, that overlaps no taken span."""
    for match in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE):
        if all(match.end() <= start or match.start() >= end for start, end in taken):
            return match.span()
    return None
