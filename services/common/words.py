"""Where learned words lie in the blob store, and what is kept of each.

A word is `words/<digest>.safetensors`, the vectors as diffusers' `load_textual_inversion` reads them, and
`words/<digest>.json`, its card: the JSON form of the `Word` message. The card is written last and removed first, so a
word with a card is whole. The digest is over what the word was learned or imported from.

What is learned so far of a batch of words is `learning/<job>/<digest>.checkpoint`, of one job and no other: who ends
the job may remove it. This module knows no vectors.
"""

import re

from google.protobuf import json_format

from collage.v1 import collage_service_pb2
from services.common import wire
from services.common.blobs import (
    BlobCorrupt,
    BlobMissing,
    BlobRef,
    BlobStore,
    BlobTooLarge,
    put_blob,
)
from services.common.errors import InvalidRequest

PREFIX = "words/"
MEDIA_TYPE = "application/vnd.safetensors"
# A card holds a text of at most 300 characters and little else.
MAX_CARD_BYTES = 16 * 1024
_CARD_SUFFIX = ".json"
LEARNING = "learning/"
_CHECKPOINT = re.compile(
    r"learning/([A-Za-z0-9_][A-Za-z0-9_-]{0,63})/[0-9a-f]{64}\.checkpoint", re.ASCII
)
_NAME = re.compile(r"words/([0-9a-f]{64})", re.ASCII)


def name_of(digest: str) -> str:
    """The resource name of a word."""
    return f"{PREFIX}{digest}"


def digest_in(name: str) -> str | None:
    """The digest in a resource name; None where it names no word."""
    found = _NAME.fullmatch(name)
    return found[1] if found else None


def card_key(digest: str) -> str:
    """Where the card lies."""
    return f"{PREFIX}{digest}{_CARD_SUFFIX}"


def digest_in_card_key(key: str) -> str | None:
    """The digest of the word whose card lies there; None for any other key."""
    return digest_in(key.removesuffix(_CARD_SUFFIX)) if key.endswith(_CARD_SUFFIX) else None


def vectors_key(digest: str) -> str:
    """Where the vectors lie."""
    return f"{PREFIX}{digest}.safetensors"


def checkpoint_key(job: str, digest: str) -> str:
    """Where a job's unfinished learning of a batch of words is kept; the digest is over theirs.

    Raises:
        ValueError: the job is not 1 to 64 letters, digits, `_` and `-`, the first no `-`.
    """
    key = f"{LEARNING}{job}/{digest}.checkpoint"
    if job_in_checkpoint_key(key) is None:
        raise ValueError(f"job is {job!r}")
    return key


def job_in_checkpoint_key(key: str) -> str | None:
    """The job whose checkpoint lies there; None for any other key."""
    found = _CHECKPOINT.fullmatch(key)
    return found[1] if found else None


async def read(blobs: BlobStore, digest: str) -> collage_service_pb2.Word | None:
    """A word's card, None where the word, or the vectors it refers to, are not stored."""
    try:
        data = await blobs.get(card_key(digest), limit_bytes=MAX_CARD_BYTES)
        card = json_format.Parse(data, collage_service_pb2.Word())
        vectors = wire.parse_blob(card.vectors, "vectors")
    # Whatever is no card is written anew.
    except (
        BlobMissing,
        BlobCorrupt,
        BlobTooLarge,
        ValueError,
        json_format.ParseError,
        InvalidRequest,
    ):
        return None
    return card if await blobs.stat(vectors.key) else None


async def write(
    blobs: BlobStore, digest: str, vectors: bytes, card: collage_service_pb2.Word
) -> collage_service_pb2.Word:
    """Stores a word; answers its card, complete: the stored one where two processes made the same word at once.

    Args:
        blobs: the store.
        digest: of what the word was made from.
        vectors: the safetensors file.
        card: without `name` and `vectors`.
    """
    ref: BlobRef = await put_blob(blobs, vectors, media_type=MEDIA_TYPE)
    whole = collage_service_pb2.Word()
    whole.CopyFrom(card)
    whole.name = name_of(digest)
    whole.vectors.CopyFrom(wire.render_blob(ref))
    data = json_format.MessageToJson(whole, preserving_proto_field_name=True).encode()
    if not await blobs.create(card_key(digest), data, media_type="application/json"):
        # A job may have drawn with the first one's vectors already, whose last bits may differ.
        if (first := await read(blobs, digest)) is not None:
            return first
        await blobs.put(card_key(digest), data, media_type="application/json")
    await blobs.put(vectors_key(digest), vectors, media_type=MEDIA_TYPE)
    return whole


async def delete(blobs: BlobStore, digest: str) -> None:
    """Forgets a word. Its vectors stay readable by their content's digest for jobs that are under way."""
    await blobs.delete(card_key(digest))
    await blobs.delete(vectors_key(digest))
