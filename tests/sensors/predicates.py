"""What the sensors of these tests ask about values."""

from __future__ import annotations

from typing import Any

NUMBER = 7


def is_paid(value: Any) -> bool:
    return bool(value["state"] == "paid")


def takes_it_away(value: Any) -> bool:
    value.clear()
    return False


async def later(value: Any) -> bool:
    return True
