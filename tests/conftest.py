"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports that go from process to process: halves of characters, which some tests log, cannot."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def nothing_learnt() -> None:
    """What one test's endpoint could not do says nothing about the next one's, which may get its port."""
    if abilities := sys.modules.get("beluga_airflow.llm.abilities"):
        abilities.forget()


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the configuration file that Airflow's configuration names, from the first time on."""

    def write(text: str) -> Path:
        path = tmp_path / "beluga.yaml"
        path.write_text(text)
        monkeypatch.setenv("AIRFLOW__BELUGA__CONFIG_FILE", str(path))
        return path

    return write
