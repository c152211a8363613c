from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.errors import BreakerOpen, InvalidSetting, ModelRefused, ModelUnavailable
from beluga_airflow.hooks.backends import AirflowBackends
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.resilience.breaker import breakers
from tests.hooks.test_llm import ASK, llm
from tests.hooks.test_state import state

Connections = dict[str, Any]


@pytest.fixture
def ready(connections: Connections, model_server: ModelServer, tmp_path: Path) -> Connections:
    connections["beluga_llm_default"] = llm(model_server)
    connections["beluga_state_default"] = state(f"sqlite:///{tmp_path / 'default.db'}")
    connections["other_llm"] = llm(model_server, model="gpt-4.1")
    connections["other_state"] = state(f"sqlite:///{tmp_path / 'other.db'}")
    return connections


async def test_each_connection_is_opened_once(ready: Connections) -> None:
    async with AirflowBackends() as backends:
        both = await asyncio.gather(
            *(backends.resources(llm_conn_id=None, state_conn_id=None) for _ in range(5)),
            backends.resources(llm_conn_id="beluga_llm_default", state_conn_id="beluga_state_default"),
        )
        assert len({id(resources.state) for resources in both}) == 1
        # a decision may name its own connection, or take the operator's
        clients = await asyncio.gather(
            *(resources.model(name) for resources in both for name in (None, "beluga_llm_default", "other_llm"))
        )
        assert len({id(client) for client in clients}) == 2
        assert (await clients[0].answer(ASK)).model == "gpt-4o"
        assert (await clients[2].answer(ASK)).model == "gpt-4.1"


async def test_the_operators_connections_are_used(ready: Connections, tmp_path: Path) -> None:
    async with AirflowBackends() as backends:
        resources = await backends.resources(llm_conn_id="other_llm", state_conn_id="other_state")
        assert resources.state.url.endswith("other.db")
        assert (await (await resources.model(None)).answer(ASK)).model == "gpt-4.1"
        assert (await (await resources.model("beluga_llm_default")).answer(ASK)).model == "gpt-4o"
        assert await backends.store("other_state") is resources.state
        assert (await backends.store(None)).url.endswith("default.db")
    assert not (tmp_path / "default.db").exists(), "a store that nobody used has no file"


async def test_a_model_is_looked_for_only_when_it_is_needed(connections: Connections, tmp_path: Path) -> None:
    connections["beluga_state_default"] = state("memory://")
    async with AirflowBackends() as backends:
        resources = await backends.resources(llm_conn_id="nowhere", state_conn_id=None)
        with pytest.raises(InvalidSetting, match="no connection 'nowhere'"):
            await resources.model(None)
        with pytest.raises(InvalidSetting, match="no connection 'elsewhere'"):
            await resources.model("elsewhere")


async def test_a_state_connection_that_cannot_be_used(connections: Connections) -> None:
    async with AirflowBackends() as backends:
        with pytest.raises(InvalidSetting, match="no connection 'nowhere'"):
            await backends.resources(llm_conn_id=None, state_conn_id="nowhere")
        # mended in the meantime, as a worker that stays up will see
        connections["nowhere"] = state("memory://")
        assert (await backends.resources(llm_conn_id=None, state_conn_id="nowhere")).state.url == "memory://"


async def test_everything_is_closed_and_may_be_opened_again(ready: Connections) -> None:
    backends = AirflowBackends()
    for _ in range(2):
        resources = await backends.resources(llm_conn_id=None, state_conn_id=None)
        await resources.state.set("a", 1)
        assert (await (await resources.model(None)).answer(ASK)).content
        await backends.close()
        assert await resources.state.get("a") == 1, "a store opens itself again"
        await resources.state.close()
    await backends.close()


async def test_a_connection_that_was_refused_is_read_again(ready: Connections) -> None:
    async with ModelServer(api_key="the-right-key") as server:
        ready["beluga_llm_default"] = {**llm(server), "password": "the-wrong-key"}
        async with AirflowBackends() as backends:
            resources = await backends.resources(llm_conn_id=None, state_conn_id=None)
            with pytest.raises(ModelRefused):
                await (await resources.model(None)).answer(ASK)
            ready["beluga_llm_default"] = {**llm(server), "password": "the-right-key"}
            assert (await (await resources.model(None)).answer(ASK)).content
            assert await resources.model(None) is await resources.model(None)


async def test_the_guards_of_a_connection_are_kept_in_the_operators_state_store(
    ready: Connections, model_server: ModelServer
) -> None:
    ready["beluga_llm_default"] = llm(model_server, failure_threshold=1)
    model_server.fail("status", status=503)
    async with AirflowBackends() as backends:
        other = await backends.resources(llm_conn_id=None, state_conn_id="other_state")
        with pytest.raises(ModelUnavailable):
            await (await other.model(None)).answer(ASK)
        with pytest.raises(BreakerOpen):
            await (await other.model(None)).answer(ASK)
        default = await backends.resources(llm_conn_id=None, state_conn_id=None)
        assert (await (await default.model(None)).answer(ASK)).content
        assert [found.state for found in await breakers(other.state)] == ["open"]
