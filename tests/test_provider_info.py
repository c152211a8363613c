"""What Airflow learns of the provider, checked by Airflow's own schemas, its providers manager and its CLI."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import airflow
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types

from beluga_airflow.provider_info import get_provider_info

SCHEMAS = Path(airflow.__path__[0])
TYPES = {entry["connection-type"]: entry for entry in get_provider_info()["connection-types"]}


def python(program: str, *arguments: str, **environment: str) -> str:
    """What a program prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_it_is_what_airflows_schemas_ask_for() -> None:
    # the one that Airflow checks at run time; and the parts of the other that the first leaves open
    whole = json.loads((SCHEMAS / "provider_info.schema.json").read_text())
    parts = json.loads((SCHEMAS / "provider.yaml.schema.json").read_text())["properties"]
    info = get_provider_info()
    faults = [*Draft202012Validator(whole).iter_errors(info)]
    for name in ("connection-types", "integrations", "operators", "sensors", "hooks", "triggers", "extra-links"):
        faults += Draft202012Validator(parts[name]).iter_errors(info[name])
    assert [fault.message for fault in faults] == []


def test_airflow_finds_it() -> None:
    (entry,) = [e for e in entry_points(group="apache_airflow_provider") if e.value.startswith("beluga_airflow.")]
    assert entry.load()() == get_provider_info()


def test_airflow_loads_the_plugin() -> None:
    from airflow.plugins_manager import is_valid_plugin

    (entry,) = [e for e in entry_points(group="airflow.plugins") if e.value.startswith("beluga_airflow.")]
    assert is_valid_plugin(entry.load())


def test_everything_it_names_is_there() -> None:
    info = get_provider_info()
    for kind in ("operators", "sensors", "hooks", "triggers"):
        for entry in info[kind]:
            assert entry["integration-name"] in {
                integration["integration-name"] for integration in info["integrations"]
            }
            for module in entry["python-modules"]:
                assert importlib.import_module(module).__all__
    decorators = [entry["class-name"] for entry in info["task-decorators"]]
    for path in [*info["extra-links"], *info["cli"], *decorators]:
        assert callable(loaded(path))
    for conn_type, entry in TYPES.items():
        hook = loaded(entry["hook-class-name"])
        assert (hook.conn_type, hook.hook_name) == (conn_type, entry["hook-name"])
        assert callable(hook.test_connection)
        # Airflow makes the hook by this argument
        assert getattr(hook(**{hook.conn_name_attr: "own"}), hook.conn_name_attr) == "own"
        assert "-" not in conn_type, "a hyphen breaks connections that are given as a URI"


def test_every_module_of_the_rooms_is_named() -> None:
    rooms = {"operators": "Operator", "sensors": "Sensor", "hooks": "Hook", "triggers": "Trigger"}
    root = Path(importlib.import_module("beluga_airflow").__path__[0])
    for room, ending in rooms.items():
        named = {module for entry in get_provider_info()[room] for module in entry["python-modules"]}
        public = set()
        for file in (root / room).glob("*.py"):
            module = f"beluga_airflow.{room}.{file.stem}"
            if file.stem != "__init__" and any(
                name.endswith(ending) for name in importlib.import_module(module).__all__
            ):
                public.add(module)
        assert named == public


# the connection forms


@pytest.fixture(scope="module")
def manager() -> Iterator[Any]:
    from airflow.providers_manager import ProvidersManager

    manager: Any = ProvidersManager()  # type: ignore[no-untyped-call]  # Airflow's
    yield manager
    manager._cleanup()


def fields(manager: Any, conn_type: str) -> dict[str, Any]:
    prefix = f"extra__{conn_type}__"
    return {
        name.removeprefix(prefix): widget
        for name, widget in manager._connection_form_widgets.items()
        if name.startswith(prefix)
    }


