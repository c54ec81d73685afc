"""What of a request does nothing, or something else than its number says: found before it is drawn.

The schedule cuts every dial into whole steps: this module knows how, and tells callers in words. It draws nothing.
"""

import math
from collections.abc import Iterator, Sequence

from collage.v1 import collage_pb2
from services.common.collage import Sampling, Structure
from services.common.field import Field
from services.generator.structure import acts_within

# A noise dial that acts further from its value than this is warned of.
COARSE_DIAL = 0.1

_COLLAGE = Field("collage")


def coarse_dials(
    layers: Sequence[collage_pb2.LayerPlan], steps: int
) -> Iterator[collage_pb2.Warning]:
    """A warning for each layer in sight whose noise, cut into so few steps, acts far from what was asked.

    A layer is drawn in int(steps * noise) of the steps, as in diffusers' img2img.
    """
    for index, layer in enumerate(layers):
        acting = math.floor(steps * layer.noise) / steps
        if layer.visible_fraction == 0 or layer.noise - acting <= COARSE_DIAL:
            continue
        levels = ", ".join(f"{step / steps:.2g}" for step in range(steps + 1))
        effect = (
            "the layer's pixels stay as they are" if acting == 0 else f"it acts as {acting:.2g}"
        )
        yield collage_pb2.Warning(
            reason="NOISE_DIAL_COARSE",
            field=str(_COLLAGE["layers"][index]["noise"]),
            message=f"is {layer.noise:.2g}: with {steps} steps the dial has only the levels {levels}; "
            f"the next below counts, so {effect}; set one of them, or take more steps",
        )


def idle_structure(
    layers: Sequence[collage_pb2.LayerPlan], *, largest_noise: float, steps: int, max_steps: int
) -> Iterator[collage_pb2.Warning]:
    """A warning for each window of a layer in sight that no whole step lies in.

    Windows are fractions of the steps that a picture takes, which are fewer than `steps` where no dial is at 1.
    """

    def taken(of: int) -> int:
        return math.floor(of * largest_noise)

    for index, layer in enumerate(layers):
        for number, part in enumerate(map(read_structure, layer.structure)):
            is_wanted = layer.visible_fraction > 0 and part.scale > 0 and taken(steps) > 0
            if not is_wanted or acts_within(part, taken(steps)):
                continue
            more = range(steps + 1, max_steps + 1)
            enough = next((each for each in more if acts_within(part, taken(each))), None)
            cure = f"or take {enough} steps" if enough else f"up to {max_steps} steps none does"
            yield collage_pb2.Warning(
                reason="STRUCTURE_NEVER_ACTS",
                field=str(_COLLAGE["layers"][index]["structure"][number]),
                message=f"never acts: with {steps} steps the picture takes {taken(steps)}, and none of these "
                f"lies wholly from {part.start:g} to {part.end:g} of them; widen the window, {cure}",
            )


def unread(
    layers: Sequence[collage_pb2.LayerPlan], negative_prompt: str, sampling: Sampling
) -> Iterator[collage_pb2.Warning]:
    """Warnings for what needs predictions without the prompt, where there are none: negative prompt and emphasis."""
    if negative_prompt:
        yield collage_pb2.Warning(
            reason="NEGATIVE_PROMPT_UNUSED",
            field=str(_COLLAGE["negative_prompt"]),
            message=f"is not read: at guidance scale {sampling.guidance_scale:g} model "
            f"{sampling.model} takes the prompt only",
        )
    for index, layer in enumerate(layers):
        for number, part in enumerate(layer.structure):
            if part.emphasis > 0:
                yield collage_pb2.Warning(
                    reason="STRUCTURE_EMPHASIS_UNUSED",
                    field=str(_COLLAGE["layers"][index]["structure"][number]["emphasis"]),
                    message=f"changes nothing: at guidance scale {sampling.guidance_scale:g} model "
                    f"{sampling.model} has no guidance to strengthen structure by",
                )


def read_structure(message: collage_pb2.Structure) -> Structure:
    """A ControlNet's part in a planned layer; its control picture is the plate's."""
    return Structure(
        kind=message.kind,
        scale=message.scale,
        start=message.start,
        end=message.end,
        emphasis=message.emphasis,
    )
