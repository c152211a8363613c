"""The plugin as projects see it: in pytest processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"airflow", "openai", "temporalio", "sqlalchemy", "pydantic", "aiohttp", "yaml"}


def _pytest(folder: Path, test: str, *arguments: str, setting: str = "", **environment: str) -> str:
    """Run pytest in a project with one test file; what it printed. It must pass."""
    (folder / "pytest.ini").write_text(
        f"[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n{setting}\n"
    )
    (folder / "test_it.py").write_text(test)
    keep = {"PATH": "/usr/bin:/bin", "HOME": str(folder / "home"), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=keep | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_loading_the_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    test = f"import sys\ndef test_it(): assert not {HEAVY!r} & set(sys.modules)"
    assert "1 passed" in _pytest(tmp_path, test)


def test_without_the_setting_the_environment_is_left_alone(tmp_path: Path) -> None:
    test = "import os\ndef test_it(): assert not [name for name in os.environ if 'AIRFLOW' in name]"
    assert "1 passed" in _pytest(tmp_path, test)


def test_a_temporary_home_keeps_airflow_out_of_the_users_home(tmp_path: Path) -> None:
    test = """
import os, pathlib
from airflow.sdk import BaseOperator

class Hello(BaseOperator):
    def execute(self, context):
        return "hello"

def test_it(operator_runner):
    assert operator_runner.run(Hello(task_id="t")).return_value == "hello"
    home = pathlib.Path(os.environ["AIRFLOW_HOME"])
    assert home.is_dir()
    assert not list(home.rglob("*.db"))
    pathlib.Path("told").write_text(str(home))
"""
    assert "(temporary)" in _pytest(tmp_path, test, "-v", setting="beluga_airflow_home = temporary")
    assert not Path((tmp_path / "told").read_text()).exists()
    assert not (tmp_path / "home").exists()


def test_workers_of_xdist_have_homes_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    test = """
import os, pathlib, pytest
@pytest.mark.parametrize("n", [0, 1])
def test_it(n):
    pathlib.Path(os.environ["PYTEST_XDIST_WORKER"]).write_text(os.environ["AIRFLOW_HOME"])
"""
    _pytest(tmp_path, test, "-n2", "--dist=each", setting="beluga_airflow_home = temporary")
    homes = {(tmp_path / worker).read_text() for worker in ("gw0", "gw1")}
    assert len(homes) == 2
    assert not any(Path(home).exists() for home in homes)


def test_a_given_home_stays(tmp_path: Path) -> None:
    test = "import os\ndef test_it(): assert os.environ['AIRFLOW_HOME'] == '/given'"
    out = _pytest(tmp_path, test, "-v", setting="beluga_airflow_home = temporary", AIRFLOW_HOME="/given")
    assert "temporary" not in out


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="'elsewhere' is unknown: write 'temporary'"):
        _pytest(tmp_path, "", setting="beluga_airflow_home = elsewhere")


def test_no_temporal_command_skips(tmp_path: Path) -> None:
    # PATH has none; neither has the folder of this stand-in for Python
    test = """
import sys
sys.executable = "/nowhere/python"
def test_it(temporal_server): assert False
"""
    with pytest.raises(AssertionError, match=r"1 skipped"):
        assert _pytest(tmp_path, test, "-rs") == ""
