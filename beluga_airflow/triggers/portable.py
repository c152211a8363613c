"""Which values may leave the triggerer in an event: what is stored was written by others, and may be anything."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import msgspec

__all__ = ["is_portable"]

DEEP = 100
"""Levels of nesting: Airflow's own code walks through an event recursively."""


def is_portable(value: Any, limit: int) -> bool:
    """Whether a JSON value reaches Airflow's database in an event of a trigger.

    An event that Airflow cannot encode (a number over 64 bits, half a character), or that its database refuses
    (a NUL), ends the whole triggerer, and the next one when it meets the same value.

    Args:
        value: JSON.
        limit: characters of its JSON text that are let through.
    """
    try:
        text = json.dumps(value, allow_nan=False)
        if len(text) > limit or "\\u0000" in text:
            return False
        msgspec.msgpack.encode(value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False
    # brackets within texts count too, which only leaves a value out
    steps = (1 if sign in "[{" else -1 for sign in text if sign in "[]{}")
    return max(accumulate(steps), default=0) <= DEEP
