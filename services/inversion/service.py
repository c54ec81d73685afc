"""`InversionService`: says, of every request, that learning words comes later.

The contract and the seam are in place; the training is not, so nothing pretends to learn.
"""

from collections.abc import AsyncIterator
from typing import Any

from collage.v1 import inversion_service_pb2, inversion_service_pb2_grpc
from services.common.errors import NotSupported


class InversionServicer(inversion_service_pb2_grpc.InversionServiceServicer):
    """Refuses with UNIMPLEMENTED and the reason."""

    async def LearnWords(
        self, request: inversion_service_pb2.LearnWordsRequest, context: Any
    ) -> AsyncIterator[inversion_service_pb2.LearnWordsResponse]:
        """Refuses; no word is learned."""
        raise NotSupported(
            "this server cannot learn words yet; leave `appearance` unset",
            reason="WORDS_NOT_SUPPORTED",
            metadata={"layers": ", ".join(subject.layer for subject in request.subjects)},
        )
        yield  # the signature of a stream