def test_the_forms_appear(manager: Any) -> None:
    manager.initialize_providers_hooks()
    manager._load_ui_metadata()
    expected = {
        "beluga_llm": [
            *("provider", "model", "base_url", "timeout", "structured_output", "logprobs"),
            *("failure_threshold", "recovery_timeout"),
            *("requests_per_minute", "tokens_per_minute", "concurrent_calls", "max_wait"),
            *("tokens_per_day", "dollars_per_day"),
        ],
        "temporal": ["namespace", "task_queue", "tls", "ui_url"],
        "beluga_state": ["url"],
    }
    for conn_type, names in expected.items():
        assert manager._hook_name_dict[conn_type] == TYPES[conn_type]["hook-name"]
        assert list(fields(manager, conn_type)) == names
        for name, widget in fields(manager, conn_type).items():
            schema = widget.field["schema"]
            Draft202012Validator.check_schema(schema)
            assert schema["title"], f"{conn_type}.{name} has a label"
            assert Draft202012Validator(schema).is_valid(None), "a field may be left empty"
        assert manager._field_behaviours[conn_type]["hidden_fields"]
        # they come from the provider's metadata: the hook's own methods for forms are deprecated
        assert (
            not {"get_connection_form_widgets", "get_ui_field_behaviour"}
            & vars(loaded(TYPES[conn_type]["hook-class-name"])).keys()
        )


def test_what_may_hold_a_secret_is_a_password_field(manager: Any) -> None:
    manager._load_ui_metadata()
    assert fields(manager, "beluga_state")["url"].is_sensitive
    for conn_type in ("beluga_llm", "temporal"):
        behaviour = manager._field_behaviours[conn_type]
        assert behaviour["relabeling"] == {"password": "API key"}, "Airflow's own password field, which it hides"
        assert "password" not in behaviour["hidden_fields"]
        assert "extra" in behaviour["hidden_fields"], "which Airflow shows as plain text"
    assert "password" in manager._field_behaviours["beluga_state"]["hidden_fields"]


@pytest.mark.parametrize(
    ("conn_type", "field", "value", "valid"),
    [
        ("beluga_llm", "timeout", 0.5, True),
        ("beluga_llm", "timeout", 0, False),
        ("beluga_llm", "timeout", "soon", False),
        ("beluga_llm", "model", "gpt-4o", True),
        ("beluga_llm", "structured_output", "text", True),
        ("beluga_llm", "structured_output", "json", False),
        ("beluga_llm", "logprobs", None, True),
        ("beluga_llm", "logprobs", "on", True),
        ("beluga_llm", "logprobs", "maybe", False),
        ("beluga_llm", "failure_threshold", 3, True),
        ("beluga_llm", "failure_threshold", 0, False),
        ("beluga_llm", "tokens_per_minute", 1.5, False),
        ("temporal", "tls", True, True),
        ("temporal", "tls", "maybe", False),
    ],
)
def test_the_form_checks_its_fields(conn_type: str, field: str, value: Any, valid: bool) -> None:
    schema = TYPES[conn_type]["conn-fields"][field]["schema"]
    assert Draft202012Validator(schema).is_valid(value) is valid


# its section of airflow.cfg


def test_airflow_knows_its_options(tmp_path: Path) -> None:
    listed = python(
        "import sys; from airflow.__main__ import main; sys.argv = "
        "['airflow', 'config', 'list', '--section', 'beluga', '--include-descriptions', '--include-examples']; main()",
        AIRFLOW_HOME=str(tmp_path),
    )
    assert "[beluga]" in listed
    assert "# Example: config_file = /etc/airflow/beluga.yaml" in listed
    assert "whenever a flow starts" in " ".join(listed.split())


# what Airflow's processes pay for it


def test_asking_for_it_imports_nothing() -> None:
    program = """
import sys
before = set(sys.modules)
from beluga_airflow.provider_info import get_provider_info
get_provider_info()
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
print(*sorted(name for name in sys.modules if name.startswith("beluga_airflow")))
"""
    assert python(program).splitlines() == ["beluga_airflow", "beluga_airflow beluga_airflow.provider_info"]


def test_the_commands_are_listed(tmp_path: Path) -> None:
    listed = python(
        "import sys; from airflow.__main__ import main; sys.argv = ['airflow', 'beluga', '--help']; main()",
        AIRFLOW_HOME=str(tmp_path),
        COLUMNS="200",
    )
    assert "Flows, decisions and their workers" in listed
    for line in ("worker            Run flows from Temporal", "model-server      Run a local server that simulates"):
        assert " ".join(line.split()) in " ".join(listed.split())
