"""Waiting for what tells nobody: `until`."""

import asyncio
from collections.abc import Callable

LIMIT_S = 20.0


async def until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds.

    Raises:
        TimeoutError: it does not within `LIMIT_S`.
    """
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 a process' end, or a budget, is no event
            await asyncio.sleep(0.01)
