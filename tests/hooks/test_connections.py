from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from airflow.sdk import Connection

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.hooks.connections import bounded_number, find_connection, flag, text
from tests.hooks.conftest import SECRET

Connections = dict[str, Any]
Hush = Callable[..., None]


async def find(conn_id: str = "own") -> Connection | None:
    return await find_connection(conn_id, default="the_default", conn_types=("beluga_llm",))


async def found(connections: Connections, extra: Any) -> Connection:
    connections["own"] = {"conn_type": "beluga_llm", "password": SECRET, "extra": extra}
    connection = await find()
    assert connection is not None
    return connection


async def test_a_default_that_nobody_made_is_none(connections: Connections) -> None:
    assert await find("the_default") is None
    connections["the_default"] = {"conn_type": "beluga_llm", "host": "h"}
    connection = await find("the_default")
    assert connection is not None
    assert connection.host == "h"


async def test_a_named_connection_must_exist(connections: Connections) -> None:
    with pytest.raises(InvalidSetting) as caught:
        await find("own")
    assert str(caught.value) == (
        "there is no connection 'own'; make one of type 'beluga_llm' in Airflow (Admin, Connections), or leave the "
        "argument out to use 'the_default'"
    )
    assert caught.value.__suppress_context__


async def test_a_connection_of_another_type_is_refused(connections: Connections, hush: Hush) -> None:
    for conn_id in ("own", "the_default"):
        connections[conn_id] = {"conn_type": "http", "password": SECRET, "host": SECRET, "extra": {"x": SECRET}}
        with pytest.raises(InvalidSetting, match=f"connection '{conn_id}' is of type 'http', it must be") as caught:
            await find(conn_id)
        hush(caught.value)


@pytest.mark.parametrize("value", ['{"conn_type": "beluga_llm", "password": "' + SECRET, "{}}" + SECRET])
async def test_an_environment_variable_that_cannot_be_read_is_no_default(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, value: str, hush: Hush
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_THE_DEFAULT", value)
    with pytest.raises(InvalidSetting, match="AIRFLOW_CONN_THE_DEFAULT is there but Airflow cannot read it") as caught:
        await find("the_default")
    hush(caught.value)


@pytest.mark.parametrize(
    "form",
    [
        f'{{"conn_type": "beluga_llm", "password": "{SECRET}", "extra": {{"model": "m", "timeout": 5}}}}',
        f"beluga-llm://:{SECRET}@/?model=m&timeout=5",
    ],
)
async def test_environment_variables_in_both_forms(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OWN", form)
    connection = await find()
    assert connection is not None
    assert connection.password == SECRET
    assert (text(connection, "model"), bounded_number(connection, "timeout")) == ("m", 5.0)


@pytest.mark.parametrize("extra", ["{broken " + SECRET, "[1]", '"text"', "5", "true", "null", '{"a": 1'])
async def test_an_extra_that_is_no_object_is_refused(connections: Connections, extra: str, hush: Hush) -> None:
    connection = await found(connections, extra)
    with pytest.raises(InvalidSetting, match="the extra of connection 'own' is not a JSON object; mend it") as caught:
        text(connection, "model")
    hush(caught.value)


@pytest.mark.parametrize(
    ("extra", "value"),
    [(None, None), ("", None), ({}, None), ({"x": ""}, None), ({"x": None}, None), ({"x": "a"}, "a"), ({"x": 5}, "5")],
)
async def test_a_text_of_the_extra(connections: Connections, extra: Any, value: str | None) -> None:
    assert text(await found(connections, extra), "x") == value


@pytest.mark.parametrize(("value", "number"), [(5, 5.0), ("0.5", 0.5), (None, None), ("", None)])
async def test_a_number_of_the_extra(connections: Connections, value: Any, number: float | None) -> None:
    assert bounded_number(await found(connections, {"timeout": value}), "timeout") == number


@pytest.mark.parametrize("value", [0, -1, "soon", "inf", "nan", True, [1]])
async def test_a_number_that_is_none(connections: Connections, value: Any) -> None:
    connection = await found(connections, {"timeout": value})
    with pytest.raises(InvalidSetting, match=r"timeout of connection 'own' is .* it must be a number above 0"):
        bounded_number(connection, "timeout")


@pytest.mark.parametrize(
    ("values", "answer"),
    [((True, "True", "1", 1, " on ", "yes"), True), ((False, 0, "off", "NO"), False), ((None, ""), True)],
)
async def test_a_flag_of_the_extra(connections: Connections, values: tuple[Any, ...], answer: bool) -> None:
    for value in values:
        assert flag(await found(connections, {"tls": value}), "tls", default=True) is answer


async def test_a_flag_that_is_none(connections: Connections) -> None:
    connection = await found(connections, {"tls": "required"})
    with pytest.raises(InvalidSetting, match="tls of connection 'own' is 'required', it must be true or false"):
        flag(connection, "tls", default=False)
