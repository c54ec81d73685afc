"""How many jobs are in each state and how many wait before one, kept from entries as they come.

Main type: `Census`. It is told the newest entry of every job, then each one after; it asks nobody.
"""

from __future__ import annotations

import itertools
from collections import Counter

from gateway.jobs import JobState
from gateway.jobs.nats_log import Entry


class Census:
    """Of the jobs that have a log; what nobody touched yet is only in the stream of requests."""

    def __init__(self) -> None:
        # State and number of each that has not ended.
        self._open: dict[str, tuple[JobState, int]] = {}
        self._ended: Counter[JobState] = Counter()
        # Numbers of those that were cancelled before they were handed out.
        self._skipped: set[int] = set()

    def take(self, job_id: str, entry: Entry) -> None:
        """The job's log has this entry now."""
        if entry.state.is_final:
            self._open.pop(job_id, None)
            self._ended[entry.state] += 1
            if entry.attempt == 0 and entry.number:
                self._skipped.add(entry.number)
        else:
            self._open[job_id] = (entry.state, entry.number)

    def state(self, job_id: str) -> JobState | None:
        """The state of a job that has begun and not ended."""
        found = self._open.get(job_id)
        return found[0] if found else None

    def counts(self) -> dict[JobState, int]:
        """Jobs by state."""
        counted = self._ended + Counter(state for state, _ in self._open.values())
        return {state: counted[state] for state in JobState}

    def waiting(self, *, handed_out: int, up_to: int) -> int:
        """Jobs that wait, among those whose number is at most `up_to`.

        `handed_out` is the highest number that was given to a worker.
        """
        self._skipped = {number for number in self._skipped if number > handed_out}
        fresh = max(0, up_to - handed_out) - sum(number <= up_to for number in self._skipped)
        again = sum(
            state is JobState.QUEUED and number <= up_to for state, number in self._open.values()
        )
        return fresh + again

    def first_waiting(self, *, handed_out: int, up_to: int) -> int | None:
        """The lowest number of a job that waits, among those up to `up_to`; None where none does."""
        again = (n for state, n in self._open.values() if state is JobState.QUEUED and n <= up_to)
        fresh = (n for n in range(handed_out + 1, up_to + 1) if n not in self._skipped)
        return min((*again, *itertools.islice(fresh, 1)), default=None)
