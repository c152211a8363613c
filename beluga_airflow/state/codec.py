"""How keys and values become text, the same in every backend."""

from __future__ import annotations

import json
from typing import Any

from beluga_airflow.errors import StateError

__all__ = ["decode", "encode", "named"]


def named(key: str) -> str:
    """``key``, when every backend can hold it.

    Raises:
        StateError: it is no text that can be written as UTF-8.
    """
    try:
        key.encode()
    except (AttributeError, UnicodeEncodeError):
        raise StateError(f"{key!r} cannot be a state key; use texts without lone surrogates") from None
    return key


def encode(key: str, value: Any) -> str:
    """``value`` as compact JSON text.

    Raises:
        StateError: it is not JSON.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(f"the value for state key {key!r} is not JSON: {error}; store JSON values only") from error


def decode(key: str, text: str) -> Any:
    """The value that ``encode`` wrote.

    Raises:
        StateError: the text was damaged since.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise StateError(f"the value of state key {key!r} is damaged: {error}; delete the key or restore it") from error
