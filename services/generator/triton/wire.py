"""How what the seam carries crosses to a model server and back.

Main type: `Packed`, a job's `Given` as bytes under their digest, by which each row of a call names its own. Latents,
timesteps and gains are plain tensors of Triton's; all else is safetensors, so nothing is ever unpickled. This module
knows neither Triton nor a network.
Suffixes: B rows of a call, K bytes of a key, T text positions, D text width, P width of the pooled text.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from services.common.collage import Adapter
from services.diffusion.text import Text, TextStates
from services.diffusion.word import Word
from services.generator.call import ControlPicture, Given, Hint, Rows, Steering

STAGES = ("encode_text", "encode_image", "predict", "decode_image")
# A digest, and a byte that is 1 where other rows than the row before's begin.
KEY_BYTES = 33
# What a stage says that cannot do what it was asked; what follows is JSON.
FAILED = "collage: "
# Of its reasons: it does not hold what is named, and may be given it; it is a stage of another model.
NOT_HELD, OTHER_MODEL = "NOT_HELD", "OTHER_MODEL"
_HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """Something that does not change from step to step, as bytes. pictures: those that it names, by digest."""

    digest: bytes
    data: bytes
    pictures: Mapping[bytes, bytes]


def digest(data: bytes) -> bytes:
    """sha256."""
    return hashlib.sha256(data).digest()


def pack(tensors: Mapping[str, torch.Tensor], head: Mapping[str, Any]) -> bytes:
    """Tensors and plain values as bytes."""
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A file of no tensor has no head.
    data: bytes = save(named or {"none": torch.zeros(0)}, {_HEAD: json.dumps(head, sort_keys=True)})
    return data


def unpack(data: bytes) -> tuple[dict[str, torch.Tensor], Any]:
    """What `pack` was given.

    Raises:
        ValueError: it is something else.
    """
    try:
        return load(data), head_of(data)
    except SafetensorError as error:
        raise ValueError(f"no packed tensors: {error}") from error


def head_of(data: bytes) -> Any:
    """The plain values alone that `pack` was given. Raises `ValueError`."""
    try:
        length = int.from_bytes(data[:8], "little")
        return json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_HEAD])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no packed tensors: {error}") from error


def pack_picture(picture: ControlPicture) -> bytes:
    """A control picture as bytes."""
    return pack({"rgb": picture.rgb_3HW}, {"kind": picture.kind})


def is_picture(data: bytes) -> bool:
    """Whether it is a control picture, packed. Raises `ValueError`."""
    return "kind" in head_of(data)


def unpack_picture(data: bytes) -> ControlPicture:
    """The control picture of these bytes. Raises `ValueError`."""
    tensors, head = unpack(data)
    return ControlPicture(kind=head["kind"], rgb_3HW=tensors["rgb"])


def pack_given(given: Given, picture_data: Callable[[ControlPicture], bytes]) -> Packed:
    """What stays the same for some rows, however many they are.

    Args:
        given: theirs.
        picture_data: `pack_picture`, or what remembers its answers.
    """
    tensors = {"hidden": given.text.hidden_BTD}
    if given.text.pooled_BP is not None:
        tensors["pooled"] = given.text.pooled_BP
    if given.steering is not None:
        tensors["visible"], tensors["speaks"] = (
            given.steering.visible_Lhw,
            given.steering.speaks_LT,
        )
        tensors |= {f"dial {name}": dial_L for name, dial_L in given.steering.dials.items()}
    pictures, hints = {}, []
    for index, hint in enumerate(given.hints):
        data = picture_data(hint.picture)
        key = digest(data)
        pictures[key] = data
        hints.append(key.hex())
        tensors[f"scale {index}"] = hint.scale_hw
    head = {
        "hints": hints,
        "dials": None if given.steering is None else list(given.steering.dials),
        "guidance_scale": given.guidance_scale,
        "adapters": [[adapter.name, adapter.weight] for adapter in given.adapters],
    }
    data = pack(tensors, head)
    return Packed(digest=digest(data), data=data, pictures=pictures)


def pictures_of(data: bytes) -> list[bytes]:
    """Digests of the control pictures that a packed `Given` names. Raises `ValueError`."""
    return [bytes.fromhex(each) for each in head_of(data)["hints"]]


def unpack_given(data: bytes, pictures: Mapping[bytes, ControlPicture]) -> Given:
    """One row's `Given`.

    Args:
        data: packed.
        pictures: those it names, by digest.

    Raises:
        ValueError: it is none.
    """
    tensors, head = unpack(data)
    steering = None
    if head["dials"] is not None:
        steering = Steering(
            visible_Lhw=tensors["visible"],
            speaks_LT=tensors["speaks"],
            dials={name: tensors[f"dial {name}"] for name in head["dials"]},
        )
    return Given(
        count=1,
        text=TextStates(hidden_BTD=tensors["hidden"], pooled_BP=tensors.get("pooled")),
        steering=steering,
        hints=tuple(
            Hint(picture=pictures[bytes.fromhex(each)], scale_hw=tensors[f"scale {index}"])
            for index, each in enumerate(head["hints"])
        ),
        guidance_scale=head["guidance_scale"],
        adapters=tuple(Adapter(name=name, weight=weight) for name, weight in head["adapters"]),
    )


def pack_items(items: Sequence[bytes], rows: int) -> torch.Tensor:
    """Packed things, which come along with a call of so many rows, as that many rows of bytes."""
    lengths = [len(item).to_bytes(8, "little") for item in items]
    joined = b"".join([len(items).to_bytes(8, "little"), *lengths, *items])
    padded = joined + bytes(-len(joined) % rows)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).reshape(rows, -1)


def unpack_items(bytes_BK: torch.Tensor) -> list[bytes]:
    """The packed things of `pack_items`. Raises `ValueError`."""
    joined = bytes_BK.numpy().tobytes()
    count = int.from_bytes(joined[:8], "little")
    place = 8 * (count + 1)
    if place > len(joined):
        raise ValueError(f"{len(joined)} bytes hold no {count} things")
    items = []
    for index in range(count):
        length = int.from_bytes(joined[8 * (index + 1) : 8 * (index + 2)], "little")
        items.append(joined[place : place + length])
        place += length
    return items


def keys_of(rows: Sequence[Rows], digests: Sequence[bytes]) -> torch.Tensor:
    """The key of each row, uint8 [B, K]; `digests` of what each of `rows` is given."""
    keys = b"".join(
        own + bytes([index == 0])
        for each, own in zip(rows, digests, strict=True)
        for index in range(each.given.count)
    )
    return torch.frombuffer(bytearray(keys), dtype=torch.uint8).reshape(-1, KEY_BYTES)


def runs_of(key_BK: torch.Tensor) -> list[tuple[bytes, int]]:
    """For rows that belong together, one after the other: the digest of what they are given, and how many they are."""
    found: list[tuple[bytes, int]] = []
    for key in key_BK.numpy():
        own = key[:-1].tobytes()
        if key[-1] or not found or found[-1][0] != own:
            found.append((own, 1))
        else:
            found[-1] = own, found[-1][1] + 1
    return found


def pack_texts(texts: Sequence[Text], adapters: Sequence[Adapter]) -> bytes:
    """Texts on their way to the encoders, and the adapters that are on."""
    tensors: dict[str, torch.Tensor] = {}
    for index, text in enumerate(texts):
        for number, vectors_VD in enumerate(text.word.vectors if text.word else ()):
            tensors[f"word {index} {number}"] = vectors_VD
    head = {
        "texts": [
            {
                "ids": text.ids_ET,
                "positions": text.positions,
                "words": len(text.word.vectors) if text.word else 0,
            }
            for text in texts
        ],
        "adapters": [[adapter.name, adapter.weight] for adapter in adapters],
    }
    return pack(tensors, head)


def unpack_texts(data: bytes) -> tuple[list[Text], tuple[Adapter, ...]]:
    """What `pack_texts` was given. Raises `ValueError`."""
    tensors, head = unpack(data)
    texts = []
    for index, each in enumerate(head["texts"]):
        vectors = tuple(tensors[f"word {index} {number}"] for number in range(each["words"]))
        texts.append(
            Text(
                ids_ET=tuple(map(tuple, each["ids"])),
                word=Word(vectors=vectors) if vectors else None,
                positions=tuple(each["positions"]),
            )
        )
    return texts, tuple(Adapter(name=name, weight=weight) for name, weight in head["adapters"])


def failure(reason: str, message: str, **more: Any) -> str:
    """What a stage says that fails."""
    return FAILED + json.dumps({"reason": reason, "message": message, **more})


def failure_of(message: str) -> dict[str, Any] | None:
    """What a stage said; None where the server said it itself."""
    _, found, told = message.partition(FAILED)
    if not found:
        return None
    try:
        parsed, _ = json.JSONDecoder().raw_decode(told)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
