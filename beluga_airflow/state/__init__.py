"""Shared state: one contract, one file a backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.state.base import Change, StateStore, Versioned

__all__ = ["Change", "StateStore", "Versioned", "open_store"]


def open_store(url: str) -> StateStore:
    """The state store at a URL.

    ``memory://``, ``sqlite:///path`` (``sqlite:////absolute/path``), ``redis://`` and ``rediss://`` as redis-py reads
    them, ``postgresql://`` as libpq does.

    Raises:
        InvalidSetting: no backend of ours serves such a URL, or its client is not installed.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "memory":
        from beluga_airflow.state.memory import MemoryStore

        return MemoryStore()
    if scheme == "sqlite" and len(rest) > 1 and rest.startswith("/"):
        from beluga_airflow.state.sqlite import SqliteStore

        return SqliteStore(rest[1:])
    if scheme in ("redis", "rediss"):
        with _needs("redis"):
            from beluga_airflow.state.redis import RedisStore
        return RedisStore(url)
    if scheme in ("postgresql", "postgres"):
        with _needs("postgres"):
            from beluga_airflow.state.postgres import PostgresStore
        return PostgresStore(url)
    # what is behind the scheme may be a password
    begins = f"begins with {scheme!r}" if separator else "has no '://'"
    raise InvalidSetting(
        f"no state store serves a URL that {begins}; use 'sqlite:////path/to/state.db', 'redis://host:6379/0' or "
        "'postgresql://user:password@host/database'"
    )


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InvalidSetting(
            f"a state store in {extra} needs a client that is not installed ({error.name}): "
            f"pip install 'beluga-airflow[{extra}]'"
        ) from error
