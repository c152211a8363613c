"""What the launcher gives its programs, and what it says where nothing can be started."""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from beluga_airflow.cli import database, demo, parts, processes, stack
from beluga_airflow.cli.supervisor import Part


@pytest.fixture
def site(tmp_path: Path) -> parts.Site:
    ports = {"airflow": 8080, "worker_logs": 8793, "trigger_logs": 8794, "temporal": 7233, "temporal_ui": 8233}
    return parts.Site(state=tmp_path, dags=tmp_path / "dags", model=8089, **ports)


async def parts_of(site: parts.Site) -> dict[str, Part]:
    async with demo.AirflowApi(site.airflow_url) as api:
        return {part.name: part for part in parts.parts(site, api)}


async def test_no_other_installation_leaks_into_the_stack(site: parts.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", "/elsewhere")
    monkeypatch.setenv("AIRFLOW__CORE__EXECUTOR", "CeleryExecutor")
    monkeypatch.setenv("AIRFLOW_CONN_BELUGA_LLM_DEFAULT", "{}")
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", "postgres://")
    monkeypatch.setenv("TEMPORAL_ADDRESS", "cloud:7233")
    monkeypatch.setenv("no_proxy", "intranet")

    env = (await parts_of(site))["airflow"].env

    assert env["AIRFLOW_HOME"] == str(site.state / "airflow")
    assert env["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    assert env["AIRFLOW__API__HOST"] == "127.0.0.1", "nobody logs in, so nobody else may reach it"
    assert "AIRFLOW_CONN_WAREHOUSE" not in env
    assert "TEMPORAL_ADDRESS" not in env
    assert env["no_proxy"] == "intranet,127.0.0.1,localhost"
    assert not any(name.startswith("AIRFLOW__BELUGA__") for name in env)
    temporal = json.loads(env["AIRFLOW_CONN_TEMPORAL_DEFAULT"])
    assert (temporal["conn_type"], temporal["port"]) == ("temporal", 7233)


async def test_airflow_gets_sessions_that_do_not_lock_each_other_out(site: parts.Site) -> None:
    module, _, name = (
        (await parts_of(site))["airflow"].env["AIRFLOW__DATABASE__SQL_ALCHEMY_SESSION_MAKER"].rpartition(".")
    )

    assert getattr(importlib.import_module(module), name) is database.sessions


async def test_airflow_reads_while_it_writes(site: parts.Site) -> None:
    await parts_of(site)

    with closing(sqlite3.connect(site.state / "airflow" / "airflow.db")) as file:
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_keys_are_made_once_and_are_private(site: parts.Site) -> None:
    names = ("AIRFLOW__CORE__FERNET_KEY", "AIRFLOW__API_AUTH__JWT_SECRET", "AIRFLOW__API__SECRET_KEY")
    first = (await parts_of(site))["airflow"].env
    second = (await parts_of(site))["airflow"].env

    assert [first[name] for name in names] == [second[name] for name in names]
    assert len({first[name] for name in names}) == 3
    assert len(first["AIRFLOW__API_AUTH__JWT_SECRET"]) >= 64
    assert (site.state / "secrets.json").stat().st_mode & 0o777 == 0o600


async def test_without_a_key_the_model_is_simulated(site: parts.Site) -> None:
    some = await parts_of(site)

    assert set(some) == {"temporal", "model", "airflow", "worker"}
    connection = json.loads(some["worker"].env["AIRFLOW_CONN_BELUGA_LLM_DEFAULT"])
    assert connection["extra"]["provider"] == "simulated"
    assert connection["extra"]["base_url"] == "http://127.0.0.1:8089/v1"


async def test_with_a_key_nothing_is_simulated_and_only_who_needs_it_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with processes.Ports() as ports:
        site = parts.claim_site(tmp_path, tmp_path / "dags", ports)
    some = await parts_of(site)

    assert set(some) == {"temporal", "airflow", "worker"}
    assert {name for name, part in some.items() if "OPENAI_API_KEY" in part.env} == {"airflow", "worker"}
    assert "AIRFLOW_CONN_BELUGA_LLM_DEFAULT" not in some["worker"].env
    assert not any("sk-test" in word for part in some.values() for word in part.argv)


def test_what_cannot_be_started_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stack.main(["up", "--state-dir", str(tmp_path / "odd?"), "--dags", str(tmp_path)]) == 1
    assert "'?'" in capsys.readouterr().err
    assert stack.main(["demo", "--state-dir", str(tmp_path), "--dags", str(tmp_path / "none")]) == 1
    assert "give --dags" in capsys.readouterr().err


def test_down_where_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert stack.main(["down", "--state-dir", str(folder)]) == 0
        assert "No stack is running" in capsys.readouterr().out


def test_a_second_stack_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with processes.lock(tmp_path / "stack.lock"):
        assert stack.main(["up", "--state-dir", str(tmp_path), "--dags", str(tmp_path)]) == 1
    complaint = capsys.readouterr().err
    assert f"A stack is running in {tmp_path}, process {os.getpid()}" in complaint
    assert "make down" in complaint


def test_the_launcher_loads_neither_airflow_nor_temporalio() -> None:
    program = "import sys, beluga_airflow.cli.stack; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert "beluga_airflow" in loaded
    assert not {"airflow", "temporalio", "openai"} & set(loaded)
