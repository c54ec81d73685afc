"""Conditioning: the prompts as the U-Net reads them, and which text positions speak of which layer.

Main types: `LayerControl`, how one layer steers, and `Conditioning`, a job's prompts encoded. Layers come with
character spans; the tokenizer's own offsets turn them into positions, so words need not be searched for.

A text encoder mixes what stands in a text: in one prompt, every token after a learned word would speak of that word's
layer, other layers' words first of all. So the prompt is encoded without learned words, and the words of a layer that
has one, the learned one before them, are encoded as a text of their own, as they were learned; their states then stand
in the prompt's place for them (noun phrases alone: Feng et al. 2022, Structured Diffusion Guidance).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch

from services.common.collage import Adapter, Dials, Structure
from services.common.errors import InvalidRequest
from services.diffusion.text import Text, TextStates
from services.diffusion.tokens import TextTooLong, Tokens
from services.diffusion.word import Word
from services.generator.attention import STEERING
from services.generator.call import Steering
from services.generator.stages import Stages


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerControl:
    """How one layer steers: its words, half-open in characters of the prompt, its dials, its own seed.

    structures: its ControlNets, each kind once; their control pictures are the plate's. word: the learned word that
    stands before its words.
    """

    text_start: int
    text_end: int
    dials: Dials
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

    def steering(self, visible_Lhw: torch.Tensor) -> Steering | None:
        """How the layers, seen where these masks say, steer the prompt's rows; None where none does."""
        return Steering.of(
            self.positions,
            [{dial: getattr(layer.dials, dial) for dial in STEERING} for layer in self.layers],
            visible_Lhw,
            window=self.prompt.hidden_BTD.shape[1],
        )


def prepare(
    stages: Stages,
    *,
    prompt: str,
    negative_prompt: str,
    guidance_scale: float,
    layers: Sequence[LayerControl],
    adapters: Sequence[Adapter] = (),
) -> Conditioning:
    """Encodes the prompts, with these adapters on; the negative one is not read where `reads_negative` says so.

    Raises:
        InvalidRequest: a prompt has more tokens than the model reads, learned words' vectors among them; says how many.
    """
    words = {index: layer.word for index, layer in enumerate(layers) if layer.word is not None}
    places = [(layers[index].text_start, len(word)) for index, word in words.items()]
    tokens = _tokenize(stages, prompt, places, field="prompt")
    learned = dict(zip(words, tokens.words, strict=True))
    positions = tuple(
        (*learned.get(index, ()), *tokens.of_characters(layer.text_start, layer.text_end))
        for index, layer in enumerate(layers)
    )
    plain = stages.facts.tokenize(prompt) if words else tokens
    encoded = stages.encode_text([Text(ids_ET=plain.ids_ET)], adapters)
    if words:
        encoded = _with_words(stages, encoded, tokens, positions, words, adapters)
    negative = None
    if stages.facts.reads_negative(guidance_scale):
        ids_ET = _tokenize(stages, negative_prompt, field="negative_prompt").ids_ET
        is_zero = stages.facts.is_empty_zero and not negative_prompt
        negative = (
            encoded.zeros() if is_zero else stages.encode_text([Text(ids_ET=ids_ET)], adapters)
        )
    return Conditioning(
        prompt=encoded,
        negative=negative,
        guidance_scale=guidance_scale,
        layers=tuple(layers),
        positions=positions,
    )


def _with_words(
    stages: Stages,
    plain: TextStates,
    tokens: Tokens,
    positions: Sequence[Sequence[int]],
    words: Mapping[int, Word],
    adapters: Sequence[Adapter],
) -> TextStates:
    """The prompt's states with learned words, from those of the prompt without.

    A position that layers share stays as the prompt has it, and so does what SDXL pools: neither is one layer's.

    Args:
        stages: who encodes.
        plain: one row, of the prompt without words.
        tokens: of the prompt with places for them.
        positions: of each layer in the prompt with words, the learned one's first.
        words: by layer.
        adapters: the ones that are on.
    """
    blank = stages.facts.tokenize("")
    phrases = []
    for index, word in words.items():
        ids_ET = tuple(
            (begin, *(ids_T[position] for position in positions[index]), *rest)[: len(ids_T)]
            for ids_T, (begin, *rest) in zip(tokens.ids_ET, blank.ids_ET, strict=True)
        )
        phrases.append(Text(ids_ET=ids_ET, word=word, positions=tuple(range(1, 1 + len(word)))))
    states_WTD = stages.encode_text(phrases, adapters).hidden_BTD
    # Each position after a word's vectors is one of the prompt without them; the padding's end gives way.
    learned = set(chain(*tokens.words))
    window = plain.hidden_BTD.shape[1]
    vectors = accumulate((position in learned for position in range(window - 1)), initial=0)
    hidden_1TD = plain.hidden_BTD[:, [place - count for place, count in enumerate(vectors)]]
    sharing = Counter(chain(*positions))
    row, source, target = zip(
        *(
            (row, source, position)
            for row, index in enumerate(words)
            for source, position in enumerate(positions[index], start=1)
            if sharing[position] == 1
        ),
        strict=True,
    )
    hidden_1TD[0, list(target)] = states_WTD[list(row), list(source)]
    return replace(plain, hidden_BTD=hidden_1TD)


def _tokenize(
    stages: Stages, text: str, words: Sequence[tuple[int, int]] = (), *, field: str
) -> Tokens:
    try:
        return stages.facts.tokenize(text, words)
    except TextTooLong as error:
        raise InvalidRequest.of(field, str(error), reason="PROMPT_TOO_LONG") from error
