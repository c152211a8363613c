"""What the operating system knows about our processes: sessions, leftovers of a killed run, the lock, free ports."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import psutil

__all__ = [
    "AlreadyRunningError",
    "Ports",
    "Record",
    "alive",
    "children",
    "end_leftovers",
    "holder",
    "identity",
    "kill",
    "last_lines",
    "listens",
    "lock",
    "session",
    "terminate",
]

POLL_SECONDS = 0.1
KILL_SECONDS = 5.0

# The processes of each part, its leader first, each by `pid`, `started` (seconds since the epoch) and `command`.
Record = Mapping[str, Sequence[Mapping[str, Any]]]


class AlreadyRunningError(Exception):
    """Another process holds the lock; ``holder`` says which."""


def session(leader: int) -> list[psutil.Process]:
    """Every process in the session that ``leader`` began and its descendants elsewhere, itself first."""
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == leader:
                found.append(psutil.Process(pid))
    found.sort(key=lambda process: process.pid != leader)
    roots = found[:1] if found and found[0].pid == leader else found.copy()
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            found += [child for child in root.children(recursive=True) if child not in found]
    return found


def alive(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Those that still run."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            # Where nobody reaps orphans (a container without an init) the dead stay as zombies for ever.
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def terminate(processes: Iterable[psutil.Process]) -> None:
    """Asks each of them to end."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()


async def kill(processes: Iterable[psutil.Process]) -> None:
    """Kills them, and waits until the kernel has done it."""
    deadline = monotonic() + KILL_SECONDS
    while (processes := alive(processes)) and monotonic() < deadline:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.sleep(POLL_SECONDS)


def listens(leader: int, port: int) -> bool:
    """Whether this part itself, and not some other program, listens on the TCP port."""
    for process in session(leader):
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def children(leader: int) -> list[str]:
    """The command lines of its own children; an empty one is of a child that died and was not taken notice of."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(leader).children():
            try:
                found.append(" ".join(child.cmdline()))
            except psutil.ZombieProcess:
                found.append("")
    return found


def identity(process: psutil.Process) -> dict[str, Any]:
    """What tells this process from any later one that gets its number."""
    with suppress(psutil.NoSuchProcess):
        return {"pid": process.pid, "started": process.create_time(), "command": process.cmdline()}
    return {"pid": process.pid, "started": 0.0, "command": []}


def _living(known: Mapping[str, Any], *, leads: bool) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(known["pid"])
        same_start = abs(process.create_time() - known["started"]) < 1.0  # the clock may have been set meanwhile
        # Those further down rename themselves (setproctitle), a leader does not.
        if same_start and (not leads or process.cmdline() == known["command"]):
            return process
    return None


async def end_leftovers(record: Record, *, grace: float = 10.0) -> int:
    """Ends what a supervisor that was killed has left running, and says how many processes that were.

    A session is ended only when a process written down for it still lives. As long as one does, the kernel gives
    the session's number to nobody else, so all that are in it are ours.

    Args:
        record: what ``Supervisor.record`` said.
        grace: seconds between SIGTERM and SIGKILL.
    """
    doomed: set[psutil.Process] = set()
    for known in record.values():
        living = [_living(each, leads=number == 0) for number, each in enumerate(known)]
        if any(living):
            doomed |= alive([*filter(None, living), *session(known[0]["pid"])])
    terminate(doomed)
    deadline = monotonic() + grace
    left = doomed
    while (left := alive(left)) and monotonic() < deadline:  # noqa: ASYNC110 - no event tells of others' children
        await asyncio.sleep(POLL_SECONDS)
    await kill(left)
    return len(doomed)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds the lock while the block runs; the kernel frees it when its holder dies, however that dies.

    Raises:
        AlreadyRunningError: another process holds it.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunningError(f"{path} is held by another process") from None
        file.truncate(0)
        json.dump(identity(psutil.Process()), file)
        file.flush()
        yield


def holder(path: Path) -> psutil.Process | None:
    """The process that wrote itself into the lock file, if it still lives."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return _living(known, leads=True)


class Ports(ExitStack):
    """TCP ports that nobody uses, held against other stacks of this machine until it is closed."""

    def claim(self, usual: int) -> int:
        """The usual port, or the next free one above it.

        Raises:
            OSError: a hundred ports in a row are taken.
        """
        for port in range(usual, usual + 100):
            # The program that gets the port binds it many seconds from now. Until then an abstract socket keeps
            # other stacks off it: it leaves no file, and dies with us.
            claim = self.enter_context(socket.socket(socket.AF_UNIX))
            with suppress(OSError):
                claim.bind(f"\0beluga-airflow-port-{port}")
                if not _is_taken(port):
                    return port
        raise OSError(f"No TCP port from {usual} to {usual + 99} is free: end a program that listens on one of them.")


def _is_taken(port: int) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT does not count
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # any other error: no such family on this machine
                return True
    return False


def last_lines(log: Path, *, about: str = "", count: int = 20) -> list[str]:
    """The end of a log (or of its lines that begin with ``about``), safe for a terminal: no control characters."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        text = file.read().decode(errors="replace")
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[^\n\x20-\x7e\xa0-\U0010ffff]", "", text)
    return [line[:300] for line in plain.split("\n") if line.strip() and line.startswith(about)][-count:]
