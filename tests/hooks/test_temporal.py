from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from airflow.sdk import BaseHook

from beluga_airflow.config import Settings, TemporalSettings, WorkflowSettings
from beluga_airflow.errors import InvalidSetting, TemporalUnavailable
from beluga_airflow.hooks.temporal import TemporalHook
from beluga_airflow.temporal.client import Target
from beluga_airflow.testing import TemporalServer
from tests.hooks.conftest import SECRET

Connections = dict[str, Any]
Hush = Callable[..., None]


def temporal(**fields: Any) -> dict[str, Any]:
    return {"conn_type": "temporal", **fields}


async def test_without_a_connection_the_defaults_serve(connections: Connections) -> None:
    assert await TemporalHook().target() == Target(
        address="localhost:7233",
        namespace="default",
        task_queue="beluga-workflows",
        api_key=None,
        tls=False,
        ui_url="http://localhost:8233",
    )


async def test_settings_are_the_defaults(connections: Connections) -> None:
    own = TemporalSettings(address="t.example:1", namespace="n", task_queue="q")
    settings = Settings(workflow=WorkflowSettings(temporal=own))
    assert await TemporalHook(settings=settings).target() == Target(
        address="t.example:1", namespace="n", task_queue="q", ui_url=None
    )
    connections["own"] = temporal(host="h", port=2)
    target = await TemporalHook("own", settings=settings).target()
    assert (target.address, target.namespace, target.task_queue) == ("h:2", "n", "q")


async def test_a_connection_says_it_all(connections: Connections, hush: Hush) -> None:
    extra = {"namespace": "shop.a1b2c", "task_queue": "orders", "ui_url": "https://ui.example", "tls": False}
    connections["own"] = temporal(host="t.example", port=7, password=SECRET, extra=extra)
    target = await TemporalHook("own").target()
    assert target == Target(
        address="t.example:7",
        namespace="shop.a1b2c",
        task_queue="orders",
        api_key=SECRET,
        tls=False,
        ui_url="https://ui.example",
    )
    hush(target, TemporalHook("own"))


async def test_an_empty_connection_is_the_local_server(connections: Connections) -> None:
    connections["own"] = temporal()
    assert await TemporalHook("own").target() == Target(address="localhost:7233")


@pytest.mark.parametrize(
    ("password", "tls", "expected"),
    [(SECRET, None, True), (SECRET, "off", False), (None, None, False), (None, True, True), ("", None, False)],
)
async def test_a_key_does_not_travel_in_the_clear_by_default(
    connections: Connections, password: str | None, tls: Any, expected: bool
) -> None:
    connections["own"] = temporal(host="h", password=password, extra={"tls": tls})
    assert (await TemporalHook("own").target()).tls is expected


async def test_missing_wrong_and_broken_connections_are_refused(connections: Connections, hush: Hush) -> None:
    connections["http"] = {"conn_type": "http", "password": SECRET}
    connections["broken"] = temporal(password=SECRET, extra="{" + SECRET)
    connections["tls"] = temporal(password=SECRET, extra={"tls": "maybe"})
    for conn_id, says in [
        ("none", "no connection 'none'"),
        ("http", "is of type 'http'"),
        ("broken", "not a JSON object"),
        ("tls", "tls of connection 'tls' is 'maybe'"),
    ]:
        with pytest.raises(InvalidSetting, match=says) as caught:
            await TemporalHook(conn_id).target()
        hush(caught.value)
        worked, told = await asyncio.to_thread(TemporalHook(conn_id).test_connection)
        assert (worked, told) == (False, str(caught.value))


async def test_a_client_of_the_server(connections: Connections, temporal_server: TemporalServer) -> None:
    connections["temporal_default"] = temporal_server.connection
    client, target = await TemporalHook().client()
    assert client.namespace == target.namespace == "default"
    assert target.address == temporal_server.address
    assert target.ui_url == temporal_server.ui_url


# the button in Airflow's form


def test_the_connection_is_tested(connections: Connections, temporal_server: TemporalServer) -> None:
    connections["own"] = temporal_server.connection
    hook = BaseHook.get_hook("own")
    assert isinstance(hook, TemporalHook)
    worked, told = hook.test_connection()
    assert (worked, told) == (
        True,
        f"the Temporal server at {temporal_server.address} answers and has the namespace 'default'",
    )


def test_a_namespace_that_the_server_has_not(connections: Connections, temporal_server: TemporalServer) -> None:
    connections["own"] = {**temporal_server.connection, "extra": {"namespace": "elsewhere"}}
    worked, told = TemporalHook("own").test_connection()
    assert not worked
    assert temporal_server.address in told
    assert "namespace 'elsewhere'" in told
    assert "NOT_FOUND" in told


def test_a_server_that_is_down(connections: Connections, unused_tcp_port: int, hush: Hush) -> None:
    connections["own"] = temporal(host="127.0.0.1", port=unused_tcp_port, password=SECRET, extra={"tls": False})
    worked, told = TemporalHook("own").test_connection()
    assert not worked
    assert f"127.0.0.1:{unused_tcp_port}, namespace 'default' cannot be reached; see that it runs" in told
    with pytest.raises(TemporalUnavailable) as caught:
        asyncio.run(TemporalHook("own").client())
    assert caught.value.retryable
    hush(told, caught.value)


def test_a_host_that_is_none(connections: Connections) -> None:
    connections["own"] = temporal(host="localhost:7233")
    worked, told = TemporalHook("own").test_connection()
    assert not worked
    assert told.startswith("'localhost:7233:7233' is no address of a Temporal server")
