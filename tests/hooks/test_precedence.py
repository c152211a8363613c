"""Argument, connection, file, default: value by value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.config import LLMSettings, Settings, StateSettings, TemporalSettings, WorkflowSettings
from beluga_airflow.hooks.backends import AirflowBackends
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.state import StateHook, default_url
from beluga_airflow.hooks.temporal import TemporalHook

Connections = dict[str, Any]
Write = Callable[[str], Path]
LLM = {"provider": ("openai", "ollama", "vllm"), "model": ("gpt-4o", "of-file", "of-conn"), "timeout": (30, 40, 50)}
TEMPORAL = {
    "address": ("localhost:7233", "of-file:1", "of-conn:2"),
    "namespace": ("default", "of-file", "of-conn"),
    "task_queue": ("beluga-workflows", "of-file", "of-conn"),
}
"""The default, what the file says, what the connection says."""


def of_file(section: str, values: dict[str, Any]) -> str:
    return f"{section}: {values}" if values else "{}"


@pytest.mark.parametrize("conn_id", ["beluga_llm_default", "own"])
@pytest.mark.parametrize("name", LLM)
async def test_each_value_of_a_model(name: str, conn_id: str, connections: Connections, config_file: Write) -> None:
    default, in_file, in_connection = LLM[name]
    others = {other: values[0] for other, values in LLM.items() if other != name}

    async def found() -> Any:
        endpoint = await LLMHook(conn_id).endpoint()
        assert {other: getattr(endpoint, other) for other in others} == others
        return getattr(endpoint, name)

    connections[conn_id] = {"conn_type": "beluga_llm"}
    config_file("{}")
    assert await found() == default
    config_file(of_file("llm", {name: in_file}))
    assert await found() == in_file
    connections[conn_id]["extra"] = {name: in_connection}
    assert await found() == in_connection
    config_file("{}")
    assert await found() == in_connection


async def test_without_a_connection_the_file_says_which_model(connections: Connections, config_file: Write) -> None:
    config_file(of_file("llm", {"provider": "ollama", "model": "llama3.1", "timeout": "1m"}))
    hook = LLMHook()
    endpoint = await hook.endpoint()
    assert (endpoint.provider, endpoint.model, endpoint.timeout) == ("ollama", "llama3.1", 60)
    config_file(of_file("llm", {"model": "other"}))
    assert (await hook.endpoint()).model == "other", "it is read when it is needed"


@pytest.mark.parametrize("conn_id", ["temporal_default", "own"])
@pytest.mark.parametrize("name", TEMPORAL)
async def test_each_value_of_temporal(name: str, conn_id: str, connections: Connections, config_file: Write) -> None:
    default, in_file, in_connection = TEMPORAL[name]
    others = {other: values[0] for other, values in TEMPORAL.items() if other != name}

    async def found() -> Any:
        target = await TemporalHook(conn_id).target()
        assert {other: getattr(target, other) for other in others} == others
        return getattr(target, name)

    connections[conn_id] = {"conn_type": "temporal"}
    config_file("{}")
    assert await found() == default
    config_file(f"orchestration: {{workflow: {{temporal: { ({name: in_file}) }}}}}")
    assert await found() == in_file
    host, _, port = in_connection.partition(":")
    said = {"host": host, "port": int(port)} if port else {"extra": {name: in_connection}}
    connections[conn_id] = {"conn_type": "temporal", **said}
    assert await found() == in_connection


async def test_an_address_is_one_value(connections: Connections, config_file: Write) -> None:
    config_file("orchestration: {workflow: {temporal: {address: 'of-file:1'}}}")
    for said, address in [({"host": "h"}, "h:7233"), ({"port": 9}, "localhost:9"), ({}, "of-file:1")]:
        connections["own"] = {"conn_type": "temporal", **said}
        assert (await TemporalHook("own").target()).address == address
    target = await TemporalHook().target()
    assert (target.address, target.ui_url) == ("of-file:1", None), "nobody knows where its web UI is"


async def url() -> str:
    store = await StateHook().store()
    await store.close()
    return store.url


async def test_the_url_of_a_state_store(
    connections: Connections, config_file: Write, home: Path, tmp_path: Path
) -> None:
    config_file("{}")
    assert await url() == default_url()
    config_file(f"state: {{url: 'sqlite:///{tmp_path / 'of-file.db'}'}}")
    assert await url() == f"sqlite:///{tmp_path / 'of-file.db'}"
    connections["beluga_state_default"] = {"conn_type": "beluga_state"}
    assert await url() == f"sqlite:///{tmp_path / 'of-file.db'}", "a connection that says nothing"
    connections["beluga_state_default"] = {"conn_type": "beluga_state", "extra": {"url": "memory://"}}
    assert await url() == "memory://"


async def test_settings_that_are_given_go_before_the_file(
    connections: Connections, config_file: Write, tmp_path: Path
) -> None:
    config_file("llm: {")
    settings = Settings(
        llm=LLMSettings(model="given"),
        workflow=WorkflowSettings(temporal=TemporalSettings(namespace="given")),
        state=StateSettings(url="memory://"),
    )
    assert (await LLMHook(settings=settings).endpoint()).model == "given"
    assert (await TemporalHook(settings=settings).target()).namespace == "given"
    assert (await StateHook(settings=settings).store()).url == "memory://"


async def test_what_is_open_follows_the_file(
    connections: Connections, config_file: Write, tmp_path: Path, home: Path
) -> None:
    connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": {"provider": "ollama"}}
    async with AirflowBackends() as backends:
        found = []
        for name in ("one", "two", "one"):
            config_file(f"llm: {{model: {name}}}\nstate: {{url: 'sqlite:///{tmp_path / name}.db'}}")
            resources = await backends.resources(llm_conn_id=None, state_conn_id=None)
            assert resources.state.url == f"sqlite:///{tmp_path / name}.db"
            found.append((resources.state, await resources.model(None)))
        assert found[0] == found[2], "nothing is opened twice"
        assert found[0][1] is not found[1][1]
