"""The stores that guards are kept in: those of the tests of the state stores."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from beluga_airflow.state import StateStore
from tests.state.backends import Place
from tests.state.conftest import database, place, redis_url, serve, server, shared_place  # noqa: F401  # fixtures

DEADLINE = 30


@pytest.fixture
async def store(place: Place) -> AsyncIterator[StateStore]:  # noqa: F811  # the fixture
    """An empty store of each backend in turn."""
    store = place.opened()
    yield store
    await store.close()
