"""What `Confined` processes do in its tests: `doing`."""

import os
from collections.abc import Callable
from pathlib import Path

from services.common.confined import Work
from services.common.errors import InvalidRequest, NotFound, Violation

# What a process may have here.
MEMORY_BYTES = 500 * 2**20


def doing(*arguments: str) -> Work:
    """Does what the first part says, and answers the others and the arguments."""

    def work(parts: list[bytes], begin: Callable[[str], None]) -> list[bytes]:
        what, *more = parts
        begin(f"parts[{len(more)}]")
        match what:
            case b"print":
                # Python's own way and C's.
                print("a library says something", flush=True)  # noqa: T201 that is what is tried
                os.write(1, b"and so does C")
            case b"refuse":
                raise InvalidRequest(
                    [Violation(field=f"a[{k}]", description="is wrong") for k in range(2)],
                    reason="SOME_REASON",
                )
            case b"miss":
                raise NotFound("no such thing")
            case b"fail":
                raise ZeroDivisionError("for the log")
            case b"hang":
                while True:
                    pass
            case b"fill":
                return [bytes(2 * MEMORY_BYTES)]
            case b"signal":
                os.kill(os.getpid(), int(more[0]))
            case b"crash once":
                mark = Path(more[0].decode())
                if not mark.exists():
                    mark.touch()
                    os.abort()
            case b"pid":
                return [f"{os.getpid()}".encode()]
        return [*more, *(text.encode() for text in arguments)]

    return work
