"""Secrets that must not be told, and where they could be."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.testing import OperatorRunner

SECRET = "sk-hush-5e11KEY7"  # noqa: S105  # made up


@pytest.fixture
def connections(operator_runner: OperatorRunner) -> dict[str, Any]:
    """The connections that hooks find."""
    return operator_runner.connections


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An AIRFLOW_HOME of this test's own."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def hush(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., None]]:
    """Asserts that texts and errors do not hold the secret; at the end of the test, that no log and no output does."""

    def assert_hushed(*told: object) -> None:
        for one in told:
            lines = traceback.format_exception(one) if isinstance(one, BaseException) else []
            assert SECRET not in " ".join([str(one), repr(one), *lines])

    with caplog.at_level("INFO"):
        yield assert_hushed
    output = capfd.readouterr()
    assert_hushed(caplog.text, output.out, output.err)
