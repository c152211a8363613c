"""Every snippet of the README does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.task_group.running import runs_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [text for language, text in SNIPPETS if language == "python"]
SHELL = [line for language, text in SNIPPETS if language == "sh" for line in text.splitlines() if line.strip()]


def test_every_snippet_is_known_to_a_test_below() -> None:
    assert [language for language, _ in SNIPPETS].count("python") == 4
    assert [line.split()[0] for line in SHELL] == ["make", "make", "pip", "airflow", "export", "export"]
    assert {language for language, _ in SNIPPETS} == {"python", "sh", "ini"}


@pytest.mark.parametrize("model_rules", [[{"when": {"customer_tier": "gold"}, "answer": "expedite"}]])
def test_the_dag_runs(operator_runner, model_server, tmp_path: Path) -> None:
    (tmp_path / "readme_dag.py").write_text(PYTHON[0])
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(tmp_path)
    assert not bag.import_errors
    task = bag.dags["my_orders"].task_dict["process_order"]
    llm = {"provider": "simulated", "base_url": model_server.base_url}
    operator_runner.connections.update(
        beluga_llm_default={"conn_type": "beluga_llm", "extra": llm},
        beluga_state_default={"conn_type": "beluga_state", "extra": {"url": f"sqlite:///{tmp_path}/state.db"}},
    )

    run = operator_runner.run(task)

    assert run.state == "success", run.error
    assert run.return_value["data"]["handling"] == "expedite"
    assert run.return_value["data"]["payment_id"] == "payment for orders/A-1/payment"


def test_a_flow_runs_as_tasks_for_each_of_many_orders(tmp_path: Path) -> None:
    folder, home = tmp_path / "dags", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    (folder / "parcels.py").write_text(PYTHON[1])

    (run,) = runs_of(folder, [["my_parcels", {}, None]], home=home, environment={})

    ends = [task["xcoms"]["return_value"] for task in run["tasks"] if task["task_id"].endswith(".result")]
    assert run["state"] == "success"
    assert sorted(end["data"]["sent"] for end in ends) == ["to Ghent", "to Porto"]


def test_a_flow_runs_without_airflow() -> None:
    program = f"{PYTHON[2]}\nimport sys\nassert 'airflow' not in sys.modules, 'it loaded Airflow'\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tests_pass(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PYTHON[3])
    pytester.makeini(next(text for language, text in SNIPPETS if language == "ini"))
    result = pytester.runpytest_subprocess("-p", "no:randomly")
    result.assert_outcomes(passed=2)


def test_the_worker_command_is_one_that_airflow_knows() -> None:
    (line,) = [line for line in SHELL if line.startswith("airflow")]
    from beluga_airflow.cli.commands import get_commands

    (group,) = get_commands()
    words = shlex.split(line)
    (command,) = [command for command in group.subcommands if command.name == words[2]]
    flags = {flag for argument in command.args for flag in argument.flags}
    assert words[:2] == ["airflow", "beluga"]
    assert {word for word in words if word.startswith("--")} <= flags


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("export")])
def test_the_connections_can_be_read(line: str, operator_runner, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, value = shlex.split(line)[1].partition("=")
    monkeypatch.setenv(name, value)
    from airflow.sdk import BaseHook

    connection = BaseHook.get_connection(name.removeprefix("AIRFLOW_CONN_").lower())
    assert connection.conn_type == json.loads(value)["conn_type"]


def test_the_make_targets_exist() -> None:
    wanted = {*(line.split()[1] for line in SHELL if line.startswith("make")), *re.findall(r"`make (\w+)`", README)}
    done = subprocess.run(
        ["make", "-n", *sorted(wanted - {"demo", "up", "down"})],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MAKEFLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert wanted <= targets


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_installs_as_a_package(tmp_path: Path) -> None:
    # a copy: building leaves things behind
    copy, target = tmp_path / "copy", tmp_path / "installed"
    shutil.copytree(ROOT / "beluga_airflow", copy / "beluga_airflow", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", target, copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "beluga_airflow" / "py.typed").exists()
    points = next(target.glob("beluga_airflow-*.dist-info")) / "entry_points.txt"
    assert "provider_info = beluga_airflow.provider_info:get_provider_info" in points.read_text()
