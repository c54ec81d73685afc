"""The models that are served, asked of the generator and remembered for a few seconds.

Main type: `Models`. Whatever a request leaves unset is settled by what is answered here, once, when it comes in.
"""

import asyncio
import time
from collections.abc import Sequence

from collage.v1 import (
    collage_pb2,
    collage_service_pb2,
    compositor_service_pb2,
    compositor_service_pb2_grpc,
    generator_service_pb2,
    generator_service_pb2_grpc,
)
from gateway.stages import ASK_TIMEOUT_S, asked
from services.common.errors import InvalidRequest, quote
from services.common.field import Field
from services.common.rpc import bounded, outgoing

# Models change only when a generator restarts.
FRESH_S = 5.0


class Models:
    """The models of a generator, and what the compositor draws for them."""

    def __init__(
        self,
        generator: generator_service_pb2_grpc.GeneratorServiceStub,
        compositor: compositor_service_pb2_grpc.CompositorServiceStub,
    ) -> None:
        self._generator = generator
        self._compositor = compositor
        self._models: Sequence[collage_service_pb2.Model] = ()
        self._asked = -FRESH_S

    async def all(self) -> Sequence[collage_service_pb2.Model]:
        """Every model, the default first."""
        if time.monotonic() - self._asked >= FRESH_S:
            answer = await asked(
                self._generator.DescribeModels(
                    generator_service_pb2.DescribeModelsRequest(),
                    timeout=bounded(ASK_TIMEOUT_S),
                    metadata=outgoing(),
                )
            )
            self._models = answer.models
            self._asked = time.monotonic()
        return self._models

    async def described(
        self,
    ) -> tuple[Sequence[collage_service_pb2.Model], Sequence[collage_pb2.CutOutModel]]:
        """Every model with the control kinds that the compositor draws, and what cuts objects out.

        Nothing but a list of models needs these.
        """
        models, drawn = await asyncio.gather(
            self.all(),
            asked(
                self._compositor.DescribeDetectors(
                    compositor_service_pb2.DescribeDetectorsRequest(),
                    timeout=bounded(ASK_TIMEOUT_S),
                    metadata=outgoing(),
                )
            ),
        )
        return [_with_drawn(model, drawn.kinds) for model in models], drawn.cut_out_models

    async def named(self, name: str, field: Field) -> collage_service_pb2.Model:
        """The model of this name, the default for an empty one.

        Raises:
            InvalidRequest: naming the known models.
        """
        models = await self.all()
        for model in models:
            if name in ("", model.name):
                return model
        known = ", ".join(model.name for model in models)
        raise InvalidRequest.of(
            field, f"is {quote(name)}; allowed: {known}", reason="UNKNOWN_MODEL"
        )


def _with_drawn(
    model: collage_service_pb2.Model, kinds: Sequence[str]
) -> collage_service_pb2.Model:
    """A copy that says which of its control kinds are drawn."""
    told = collage_service_pb2.Model()
    told.CopyFrom(model)
    told.drawn_control_kinds.extend(kind for kind in model.control_kinds if kind in kinds)
    return told
