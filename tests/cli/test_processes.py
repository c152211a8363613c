"""What the launcher asks of the operating system, on real processes, locks and sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from beluga_airflow.cli import processes


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("lie", [{"started": 1_000_000.0}, {"command": ["something", "else"]}])
async def test_a_stranger_with_the_number_of_a_leftover_is_left_alone(
    stranger: subprocess.Popen[bytes], lie: dict[str, Any]
) -> None:
    known = processes.identity(psutil.Process(stranger.pid)) | lie

    assert await processes.end_leftovers({"shop": [known]}) == 0
    assert stranger.poll() is None


async def test_the_rest_of_a_session_is_ended_while_one_that_was_written_down_lives(
    stranger: subprocess.Popen[bytes],
) -> None:
    known = processes.identity(psutil.Process(stranger.pid))

    assert await processes.end_leftovers({"shop": [{"pid": stranger.pid, "started": 0.0, "command": []}, known]}) == 1
    assert stranger.wait() == -signal.SIGTERM


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "stack.lock"
    with processes.lock(path):
        with pytest.raises(processes.AlreadyRunningError), processes.lock(path):
            pytest.fail("held twice")
        assert processes.holder(path) == psutil.Process()
    with processes.lock(path):
        pass


def test_a_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    program = """
        import os, pathlib, sys
        from beluga_airflow.cli.processes import lock
        with lock(pathlib.Path(sys.argv[1])):
            os.kill(os.getpid(), 9)
    """
    path = tmp_path / "stack.lock"
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)], check=False)

    assert killed.returncode == -signal.SIGKILL
    assert processes.holder(path) is None
    with processes.lock(path):
        assert processes.holder(path) == psutil.Process()


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")])
def test_a_port_that_somebody_listens_on_is_not_claimed(family: socket.AddressFamily, host: str) -> None:
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(f"this machine has no such address: {error}")
    with server, processes.Ports() as ports:
        taken = server.getsockname()[1]

        assert taken < ports.claim(taken) < taken + 100


def test_a_port_is_claimed_once_on_this_machine() -> None:
    with processes.Ports() as ours, processes.Ports() as theirs:
        first = ours.claim(23456)
        assert theirs.claim(first) > first
    with processes.Ports() as later:
        assert later.claim(first) == first


def test_a_part_is_known_by_the_port_that_it_listens_on(stranger: subprocess.Popen[bytes]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert processes.listens(os.getsid(0), port)
        assert not processes.listens(stranger.pid, port)


def test_last_lines_are_safe_for_a_terminal(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    log.write_bytes(
        b"old\n" * 50 + b"\x1b]0;title\x07worker | \x1b[31mred\x1b[0m\n\nother | \xff\n" + b"w" * 5000 + b"\n"
    )

    assert processes.last_lines(log, count=3) == ["]0;titleworker | red", "other | \ufffd", "w" * 300]
    assert processes.last_lines(log, about="other") == ["other | \ufffd"]
    assert processes.last_lines(tmp_path / "none.log") == []
