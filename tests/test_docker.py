"""The compose file says what the package understands. No container engine is asked."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).resolve().parents[1] / "docker"


def interpolated(text: str, environment: dict[str, str]) -> str:
    """A value as docker compose fills it in, for the forms that the file uses."""

    def value(match: re.Match[str]) -> str:
        name, operator, default = match.groups()
        found = environment.get(name)
        return default if found is None or (operator.startswith(":") and not found) else found

    return re.sub(r"\$\{(\w+)(:-|-|:\?)([^}]*)\}", value, text)


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    return found


def connection(name: str, environment: dict[str, str]) -> dict[str, Any]:
    text = services()["worker"]["environment"][f"AIRFLOW_CONN_{name}"]
    found: dict[str, Any] = json.loads(interpolated(text, environment))
    return found


def test_the_connections_are_of_types_that_the_provider_has() -> None:
    from beluga_airflow.provider_info import get_provider_info

    types = {each["connection-type"] for each in get_provider_info()["connection-types"]}
    names = ("TEMPORAL_DEFAULT", "BELUGA_LLM_DEFAULT", "BELUGA_STATE_DEFAULT")
    assert {connection(name, {})["conn_type"] for name in names} == types


def test_a_simulated_model_answers_unless_another_is_named() -> None:
    assert connection("BELUGA_LLM_DEFAULT", {})["extra"] == {
        "provider": "simulated",
        "base_url": "http://model:8400/v1",
    }
    real = {"BELUGA_LLM_PROVIDER": "openai", "BELUGA_LLM_BASE_URL": ""}
    assert connection("BELUGA_LLM_DEFAULT", real)["extra"] == {"provider": "openai", "base_url": ""}


def test_every_service_waits_for_services_that_exist() -> None:
    for name, service in services().items():
        assert set(service.get("depends_on", {})) <= services().keys(), name


def test_the_worker_and_the_model_are_commands_of_ours() -> None:
    from beluga_airflow.cli.commands import get_commands

    (group,) = get_commands()
    words = shlex.split(services()["worker"]["command"])
    (command,) = [each for each in group.subcommands if each.name == words[2]]
    assert words[:2] == ["airflow", "beluga"]
    assert {word for word in words if word.startswith("--")} <= {flag for each in command.args for flag in each.flags}
    assert "beluga_airflow.llm.model_server" in services()["model"]["command"]


def test_the_image_is_of_the_airflow_that_is_tested() -> None:
    import airflow

    assert f"apache/airflow:{airflow.__version__}-" in (DOCKER / "Dockerfile").read_text()
