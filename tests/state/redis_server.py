"""A Redis of our own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

__all__ = ["Server", "free_port", "until"]


class Server:
    """A Redis of our own, on a free port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def url(self, scheme: str = "redis", user: str = "", query: str = "") -> str:
        return f"{scheme}://{user}localhost:{self.port}/0{query}"

    def start(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("there is no redis-server on the path; install the package redis-server")
        port = [] if "--tls-port" in self.options else ["--port", str(self.port)]
        self.process = subprocess.Popen(
            [program, *port, "--dir", str(self.folder), "--save", "", "--bind", "127.0.0.1", *self.options],
            stdout=subprocess.DEVNULL,
        )
        until(lambda: socket.create_connection(("127.0.0.1", self.port), timeout=1).close())
        # LOADING is over
        if not {"--tls-port", "--requirepass"} & set(self.options):
            until(lambda: self.ask("PING"))

    def ask(self, *command: str | int) -> Any:
        with redis.Redis(port=self.port) as client:
            return client.execute_command(*command)

    def connections(self) -> int:
        with redis.Redis(port=self.port) as client:
            return len(client.client_list(_type="normal")) - 1

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def until(answers: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while True:
        try:
            answers()
        except (OSError, redis.ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return
