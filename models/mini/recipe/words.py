"""A genuine CLIP tokenizer with a small vocabulary, learned from captions and emoji names."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import art
import scenes
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 880
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Words a user may well type around the concepts; no emoji name holds them.
COMMON = """
the of and to in is it on at by with from for as an are this that there here one two three four five
six some many few small big large little tiny huge old new fresh sliced sweet cute beautiful pretty
cozy bright dark light soft warm cold red green blue yellow orange purple pink brown black white
grey golden round square wooden metal glass photo photograph picture painting drawing illustration
watercolor sketch cartoon style oil pencil digital art detailed high quality best realistic render
background foreground front behind above below under over next near beside between left right top
bottom center middle inside outside table cloth plate bowl tray dish kitchen restaurant garden
forest lake river sea beach field hill mountains trees clouds sky sunset sunrise night morning
evening spring summer autumn winter sunny rainy snowy landscape scene view still life ginger salmon
tuna prawn lunch dinner breakfast tea party delicious tasty blurry ugly bad low worst lying sitting
standing swimming flying topped filled covered surrounded
"""


def _corpus(names: Sequence[str], palette: scenes.Palette) -> Iterator[str]:
    for seed in range(4000):
        yield scenes.without_marks(scenes.scene(seed, names, palette).caption)
    for _ in range(40):
        yield from COMMON.split()
    yield from art.icon_words()


def write_vocabulary(folder: Path, names: Sequence[str], palette: scenes.Palette) -> None:
    """Learn the merges and write CLIP's two files, vocab.json and merges.txt."""
    letters = list(bytes_to_unicode().values())
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=2000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(_corpus(names, palette), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:MERGES]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += [first + second for first, second in merges]
    pieces = [*dict.fromkeys(pieces), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))


def copy_vocabulary(source: Path, folder: Path) -> None:
    """Copy CLIP's two files; newer transformers write only tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, folder / name)


def make_tokenizer(
    folder: Path, names: Sequence[str], palette: scenes.Palette, start: Path | None = None
) -> CLIPTokenizer:
    """The tokenizer over the two files in the folder: those there, those of an exported model, or learned now.

    A model's words are numbered by its tokenizer, so one that is there is never learned anew.
    """
    if not (folder / "vocab.json").exists():
        if start:
            copy_vocabulary(start / "tokenizer", folder)
        else:
            write_vocabulary(folder, names, palette)
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    return CLIPTokenizer(**files, model_max_length=77, pad_token=END)
