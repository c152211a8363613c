"""What the sensors of these tests ask about values."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

NUMBER = 7


def is_paid(value: Any) -> bool:
    return bool(value["state"] == "paid")


def takes_it_away(value: Any) -> bool:
    value.clear()
    return False


async def later(value: Any) -> bool:
    return True


def tells_of_it(value: Any) -> bool:
    """Raises what holds the value, as many libraries do."""
    raise ValueError(value["text"])


def speechless(value: Any) -> bool:
    class Speechless(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    raise Speechless


def cancels(value: Any) -> bool:
    raise asyncio.CancelledError


def wrapped(value: Any) -> Any:
    """A plain function around an async one: what it returns is always true."""
    return later(value)


def generates(value: Any) -> Iterator[bool]:
    yield False
