from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, BaseHook, task

from beluga_airflow import state as state_room
from beluga_airflow.errors import InvalidSetting, StateError, StateUnavailable
from beluga_airflow.hooks.state import StateHook, default_url
from beluga_airflow.testing import OperatorRunner
from tests.hooks.conftest import SECRET

Connections = dict[str, Any]
Hush = Callable[..., None]


def state(url: str | None) -> dict[str, Any]:
    return {"conn_type": "beluga_state", "password": SECRET, "extra": {"url": url}}


async def url_of(conn_id: str) -> str:
    store = await StateHook(conn_id).store()
    await store.close()
    return store.url


async def test_without_a_connection_it_is_a_file_in_airflows_home(connections: Connections, home: Path) -> None:
    file = home / "beluga" / "state.db"
    assert default_url() == f"sqlite:///{file}"
    hook = StateHook()
    store = await hook.store()
    await store.set("a", 1)
    await store.close()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    connections["beluga_state_default"] = state(None)
    assert await url_of("beluga_state_default") == default_url()


def test_the_default_may_be_in_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("AIRFLOW_HOME")
    assert default_url() == "sqlite:////home/ada/airflow/beluga/state.db"
    monkeypatch.setenv("AIRFLOW_HOME", "~/flows")
    assert default_url() == "sqlite:////home/ada/flows/beluga/state.db"


async def test_a_connection_says_where(connections: Connections, tmp_path: Path) -> None:
    connections["file"] = state(f"sqlite:///{tmp_path / 'x.db'}")
    connections["memory"] = state("memory://")
    assert await url_of("file") == f"sqlite:///{tmp_path / 'x.db'}"
    assert await url_of("memory") == "memory://"


@pytest.mark.parametrize(
    "connection",
    [
        # another file in each process
        {"conn_type": "sqlite", "host": "state.db"},
        state("sqlite:///state.db"),
        # libpq would take a part of the password for the host
        state(f"postgresql://u:pw/{SECRET}@h/db"),
        state(f"postgresql://u:pw@{SECRET}@h/db"),
    ],
)
async def test_a_url_that_means_something_else_is_refused(
    connections: Connections, connection: dict[str, Any], hush: Hush
) -> None:
    connections["own"] = connection
    with pytest.raises(InvalidSetting, match=r"connection 'own' .* such as sqlite:////path/") as caught:
        await url_of("own")
    hush(caught.value)


async def test_missing_wrong_and_broken_connections_are_refused(connections: Connections, hush: Hush) -> None:
    connections["http"] = {"conn_type": "http", "password": SECRET}
    connections["broken"] = {**state("memory://"), "extra": "{" + SECRET}
    connections["other"] = state(f"mysql://u:{SECRET}@h/db")
    for conn_id, says in [
        ("none", "no connection 'none'"),
        ("http", "is of type 'http'"),
        ("broken", "not a JSON object"),
        ("other", "what connection 'other' names cannot be used"),
    ]:
        with pytest.raises(InvalidSetting, match=says) as caught:
            await StateHook(conn_id).store()
        hush(caught.value)
        worked, told = await asyncio.to_thread(StateHook(conn_id).test_connection)
        assert (worked, told) == (False, str(caught.value))


def test_a_plain_task_uses_it(operator_runner: OperatorRunner, home: Path) -> None:
    with DAG("orders", schedule=None):

        @task
        def count() -> Any:
            hook = StateHook()
            hook.set("runs", {"n": hook.get("runs", {"n": 0})["n"] + 1})
            return [hook.get("runs"), hook.get("absent"), hook.get("absent", 7)]

        operator: Any = count().operator  # type: ignore[attr-defined]  # of what a decorated task returns
    assert operator_runner.run(operator, run_id="r1").return_value == [{"n": 1}, None, 7]
    # another task, in another process as a rule, sees what the first one kept
    assert operator_runner.run(operator, run_id="r2").return_value == [{"n": 2}, None, 7]


def test_a_value_that_is_no_json_is_refused(connections: Connections, home: Path) -> None:
    with pytest.raises(StateError, match="state key 'a' is not JSON"):
        StateHook().set("a", object())
    assert StateHook().get("a") is None


def test_a_store_that_is_not_there(connections: Connections, tmp_path: Path) -> None:
    connections["own"] = state(f"sqlite:///{tmp_path}")  # a folder
    with pytest.raises(StateUnavailable, match="cannot be used now"):
        StateHook("own").get("a")
    with pytest.raises(StateUnavailable, match="cannot be used now"):
        StateHook("own").set("a", 1)
    worked, told = StateHook("own").test_connection()
    assert not worked
    assert f"sqlite:///{tmp_path} cannot be used now" in told


def test_the_connection_is_tested(connections: Connections, tmp_path: Path, hush: Hush) -> None:
    connections["own"] = state(f"sqlite:///{tmp_path / 'state.db'}")
    hook = BaseHook.get_hook("own")
    assert isinstance(hook, StateHook)
    worked, told = hook.test_connection()
    assert worked
    assert told.startswith(f"the state store sqlite:///{tmp_path / 'state.db'} takes and gives back values")
    assert hook.get("beluga/connection-test") is None, "the test leaves nothing behind"
    hush(told, hook)


# Airflow's own connections


@pytest.mark.parametrize(
    ("connection", "shown", "whole"),
    [
        (
            {"conn_type": "redis", "host": "cache", "password": "p@/:?#", "extra": {"db": 3}},
            "redis://cache:6379/3",
            "redis://:p%40%2F%3A%3F%23@cache:6379/3",
        ),
        (
            {
                "conn_type": "redis",
                "host": "cache",
                "port": 6380,
                "extra": {"ssl": True, "ssl_ca_certs": "/etc/ca.pem"},
            },
            "rediss://cache:6380/0",
            "rediss://cache:6380/0?ssl_ca_certs=%2Fetc%2Fca.pem",
        ),
        (
            {
                "conn_type": "postgres",
                "host": "db",
                "login": "a da",
                "password": "p@",
                "schema": "shop",
                "extra": {"sslmode": "require", "cursor": "dictcursor"},
            },
            "postgresql://db:5432/shop",
            "postgresql://a%20da:p%40@db:5432/shop?sslmode=require",
        ),
        ({"conn_type": "postgres"}, "postgresql://localhost:5432/postgres", "postgresql://localhost:5432/postgres"),
        ({"conn_type": "sqlite", "host": "/var/lib/x.db"}, "sqlite:////var/lib/x.db", "sqlite:////var/lib/x.db"),
    ],
)
async def test_airflows_own_connections_are_taken(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any], shown: str, whole: str
) -> None:
    connections["own"] = connection
    assert await url_of("own") == shown
    opened: list[str] = []
    monkeypatch.setattr(state_room, "open_store", opened.append)
    await StateHook("own").store()
    assert opened == [whole]


async def test_a_sqlite_connection_without_a_file_is_refused(connections: Connections) -> None:
    connections["own"] = {"conn_type": "sqlite"}
    with pytest.raises(InvalidSetting, match="connection 'own' of type 'sqlite' names no file; write its path as host"):
        await StateHook("own").store()
