"""The backends that every test of the contract runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg

from beluga_airflow.state import StateStore
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.state.postgres import PostgresStore
from beluga_airflow.state.redis import RedisStore
from beluga_airflow.state.sqlite import SqliteStore

__all__ = ["BACKENDS", "SHARED", "Place"]

SHARED = ["sqlite", "redis", "postgres"]
"""Those that several processes can share."""
BACKENDS = ["memory", *SHARED]


@dataclass(frozen=True)
class Place:
    """Where stores of one backend are made.

    Args:
        backend: which.
        folder: for what lies on disk.
        server: the URL of a server, which is this test's own.
    """

    backend: str
    folder: Path
    server: str

    def url(self) -> str:
        """Of a new, empty store."""
        name = f"s{uuid4().hex}"
        match self.backend:
            case "sqlite":
                return f"sqlite:///{self.folder}/{name}.db"
            case "redis":
                return f"{self.server}{name}:"
            case "postgres":
                with psycopg.connect(self.server, autocommit=True) as db:
                    db.execute(f"CREATE SCHEMA {name}")
                return f"{self.server}?options=-csearch_path%3D{name}"
        return "memory://"

    def opened(self, url: str | None = None, **options: Any) -> StateStore:
        """A store there, or a new, empty one; ``options`` of its class."""
        url = url or self.url()
        match self.backend:
            case "sqlite":
                return SqliteStore(url.removeprefix("sqlite:///"), **options)
            case "redis":
                return RedisStore(url, **options)
            case "postgres":
                return PostgresStore(url, **options)
        return MemoryStore(**options)
