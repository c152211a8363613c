"""A PostgreSQL of our own, and databases on the one that answers."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

__all__ = ["PASSWORD", "USUAL", "Server"]

USUAL = os.environ.get("BELUGA_TEST_POSTGRES_URL", "postgresql://localhost:5432/postgres")
PASSWORD = "s3cret@/:?#%"  # noqa: S105  # of a server that lives as long as its tests


class Server:
    """A server of our own; PostgreSQL does not serve root."""

    def __init__(self, folder: Path) -> None:
        self._user = ["runuser", "-u", _servant(), "--"] if os.geteuid() == 0 else []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._folder = folder
        (folder / "password").write_text(PASSWORD)
        if self._user:
            for path in (folder, folder / "password"):
                shutil.chown(path, _servant())
        self._run("initdb", "-A", "scram-sha-256", "-U", "beluga", f"--pwfile={folder}/password", "-E", "UTF8", "-N")

    @property
    def url(self) -> str:
        return f"postgresql://beluga:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-o", f"-p {self.port} -k {self._folder} -h 127.0.0.1", "-l", "log")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "-w", "-m", mode)

    def _run(self, program: str, *arguments: str) -> None:
        found = shutil.which(program)
        if found is None:
            pytest.skip(f"{program} is not on the path; install the package postgresql")
        subprocess.run(
            [*self._user, found, "-D", f"{self._folder}/data", *arguments],
            cwd=self._folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )


def _servant() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
