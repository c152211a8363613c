"""What holds for the Redis backend beside the contract: the server's trouble, its processes, and what a URL says."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from beluga_airflow.errors import HistoryLost, InvalidSetting, StateError, StateUnavailable
from beluga_airflow.state import Change, StateStore, Versioned, open_store
from beluga_airflow.state.redis import RedisStore
from beluga_airflow.state.watching import PAGE
from tests.state.redis_server import Server

DEADLINE = 60
ROOT = Path(__file__).resolve().parents[2]

WRITER = """
import asyncio, sys
from beluga_airflow.state import open_store
async def main():
    store = open_store(sys.argv[1])
    for number in range(500):
        await store.set(f"{sys.argv[2]}/{number % 7}", number)
    await store.close()
asyncio.run(main())
"""


@pytest.fixture
def url(redis_url: str) -> str:
    return redis_url


@pytest.fixture
async def store(url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(url)
    async with asyncio.timeout(DEADLINE):
        yield store
        await store.close()


async def persistently(store: StateStore, key: str, value: Any) -> int:
    while True:
        try:
            return await store.set(key, value)
        except StateUnavailable:
            await asyncio.sleep(0.02)


async def taken(watch: Any, count: int) -> list[Change]:
    return [await anext(watch) for _ in range(count)]


# several who write, and who watch


async def test_what_two_processes_write_a_third_sees_whole_and_in_order(store: RedisStore, url: str) -> None:
    begin = await store.set("begin", None)
    writers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WRITER, url, name), env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        for name in "ab"
    ]
    async with aclosing(store.watch("", prefix=True, after=begin)) as watch:
        changes = await taken(watch, 1_000)
    assert [await writer.wait() for writer in writers] == [0, 0]

    assert [change.version for change in changes] == list(range(begin + 1, begin + 1_001))
    for name in "ab":
        assert [change.value for change in changes if change.key.startswith(name)] == list(range(500))


async def test_versions_have_no_gaps_whoever_writes(store: RedisStore, url: str) -> None:
    begin = await store.set("begin", None)
    others = [RedisStore(url) for _ in range(8)]

    async def write(number: int, other: RedisStore) -> list[int]:
        versions = []
        for round_ in range(50):
            versions += [await other.set(f"{number}/{round_}", round_), await other.set("shared", number)]
            await other.delete("nothing")
            await other.compare_and_swap("shared", None, version=begin)
        return versions

    versions = await asyncio.gather(*map(write, range(8), others))
    await asyncio.gather(*(other.close() for other in others))

    assert sorted(version for own in versions for version in own) == list(range(begin + 1, begin + 801))
    assert all(own == sorted(own) for own in versions)


async def test_a_change_wakes_who_waits_at_once(store: RedisStore, url: str) -> None:
    other = RedisStore(url)
    delays = []
    async with aclosing(store.watch("k", after=await other.set("k", -1))) as watch:
        for number in range(20):
            change = asyncio.ensure_future(anext(watch))
            await asyncio.sleep(0.05)
            begun = time.monotonic()
            await other.set("k", number)
            assert (await change).value == number
            delays.append(time.monotonic() - begun)
    await other.close()

    assert sorted(delays)[10] < 0.1, "not only every PATIENCE seconds"


async def test_who_watches_learns_of_a_time_that_is_up_within_seconds(store: RedisStore) -> None:
    await store.set("k", 1, ttl=0.4)
    async with aclosing(store.watch("k")) as watch:
        assert (await anext(watch)).value == 1
        begun = time.monotonic()
        assert (await anext(watch)).is_gone
        assert 0.2 < time.monotonic() - begun < 3


async def test_all_whose_time_is_up_are_removed_however_many(store: RedisStore) -> None:
    count = 2 * PAGE + 10
    begin = (await store._now("", prefix=True))[1]
    await asyncio.gather(*(store.set(f"k/{number}", number, ttl=0.01) for number in range(count)))
    await asyncio.sleep(0.05)
    assert [key async for key in store.keys("")] == []
    assert (await store._now("", prefix=True))[0] == []

    await store._remove_expired()

    assert await store._now("", prefix=True) == ([], begin + 2 * count), "each removal is a change"


# much, and large


async def test_large_values_are_stored_watched_and_read_back_in_parts(store: RedisStore) -> None:
    begin = await store.set("begin", None)
    values = [str(number) * 1_000_000 for number in range(9)] * 3
    for number, value in enumerate(values):
        await store.set(f"k/{number}", value)

    assert [await store.get(f"k/{number}") for number in range(len(values))] == values
    assert 1 < len(await store._changes(begin, PAGE)) < len(values), "not all of them in one answer"
    async with aclosing(store.watch("k/", prefix=True, after=begin)) as watch:
        assert [change.value for change in await taken(watch, len(values))] == values
    async with aclosing(store.watch("k/", prefix=True)) as watch:
        assert [change.value for change in await taken(watch, len(values))] == values


async def test_ten_thousand_keys_are_listed_by_prefix_and_in_order(store: RedisStore) -> None:
    keys = [f"{letter}/{number}" for letter in "ab" for number in range(10_000)]
    first = await store.set("first", None)
    await asyncio.gather(*(store.set(key, None) for key in keys))

    begun = time.monotonic()
    listed = [key async for key in store.keys("b/")]
    taken = time.monotonic() - begun

    assert listed == sorted(key for key in keys if key.startswith("b/"))
    assert taken < 5
    changes, version = await store._now("b/", prefix=True)
    assert [change.version for change in changes] == sorted(change.version for change in changes)
    assert (len(changes), version) == (10_000, first + 20_000)


async def test_a_history_that_is_gone_is_said_with_the_gap(store: RedisStore, url: str) -> None:
    short = RedisStore(url, history=50)
    versions = [await short.set("k", number) for number in range(200)]

    gap = f"does not keep changes {versions[10]} to {versions[149]} any more"
    with pytest.raises(HistoryLost, match=gap) as caught:
        await anext(short.watch("k", after=versions[9]))

    assert (caught.value.after, caught.value.kept_from) == (versions[9], versions[150])
    async with aclosing(short.watch("k", after=versions[149])) as watch:
        assert [change.value for change in await taken(watch, 50)] == list(range(150, 200))
    await short.close()


async def test_a_history_of_large_values_is_shorter_so_that_the_server_is_not_filled(
    store: RedisStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beluga_airflow.state import redis as module

    smaller = {name: text.replace("256000000", "5000") for name, text in module.SCRIPTS.items()}
    monkeypatch.setattr(module, "SCRIPTS", smaller)
    limited = RedisStore(url)
    first = await limited.set("k", "0" * 100)
    for number in range(1, 1_300):
        await limited.set("k", str(number % 10) * (100 if number < 1_200 else 8))

    with pytest.raises(HistoryLost) as caught:
        await anext(limited.watch("k", after=first))

    assert caught.value.kept_from == first + 300, "the last thousand changes are kept, however large"
    await limited.close()


# trouble


async def test_a_server_that_is_killed_under_load_loses_nothing_that_it_said_it_had(
    serve: Callable[..., Server],
) -> None:
    server = serve("--appendonly", "yes", "--appendfsync", "always")
    store, watcher = RedisStore(server.url()), RedisStore(server.url())
    begin = await store.set("begin", None)
    seen: list[Change] = []

    async def watch() -> None:
        async with aclosing(watcher.watch("", prefix=True, after=begin)) as changes:
            async for change in changes:
                if change.key == "end":
                    return
                seen.append(change)

    async def write(name: str) -> list[int]:
        return [await persistently(store, name, number) for number in range(300)]

    async def kill_and_start() -> None:
        for _ in range(2):
            await asyncio.sleep(0.15)
            server.kill()
            await asyncio.to_thread(server.start)

    async with asyncio.timeout(DEADLINE):
        watching = asyncio.ensure_future(watch())
        versions, _ = await asyncio.gather(asyncio.gather(*map(write, "abc")), kill_and_start())
        await persistently(store, "end", None)
        await watching
    await asyncio.gather(store.close(), watcher.close())

    assert [change.version for change in seen] == list(range(begin + 1, begin + 1 + len(seen)))
    by_version = {change.version: (change.key, change.value) for change in seen}
    for name, own in zip("abc", versions, strict=True):
        assert [by_version[version] for version in own] == [(name, number) for number in range(300)]


async def test_watching_goes_on_when_connections_are_cut(serve: Callable[..., Server]) -> None:
    server = serve()
    store, watcher = RedisStore(server.url()), RedisStore(server.url())
    async with asyncio.timeout(DEADLINE), aclosing(watcher.watch("k")) as watch:
        assert (await anext(watch)).is_gone
        for round_ in range(3):
            change = asyncio.ensure_future(anext(watch))
            await asyncio.sleep(0.1)
            assert server.ask("CLIENT", "KILL", "TYPE", "normal") >= 2
            await asyncio.sleep(0.05)
            await store.set("k", [round_, 1])  # a connection that was closed meanwhile is no error
            await store.set("k", [round_, 2])
            assert [(await change).value, (await anext(watch)).value] == [[round_, 1], [round_, 2]]
    await asyncio.gather(store.close(), watcher.close())


async def test_data_that_the_server_lost_is_told_to_all_who_watch(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())
    last = [await store.set("k", number) for number in range(20)][-1]
    watches = [store.watch("k") for _ in range(3)]
    for watch in watches:
        assert (await anext(watch)).value == 19
    waiting = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0.2)

    server.kill()
    server.start()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), DEADLINE)

    for lost in results:
        assert isinstance(lost, HistoryLost)
        assert lost.after == last
        # no version comes back
        assert lost.kept_from > last + 1_000
    with pytest.raises(HistoryLost, match="watch without after="):
        await anext(store.watch("k", after=last))
    async with asyncio.timeout(DEADLINE), aclosing(store.watch("k")) as again:
        assert (await anext(again)).is_gone
        await store.set("k", "new")
        assert (await anext(again)).value == "new"
    await store.close()


async def test_data_that_was_lost_and_has_grown_again_is_told_to_who_comes_late(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())
    seen = [await store.set("k", number) for number in range(20)][9]
    server.kill()
    server.start()
    other = RedisStore(server.url())
    for number in range(40):
        await other.set("k", -number)
    await other.close()

    with pytest.raises(HistoryLost, match="watch without after="):
        await asyncio.wait_for(anext(store.watch("k", after=seen)), DEADLINE)
    await store.close()


async def test_data_that_went_back_to_a_snapshot_is_told(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())
    kept = [await store.set("k", number) for number in range(20)][-1]
    server.ask("SAVE")
    seen = [await store.set("k", number) for number in range(20)][-1]
    server.kill()
    server.start()
    with pytest.raises(HistoryLost, match=f"is at version {kept}, and change {seen} was seen") as lost:
        await asyncio.wait_for(anext(store.watch("k", after=seen)), DEADLINE)
    assert (lost.value.after, lost.value.kept_from) == (seen, kept + 1)
    await store.close()


async def test_who_was_busy_while_the_server_lost_data_learns_of_it_too(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())
    last = [await store.set("k", number) for number in range(20)][-1]
    slow, quick = store.watch("k"), store.watch("other")
    await asyncio.gather(anext(slow), anext(quick))
    waiting = asyncio.ensure_future(anext(quick))
    await asyncio.sleep(0.1)
    server.kill()
    server.start()
    async with asyncio.timeout(DEADLINE), aclosing(store.watch("k")) as again:
        with pytest.raises(HistoryLost):
            await waiting
        assert (await anext(again)).is_gone
        for number in range(3):
            await store.set("k", number)
            assert (await anext(again)).value == number
        with pytest.raises(HistoryLost) as lost:
            await asyncio.wait_for(anext(slow), 5)
    assert lost.value.after == last
    await store.close()


async def test_a_swap_whose_answer_is_lost_is_not_tried_again(serve: Callable[..., Server]) -> None:
    server = serve()
    direct = RedisStore(server.url())
    version = await direct.set("k", 0)
    async with cutting_answers(server.port) as (port, cut):
        store = RedisStore(f"redis://localhost:{port}/0")
        # from here on the server knows the script
        assert await store.compare_and_swap("k", 1, version=version + 1) is None
        cut.set()
        # it has taken effect, and a second try would say that it has not
        with pytest.raises(StateUnavailable):
            await store.compare_and_swap("k", 1, version=version)
        assert await store.get_versioned("k") == Versioned(value=1, version=version + 1)
        await store.close()
    await direct.close()


@asynccontextmanager
async def cutting_answers(server: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A way to a server on a port of its own; when the event is set, the next answer cuts the connection instead."""
    cut = asyncio.Event()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        while (data := await reader.read(65_536)) and not (answers and cut.is_set()):
            writer.write(data)
        if answers:
            cut.clear()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_read, to_write = await asyncio.open_connection("localhost", server)
        requests = asyncio.ensure_future(forward(reader, to_write, answers=False))
        await forward(to_read, writer, answers=True)
        await requests

    async with await asyncio.start_server(serve, "localhost", 0) as between:
        yield between.sockets[0].getsockname()[1], cut


