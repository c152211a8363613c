"""The PostgreSQL store on real servers: one that answers, and one of our own that is restarted and killed."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from beluga_airflow.errors import HistoryLost, InvalidSetting, StateError, StateUnavailable
from beluga_airflow.state import Change, StateStore, open_store, postgres
from beluga_airflow.state.postgres import PostgresStore
from tests.state.postgres_server import Server

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 120


@pytest.fixture
async def store(database: str) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(database)
    async with asyncio.timeout(DEADLINE):
        yield store
        await store.close()


async def seen_until_end(store: StateStore, after: int) -> list[Change]:
    async with aclosing(store.watch("", prefix=True, after=after)) as watch:
        changes = []
        async for change in watch:
            changes.append(change)
            if change.key == "end":
                break
        return changes


def by_writer(changes: list[Change]) -> dict[str, list[int]]:
    found: defaultdict[str, list[int]] = defaultdict(list)
    for change in changes:
        found[change.key.partition("/")[0]].append(change.value)
    return found


async def writer(url: str, name: str, count: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.state.writer", url, name, str(count)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )


async def persist(store: StateStore, name: str, is_enough: Callable[[int], bool]) -> list[int]:
    """Write numbers through whatever comes; the versions that were told."""
    versions: list[int] = []
    while not is_enough(len(versions)):
        with suppress(StateUnavailable):
            versions.append(await store.set(f"{name}/k", len(versions)))
            continue
        await asyncio.sleep(0.02)
    return versions


def assert_nothing_is_lost(changes: list[Change], told: dict[str, list[int]], begin: int) -> None:
    """Each change once, in the order of versions; a write whose answer was lost may be there twice."""
    assert [change.version for change in changes] == list(range(begin + 1, begin + 1 + len(changes)))
    seen = {change.version for change in changes}
    for name, versions in told.items():
        numbers = by_writer(changes)[name]
        assert sorted(numbers) == numbers
        assert set(numbers) == set(range(len(versions)))
        assert set(versions) <= seen


async def test_processes_and_tasks_write_and_one_watches_all_in_order(store: PostgresStore, database: str) -> None:
    begin = await store.set("begin", 1)
    watching = asyncio.create_task(seen_until_end(store, begin))

    processes = [await writer(database, f"p{number}", 200) for number in range(2)]
    tasks = [persist(store, f"t{number}", lambda done: done == 100) for number in range(8)]
    told, *_ = await asyncio.gather(asyncio.gather(*tasks), *(process.communicate() for process in processes))
    end = await store.set("end", 1)
    changes = await watching

    assert end == begin + 2 * 200 + 8 * 100 + 1
    assert_nothing_is_lost(changes, {f"t{number}": versions for number, versions in enumerate(told)}, begin)
    assert [by_writer(changes)[f"p{number}"] for number in range(2)] == [list(range(200))] * 2


async def test_connections_that_are_ended_under_load_lose_nothing(store: PostgresStore, database: str) -> None:
    begin = await store.set("begin", 1)
    watching = asyncio.create_task(seen_until_end(store, begin))
    stop = asyncio.Event()
    writing = [asyncio.create_task(persist(store, name, lambda _: stop.is_set())) for name in "abcd"]

    ended = 0
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        for _ in range(8):
            await asyncio.sleep(0.1)
            cursor = await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            ended += cursor.rowcount
    await asyncio.sleep(0.1)
    stop.set()
    told = dict(zip("abcd", await asyncio.gather(*writing), strict=True))
    await persist(store, "last", lambda done: done == 1)
    await store.set("end", 1)

    assert ended >= 8, "nothing was proven"
    assert_nothing_is_lost(await watching, told, begin)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_server_that_restarts_under_load_loses_nothing(server: Server, mode: str) -> None:
    with psycopg.connect(server.url) as db:
        db.execute(f"CREATE SCHEMA s_{mode}")
    store = PostgresStore(f"{server.url}?options=-csearch_path%3Ds_{mode}")
    async with asyncio.timeout(DEADLINE):
        begin = await store.set("begin", 1)
        watching = asyncio.create_task(seen_until_end(store, begin))
        stop = asyncio.Event()
        writing = [asyncio.create_task(persist(store, name, lambda _: stop.is_set())) for name in "ab"]
        for _ in range(2):
            await asyncio.sleep(0.2)
            await asyncio.to_thread(server.stop, mode)
            with pytest.raises(StateUnavailable, match="cannot be used now"):
                await store.get("a/k")
            await asyncio.to_thread(server.start)
        await asyncio.sleep(0.2)
        stop.set()
        told = dict(zip("ab", await asyncio.gather(*writing), strict=True))
        await store.set("end", 1)

        assert min(map(len, told.values())) > 50, "nothing was proven"
        assert_nothing_is_lost(await watching, told, begin)
        await store.close()


async def test_after_a_restart_the_next_call_works(server: Server) -> None:
    store = PostgresStore(server.url)
    version = await store.set("k", 1)
    assert await store.get("k") == 1

    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start)

    assert await store.get("k") == 1
    assert await store.set("k", 2) == version + 1
    await store.close()


def other(url: str, **parts: str) -> str:
    return urlsplit(url)._replace(**parts).geturl()


async def test_who_is_not_let_in_is_told_and_no_secret_is(server: Server) -> None:
    for url, said in {
        server.url.replace("s3cret", "wrong"): "password authentication failed",
        other(server.url, path="/missing"): 'database "missing" does not exist',
        server.url + "?sslmode=require": "server does not support SSL, but SSL was required",
    }.items():
        store = open_store(url)
        with pytest.raises(StateError, match=said) as raised:
            await store.get("k")
        assert not isinstance(raised.value, StateUnavailable)
        assert not any(word in f"{raised.value!r} {store.url} {store!r}" for word in ("wrong", "s3cret"))


async def test_a_user_without_rights_is_refused(server: Server) -> None:
    with psycopg.connect(server.url) as db:
        db.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    store = open_store(f"postgresql://guest:guest@127.0.0.1:{server.port}/postgres")

    with pytest.raises(StateError, match="permission denied") as raised:
        await store.set("k", 1)
    assert not isinstance(raised.value, StateUnavailable)
    await store.close()


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        store = open_store(f"postgresql://u:s3cret@127.0.0.1:{unused.getsockname()[1]}/db")
        with pytest.raises(
            StateUnavailable, match=r"cannot be used now: connection failed.*; see that its server runs"
        ) as raised:
            await store.set("k", 1)
    assert "s3cret" not in str(raised.value)


async def test_a_replica_that_takes_no_writes_is_unavailable(store: PostgresStore, database: str) -> None:
    await store.set("k", 1)
    replica = PostgresStore(f"{database}?options=-cdefault_transaction_read_only%3Don")

    assert await replica.get("k") == 1
    with pytest.raises(StateUnavailable, match="read-only transaction"):
        await replica.set("k", 2)
    await replica.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p%40@db.example:5433/app?sslmode=verify-full", "postgresql://db.example:5433/app"),
        ("postgres://a,b:2/app", "postgresql://a,b:2/app"),
        ("postgresql://u:p@[::1]:5432/x?password=q", "postgresql://[::1]:5432/x"),
        ("postgresql:///app?host=/run/pg&user=u", "postgresql://%2Frun%2Fpg/app"),
    ],
)
def test_the_url_is_shown_without_user_and_query(url: str, shown: str) -> None:
    assert open_store(url).url == shown


@pytest.mark.parametrize(
    "url",
    [
        *("postgresql://u:s3%zz@h/db", "postgresql://u:s3%zz@h/db?x=1", "postgresql://h/d?s3%zz=1"),
        *("postgresql://u:s3/s3@h/db", "postgresql://u:s3@s3@h/db", "postgresql://u:x@s3/s3@h/db"),
    ],
)
def test_a_url_that_cannot_be_read_is_not_repeated(url: str) -> None:
    with pytest.raises(InvalidSetting, match="cannot be read; write it as 'postgresql://") as raised:
        open_store(url)
    assert "s3%" not in f"{raised.value}"


async def test_history_that_is_gone_is_named(store: PostgresStore, database: str) -> None:
    short = PostgresStore(database, history=50)
    for number in range(700):
        await short.set("k", number)
    kept = [change.version for change in await short._changes(200, 1_000)]

    # younger than a week: ten times as many
    assert kept == list(range(201, 701))
    with pytest.raises(HistoryLost, match=r"does not keep changes 6 to 199 any more") as raised:
        await anext(short.watch("k", after=5))
    assert (raised.value.after, raised.value.kept_from) == (5, 200)

    with psycopg.connect(database) as db:
        db.execute("UPDATE beluga_state_change SET at = at - interval '8 days'")
    last = await short.set("k", 700)
    with pytest.raises(HistoryLost) as raised:
        await short._changes(600, 1)
    assert raised.value.kept_from == last - 49
    assert await short._changes(last, 10) == []
    await short.close()


async def test_a_time_that_is_up_is_seen(store: PostgresStore) -> None:
    async with aclosing(store.watch("k")) as watch:
        await anext(watch)
        await store.set("k", 1, ttl=0.5)
        assert (await anext(watch)).value == 1
        began = time.monotonic()
        assert (await anext(watch)).is_gone
    assert 0.4 < time.monotonic() - began < 3


@pytest.mark.parametrize("ttl", [1e300, float("inf"), 1e10])
async def test_a_time_beyond_the_calendar_is_a_long_one(store: PostgresStore, ttl: float) -> None:
    await store.set("k", 1, ttl=ttl)
    assert await store.get("k") == 1


async def test_expired_keys_go_where_nobody_watches(store: PostgresStore, database: str) -> None:
    await asyncio.gather(*(store.set(f"short/{number}", 1, ttl=0.01) for number in range(300)))
    await asyncio.sleep(0.05)
    await asyncio.gather(*(store.set("k", number) for number in range(200)))

    with psycopg.connect(database) as db:
        assert db.execute("SELECT count(*) FROM beluga_state").fetchone() == (1,)


async def test_large_values_are_read_in_pages(store: PostgresStore) -> None:
    values = [f"{number:02d}" * 500_000 for number in range(40)]
    begin = await store.set("begin", 1)
    await asyncio.gather(*(store.set(f"k{number:02d}", value) for number, value in enumerate(values)))
    await store.set("end", 1)

    assert 10 < len(await store._changes(begin, 1_000)) < 20
    assert [change.value for change in await seen_until_end(store, begin)] == [*values, 1]
    assert [await store.get(f"k{number:02d}") for number in range(40)] == values


async def test_ten_thousand_keys_are_listed_by_prefix(store: PostgresStore) -> None:
    keys = [f"k/{number}" for number in range(10_000)]
    await asyncio.gather(*(store.set(key, 1) for key in [*keys, "j", "k", "k0", "l", "k/\U0010ffff"]))

    assert [key async for key in store.keys("k/")] == sorted([*keys, "k/\U0010ffff"])
    assert [key async for key in store.keys("k/777")] == sorted(key for key in keys if key.startswith("k/777"))


async def test_keys_longer_than_an_index_row_are_keys(store: PostgresStore) -> None:
    begin = random.Random(0).randbytes(5_000).hex()  # noqa: S311 - cannot be made shorter by compression
    keys = [begin, begin + "a", begin + "b", begin[:1_500] + "z", begin[:1_500]]
    for key in keys:
        await store.set(key, key)

    assert [await store.get(key) for key in keys] == keys
    assert [key async for key in store.keys(begin[:1_200])] == sorted(keys)
    assert [key async for key in store.keys(begin)] == keys[:3]
    assert [change.key for change in (await store._now(begin, prefix=False))[0]] == [begin]


async def test_many_may_be_the_first(database: str) -> None:
    stores = [PostgresStore(database) for _ in range(12)]

    versions = await asyncio.gather(*(store.set(f"k{number}", 1) for number, store in enumerate(stores)))

    assert sorted(versions) == list(range(1, 13))
    for store in stores:
        await store.close()


async def test_schemas_are_stores_of_their_own(store: PostgresStore, database: str) -> None:
    with psycopg.connect(database) as db:
        db.execute("CREATE SCHEMA second")
    second = PostgresStore(f"{database}?options=-csearch_path%3Dsecond")

    assert (await store.set("k", 1), await store.set("k", 2), await second.set("k", 3)) == (1, 2, 1)
    assert (await store.get("k"), await second.get("k")) == (2, 3)
    await second.close()


async def count_up(store: StateStore, count: int) -> None:
    while count:
        found = await store.get_versioned("counter")
        assert found is not None
        count -= await store.compare_and_swap("counter", found.value + 1, version=found.version) is not None


async def test_of_all_who_swap_on_their_own_connections_one_wins(store: PostgresStore, database: str) -> None:
    others = [PostgresStore(database) for _ in range(4)]
    begin = await store.set("counter", 0)

    await asyncio.gather(*(count_up(other, 50) for other in others))

    assert await store.get("counter") == 4 * 50
    assert [change.value for change in await store._changes(begin, 1_000)] == list(range(1, 4 * 50 + 1))
    for other in others:
        await other.close()


async def test_who_was_interrupted_while_he_connected_hears_later(store: PostgresStore, database: str) -> None:
    version = await store.set("k", 0)
    for number in range(25):
        ear = PostgresStore(database)
        waiting = asyncio.create_task(ear._wait(version, 30))
        await asyncio.sleep(number * 0.0005)
        waiting.cancel()
        await asyncio.wait([waiting])

        await ear._wait(version, 0.01)  # it listens from here on, at the latest
        listening = asyncio.create_task(ear._wait(version, 30))
        await asyncio.sleep(0.01)
        version = await store.set("k", number)
        async with asyncio.timeout(5):
            await listening
        await ear.close()


HOLD = """
import psycopg, sys, time
db = psycopg.connect(sys.argv[1])
db.execute("SELECT beluga_state_write_1('killed', '1', NULL, NULL, 1000)")
print("holds", flush=True)
time.sleep(600)
"""


async def test_a_writer_killed_in_its_transaction_blocks_nobody_for_long(store: PostgresStore, database: str) -> None:
    version = await store.set("k", 1)
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLD, database), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"holds\n"
    waiting = asyncio.create_task(store.set("k", 2))
    await asyncio.sleep(0.3)
    assert not waiting.done(), "nothing was proven"
    assert await store.get("k") == 1, "readers wait for no writer"

    began = time.monotonic()
    holder.kill()
    assert await waiting == version + 1
    assert time.monotonic() - began < 2
    assert await store.get("killed") is None
    await holder.wait()


async def test_a_server_that_does_not_answer_is_unavailable(
    store: PostgresStore, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.set("k", 1)
    monkeypatch.setattr(postgres, "ANSWER_SECONDS", 0.5)
    with psycopg.connect(database) as holder:
        holder.execute("SELECT beluga_state_write_1('held', '1', NULL, NULL, 1000)")
        began = time.monotonic()
        results = await asyncio.gather(*(store.set("k", number) for number in range(5)), return_exceptions=True)
        assert time.monotonic() - began < 5
    assert all(isinstance(result, StateUnavailable) for result in results)
    assert "did not answer in 0.5 s" in str(results[0])
    # what was given up is not done later
    assert (await store.get("k"), await store.set("k", 2)) == (1, 3)


async def test_one_of_many_who_give_up_leaves_the_others_their_answer(store: PostgresStore, database: str) -> None:
    version = await store.set("k", 0)
    with psycopg.connect(database) as holder:
        holder.execute("SELECT beluga_state_write_1('held', '1', NULL, NULL, 1000)")
        writes = [asyncio.create_task(store.set("k", number)) for number in range(10)]
        await asyncio.sleep(0.2)
        writes[0].cancel()  # on its way
        writes[5].cancel()  # not yet
        await asyncio.sleep(0)
        holder.rollback()
    results = await asyncio.gather(*writes, return_exceptions=True)

    assert [type(result) for result in results].count(asyncio.CancelledError) == 2
    assert sorted(result for result in results if isinstance(result, int))[-1] <= version + 10
    assert await store.get("k") == 9


def test_one_store_serves_one_loop_after_the_other(database: str) -> None:
    store = open_store(database)

    assert [asyncio.run(store.set("k", number)) for number in range(4)] == [1, 2, 3, 4]
    assert asyncio.run(store.get("k")) == 3
    asyncio.run(store.close())
    with psycopg.connect(database) as db:
        alone = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        deadline = time.monotonic() + 5
        while db.execute(alone).fetchone() != (0,):
            assert time.monotonic() < deadline, "a connection was left"
            time.sleep(0.05)


async def test_who_watches_is_told_at_once(store: PostgresStore, database: str) -> None:
    elsewhere = PostgresStore(database)
    waits = []
    async with aclosing(store.watch("k")) as watch:
        await anext(watch)
        for number in range(15):
            await asyncio.sleep(0.05)
            written = asyncio.create_task(elsewhere.set("k", number))
            began = time.monotonic()
            assert (await anext(watch)).value == number
            waits.append(time.monotonic() - began)
            await written
    assert sorted(waits)[7] < 0.25, "found by looking, not by being told"
    await elsewhere.close()


async def test_what_was_told_before_anybody_waited_is_heard_at_once(store: PostgresStore) -> None:
    last = await store.set("k", 0)
    await store._wait(last, 0.1)  # listens from here on
    for number in range(3):
        new = await store.set("k", number)
        await asyncio.sleep(0.05)  # it has been told
        began = time.monotonic()
        await store._wait(last, 5)
        assert time.monotonic() - began < 2
        last = new


async def test_a_stranger_on_the_channel_harms_nobody(store: PostgresStore, database: str) -> None:
    async with aclosing(store.watch("k", after=await store.set("k", 0))) as watch:
        following = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.3)
        with psycopg.connect(database, autocommit=True) as db:
            for payload in ("", "x", "9" * 5_000):
                db.execute("SELECT pg_notify('beluga_state_' || 'beluga_state_change'::regclass::oid, %s)", [payload])
        await asyncio.sleep(0.3)
        assert not following.done()
        await store.set("k", 1)
        assert (await following).value == 1
