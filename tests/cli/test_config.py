"""`airflow beluga config`, as a user runs it; and `airflow beluga show` under the same settings."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from beluga_airflow import Chain, Retry
from beluga_airflow.cli.config import config
from beluga_airflow.cli.show import draw, show
from beluga_airflow.config import ChainSettings, Settings, WorkflowSettings
from beluga_airflow.config.reader import KEYS

Write = Callable[[str], Path]
SECRET = "hush-5e11"  # noqa: S105  # made up
TEXT = """\
orchestration:
  chain:
    timeout: 5m
  workflow:
    max_retries: ${RETRIES}
llm:
  model: gpt-4o-mini
state:
  url: redis://:${PASSWORD}@localhost:6379/0
"""


def run(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_CONN", "AIRFLOW__BEL"))}
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "airflow", "beluga", "config", *arguments],
        env={**kept, "AIRFLOW_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_prints_what_is_in_force_and_where_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "beluga.yaml"
    path.write_text(TEXT)
    done = run(
        tmp_path,
        AIRFLOW__BELUGA__CONFIG_FILE="beluga.yaml",
        RETRIES="5",
        PASSWORD=SECRET,
        AIRFLOW_CONN_TEMPORAL_DEFAULT='{"conn_type": "temporal", "host": "t.example", "password": "' + SECRET + '"}',
        AIRFLOW_CONN_BELUGA_LLM_DEFAULT='{"conn_type": "beluga_llm", "extra": {"timeout": 2.5}}',
    )
    assert done.returncode == 0, done.stderr
    head, empty, *rows = done.stdout.splitlines()
    assert (head, empty) == (f"file: {path} (AIRFLOW__BELUGA__CONFIG_FILE)", "")
    assert [row.split(maxsplit=1)[0] for row in rows] == list(KEYS)
    told = {key: (value, origin) for key, value, origin in (_cells(row) for row in rows)}
    assert told == {
        "orchestration.chain.timeout": ("300 s", f"{path}:3"),
        "orchestration.chain.max_retries": ("3", "default"),
        "orchestration.graph.max_workers": ("10", "default"),
        "orchestration.graph.parallel_execution": ("true", "default"),
        "orchestration.graph.timeout": ("600 s", "default"),
        "orchestration.workflow.temporal.address": ("t.example:7233", "connection temporal_default"),
        "orchestration.workflow.temporal.namespace": ("default", "default"),
        "orchestration.workflow.temporal.task_queue": ("beluga-workflows", "default"),
        "orchestration.workflow.timeout": ("3600 s", "default"),
        "orchestration.workflow.max_retries": ("5", f"{path}:5, ${{RETRIES}}"),
        "llm.provider": ("openai", "default"),
        "llm.model": ("gpt-4o-mini", f"{path}:7"),
        "llm.timeout": ("2.5 s", "connection beluga_llm_default"),
        "state.url": ("redis://localhost:6379/0", f"{path}:9, ${{PASSWORD}}"),
    }
    assert SECRET not in done.stdout + done.stderr


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("  ") if cell.strip()]


def test_airflow_cfg_names_the_file_and_json_is_for_programs(tmp_path: Path) -> None:
    (tmp_path / "airflow.cfg").write_text(f"[beluga]\nconfig_file = {tmp_path / 'own.yaml'}\n")
    (tmp_path / "own.yaml").write_text("llm: {timeout: 1h}\n")
    done = run(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["config_file"] == str(tmp_path / "own.yaml")
    assert list(told["settings"]) == list(KEYS)
    assert told["settings"]["llm.timeout"] == {"value": 3600.0, "from": f"{tmp_path / 'own.yaml'}:1"}
    assert told["settings"]["orchestration.workflow.max_retries"] == {"value": None, "from": "default"}
    assert told["settings"]["state.url"] == {"value": f"sqlite:///{tmp_path}/beluga/state.db", "from": "default"}


def test_a_fault_ends_it_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "beluga.yaml"
    path.write_text(f"state:\n  url: '{SECRET}'\n")
    done = run(tmp_path, AIRFLOW__BELUGA__CONFIG_FILE=str(path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"beluga config: {path}:2: 'state.url' is something else (it is not")
    assert SECRET not in done.stderr


# in this process


@pytest.fixture
def printed(
    operator_runner: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """What the command prints here, where the connections are those of the runner."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "server")

    def printed() -> str:
        config(Namespace(json=False))
        return capsys.readouterr().out

    return printed


def test_without_a_file_it_says_how_to_name_one(printed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AIRFLOW__BELUGA__CONFIG_FILE", raising=False)
    head, _, *rows = printed().splitlines()
    assert head == "file: none (AIRFLOW__BELUGA__CONFIG_FILE, or [beluga] config_file in airflow.cfg)"
    assert {_cells(row)[2] for row in rows} == {"default"}
    assert _cells(rows[9])[1] == "as elsewhere"


def test_passwords_are_masked_wherever_they_come_from(printed: Any, config_file: Write, operator_runner: Any) -> None:
    for url in (
        f"postgresql://u:{SECRET}@h/db?sslpassword={SECRET}",
        f"rediss://u:{SECRET}@h:6380/1",
        f"redis://h/0?password={SECRET}",
    ):
        config_file(f"state: {{url: '{url}'}}")
        assert SECRET not in printed()
    operator_runner.connections["beluga_state_default"] = {
        "conn_type": "postgres",
        "host": "h",
        "login": "u",
        "password": SECRET,
    }
    told = printed()
    assert SECRET not in told
    assert "connection beluga_state_default" in told.splitlines()[-1]


def test_a_connection_with_a_fault_ends_it(printed: Any, operator_runner: Any) -> None:
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": {"timeout": "soon"}}
    with pytest.raises(SystemExit, match="beluga config: timeout of connection 'beluga_llm_default' is 'soon'"):
        printed()


def test_what_a_terminal_could_take_for_commands_is_escaped(printed: Any, operator_runner: Any) -> None:
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": {"model": "a\x1b[2Jb"}}
    assert r"'a\x1b[2Jb'" in printed()


# a flow is drawn as it would run


def drawn(flow: Any, settings: Settings) -> list[str]:
    file = io.StringIO()
    draw(flow.check(), Console(file=file, width=80), settings)
    return file.getvalue().splitlines()


def test_a_flow_is_drawn_under_the_settings() -> None:
    settings = Settings(chain=ChainSettings(timeout=90, max_retries=0), workflow=WorkflowSettings(max_retries=5))
    flow = Chain("orders").add_step("a", len)
    assert drawn(flow, settings)[:5] == [
        "orders: a chain of 1 step",
        "timeout 90 s*; on Temporal 3600 s*",
        "attempts of a step on Temporal 6*",
        "",
        "●  a  function  60 s*  1 attempt*",
    ]
    own = Chain("orders", retry=Retry(maximum_attempts=2)).add_step("a", len)
    assert not [line for line in drawn(own, settings) if "attempts of a step" in line]


def test_a_flow_is_drawn_under_those_in_force(
    config_file: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = Namespace(flow="tests.operators.settled_flows:open_chain", mermaid=False)
    path = config_file("orchestration: {chain: {timeout: 7m}}")
    show(arguments)
    assert "timeout 420 s*" in capsys.readouterr().out
    path.write_text("orchestration: {chain: {timeout: soon}}")
    with pytest.raises(SystemExit, match=f"beluga show: {path}:1: 'orchestration.chain.timeout' is 'soon'"):
        show(arguments)
