"""How long calls of the networks take here, from those that were made: `Pace`.

A call's time is remembered by what decides it, and where that very call was never made it is told from the nearest one,
with a wider spread. Nothing is told of a kind of work that was never done: work is refused by these numbers. It knows
no torch and no jobs.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
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
# hardly with anything. Calls that were made less than ENOUGH times are believed no better: the first one pays for
# allocation.
SCALED_SPREAD = 2.0
ENOUGH = 3
# What of the growth from the fastest small call to the fastest larger one is counted on beyond them.
SURE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What decides how long a call takes.

    work: encoding a job's prompts and composite, a U-Net's step, decoding pictures, or a training step with its part of
    what comes beside it. cells: of the latent grid. rows: of the U-Net, or pictures. controlnets: beside the U-Net.
    """

    model: str
    work: Literal["encode", "step", "decode", "train"]
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
    """Running means of a call's seconds, and of how far they were from that mean; and the least of them."""

    mean: float
    fastest: float
    deviation: float = 0.0
    count: int = 1

    def take(self, seconds: float) -> None:
        """Takes in one more."""
        self.count += 1
        self.fastest = min(self.fastest, seconds)
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
            self._seen[call] = _Seen(mean=seconds, fastest=seconds)
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
            low, high = max(0.0, seen.mean - spread), seen.mean + spread
            if seen.count < ENOUGH:
                low, high = (
                    min(low, seen.mean / SCALED_SPREAD),
                    max(high, seen.mean * SCALED_SPREAD),
                )
            return Expected(seconds=seen.mean, low=low, high=high)
        alike = [each for each in self._seen if (each.model, each.work) == (call.model, call.work)]
        if not alike:
            return Expected()
        # Of two as near the larger: what any call costs is the smaller part of it.
        nearest = min(alike, key=lambda each: (abs(math.log(each.size / call.size)), -each.size))
        seconds = self._seen[nearest].mean * call.size / nearest.size
        return Expected(
            seconds=seconds, low=self._least(call, nearest, alike), high=seconds * SCALED_SPREAD
        )

    def _least(self, call: Call, nearest: Call, alike: Sequence[Call]) -> float:
        """What a call takes for certain that was never made.

        What a smaller one took, and most of what it should take more by how much larger calls cost than smaller ones
        here, the fastest of each: the others may have shared the device with something else. Where none of another size
        was made, more rows or cells may cost nothing more: on a large GPU they do not.
        """
        fastest = self._seen[nearest].fastest
        if call.size <= nearest.size:
            return self._seen[nearest].mean * call.size / nearest.size / SCALED_SPREAD
        smaller = [each for each in alike if each.size < nearest.size]
        if not smaller:
            return self.expected(nearest).low
        before = max(smaller, key=lambda each: each.size)
        more = max(0.0, fastest - self._seen[before].fastest) / (nearest.size - before.size)
        scaled = min(
            fastest * call.size / nearest.size, fastest + more * (call.size - nearest.size)
        )
        return max(self.expected(nearest).low, SURE * scaled)
