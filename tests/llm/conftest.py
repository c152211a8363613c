"""A client of the model server, and the words that must not leave it."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from beluga_airflow.llm.client import Endpoint, OpenAIClient
from beluga_airflow.llm.model_server import ModelServer
from tests.state.conftest import (  # noqa: F401  # fixtures
    database,
    place,
    redis_url,
    serve,
    server,
    shared_place,
)

KEY = "sk-live-4f9aKEYc1"
QUESTION = "Is the QUESTIONMARK order to be held?"
DATUM = "DATUM of Mrs. Smith"
SERVER_WORDS = "SERVERWORDS and your key sk-live-4f9aKEYc1"

ClientFactory = Callable[..., OpenAIClient]


@pytest.fixture
async def client_of() -> AsyncIterator[ClientFactory]:
    """Makes clients of a server (or of a base URL), closed when the test ends."""
    async with AsyncExitStack() as opened:

        def make(server: ModelServer | str, **endpoint: Any) -> OpenAIClient:
            base_url = server if isinstance(server, str) else server.base_url
            given = {"provider": "simulated", "api_key": KEY, "timeout": 10.0, "base_url": base_url, **endpoint}
            client = OpenAIClient(Endpoint(**given))
            opened.push_async_callback(client.close)
            return client

        yield make


def assert_tells_nothing(error: BaseException) -> None:
    """No message, and no log of the error, has a word of the key, the question, the data or the server."""
    told = " ".join([str(error), repr(error), *traceback.format_exception(error)])
    for word in (KEY, "QUESTIONMARK", "DATUM", "SERVERWORDS"):
        assert word not in told
