from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import beluga_airflow
from beluga_airflow import graph

PACKAGE = Path(beluga_airflow.__file__).parent
MODULES = sorted(
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in PACKAGE.rglob("*.py")
)
HEAVY = {"airflow", "openai", "temporalio", "pydantic", "redis", "psycopg"}
ROOMS_OF_AIRFLOW = ("hooks", "triggers", "operators", "sensors", "task_group", "plugin", "cli", "testing")
ROOMS_OF_TEMPORAL = ("temporal", "cli", "testing")


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def loaded_by(code: str, env: dict[str, str] | None = None) -> set[str]:
    """The packages that a fresh process has loaded after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=env,
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_public_names_of_the_package() -> None:
    assert beluga_airflow.__all__ == [
        "BelugaError",
        "Budget",
        "Chain",
        "CircuitBreaker",
        "Decision",
        "FlowResult",
        "Graph",
        "InvalidFlow",
        "InvalidInput",
        "Memory",
        "RateLimit",
        "Retry",
        "StepContext",
        "Stop",
        "__version__",
        "run",
    ]


def test_the_public_names_of_graph() -> None:
    assert graph.__all__ == [
        "Budget",
        "Chain",
        "Decision",
        "Flow",
        "FlowResult",
        "Graph",
        "Identity",
        "Memory",
        "Outcome",
        "Retry",
        "Shape",
        "StepContext",
        "Stop",
    ]


@pytest.mark.parametrize("name", beluga_airflow.__all__)
def test_every_public_name_is_there_and_from_one_place(name: str) -> None:
    found = getattr(beluga_airflow, name)

    assert found is not None
    if name in graph.__all__:
        assert found is getattr(graph, name)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'beluga_airflow' has no attribute 'nothing'"):
        beluga_airflow.nothing  # noqa: B018


def test_the_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import version

    assert beluga_airflow.__version__ == version("beluga-airflow")


@pytest.mark.parametrize(
    "code", ["import beluga_airflow", "from beluga_airflow.provider_info import get_provider_info as f; f()"]
)
def test_importing_the_package_or_its_provider_info_costs_nothing(code: str) -> None:
    loaded = loaded_by(code)

    assert not loaded & (HEAVY | {"anyio", "tenacity", "opentelemetry", "asyncio"})


def test_defining_and_checking_a_flow_loads_nothing_heavy() -> None:
    code = "from beluga_airflow import Chain, Decision, Graph, Retry\nGraph('g').add_node('a', len).check()"

    assert not loaded_by(code) & HEAVY


def test_running_a_flow_of_plain_functions_loads_nothing_heavy() -> None:
    code = (
        "import asyncio\nfrom beluga_airflow import Chain, run\n"
        "asyncio.run(run(Chain('f').add_step('a', lambda data: None), {}))"
    )

    assert not loaded_by(code) & HEAVY


def test_no_module_outside_its_rooms_loads_airflow_or_temporalio() -> None:
    below_hooks = [module for module in MODULES if room(module) not in (*ROOMS_OF_AIRFLOW, *ROOMS_OF_TEMPORAL)]
    assert len(below_hooks) > 25

    assert not loaded_by("\n".join(f"import {module}" for module in below_hooks)) & {"airflow", "temporalio", "openai"}


def test_the_temporal_side_loads_no_airflow() -> None:
    modules = [module for module in MODULES if room(module) == "temporal"]

    loaded = loaded_by("\n".join(f"import {module}" for module in modules))

    assert "temporalio" in loaded
    assert "airflow" not in loaded
