"""``airflow beluga config``: what is in force, and where each value came from."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from beluga_airflow.config import Settings
from beluga_airflow.config.reader import KEYS, ConfigFile
from beluga_airflow.errors import BelugaError
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.settings import config_in_force
from beluga_airflow.hooks.state import StateHook, default_url
from beluga_airflow.hooks.temporal import TemporalHook
from beluga_airflow.state import open_store

__all__ = ["config"]

VARIABLE = "AIRFLOW__BELUGA__CONFIG_FILE"
HOOKS: dict[str, type[LLMHook | TemporalHook | StateHook]] = {
    "llm": LLMHook,
    "orchestration.workflow.temporal": TemporalHook,
    "state": StateHook,
}
"""Whose default connection goes before the settings of a section."""


@dataclass(frozen=True, kw_only=True)
class _InForce:
    """A value, as the terminal shows it, and where it came from."""

    key: str
    value: Any
    origin: str


def config(arguments: Namespace) -> None:
    """Print the settings in force. Exits 1 with the reason where there is a fault in them."""
    # connections that were made in Airflow's UI are in its database; this is how its own servers find them
    os.environ.setdefault("_AIRFLOW_PROCESS_CONTEXT", "server")
    try:
        file = config_in_force()
        found = [*_in_force(file, asyncio.run(_connections()))]
    except BelugaError as error:
        sys.exit(f"beluga config: {error}")
    if arguments.json:
        settings = {one.key: {"value": one.value, "from": one.origin} for one in found}
        print(json.dumps({"config_file": str(file.path) if file else None, "settings": settings}, indent=2))
        return
    for line in _table(file, found):
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding))


async def _connections() -> dict[str, tuple[Any, str]]:
    """What the default connections say, by key, each with the connection's name."""
    said = {}
    for section, kind in HOOKS.items():
        hook = kind()
        connection = await hook.connection()
        for name, value in (hook.told(connection) if connection else {}).items():
            said[f"{section}.{name}"] = value, kind.default_conn_name
    return said


def _in_force(file: ConfigFile | None, said: dict[str, tuple[Any, str]]) -> Iterator[_InForce]:
    settings = file.settings if file else Settings()
    for key in KEYS:
        value = _value(settings, key)
        origin = file.origins.get(key) if file else None
        told = "default"
        if key in said:
            value, name = said[key]
            told = f"connection {name}"
        elif file and origin:
            filled = "".join(f", ${{{name}}}" for name in origin.variables)
            told = f"{file.path}:{origin.line}{filled}"
        if key == "state.url":
            # as the store itself shows it: without its password
            value = open_store(value or default_url()).url
        yield _InForce(key=key, value=value, origin=told)


def _value(settings: Settings, key: str) -> Any:
    found: Any = settings
    for name in key.removeprefix("orchestration.").split("."):
        found = getattr(found, name)
    return found


def _table(file: ConfigFile | None, found: list[_InForce]) -> Iterator[str]:
    named = VARIABLE if VARIABLE in os.environ else "[beluga] config_file in airflow.cfg"
    yield f"file: {file.path} ({named})" if file else f"file: none ({VARIABLE}, or [beluga] config_file in airflow.cfg)"
    yield ""
    rows = [(one.key, _shown(one), one.origin) for one in found]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, origin in rows:
        yield f"{key.ljust(wide[0])}  {value.ljust(wide[1])}  {origin}"


def _shown(one: _InForce) -> str:
    if one.value is None:
        return "as elsewhere"
    if isinstance(one.value, bool):
        return str(one.value).lower()
    if one.key.endswith(".timeout"):
        return f"{one.value:.12g} s"
    text = str(one.value)
    return text if text.isprintable() else ascii(text)
