"""What holds for the SQLite backend beside the contract: several processes, the file, and trouble with it."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from beluga_airflow.errors import InvalidSetting, StateError, StateUnavailable
from beluga_airflow.state import open_store
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.state.sqlite import SqliteStore

DEADLINE = 60

HEAD = """
import asyncio, sys
from beluga_airflow.state.sqlite import SqliteStore
store, name = SqliteStore(sys.argv[1]), sys.argv[2]
def say(text): print(text, flush=True)
"""
COUNTER = """
async def main():
    for _ in range(100):
        while True:
            found = await store.get_versioned("counter")
            value, version = (found.value, found.version) if found else (0, None)
            swapped = await store.compare_and_swap("counter", value + 1, version=version)
            if swapped is not None:
                say(swapped)
                break
    for number in range(50):
        say(await store.set(f"{name}/{number}", number))
    await store.close()
asyncio.run(main())
"""
WRITER = """
async def write(number):
    await store.set(f"k/{number}", {"number": number, "padding": "x" * 500})
    say(number)
async def main():
    number = 0
    while True:
        await asyncio.gather(*(write(number + more) for more in range(20)))
        number += 20
asyncio.run(main())
"""


@asynccontextmanager
async def running(code: str, path: Path, name: str = "p") -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HEAD + code, str(path), name, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(DEADLINE):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_several_processes_share_one_file_from_its_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "state.db"

    async def versions_of(name: str) -> list[int]:
        async with running(COUNTER, path, name) as process:
            printed, _ = await process.communicate()
            assert process.returncode == 0
            return [int(line) for line in printed.split()]

    versions = await asyncio.gather(*map(versions_of, "abcd"))

    store = SqliteStore(path)
    assert await store.get("counter") == 400
    assert [len([key async for key in store.keys(f"{name}/")]) for name in "abcd"] == [50] * 4
    await store.close()
    assert all(own == sorted(own) for own in versions)
    assert len({version for own in versions for version in own}) == 4 * 150, "no version is given twice"


async def test_nobody_who_opens_a_new_file_is_turned_away(tmp_path: Path) -> None:
    for round_ in range(40):
        stores = [SqliteStore(tmp_path / str(round_) / "state.db") for _ in range(8)]

        versions = await asyncio.gather(*(store.set(f"k{number}", 1) for number, store in enumerate(stores)))

        assert sorted(versions) == list(range(1, 9))
        await asyncio.gather(*(store.close() for store in stores))


async def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    async with running(WRITER, path) as process:
        assert process.stdout is not None
        said = [await process.stdout.readline() for _ in range(300)]
        process.kill()
        said += (await process.stdout.read()).splitlines(keepends=True)
    acknowledged = {int(line) for line in said if line.endswith(b"\n")}
    assert len(acknowledged) >= 300

    store = SqliteStore(path)
    kept = {int(key.removeprefix("k/")) async for key in store.keys("k/")}
    values = [await store.get(f"k/{number}") for number in sorted(kept)]
    next_version = await store.set("more", 1)
    await store.close()

    assert acknowledged <= kept
    assert [value["number"] for value in values] == sorted(kept), "and nothing is there by half"
    assert next_version > len(kept)


async def test_two_stores_in_one_process_see_each_others_changes(tmp_path: Path) -> None:
    one, other = SqliteStore(tmp_path / "state.db"), SqliteStore(tmp_path / "state.db")

    await one.set("k", 1)
    assert await other.get("k") == 1
    version = await other.set("k", 2)
    assert await one.compare_and_swap("k", 3, version=version) is not None
    assert await other.get("k") == 3

    await one.close()
    await other.close()


async def test_what_was_stored_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    version = await store.set("k", {"kept": True})
    await store.delete("other")
    await store.close()

    again = SqliteStore(tmp_path / "state.db")
    assert await again.get("k") == {"kept": True}
    assert await again.set("k", None) > version
    await again.close()


async def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "state.db"
    store = SqliteStore(path)
    await store.set("k", "secret")

    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    folder = stat.S_IMODE(path.parent.stat().st_mode)
    await store.close()

    assert modes == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}
    assert folder == 0o700


async def test_opening_a_store_touches_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "folder" / "state.db")
    await store.close()

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"this is no database" * 100, b"\x00" * 5_000, b"SQLite format 3\x00" + b"x" * 5_000]
)
async def test_a_damaged_file_is_told_as_such_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(content)
    store = SqliteStore(path)

    for use in (store.get("k"), store.set("k", 1), store.delete("k"), store.compare_and_swap("k", 1, version=None)):
        with pytest.raises(StateError, match=r"is damaged: .*; restore it or move it away") as damaged:
            await use
        assert str(path) in str(damaged.value)
        assert not damaged.value.retryable
    await store.close()

    assert path.read_bytes() == content


async def test_a_damaged_value_is_told_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    await store.set("k/1", "0123456789")
    await store.set("k/2", "fine")
    await store.close()
    path.write_bytes(path.read_bytes().replace(b'"0123456789"', b'"0123456789,'))

    with pytest.raises(StateError, match=r"the value of state key 'k/1' is damaged: .*; delete the key or restore it"):
        await store.get("k/1")
    assert await store.get("k/2") == "fine"
    await store.set("k/1", "mended")
    assert await store.get("k/1") == "mended"
    await store.close()


async def test_a_path_that_cannot_be_used_is_unavailable_until_it_can(tmp_path: Path) -> None:
    in_the_way = tmp_path / "folder"
    in_the_way.write_text("a file")
    store = SqliteStore(in_the_way / "state.db")

    for use in (store.get("k"), store.set("k", 1), store.delete("k")):
        with pytest.raises(StateUnavailable, match=r"cannot be used now: .*; check the file and its disk") as away:
            await use
        assert str(in_the_way) in str(away.value)
        assert away.value.retryable

    in_the_way.unlink()
    await store.set("k", 1)
    assert await store.get("k") == 1
    await store.close()


@pytest.mark.parametrize("path", ["", "\x00"])
async def test_a_path_that_can_never_be_one_is_an_error_and_no_silence(tmp_path: Path, path: str) -> None:
    store = SqliteStore(f"{tmp_path}/{path}")

    async with asyncio.timeout(DEADLINE):
        with pytest.raises(StateError):
            await store.set("k", 1)
    await store.close()


async def test_a_store_serves_one_event_loop_after_another(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    await store.set("k", 1)
    found = []

    other = threading.Thread(target=lambda: found.append(asyncio.run(store.get("k"))))
    other.start()
    await asyncio.to_thread(other.join)

    assert found == [1]
    await store.close()


async def test_a_closed_store_leaves_no_thread_behind(tmp_path: Path) -> None:
    # another test's may be on its way out
    before = {*threading.enumerate()}
    store = SqliteStore(tmp_path / "state.db")
    await store.set("k", 1)
    own = {thread for thread in {*threading.enumerate()} - before if thread.name == "beluga-state"}
    assert own

    await store.close()

    assert not own & {*threading.enumerate()}


def test_urls_lead_to_their_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert isinstance(open_store("memory://"), MemoryStore)
    assert open_store("memory://").url == "memory://"
    assert open_store("sqlite:////var/lib/state.db").url == "sqlite:////var/lib/state.db"
    assert open_store("sqlite:///state.db").url == f"sqlite:///{tmp_path}/state.db"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgres:pa55word@host", "has no '://'"),
        ("mysql://:pa55word@host/0", "begins with 'mysql'"),
        ("sqlite://", "begins with 'sqlite'"),
        ("sqlite:///", "begins with 'sqlite'"),
        ("", "has no '://'"),
    ],
)
def test_other_urls_are_refused_without_showing_a_password(url: str, said: str) -> None:
    with pytest.raises(InvalidSetting, match=r"use 'sqlite:////path/to/state.db', 'redis://") as refused:
        open_store(url)

    assert said in str(refused.value)
    assert "pa55word" not in str(refused.value)
