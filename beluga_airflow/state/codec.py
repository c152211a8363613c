"""How values become text, the same in every backend."""

from __future__ import annotations

import json
from typing import Any

from beluga_airflow.errors import StateError

__all__ = ["encode"]


def encode(key: str, value: Any) -> str:
    """``value`` as compact JSON text.

    Raises:
        StateError: it is not JSON.
    """
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise StateError(f"the value for state key {key!r} is not JSON: {error}; store JSON values only") from error
