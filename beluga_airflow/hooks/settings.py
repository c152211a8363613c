"""The settings in force: those of the file that Airflow's configuration names, else the defaults."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from airflow.sdk.configuration import conf

from beluga_airflow.config import Settings
from beluga_airflow.config.reader import ConfigFile, read
from beluga_airflow.errors import InvalidSetting

__all__ = ["LastingSettings", "airflow_home", "config_file", "config_in_force", "settings_in_force"]

log = logging.getLogger(__name__)

SETTLED = 1.0
"""Seconds: a file that was written within them may be written again in the same tick of its clock."""


def settings_in_force() -> Settings:
    """The settings, as the file is now. Whoever starts a flow asks, and nobody who defines one.

    Raises:
        InvalidSetting: a file is named, and is not there or cannot be used.
    """
    file = config_in_force()
    return Settings() if file is None else file.settings


class LastingSettings:
    """The settings for a process with flows under way, which a fault in the file must not fail: it keeps the last ones.

    Raises:
        InvalidSetting: there is a fault in it from the start.
    """

    def __init__(self) -> None:
        self._last = settings_in_force()
        self._fault = ""

    def __call__(self) -> Settings:
        """The settings in force, or those that were until there was a fault."""
        try:
            self._last, self._fault = settings_in_force(), ""
        except InvalidSetting as error:
            if str(error) != self._fault:
                self._fault = str(error)
                log.error("%s; until that is mended, the settings from before it hold here", error)
        return self._last


def config_in_force() -> ConfigFile | None:
    """The file with the settings, as it is now; None where ``[beluga] config_file`` names none.

    Raises:
        InvalidSetting: it is not there, or cannot be used.
    """
    path = config_file()
    if path is None:
        return None
    kept, mark = _kept.get(path), _mark(path)
    if kept is not None and mark is not None and kept.mark == mark and kept.holds():
        return kept.file
    started = time.time()
    file = read(path)
    if mark is not None and started - mark[0] / 1e9 > SETTLED:
        names = {name for origin in file.origins.values() for name in origin.variables}
        _kept[path] = _Kept(mark=mark, file=file, environment={name: os.environ.get(name) for name in names})
    return file


def config_file() -> Path | None:
    """The file that Airflow's configuration names; a relative path is one under ``AIRFLOW_HOME``.

    Raises:
        InvalidSetting: it begins with the home of a user that there is not.
    """
    named = (conf.get("beluga", "config_file", fallback=None) or "").strip()
    try:
        return airflow_home() / Path(named).expanduser() if named else None
    except RuntimeError:
        raise InvalidSetting(
            f"[beluga] config_file is {named!r}, whose home directory is not known; write the path without '~'"
        ) from None


def airflow_home() -> Path:
    """Where Airflow keeps its files."""
    return Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser().absolute()


Mark = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A file that was read, and from what: to read it takes a millisecond, which each item of a batch would pay."""

    mark: Mark
    file: ConfigFile
    environment: dict[str, str | None] = field(repr=False)

    def holds(self) -> bool:
        return all(os.environ.get(name) == value for name, value in self.environment.items())


_kept: dict[Path, _Kept] = {}


def _mark(path: Path) -> Mark | None:
    """Differs where the file was written again; None where there is none, of which ``read`` tells."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
