"""Conditioning: the prompts as the U-Net reads them, and which text positions speak of which layer.

Main types: `LayerControl`, how one layer steers, and `Conditioning`, a job's prompts encoded. Layers come with
character spans; the tokenizer's own offsets turn them into positions, so words need not be searched for.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.collage import Structure
from services.common.errors import InvalidRequest
from services.generator.models import TextTooLong, Tokens
from services.generator.stages import Stages, Text, TextStates
from services.generator.word import Word


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerControl:
    """How one layer steers: its words, half-open in characters of the prompt, its dials in [0, 1], its own seed.

    structures: its ControlNets, each kind once; their control pictures are the plate's. word: the learned word that
    stands before its words.
    """

    text_start: int
    text_end: int
    attract: float
    repel: float
    seed: int | None = None
    structures: tuple[Structure, ...] = ()
    word: Word | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """Encoded prompts.

    prompt, negative: one row each; negative None means no guidance. positions: for each layer the text
    positions of its words, the learned one first; empty for a layer without words.
    """

    prompt: TextStates
    negative: TextStates | None
    guidance_scale: float
    layers: tuple[LayerControl, ...]
    positions: tuple[tuple[int, ...], ...]


def prepare(
    stages: Stages,
    *,
    prompt: str,
    negative_prompt: str,
    guidance_scale: float,
    layers: Sequence[LayerControl],
) -> Conditioning:
    """Encodes the prompts; the negative one is not read where `reads_negative` says so.

    Raises:
        InvalidRequest: a prompt has more tokens than the model reads, learned words' vectors among them; says how many.
    """
    words = {index: layer.word for index, layer in enumerate(layers) if layer.word is not None}
    places = [(layers[index].text_start, len(word)) for index, word in words.items()]
    tokens = _tokenize(stages, prompt, places, field="prompt")
    learned = dict(zip(words, tokens.words, strict=True))
    encoded = stages.encode_text(
        [
            Text(
                ids_ET=tokens.ids_ET,
                word=Word.joined(words.values()) if words else None,
                positions=tuple(itertools.chain(*tokens.words)),
            )
        ]
    )
    negative = None
    if stages.facts.reads_negative(guidance_scale):
        ids_ET = _tokenize(stages, negative_prompt, field="negative_prompt").ids_ET
        is_zero = stages.facts.is_empty_zero and not negative_prompt
        negative = encoded.zeros() if is_zero else stages.encode_text([Text(ids_ET=ids_ET)])
    return Conditioning(
        prompt=encoded,
        negative=negative,
        guidance_scale=guidance_scale,
        layers=tuple(layers),
        positions=tuple(
            (*learned.get(index, ()), *tokens.of_characters(layer.text_start, layer.text_end))
            for index, layer in enumerate(layers)
        ),
    )


def _tokenize(
    stages: Stages, text: str, words: Sequence[tuple[int, int]] = (), *, field: str
) -> Tokens:
    try:
        return stages.facts.tokenize(text, words)
    except TextTooLong as error:
        raise InvalidRequest.of(field, str(error), reason="PROMPT_TOO_LONG") from error