async def test_a_server_that_is_not_there_is_unavailable_until_it_is(tmp_path: Path) -> None:
    server = Server(tmp_path)
    store = RedisStore(server.url())
    for use in (store.get("k"), store.set("k", 1), store.delete("k"), store._wait(0, 1)):
        with pytest.raises(StateUnavailable, match=r"cannot be used now: .*; check the server") as away:
            await use
        assert f"redis://localhost:{server.port}/0" in str(away.value)
    try:
        server.start()
        assert await store.set("k", 1) > 0
        await store.close()
    finally:
        server.kill()


async def test_a_server_that_does_not_answer_is_unavailable_until_it_does(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url(query="?socket_timeout=0.3"))
    last = await store.set("k", 1)
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(StateUnavailable, match="no answer within"):
        await store.get("k")
    assert time.monotonic() - begun < 2
    server.process.send_signal(signal.SIGCONT)

    assert await store.get("k") == 1
    # waiting is no missing answer
    begun = time.monotonic()
    await store._wait(last, 1.0)
    assert 0.9 < time.monotonic() - begun < 1.5
    await store.close()


async def test_a_full_server_is_unavailable_and_can_be_emptied(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())
    version = await store.set("k", "x" * 1_000_000)
    server.ask("CONFIG", "SET", "maxmemory", "1mb")

    with pytest.raises(StateUnavailable, match="used memory > 'maxmemory'"):
        await store.set("other", 1)
    assert (await store._now("", prefix=True))[1] == version, "nothing is there by half"
    assert await store.delete("k")

    server.ask("CONFIG", "SET", "maxmemory", "0")
    assert await store.set("other", 1) == version + 2
    await store.close()


