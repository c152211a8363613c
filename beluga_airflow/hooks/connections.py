"""Reading Airflow connections; where the default one does not exist, the settings serve."""

from __future__ import annotations

import json
import os
from typing import Any

from airflow.sdk import BaseHook, Connection
from airflow.sdk.exceptions import AirflowNotFoundException

from beluga_airflow.errors import InvalidSetting

__all__ = ["bounded_number", "find_connection", "flag", "text", "whole_number"]

FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


async def find_connection(conn_id: str, *, default: str, conn_types: tuple[str, ...]) -> Connection | None:
    """The connection, or None where it is the default one and nobody made it.

    Raises:
        InvalidSetting: a connection that was asked for by name does not exist, is of another type, or cannot be read.
    """
    try:
        connection = await BaseHook.aget_connection(conn_id)
    except AirflowNotFoundException:
        variable = f"AIRFLOW_CONN_{conn_id.upper()}"
        if variable in os.environ:
            # Airflow passes it over in silence, and then the defaults would serve in its place
            raise InvalidSetting(
                f"the environment variable {variable} is there but Airflow cannot read it as a connection; write it "
                f'as JSON, {{"conn_type": "{conn_types[0]}", ...}}'
            ) from None
        if conn_id == default:
            return None
        raise InvalidSetting(
            f"there is no connection {conn_id!r}; make one of type {conn_types[0]!r} in Airflow (Admin, Connections), "
            f"or leave the argument out to use {default!r}"
        ) from None
    if connection.conn_type not in conn_types:
        raise InvalidSetting(
            f"connection {conn_id!r} is of type {connection.conn_type!r}, it must be of type {conn_types[0]!r}"
        )
    return connection


def text(connection: Connection, field: str) -> str | None:
    """A field of the connection's extra; None where it is empty."""
    value = _extra(connection).get(field)
    return str(value) if value not in (None, "") else None


def bounded_number(connection: Connection, field: str) -> float | None:
    """A field of the connection's extra that must be a number above 0; None where it is empty.

    Raises:
        InvalidSetting: it is not.
    """
    value = text(connection, field)
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise InvalidSetting(f"{field} of connection {connection.conn_id!r} is {value!r}, it must be a number above 0")
    return number


def whole_number(connection: Connection, field: str) -> int | None:
    """A field of the connection's extra that must be a whole number, 1 or more; None where it is empty.

    Raises:
        InvalidSetting: it is not.
    """
    number = bounded_number(connection, field)
    if number is None:
        return None
    if not number.is_integer():
        raise InvalidSetting(f"{field} of connection {connection.conn_id!r} is {number:g}, it must be a whole number")
    return int(number)


def flag(connection: Connection, field: str, default: bool) -> bool:
    """A field of the connection's extra that must be true or false.

    Raises:
        InvalidSetting: it is neither.
    """
    value = text(connection, field)
    found = default if value is None else FLAGS.get(value.strip().lower())
    if found is None:
        raise InvalidSetting(f"{field} of connection {connection.conn_id!r} is {value!r}, it must be true or false")
    return found


def _extra(connection: Connection) -> dict[str, Any]:
    try:
        # not by extra_dejson, for which broken JSON is an empty extra
        extra = json.loads(connection.extra) if connection.extra else {}
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        # not the text itself: secrets are kept there
        raise InvalidSetting(f"the extra of connection {connection.conn_id!r} is not a JSON object; mend it")
    return extra
