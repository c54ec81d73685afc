"""`News`: which jobs anything happened to, for the other processes on the file of a queue.

A job's number is noted in the transaction that changes it. A process reads what was noted behind
what it knows; what it wrote itself is no news to it. A lease that is extended is no news at all.
"""

from __future__ import annotations

from gateway.jobs.database import Database

# Kept for processes that did not look yet; one that misses some takes every job for changed.
_KEPT = 4096
_DROPPED_EACH = 256


class News:
    """Runs in the thread of its `Database`, but for `written`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Number of the last of which this process knows, and of all before it.
        self._known = 0
        self._noted: list[int] = []

    def begin(self) -> None:
        """A transaction begins: what one that failed had noted is not there."""
        self._noted.clear()

    def note(self, job: int) -> None:
        """The transaction under way changes the job of this number."""
        row = self._database.execute("INSERT INTO news (job) VALUES (?)", (job,))
        number = int(row.lastrowid or 0)
        if number % _DROPPED_EACH == 0:
            self._database.execute("DELETE FROM news WHERE number <= ?", (number - _KEPT,))
        self._noted.append(number)

    def written(self) -> None:
        """What was noted since `begin` is stored."""
        for number in self._noted:
            if number == self._known + 1:
                self._known = number

    def skip(self) -> None:
        """Everything up to now is known."""
        (self._known,) = self._database.execute(
            "SELECT coalesce(max(number), 0) FROM news"
        ).fetchone()

    def read(self) -> frozenset[str] | None:
        """The jobs of what was not known so far; None where that may be any."""
        rows = self._database.execute(
            "SELECT news.number AS number, id FROM news JOIN jobs ON job = jobs.number"
            " WHERE news.number > ? ORDER BY news.number",
            (self._known,),
        ).fetchall()
        if not rows:
            return frozenset()
        is_whole = rows[0]["number"] == self._known + 1
        self._known = rows[-1]["number"]
        return frozenset(row["id"] for row in rows) if is_whole else None