@pytest.mark.parametrize(
    ("setting", "back"),
    [
        (("REPLICAOF", "127.0.0.1", 1), ("REPLICAOF", "NO", "ONE")),
        (("CONFIG", "SET", "min-replicas-to-write", 1), ("CONFIG", "SET", "min-replicas-to-write", 0)),
    ],
)
async def test_a_server_that_takes_no_writes_now_is_unavailable(
    serve: Callable[..., Server], setting: tuple[str | int, ...], back: tuple[str | int, ...]
) -> None:
    server = serve()
    store = RedisStore(server.url())
    first = await store.set("k", 1)
    server.ask(*setting)
    with pytest.raises(StateUnavailable):
        await store.set("k", 2)
    server.ask(*back)

    assert await store.set("k", 3) == first + 1
    await store.close()


async def test_a_server_that_cannot_write_to_its_disk_is_unavailable(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve()
    store = RedisStore(server.url())
    await store.set("k", 1)
    (tmp_path / "dump.rdb").mkdir()
    server.ask("CONFIG", "SET", "save", "3600 1")
    server.ask("BGSAVE")
    for _ in range(100):
        if server.ask("INFO", "persistence")["rdb_last_bgsave_status"] != "ok":
            break
        await asyncio.sleep(0.05)
    with pytest.raises(StateUnavailable, match="MISCONF"):
        await store.set("k", 2)
    await store.close()


async def test_a_script_that_the_server_has_forgotten_is_sent_again(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())
    first = await store.set("k", 1)
    server.ask("SCRIPT", "FLUSH")

    assert await store.set("k", 2) == first + 1
    await store.close()


@pytest.mark.parametrize("user", ["", ":wrong-4711@", "nobody:wrong-4711@", "reader:secret-4711@"])
async def test_who_may_not_is_refused_and_no_password_is_shown(serve: Callable[..., Server], user: str) -> None:
    server = serve("--requirepass", "p/a:s@s", "--user", "reader", "on", ">secret-4711", "~*", "+@read", "+@connection")
    store = RedisStore(server.url(user=user))
    for use in (store.set("k", 1), store.delete("k"), store._remove_expired()):
        with pytest.raises(StateError, match=r"refuses: .*; check the URL's user, password and options") as refused:
            await use
        assert not refused.value.retryable
        assert "4711" not in f"{refused.value!r} {refused.value.__cause__!r} {store.url}"
    with pytest.raises(StateError):
        await anext(store.watch("k"))

    allowed = RedisStore(server.url(user=":p%2Fa%3As%40s@"))
    assert await allowed.set("k", 1) > 0
    assert allowed.url == f"redis://localhost:{server.port}/0"
    await asyncio.gather(store.close(), allowed.close())


def certified(folder: Path) -> tuple[Path, Path]:
    """A key, and its own certificate for localhost."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return key, certificate


async def test_tls_is_as_the_client_does_it(serve: Callable[..., Server], tmp_path: Path) -> None:
    key, certificate = certified(tmp_path)
    server = Server(tmp_path)
    server.options = ("--port", "0", "--tls-port", str(server.port), "--tls-auth-clients", "no")
    server.options += ("--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    trusted = RedisStore(server.url("rediss", query=f"?ssl_ca_certs={certificate}"))
    untrusted, plain = RedisStore(server.url("rediss")), RedisStore(server.url())
    try:
        server.start()
        assert await trusted.set("k", 1) > 0
        assert trusted.url == f"rediss://localhost:{server.port}/0"
        with pytest.raises(StateError, match="certificate verify failed") as refused:
            await untrusted.get("k")
        assert not refused.value.retryable
        with pytest.raises(StateUnavailable):
            await plain.get("k")
        await asyncio.gather(trusted.close(), untrusted.close(), plain.close())
    finally:
        server.kill()


@pytest.mark.parametrize("name", ["entries", "head", "changes"])
async def test_what_others_left_under_our_names_is_an_error(serve: Callable[..., Server], name: str) -> None:
    server = serve()
    server.ask("SET", f"beluga:{{state}}:{name}", "not ours")
    store = RedisStore(server.url())

    with pytest.raises(StateError, match="WRONGTYPE") as refused:
        await store.set("k", 1)

    assert not refused.value.retryable
    await store.close()


async def test_a_damaged_value_is_told_as_such(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())
    await store.set("k/1", 1)
    await store.set("k/2", 2)
    server.ask("HSET", "beluga:{state}:entries", "k/1", "1 {damaged")
    with pytest.raises(StateError, match="the value of state key 'k/1' is damaged"):
        await store.get("k/1")
    with redis.Redis(port=server.port) as client:
        client.hset("beluga:{state}:entries", "k/1", b'1 "\xff"')
    with pytest.raises(StateError, match=r"is damaged: .*; restore it"):
        await store.get("k/1")

    assert await store.get("k/2") == 2
    await store.close()


async def test_a_cancelled_call_leaves_no_answer_to_the_next(store: RedisStore) -> None:
    await store.set("k", "own")
    await store.set("other", "other's")
    for number in range(60):
        call = asyncio.ensure_future(store.get("other"))
        await asyncio.sleep(number * 0.000_01)
        call.cancel()
        assert await store.get("k") == "own"


# event loops, and letting go


def test_a_store_serves_one_event_loop_after_another_and_leaves_nothing_open(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())

    async def work(number: int) -> Any:
        async with aclosing(store.watch("k", after=await store.set("k", number))) as watch:
            change = asyncio.ensure_future(anext(watch))
            await asyncio.sleep(0.05)
            await store.set("k", -number)
            return (await change).value

    for number in range(1, 5):
        assert asyncio.run(work(number)) == -number  # and nobody closes it
        until_alone(server)
    assert not store._lines


async def test_closing_lets_go_of_all_connections_and_it_can_be_used_again(serve: Callable[..., Server]) -> None:
    server = serve()
    store = RedisStore(server.url())
    for number in range(3):
        async with aclosing(store.watch("k")) as watch:
            await anext(watch)
            waiting = asyncio.ensure_future(anext(watch))
            await asyncio.sleep(0.1)
            assert server.connections() == 2, "one for calls, one for waiting"
            await store.close()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        until_alone(server)
        await store.set("k", number)
    await store.close()


def until_alone(server: Server) -> None:
    end = time.monotonic() + 5
    while server.connections():
        assert time.monotonic() < end, "connections stay open"
        time.sleep(0.02)


# URLs


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://", "redis://localhost:6379/0"),
        ("redis://host", "redis://host:6379/0"),
        ("rediss://user:secret@host:7000/3?ssl_ca_certs=/ca.pem", "rediss://host:7000/3"),
        ("redis://:secret@[::1]:7000/?db=4", "redis://[::1]:7000/4"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url: str, shown: str) -> None:
    store = open_store(url)

    assert isinstance(store, RedisStore)
    assert store.url == shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://:pa55word@host:port/0",
        "redis://:pa55/word@host/0",
        "redis://:pa55word@host/name",
        "redis://:pa55word@host/0?db=x",
        "redis://:pa55word@host/0?no_such_option=1",
        "redis://:pa55word@[::1/0",
    ],
)
def test_what_is_no_url_is_refused_at_once_without_showing_it(url: str) -> None:
    with pytest.raises(InvalidSetting, match="use 'redis://user:password@host:6379/0'") as refused:
        open_store(url)

    assert "pa55" not in f"{refused.value} {refused.value.__cause__}"


async def test_namespaces_are_strangers_to_each_other(url: str) -> None:
    one, other = RedisStore(f"{url}one:"), RedisStore(f"{url}other:")
    await one.set("k", 1)
    second = await one.set("k", 2)

    assert await other.get_versioned("k") is None
    await other.set("k", 3)
    assert await one.get_versioned("k") == Versioned(value=2, version=second)
    assert (await one._now("k", prefix=False))[1] == second
    await asyncio.gather(one.close(), other.close())
