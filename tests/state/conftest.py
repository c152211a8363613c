"""Where stores are: servers that answer on their usual ports, or at BELUGA_TEST_*_URL, or are started."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from tests.state import postgres_server, redis_server
from tests.state.backends import BACKENDS, SHARED, Place


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each backend in turn."""
    return _place(request, tmp_path)


@pytest.fixture(params=SHARED)
def shared_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each backend that several processes can share."""
    return _place(request, tmp_path)


def _place(request: pytest.FixtureRequest, folder: Path) -> Place:
    fixture = {"redis": "redis_url", "postgres": "database"}.get(request.param)
    return Place(request.param, folder, request.getfixturevalue(fixture) if fixture else "")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., redis_server.Server]]:
    """Starts a server with these options."""
    servers: list[redis_server.Server] = []

    def start(*options: str) -> redis_server.Server:
        servers.append(redis_server.Server(tmp_path, *options))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def redis_url(serve: Callable[..., redis_server.Server]) -> Iterator[str]:
    """A namespace of its own, in the Redis that is given, or answers on its port, or is started for it."""
    server = os.environ.get("BELUGA_TEST_REDIS_URL", "redis://localhost:6379/9")
    namespace = f"beluga-test-{uuid.uuid4().hex}:{{state}}:"
    client = redis.Redis.from_url(server)
    try:
        client.ping()
    except redis.ConnectionError:
        server = serve().url()
        client = redis.Redis.from_url(server)
    yield f"{server}{'&' if '?' in server else '?'}namespace={namespace}"
    for name in client.scan_iter(f"{namespace}*", count=1_000):
        client.delete(name)
    client.close()


@pytest.fixture(scope="session")
def server() -> Iterator[postgres_server.Server]:
    folder = Path(tempfile.mkdtemp(prefix="beluga-postgres-"))
    try:
        server = postgres_server.Server(folder)
        server.start()
        yield server
        server.stop("immediate")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a new database on the server that answers, else on one of our own."""
    try:
        psycopg.connect(postgres_server.USUAL, connect_timeout=3).close()
        admin = postgres_server.USUAL
    except psycopg.OperationalError:
        admin = request.getfixturevalue("server").url
    name = f"beluga_test_{secrets.token_hex(6)}"
    with psycopg.connect(admin, autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}")
        yield urlsplit(admin)._replace(path=f"/{name}").geturl()
        db.execute(f"DROP DATABASE {name} WITH (FORCE)")
