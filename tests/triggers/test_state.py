"""Watchers of state: what their events hold, where they go on, what they cost the store, and a triggerer that dies."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import psycopg
import pytest
import redis

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.state.sqlite import SqliteStore
from beluga_airflow.testing import OperatorRunner
from beluga_airflow.triggers import cursor as cursor_module
from beluga_airflow.triggers import state as trigger_module
from beluga_airflow.triggers import stores as stores_module
from beluga_airflow.triggers.state import StateChangeTrigger, StateTrigger
from beluga_airflow.triggers.stores import shared_store
from tests.state.backends import Place

AssetEvent: Any = SimpleNamespace
"""What Airflow tells its listeners; its own class wants all of its fields."""
OURS = {"watcher": "beluga/watcher/w", "version": 9, "lost": None}
PROGRAM = Path(__file__).with_name("watched.py")
JOINED = PROGRAM.with_name("joined.py")


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not look():  # noqa: ASYNC110  # a trigger has no event for it
            await asyncio.sleep(0.01)


class Kept:
    """The state of one asset, as the triggerer lets a trigger see it; its events are stored when the test says."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    async def aget(self, key: str) -> Any:
        return self.values.get(key)

    async def aset(self, key: str, value: Any) -> None:
        self.values[key] = value


class Watching:
    """A watcher in a triggerer: its events, which are stored as they come."""

    def __init__(self, trigger: StateChangeTrigger, *assets: Kept, stores_events: bool = True) -> None:
        self.trigger, self.assets = trigger, assets
        trigger.asset_state_store = cast("Any", SimpleNamespace(_by_name=dict(enumerate(assets))))
        self.stores_events = stores_events
        self.payloads: list[dict[str, Any]] = []
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async for event in self.trigger.run():
            self.payloads.append(event.payload)
            if self.stores_events:
                self.store(event.payload)

    def store(self, payload: dict[str, Any]) -> None:
        for asset in self.assets:
            asset.values[payload["watcher"]] = payload["version"]

    async def until(self, count: int) -> list[dict[str, Any]]:
        await until(lambda: len(self.payloads) >= count or self.task.done())
        return self.payloads

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor_module, "LOOK", 0.01)
    monkeypatch.setattr(trigger_module, "AGAIN", 0.1)


@pytest.fixture
def path(operator_runner: OperatorRunner, tmp_path: Path) -> Path:
    """Of the store of the default connection."""
    path = tmp_path / "state.db"
    operator_runner.connections["beluga_state_default"] = {
        "conn_type": "beluga_state",
        "extra": {"url": f"sqlite:///{path}"},
    }
    return path


@pytest.fixture
async def store(path: Path) -> AsyncIterator[StateStore]:
    store = SqliteStore(path)
    yield store
    await store.close()


@asynccontextmanager
async def watching(trigger: StateChangeTrigger, *assets: Kept, **options: Any) -> AsyncIterator[Watching]:
    """A watcher that has begun."""
    watcher = Watching(trigger, *assets, **options)
    await until(lambda: trigger.watcher in assets[0].values or watcher.task.done())
    try:
        yield watcher
    finally:
        await watcher.stop()


def seen(payloads: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(payload["key"], payload["value"], payload["is_gone"]) for payload in payloads]


# what an event holds


async def test_every_change_from_now_on_is_an_event(store: StateStore) -> None:
    await store.set("orders/1", "before")
    asset = Kept()
    async with watching(StateChangeTrigger(prefix="orders/"), asset) as watcher:
        await store.set("orders/1", {"n": 1})
        await store.set("other", 2)
        await store.delete("orders/1")
        version = await store.set("orders/2", None)
        payloads = await watcher.until(3)
    assert seen(payloads) == [("orders/1", {"n": 1}, False), ("orders/1", None, True), ("orders/2", None, False)]
    assert payloads[-1] == {
        "key": "orders/2",
        "version": version,
        "value": None,
        "is_gone": False,
        "is_whole": True,
        "lost": None,
        "watcher": "beluga/watcher/beluga_state_default/prefix/orders/",
    }


