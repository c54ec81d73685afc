"""Learned words as a resource: found, listed, forgotten; and the remains of learnings that ended early, swept.

Main type: `Words`. What a word is made of stands in `services.common.words`; how one is learned or taken in is the
inversion service's. This module knows no vectors.
"""

import math

from collage.v1 import collage_service_pb2
from services.common import words
from services.common.blobs import BlobStore
from services.common.errors import NotFound, quote

# Keys looked at in one listing: a word has two.
LISTED_KEYS = 300


class Words:
    """The words in a blob store."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def find(self, name: str) -> collage_service_pb2.Word | None:
        """The word of that name, None where there is none."""
        digest = words.digest_in(name)
        return await words.read(self._blobs, digest) if digest else None

    async def get(self, name: str) -> collage_service_pb2.Word:
        """The word of that name.

        Raises:
            NotFound: there is none.
        """
        word = await self.find(name)
        if word is None:
            raise NotFound(f"no word {quote(name)}", reason="WORD_NOT_FOUND")
        return word

    async def delete(self, name: str) -> None:
        """Forgets a word.

        Raises:
            NotFound: there is none.
        """
        digest = words.digest_in((await self.get(name)).name)
        assert digest is not None, "a stored word has a name"
        await words.delete(self._blobs, digest)

    async def learning_jobs(self) -> set[str]:
        """The jobs that have checkpoints."""
        found: set[str] = set()
        after = ""
        while True:
            keys = await self._blobs.list(words.LEARNING, after=after, limit=LISTED_KEYS)
            found.update(job for key in keys if (job := words.job_in_checkpoint_key(key)))
            if len(keys) < LISTED_KEYS:
                return found
            after = keys[-1]

    async def forget_learning(self, job: str, *, before: float = math.inf) -> None:
        """Removes the checkpoints of a job, those that were last written before that time (unix seconds)."""
        for key in await self._blobs.list(f"{words.LEARNING}{job}/"):
            stat = await self._blobs.stat(key)
            if stat is not None and stat.modified_at < before:
                await self._blobs.delete(key)

    async def page(self, size: int, token: str) -> tuple[list[collage_service_pb2.Word], str]:
        """Up to `size` words by name, from behind the word whose digest `token` is; and the next page's token.

        Raises:
            ValueError: the token is none.
        """
        if token and words.digest_in(words.name_of(token)) is None:
            raise ValueError(token)
        found: list[collage_service_pb2.Word] = []
        after = words.card_key(token) if token else ""
        while True:
            keys = await self._blobs.list(words.PREFIX, after=after, limit=LISTED_KEYS)
            for key in keys:
                digest = words.digest_in_card_key(key)
                if digest is None:
                    continue
                # One more than asked for shows that there is another page.
                if len(found) == size:
                    return found, words.digest_in(found[-1].name) or ""
                word = await words.read(self._blobs, digest)
                if word is not None:
                    found.append(word)
            if len(keys) < LISTED_KEYS:
                return found, ""
            after = keys[-1]
