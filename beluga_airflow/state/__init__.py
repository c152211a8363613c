"""Shared state: one contract, one file a backend."""

from __future__ import annotations

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.state.base import StateStore, Versioned

__all__ = ["StateStore", "Versioned", "open_store"]


def open_store(url: str) -> StateStore:
    """The state store at a URL: ``memory://`` or ``sqlite:///path`` (``sqlite:////absolute/path``).

    Raises:
        InvalidSetting: no backend of ours serves such a URL.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "memory":
        from beluga_airflow.state.memory import MemoryStore

        return MemoryStore()
    if scheme == "sqlite" and len(rest) > 1 and rest.startswith("/"):
        from beluga_airflow.state.sqlite import SqliteStore

        return SqliteStore(rest[1:])
    # what is behind the scheme may be a password
    begins = f"begins with {scheme!r}" if separator else "has no '://'"
    raise InvalidSetting(f"no state store serves a URL that {begins}; use 'memory://' or 'sqlite:////path/to/state.db'")