async def test_one_key_is_not_a_prefix(store: StateStore) -> None:
    async with watching(StateChangeTrigger(key="a"), Kept()) as watcher:
        await store.set("ab", 1)
        await store.set("a", 2)
        assert seen(await watcher.until(1)) == [("a", 2, False)]


@pytest.mark.parametrize(
    "value", ["x" * 10_001, "nul \0", "half \ud800", 10**30, json.loads("[" * 150 + "]" * 150), [{"a": ["\udfff"]}]]
)
async def test_what_airflow_cannot_hold_stays_in_the_store(store: StateStore, value: Any) -> None:
    async with watching(StateChangeTrigger(prefix=""), Kept()) as watcher:
        await store.set("a", value)
        (payload,) = await watcher.until(1)
    assert (payload["key"], payload["value"], payload["is_whole"]) == ("a", None, False)
    assert await store.get("a") == value
    msgspec.msgpack.encode(payload)


@pytest.mark.parametrize("key", ["nul \0", "x" * 1_001])
async def test_a_key_that_airflow_cannot_hold_is_left_out(store: StateStore, key: str) -> None:
    async with watching(StateChangeTrigger(prefix=""), Kept()) as watcher:
        await store.set(key, 1)
        (payload,) = await watcher.until(1)
    assert (payload["key"], payload["value"], payload["is_whole"]) == (None, 1, False)


# where it goes on


async def test_it_goes_on_behind_the_last_event_that_was_stored(store: StateStore) -> None:
    asset = Kept()
    trigger = StateChangeTrigger(prefix="")
    async with watching(trigger, asset) as watcher:
        await store.set("a", 1)
        await watcher.until(1)
        await asyncio.sleep(0.1)
        watcher.stores_events = False
        for n in (2, 3, 4):
            await store.set("a", n)
        # of three that were fired one was stored when the triggerer died
        watcher.store((await watcher.until(4))[1])
    await store.set("a", 5)
    async with watching(trigger, asset) as watcher:
        assert [payload["value"] for payload in await watcher.until(3)] == [3, 4, 5]


async def test_it_fires_no_more_than_airflow_can_store(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor_module, "IN_FLIGHT", 3)
    monkeypatch.setattr(cursor_module, "PATIENCE", 0.2)
    asset = Kept()
    async with watching(StateChangeTrigger(prefix=""), asset, stores_events=False) as watcher:
        for n in range(6):
            await store.set("a", n)
        await watcher.until(1)
        await asyncio.sleep(0.3)
        assert len(watcher.payloads) == 1, "first it makes sure that they are stored"
        watcher.store(watcher.payloads[-1])
        await watcher.until(4)
        await asyncio.sleep(0.3)
        assert len(watcher.payloads) == 4
        watcher.store(watcher.payloads[-1])
        await watcher.until(6)


async def test_it_complains_where_no_plugin_keeps_its_place(
    store: StateStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cursor_module, "PATIENCE", 0.1)
    async with watching(StateChangeTrigger(prefix=""), Kept(), stores_events=False) as watcher:
        await store.set("a", 1)
        await watcher.until(1)
        await asyncio.sleep(0.3)
    assert "or has not loaded the plugin 'beluga'" in caplog.text


async def test_a_quiet_watcher_keeps_up_with_a_busy_store(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor_module, "PASSED", 0.05)
    asset = Kept()
    trigger = StateChangeTrigger(key="seldom")
    async with watching(trigger, asset):
        begun = asset.values[trigger.watcher]
        for n in range(20):
            last = await store.set("often", n)
            await asyncio.sleep(0.01)
        assert begun + 5 < asset.values[trigger.watcher] <= last


async def test_two_assets_and_one_that_joins_later_have_one_place(store: StateStore) -> None:
    first, second = Kept(), Kept()
    trigger = StateChangeTrigger(prefix="")
    async with watching(trigger, first) as watcher:
        await store.set("a", 1)
        await watcher.until(1)
    await store.set("a", 2)
    async with watching(trigger, first, second) as watcher:
        assert [payload["value"] for payload in await watcher.until(1)] == [2]
    assert first.values == second.values


