from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.llm.client import Endpoint, ModelRequest, OpenAIClient
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.llm.presets import PRESETS, preset

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "providers.md").read_text()
ROW = re.compile(r"^\| \[`(\w+)`\]\(([^)]+)\) \| ([^|]+) \| ([^|]+) \| `(\w+)='([^']+)'` \|$", re.MULTILINE)
ROWS = {row[0]: row[1:] for row in ROW.findall(PAGE)}
WELL_KNOWN = {
    *("openai", "azure", "anthropic", "gemini", "groq", "mistral", "deepseek", "xai", "together", "fireworks"),
    *("openrouter", "ollama", "vllm", "simulated"),
}


@pytest.mark.parametrize(
    ("name", "near"),
    [("opnai", "openai"), ("OpenAI", "openai"), ("antropic", "anthropic"), ("deep-seek", "deepseek"), ("x", None)],
)
def test_an_unknown_provider_lists_the_known_ones_and_suggests_a_near_name(name: str, near: str | None) -> None:
    with pytest.raises(InvalidSetting) as caught:
        preset(name)
    told = str(caught.value)
    assert told.startswith(f"unknown model provider {name!r}" + (f": did you mean {near!r}?" if near else "; known"))
    assert all(known in told for known in PRESETS)
    assert "provider 'openai' and set base_url" in told


def test_the_well_known_are_known() -> None:
    assert PRESETS.keys() >= WELL_KNOWN


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_used_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = preset(name)
    if found.key_variable:
        monkeypatch.setenv(found.key_variable, "from-the-environment")
    endpoint = Endpoint(provider=name, base_url=None if found.base_url else "https://own.example/v1")
    assert endpoint.key == ("from-the-environment" if found.key_variable else "none")
    parts = urlsplit(endpoint.address)
    local = parts.hostname == "localhost"
    assert parts.scheme == ("http" if local else "https"), "a key does not travel in the clear"
    assert local == (found.key_variable is None)
    assert found.limit in ("max_completion_tokens", "max_tokens")


@pytest.mark.parametrize("name", [name for name, found in PRESETS.items() if found.prices])
def test_the_price_list_knows_its_name(name: str) -> None:
    from genai_prices.data_snapshot import get_snapshot

    assert preset(name).prices in {provider.id for provider in get_snapshot().providers}


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


async def asked(**endpoint: str) -> dict[str, Any]:
    """What an endpoint is asked."""
    async with ModelServer() as server:
        client = OpenAIClient(Endpoint(base_url=server.base_url, api_key="k", **endpoint))
        question = ({"role": "user", "content": "Well?"},)
        await client.answer(ModelRequest(messages=question, schema=SCHEMA, max_tokens=77, logprobs="wanted"))
        await client.close()
        (request,) = server.requests
    return request


@pytest.mark.parametrize("name", PRESETS)
async def test_an_endpoint_is_asked_for_what_its_provider_documents(name: str) -> None:
    request = await asked(provider=name)
    assert {key: value for key, value in request.items() if "tokens" in key} == {preset(name).limit: 77}
    assert ("response_format" in request) is preset(name).json_schema
    assert ("logprobs" in request) is preset(name).logprobs


async def test_a_connection_that_says_otherwise_wins() -> None:
    request = await asked(provider="anthropic", structured_output="schema", logprobs="on")
    assert {"response_format", "logprobs"} <= request.keys()


def test_a_base_url_wins() -> None:
    assert Endpoint(provider="openai", base_url="http://localhost:9/v1").address == "http://localhost:9/v1"


def test_one_that_needs_an_address_says_what_it_looks_like() -> None:
    with pytest.raises(InvalidSetting, match=r"such as https://RESOURCE\.openai\.azure\.com/openai/v1"):
        _ = Endpoint(provider="azure").address


def test_the_page_has_a_row_for_each() -> None:
    assert list(ROWS) == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
async def test_a_row_of_the_page_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = preset(name)
    docs, address, key, variable, connection = ROWS[name]
    assert docs == found.docs
    assert address == (f"`{found.base_url}`" if found.base_url else "yours: see below")
    assert key == (f"`{found.key_variable}`" if found.key_variable else "none")
    monkeypatch.setenv(variable, connection)
    if found.key_variable:
        monkeypatch.setenv(found.key_variable, "from-the-environment")
    endpoint = await LLMHook().endpoint()
    assert (endpoint.provider, endpoint.address) == (name, found.base_url or found.address_form)
    assert endpoint.key == ("from-the-environment" if found.key_variable else "none")
    assert endpoint.model
