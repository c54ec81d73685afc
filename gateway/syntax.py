"""What other tools would read as instructions, and this one reads as words.

Main function: `foreign`. Nothing of a text is changed: whoever wrote `(cat:1.3)` hears that it is taken as it stands,
and what does here what they meant. This module knows no collage.
"""

import re
from collections.abc import Iterator

from services.common.errors import quote

# Texts shown of one kind.
_SHOWN = 3
_WEIGHT = "a layer's attract and repel say how much its words count"
# Form, what it is elsewhere, what does it here.
_FORMS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), meaning, instead)
    for pattern, meaning, instead in (
        (
            r"<(?:lora|lyco|hypernet):[^<>]{1,200}>",
            "an adapter (LoRA)",
            "name it in sampling.adapters (--adapter NAME=WEIGHT)",
        ),
        (
            r"\bembedding:[\w./\\-]+(?::-?[\d.]+)?|<(?!lora:|lyco:|hypernet:)[\w-]{1,100}>",
            "a learned word (textual inversion)",
            "import it (collage words import) and name it in a layer's appearance.word",
        ),
        (
            r"\([^()\[\]]{1,300}:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\({2,}[^()]{1,300}\){2,}"
            r"|\[+[^\[\]|:]{1,300}\]+|(?<=[\w)])(?:\+{1,9}|-{2,9})(?=[\s,.;)]|$)",
            "a weight of words",
            _WEIGHT,
        ),
        (
            r"\[[^\[\]|:]{0,300}:[^\[\]|]{0,300}\]|\[[^\[\]|]{0,300}\|[^\[\]]{0,300}\]"
            r"|\.(?:swap|blend|and)\(",
            "words that change from step to step, or a mixture of prompts",
            "a job has one prompt for all its steps; draw one, then redo a layer with other words",
        ),
        (
            r"(?<![\w-])(?:BREAK|AND)(?![\w-])",
            "the end of a part of the prompt",
            "the prompt is one text; each layer's words act where the layer stands",
        ),
        (
            r"(?<!\S)--(?:ar|v|no|seed|style|stylize|chaos|iw|niji|q)\b",
            "an option of a command",
            "size, seed and negative_prompt are fields of their own",
        ),
        (r"\\[()\[\]]", "a bracket that is no weight", "leave out the backslash"),
    )
)


def foreign(text: str) -> Iterator[str]:
    """For each kind of syntax that a text holds, what stands there, that it is read as words, and what to use."""
    # What one form holds is no other's.
    for pattern, meaning, instead in _FORMS:
        found = list(dict.fromkeys(match.group() for match in pattern.finditer(text)))
        if not found:
            continue
        text = pattern.sub(" ", text)
        shown = ", ".join(map(quote, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
        yield f"{shown}: read as plain words; elsewhere {meaning}, here: {instead}"
