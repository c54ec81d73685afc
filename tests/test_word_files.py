"""The files of learned words: what is taken in from elsewhere, and what is refused."""

import io

import pytest
import torch
from safetensors.torch import load, save

from services.common.limits import MAX_VECTORS
from services.diffusion.word import InvalidWord, Word


def vectors(count, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def _pickled() -> bytes:
    file = io.BytesIO()
    torch.save({"x": vectors(1)}, file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_file_holds_one_tensor_of_any_name_for_one_encoder(dtype):
    data = vectors(2).to(dtype)
    assert torch.equal(Word.from_bytes(save({"x": data}), (32,)).vectors[0], data.float())
    single = Word.from_bytes(save({"x": data[0]}), (32,))
    assert (len(single), single.vectors[0].shape) == (1, (1, 32))


@pytest.mark.parametrize("widths", [(32,), (32, 48)])
def test_a_word_written_is_read_again_bit_for_bit(widths):
    made = Word(vectors=tuple(vectors(3, width) for width in widths))
    data = made.to_bytes("0123456789abcdef" * 4)
    assert data == made.to_bytes("01234567" + "0" * 56), "equal vectors of one token, equal bytes"
    assert sorted(load(data)) == (["<01234567>"] if len(widths) == 1 else ["clip_g", "clip_l"])
    assert all(map(torch.equal, Word.from_bytes(data, widths).vectors, made.vectors))


def test_a_file_holds_both_encoders_for_two():
    """As A1111 and ComfyUI have them, and as diffusers' script that trains them with a LoRA."""
    for first, second in (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")):
        data = save({second: vectors(2, 48), first: vectors(2, 32)})
        word = Word.from_bytes(data, (32, 48))
        assert [each.shape for each in word.vectors] == [(2, 32), (2, 48)]


@pytest.mark.parametrize(
    ("data", "widths", "told"),
    [
        (b"", (32,), "is empty"),
        (b"hello", (32,), "is no safetensors file"),
        (b"\x80\x02}q\x00.", (32,), "is a pickled file"),
        (_pickled(), (32,), "is a pickled file"),
        (save({"x": vectors(1)})[:-4], (32,), "is cut short: holds 196 of 200 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", (32,), "is a Git LFS pointer"),
        (save({}), (32,), "holds no tensor; this model takes one tensor"),
        (save({"x": vectors(1), "y": vectors(1)}), (32,), "holds x, y; this model takes one"),
        (save({"x": vectors(1)}), (48,), "x as float32 of shape 1 x 32; .* vectors x 48"),
        (save({"x": torch.zeros(2, 1, 32)}), (32,), "of shape 2 x 1 x 32"),
        (save({"x": torch.tensor(1.0)}), (32,), "of shape a single number"),
        (save({"x": torch.ones(1, 32, dtype=torch.int32)}), (32,), "x as int32"),
        (save({"x": vectors(0)}), (32,), "holds 0 vectors; allowed: 1 to 8"),
        (save({"x": vectors(MAX_VECTORS + 1)}), (32,), "holds 9 vectors; allowed: 1 to 8"),
        (save({"x": vectors(1) / 0}), (32,), "not finite"),
        (save({"x": vectors(1) * 1e9}), (32,), "beyond 10000"),
        (save({"clip_l": vectors(1), "clip_g": vectors(1)}), (32,), "holds clip_g, clip_l; .* one"),
        (save({"x": vectors(1)}), (32, 48), "takes the tensors clip_l and clip_g"),
        (
            save({"clip_l": vectors(1), "clip_g": vectors(2, 48)}),
            (32, 48),
            "another number of vectors",
        ),
    ],
)
def test_files_that_are_no_word_say_why(data, widths, told):
    with pytest.raises(InvalidWord, match=told):
        Word.from_bytes(data, widths)
