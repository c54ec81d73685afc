"""How long calls of the networks take here, from those that were made: `Pace`.

A call's time is remembered by what decides it, and where that very call was never made it is told from the nearest one,
with a wider spread. It knows no torch and no jobs.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

# Weight of the newest call in the running means: steady, and yet the first one, which pays for allocation, counts for
# less than a tenth after five more.
NEWEST_WEIGHT = 0.4
# Kinds of calls that are remembered, those made last: canvases are the callers' choice.
MAX_REMEMBERED = 1024
# Part of a U-Net's time that each ControlNet beside it takes: a copy of its first half.
CONTROLNET_SHARE = 0.5
# How far the truth may be from what another canvas tells: attention grows with the square of the cells, small calls
# hardly with anything.
SCALED_SPREAD = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What decides how long a call takes.

    work: encoding a job's prompts and composite, a U-Net's step, or decoding pictures. cells: of the latent grid. rows:
    of the U-Net, or pictures. controlnets: beside the U-Net.
    """

    model: str
    work: Literal["encode", "step", "decode"]
    cells: int
    rows: int = 1
    controlnets: int = 0

    @property
    def size(self) -> float:
        """What time grows with, from call to call of one kind of work."""
        return self.rows * self.cells * (1 + CONTROLNET_SHARE * self.controlnets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Seconds as expected, and between which they are likely to be; all 0 where nothing is known."""

    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: "Expected") -> "Expected":
        """Of both, one after the other."""
        return Expected(
            seconds=self.seconds + other.seconds,
            low=self.low + other.low,
            high=self.high + other.high,
        )

    def times(self, count: int) -> "Expected":
        """Of so many of them, one after the other."""
        return Expected(seconds=count * self.seconds, low=count * self.low, high=count * self.high)


@dataclass(slots=True, kw_only=True)
class _Seen:
    """Running means of a call's seconds, and of how far they were from that mean."""

    mean: float
    deviation: float = 0.0

    def take(self, seconds: float) -> None:
        """Takes in one more."""
        off = seconds - self.mean
        self.mean += NEWEST_WEIGHT * off
        self.deviation += NEWEST_WEIGHT * (abs(off) - self.deviation)


class Pace:
    """Seconds of calls, made and expected."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Call, _Seen] = OrderedDict()

    def record(self, call: Call, *, seconds: float) -> None:
        """Takes in a call that was made."""
        if (seen := self._seen.get(call)) is None:
            self._seen[call] = _Seen(mean=seconds)
        else:
            seen.take(seconds)
        self._seen.move_to_end(call)
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)

    def expected(self, call: Call) -> Expected:
        """Of a call like this one; all 0 where this model never did such work."""
        if (seen := self._seen.get(call)) is not None:
            # Twice the mean deviation: some nine of ten.
            spread = 2 * seen.deviation
            return Expected(
                seconds=seen.mean, low=max(0.0, seen.mean - spread), high=seen.mean + spread
            )
        alike = [each for each in self._seen if (each.model, each.work) == (call.model, call.work)]
        if not alike:
            return Expected()
        nearest = min(alike, key=lambda each: abs(math.log(each.size / call.size)))
        seconds = self._seen[nearest].mean * call.size / nearest.size
        return Expected(seconds=seconds, low=seconds / SCALED_SPREAD, high=seconds * SCALED_SPREAD)
