from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beluga_airflow.config import ChainSettings, Settings
from beluga_airflow.config import reader as config_reader
from beluga_airflow.errors import InvalidSetting
from beluga_airflow.hooks import settings as module
from beluga_airflow.hooks.settings import LastingSettings, config_file, config_in_force, settings_in_force

Write = Callable[[str], Path]


def timeout(seconds: int) -> str:
    return f"orchestration: {{chain: {{timeout: {seconds}}}}}\n"


def with_timeout(seconds: int) -> Settings:
    return Settings(chain=ChainSettings(timeout=seconds))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were read."""
    found: list[Path] = []

    def read(path: Path) -> config_reader.ConfigFile:
        found.append(path)
        return config_reader.read(path)

    monkeypatch.setattr(module, "read", read)
    return found


def aged(path: Path, seconds: float = 60) -> None:
    """As if it had been written so long ago."""
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


# which file


@pytest.mark.parametrize("named", [None, "", "  "])
def test_without_a_file_the_defaults_hold(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW__BELUGA__CONFIG_FILE", raising=False)
    if named is not None:
        monkeypatch.setenv("AIRFLOW__BELUGA__CONFIG_FILE", named)
    assert config_file() is None
    assert config_in_force() is None
    assert settings_in_force() == Settings()


def test_the_file_is_the_one_that_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for named, path in [("conf/b.yaml", home / "conf/b.yaml"), ("/etc/b.yaml", Path("/etc/b.yaml"))]:
        monkeypatch.setenv("AIRFLOW__BELUGA__CONFIG_FILE", named)
        assert config_file() == path
    monkeypatch.setenv("AIRFLOW__BELUGA__CONFIG_FILE", "~/b.yaml")
    assert config_file() == Path.home() / "b.yaml"


def test_a_file_that_is_named_and_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__BELUGA__CONFIG_FILE", str(tmp_path / "none.yaml"))
    with pytest.raises(InvalidSetting, match=r"there is no file .*none\.yaml; make it, or correct the path"):
        settings_in_force()


def test_a_home_that_nobody_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__BELUGA__CONFIG_FILE", "~nobody-of-that-name/b.yaml")
    with pytest.raises(InvalidSetting, match=r"\[beluga\] config_file is '~nobody-of-that-name/b.yaml', whose home"):
        settings_in_force()


def test_airflow_cfg_names_it_too(tmp_path: Path) -> None:
    (tmp_path / "airflow.cfg").write_text("[beluga]\nconfig_file = own.yaml\n")
    (tmp_path / "own.yaml").write_text(timeout(7))
    program = "from beluga_airflow.hooks.settings import *; print(config_file(), settings_in_force().chain.timeout)"
    environment = {name: value for name, value in os.environ.items() if name != "AIRFLOW__BELUGA__CONFIG_FILE"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "AIRFLOW_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'own.yaml'} 7.0"


# when it is read


def test_a_change_of_the_file_holds_at_once(config_file: Write) -> None:
    for seconds in (1, 2, 3):  # in one tick of the clock, and of one size
        config_file(timeout(seconds))
        assert settings_in_force() == with_timeout(seconds)


def test_a_file_that_is_put_in_its_place_holds_at_once(config_file: Write, tmp_path: Path) -> None:
    path = config_file(timeout(1))
    aged(path)
    assert settings_in_force() == with_timeout(1)
    (tmp_path / "new.yaml").write_text(timeout(2))
    aged(tmp_path / "new.yaml", 3600)
    (tmp_path / "new.yaml").replace(path)
    assert settings_in_force() == with_timeout(2), "although it is older"


def test_an_unchanged_file_is_read_once(config_file: Write, reads: list[Path]) -> None:
    path = config_file(timeout(1))
    aged(path)
    found = [settings_in_force() for _ in range(5)]
    assert reads == [path]
    assert all(one is found[0] for one in found), "so that what was worked out for it can be kept"


def test_another_environment_is_another_file(
    config_file: Write, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS", "5")
    aged(config_file("orchestration: {chain: {timeout: '${SECONDS}'}}"))
    assert settings_in_force() == settings_in_force() == with_timeout(5)
    assert len(reads) == 1
    monkeypatch.setenv("SECONDS", "6")
    assert settings_in_force() == with_timeout(6)
    monkeypatch.delenv("SECONDS")
    with pytest.raises(InvalidSetting, match="SECONDS"):
        settings_in_force()


def test_a_file_that_was_taken_away_is_an_error(config_file: Write) -> None:
    path = config_file(timeout(1))
    aged(path)
    settings_in_force()
    path.unlink()
    with pytest.raises(InvalidSetting, match="there is no file"):
        settings_in_force()


# for a process that must go on


def test_a_process_goes_on_with_what_held_before_a_fault(config_file: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = config_file(timeout(1))
    lasting = LastingSettings()
    config_file("llm: {")
    with caplog.at_level(logging.ERROR):
        assert [lasting(), lasting()] == [with_timeout(1)] * 2
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}:1:7: this is no YAML")
    assert record.getMessage().endswith("until that is mended, the settings from before it hold here")
    config_file(timeout(2))
    assert lasting() == with_timeout(2)
    path.unlink()
    with caplog.at_level(logging.ERROR):
        assert lasting() == with_timeout(2)
    assert len(caplog.records) == 2


def test_a_process_does_not_begin_with_a_fault(config_file: Write) -> None:
    config_file("llm: {")
    with pytest.raises(InvalidSetting, match="this is no YAML"):
        LastingSettings()
