"""Where the stores are that triggers watch."""

from __future__ import annotations

from tests.state.conftest import database, place, redis_url, serve, server, shared_place  # noqa: F401  # fixtures
