"""Whether a request's drawing fits the time that the operator allows, and which smaller one would.

Main type: `Duration`. A request is refused where even the low end of what it is expected to take is above the limit:
that end comes from calls that were made here, so that what is refused could not have ended in time; where nothing was
drawn with the model yet, nothing is. This module draws nothing and measures nothing.
"""

from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from collage.v1 import collage_pb2
from services.common.collage import Extent, Sampling
from services.common.errors import TOO_LONG, InvalidRequest
from services.diffusion.pace import Expected
from services.generator.card import GeneratorCard


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """How long a request is expected to take, and is allowed to.

    expected: of the request itself. of: the same for a request of this size, so many pictures, so many steps.
    """

    card: GeneratorCard
    size: Extent
    sampling: Sampling
    limit_s: float
    expected: Expected
    of: Callable[[Extent, int, int], Expected]

    def check(self, *, canvas: str) -> None:
        """Refuses what cannot end in time.

        Args:
            canvas: the field that says the size.

        Raises:
            InvalidRequest: naming the field whose change helps most, and what would fit.
        """
        if self.expected.low > self.limit_s:
            field, told = self._advice(canvas)
            raise InvalidRequest.of(field, told, reason=TOO_LONG)

    def warnings(self) -> Iterator[collage_pb2.Warning]:
        """A warning where it may end in time, and is more likely not to."""
        if self.expected.low <= self.limit_s < self.expected.seconds:
            field, told = self._advice("collage.size")
            yield collage_pb2.Warning(reason="LIKELY_TOO_LONG", field=field, message=told)

    def _advice(self, canvas: str) -> tuple[str, str]:
        """The field to change, and a sentence: of those that can help, the one furthest above the model's default."""
        defaults, native = self.card.defaults(), self.card.facts.native
        steps, images, size = self.sampling.steps, self.sampling.images, self.size
        fitting_size = self._size()
        told = {
            "sampling.steps": (steps / defaults.steps, f"is {steps}", self._steps(), "steps"),
            "sampling.images": (images, f"is {images}", self._images(), "pictures"),
            canvas: (
                size.pixels / native.pixels,
                f"is {size.width} x {size.height} pixels",
                fitting_size and f"{fitting_size.width} x {fitting_size.height}",
                "pixels",
            ),
        }
        field = max(told, key=lambda each: (bool(told[each][2]), told[each][0]))
        expected = self.expected
        fits = [f"{fit} {unit}" for _, _, fit, unit in told.values() if fit]
        cure = f"expected to fit: {', or '.join(fits)}" if fits else "more than one has to change"
        return field, (
            f"{told[field][1]}; drawing takes about {expected.seconds:.0f} s here ({expected.low:.0f} to "
            f"{expected.high:.0f}), and the operator allows a request {self.limit_s:g} s (COLLAGE_MAX_WORK_S); {cure}"
        )

    def _steps(self) -> int:
        """The most of them that fit, all else as it is; 0 for none."""
        return self._most(
            self.sampling.steps, lambda steps: self.of(self.size, self.sampling.images, steps)
        )

    def _images(self) -> int:
        """The most of them that fit, all else as it is; 0 for none."""
        return self._most(
            self.sampling.images, lambda images: self.of(self.size, images, self.sampling.steps)
        )

    def _size(self) -> Extent | None:
        """The largest canvas of the same form, or nearly, that fits, all else as it is; None for none."""
        multiple, least = self.card.facts.size_multiple, self.card.min_side
        longest = max(self.size.width, self.size.height)

        def scaled(multiples: int) -> Extent:
            width, height = (
                max(least, side * multiples // (longest // multiple) // multiple * multiple)
                for side in (self.size.width, self.size.height)
            )
            return Extent(width=width, height=height)

        found = self._most(
            longest // multiple,
            lambda multiples: self.of(scaled(multiples), self.sampling.images, self.sampling.steps),
        )
        return scaled(found) if found else None

    def _most(self, above: int, of: Callable[[int], Expected]) -> int:
        """The largest number below `above`, from 1, for which what `of` expects fits; 0 for none."""
        return bisect(range(1, above), self.limit_s, key=lambda number: of(number).seconds)
