"""Bounding how long something may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["bounded"]


@asynccontextmanager
async def bounded(timeout: float | None, expired: Callable[[], Exception]) -> AsyncIterator[None]:
    """Give the body ``timeout`` seconds, None: any; then raise what ``expired`` makes.

    A ``TimeoutError`` of the body's own passes through as it is.
    """
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise expired() from None