async def test_the_first_of_two_assets_goes_along_when_only_the_other_has_events(tmp_path: Path) -> None:
    """Its DAG was paused: a watcher that began with it alone looks at no other cursor, and would wait for ever."""
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        str(JOINED),
        env=os.environ
        | {
            "AIRFLOW_HOME": str(tmp_path),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/airflow.db",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, log = await program.communicate()
    assert program.returncode == 0, log.decode()[-6000:]
    assert json.loads(output.decode().splitlines()[-1]) == {"first": 5, "second": 5}


async def test_lost_history_is_an_event(path: Path, store: StateStore, caplog: pytest.LogCaptureFixture) -> None:
    asset = Kept()
    trigger = StateChangeTrigger(prefix="")
    async with watching(trigger, asset):
        pass
    short = SqliteStore(path, history=1)
    for n in range(2_001):
        await short.set("a", n)
    await short.close()
    async with watching(trigger, asset) as watcher:
        lost, following = (await watcher.until(2))[:2]
    kept_from = lost["lost"]["kept_from"]
    assert lost["lost"] == {"after": 0, "kept_from": kept_from}
    assert (lost["key"], lost["version"], lost["is_whole"]) == (None, kept_from - 1, False)
    assert following["version"] == kept_from
    assert f"does not keep changes 1 to {kept_from - 1}" in caplog.text


async def test_it_goes_on_when_its_connection_is_mended(
    operator_runner: OperatorRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operator_runner.connections["own"] = {"conn_type": "beluga_state", "extra": {"url": "mysql://x"}}
    url = f"sqlite:///{tmp_path / 'own.db'}"
    asset, trigger = Kept(), StateChangeTrigger(prefix="", state_conn_id="own")
    watcher = Watching(trigger, asset)
    await asyncio.sleep(0.1)
    operator_runner.connections["own"] = {"conn_type": "beluga_state", "extra": {"url": url}}
    await until(lambda: bool(asset.values))
    store = open_store(url)
    await store.set("a", 1)
    assert seen(await watcher.until(1)) == [("a", 1, False)]
    await watcher.stop()
    await store.close()
    assert "stands still, and tries again" in caplog.text


@pytest.mark.parametrize(
    "event",
    [
        {"extra": {"from_trigger": True, "payload": OURS, "from_rest_api": True}},
        {"extra": {"from_trigger": True, "payload": OURS}, "source_task_id": "t"},
        {"extra": {"from_trigger": True, "payload": {"file": "of another trigger"}}},
        {"extra": {"from_trigger": True, "payload": {"watcher": "of another trigger", "version": 1, "lost": None}}},
        {"extra": {"from_trigger": True, "payload": "text"}},
        {"extra": {}},
        {"extra": None},
    ],
)
def test_events_that_are_not_ours_move_nothing(event: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    monkeypatch.setattr(cursor_module, "_move", lambda *given: moved.append(given))
    cursor_module.on_asset_event_emitted(AssetEvent(**{"asset": None, "source_task_id": None, **event}))
    assert moved == []
    cursor_module.on_asset_event_emitted(
        AssetEvent(asset=None, source_task_id=None, extra={"from_trigger": True, "payload": OURS})
    )
    assert len(moved) == 1


# what it costs


async def test_all_who_watch_a_store_share_its_connections(operator_runner: OperatorRunner, place: Place) -> None:
    url = place.url() + "&client_name=beluga-watch" if place.backend == "redis" else place.url()
    for name in ("one", "two"):
        operator_runner.connections[name] = {"conn_type": "beluga_state", "extra": {"url": url}}
    counts = {}
    for number in (1, 30):
        triggers = [StateChangeTrigger(prefix=f"{n}/", state_conn_id=("one", "two")[n % 2]) for n in range(number)]
        watchers = [Watching(trigger, Kept()) for trigger in triggers]
        sensor = StateTrigger(key="0/", condition={}, state_conn_id="one")
        waits = asyncio.create_task(anext(aiter(sensor.run())))
        async with shared_store("one") as store:
            await until(lambda: all(watcher.assets[0].values for watcher in watchers))  # noqa: B023  # at once
            for n in range(number):
                await store.set(f"{n}/", n)
            for n, watcher in enumerate(watchers):
                assert seen(await watcher.until(1)) == [(f"{n}/", n, False)]
            assert (await waits).xcoms == {"return_value": 0}  # type: ignore[attr-defined]  # it is the task's end
            counts[number] = connections(place, url)
            for watcher in watchers:
                await watcher.stop()
    # one store has up to three, each made when it is first needed
    assert max(counts.values()) <= 3
    assert stores_module._open[asyncio.get_running_loop()] == {}, "the last one closes it"


def connections(place: Place, url: str) -> int:
    """That the server has from this process."""
    match place.backend:
        case "redis":
            client = redis.Redis.from_url(url.partition("?")[0])
            found = [one for one in client.client_list() if one["name"] == "beluga-watch"]
            client.close()
            assert 1 <= len(found) <= 3
            return len(found)
        case "postgres":
            with psycopg.connect(place.server) as db:
                others = "datname = current_database() AND pid <> pg_backend_pid()"
                row = db.execute(f"SELECT count(*) FROM pg_stat_activity WHERE {others}").fetchone()  # noqa: S608  # ours
            assert row is not None
            assert 1 <= row[0] <= 3
            return int(row[0])
    return 0


# arguments


@pytest.mark.parametrize("given", [{}, {"key": "a", "prefix": "b"}])
def test_it_watches_a_key_or_a_prefix(given: dict[str, str]) -> None:
    with pytest.raises(InvalidSetting, match="exactly one"):
        StateChangeTrigger(**given)


@pytest.mark.parametrize("given", [{"key": "a"}, {"prefix": ""}, {"prefix": "a/", "state_conn_id": "own"}])
def test_it_is_made_again_from_its_arguments(given: dict[str, str]) -> None:
    path, kwargs = StateChangeTrigger(**given).serialize()
    assert path == "beluga_airflow.triggers.state.StateChangeTrigger"
    assert kwargs == {"state_conn_id": "beluga_state_default", **given}
    assert StateChangeTrigger(**kwargs).watcher == StateChangeTrigger(**given).watcher


def test_each_watch_has_a_place_of_its_own() -> None:
    triggers = [
        StateChangeTrigger(key="a"),
        StateChangeTrigger(prefix="a"),
        StateChangeTrigger(key="a", state_conn_id="own"),
        StateChangeTrigger(key="a" * 1_000),
        StateChangeTrigger(key="b" * 1_000),
        StateChangeTrigger(key="a\0"),
    ]
    names = {trigger.watcher for trigger in triggers}
    assert len(names) == len(triggers)
    assert all(len(name) <= 300 and name.isprintable() for name in names)


async def test_it_is_no_trigger_for_tasks() -> None:
    with pytest.raises(InvalidSetting, match="a task waits with StateSensor"):
        await anext(aiter(StateChangeTrigger(key="a").run()))


# Airflow


async def test_a_killed_triggerer_misses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    shutil.copy(PROGRAM, tmp_path)
    connection = {"conn_type": "beluga_state", "extra": {"url": f"sqlite:///{tmp_path / 'state.db'}"}}
    environment = {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "1",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/airflow.db?timeout=60",
        # a new triggerer takes over when the old one has been silent so long
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "4",
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
        "AIRFLOW_CONN_BELUGA_STATE_DEFAULT": json.dumps(connection),
    }
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        *(str(tmp_path / PROGRAM.name), str(tmp_path), "200", "2"),
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, log = await program.communicate()
    assert program.returncode == 0, log.decode()[-6000:]
    told = json.loads(output.decode().splitlines()[-1])
    assert len(told["made"]) >= 200
    assert told["stored"] == told["made"]
    given = [version for run in told["given"] for version in run]
    assert given
    assert len(given) == len(set(given)), "no run has what another has"
    assert set(given) <= set(told["made"])
