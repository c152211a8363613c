"""What every state store must do; a new backend joins the list of backends.py."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beluga_airflow.errors import HistoryLost, StateError
from beluga_airflow.state import Change, StateStore, Versioned, watching
from tests.state.backends import Place

DEADLINE = 30

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@pytest.fixture
async def store(place: Place) -> AsyncIterator[StateStore]:
    store = place.opened()
    async with asyncio.timeout(DEADLINE):
        yield store
        await store.close()


async def listed(store: StateStore, prefix: str) -> list[str]:
    return [key async for key in store.keys(prefix)]


async def test_what_is_set_is_there_until_it_is_deleted(store: StateStore) -> None:
    assert await store.get("order") is None

    await store.set("order", {"id": 7})
    assert await store.get("order") == {"id": 7}
    await store.set("order", {"id": 8})
    assert await store.get("order") == {"id": 8}

    assert (await store.delete("order"), await store.delete("order")) == (True, False)
    assert await store.get("order", "gone") == "gone"


async def test_a_stored_none_is_not_a_missing_key(store: StateStore) -> None:
    version = await store.set("null", None)

    assert await store.get("null", "default") is None
    assert await store.get("missing", "default") == "default"
    assert await store.get_versioned("null") == Versioned(value=None, version=version)
    assert await store.get_versioned("missing") is None
    assert await listed(store, "") == ["null"]
    assert await store.compare_and_swap("null", 1, version=None) is None, "it is there"


@pytest.mark.parametrize("value", [0, False, "", [], {}])
async def test_a_value_that_is_nothing_much_is_a_value(store: StateStore, value: Any) -> None:
    await store.set("k", value)

    found = await store.get("k", "default")

    assert found == value
    assert type(found) is type(value)


@given(value=json_values)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_any_json_comes_back_as_it_was(place: Place, value: Any) -> None:
    async def there_and_back() -> Any:
        store = place.opened()
        await store.set("k", value)
        try:
            return await store.get("k")
        finally:
            await store.close()

    found = asyncio.run(there_and_back())

    assert json.dumps(found) == json.dumps(value)


@pytest.mark.parametrize("value", ["\ud800", "\x00", "😀", {"\udfff": ["\ud800"]}, 2**80, 1e308, -0.0])
async def test_texts_and_numbers_at_the_edge_come_back(store: StateStore, value: Any) -> None:
    await store.set("k", value)

    assert repr(await store.get("k")) == repr(value)


async def test_what_comes_back_is_a_copy(store: StateStore) -> None:
    value: dict[str, list[int]] = {"lines": [1]}
    await store.set("k", value)
    value["lines"].append(2)

    (await store.get("k"))["lines"].append(3)

    assert await store.get("k") == {"lines": [1]}


async def test_large_values_come_back_whole(store: StateStore) -> None:
    values = {f"k{number}": f"{number}" * 1_000_000 for number in range(5)}

    await asyncio.gather(*(store.set(key, value) for key, value in values.items()))

    assert {key: await store.get(key) for key in values} == values


@pytest.mark.parametrize("value", [{1}, b"bytes", math.nan, [math.inf], object(), {(1, 2): 3}])
async def test_what_is_not_json_is_refused_and_changes_nothing(store: StateStore, value: Any) -> None:
    version = await store.set("k", "kept")

    for change in (store.set("k", value), store.compare_and_swap("k", value, version=version)):
        with pytest.raises(StateError, match=r"the value for state key 'k' is not JSON: .*; store JSON values only"):
            await change

    assert await store.get_versioned("k") == Versioned(value="kept", version=version)


async def test_endless_nesting_is_refused(store: StateStore) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]

    with pytest.raises(StateError, match="is not JSON"):
        await store.set("k", nested)


@pytest.mark.parametrize("key", ["\ud800", 7, None, b"k"])
async def test_what_cannot_be_a_key_is_refused_and_the_store_goes_on(store: StateStore, key: Any) -> None:
    for use in (
        store.get(key),
        store.get_versioned(key),
        store.set(key, 1),
        store.compare_and_swap(key, 1, version=None),
        store.delete(key),
        listed(store, key),
    ):
        with pytest.raises(StateError, match="cannot be a state key"):
            await use

    await store.set("k", 1)
    assert await listed(store, "") == ["k"]


@pytest.mark.parametrize("key", ["", " ", "a/b@0", "%", "_", "ü😀", "a\x00b", "k" * 10_000, "'; DROP TABLE state; --"])
async def test_any_text_is_a_key_and_stands_for_itself_only(store: StateStore, key: str) -> None:
    others = [f"{key}x", f"x{key}", key[:-1] or "empty", key.upper() + "X"]
    for other in others:
        await store.set(other, "other")

    await store.set(key, "mine")
    assert await store.get(key) == "mine"
    await store.delete(key)

    assert [await store.get(other) for other in others] == ["other"] * 4


async def test_versions_grow_with_every_change_and_never_restart(store: StateStore) -> None:
    versions = [await store.set("a", 1), await store.set("a", 1), await store.set("b", 1)]
    await store.delete("a")
    versions.append(await store.set("a", 1))
    await store.delete("a")
    await store.delete("b")
    created = await store.compare_and_swap("a", 2, version=None)
    assert created is not None
    versions.append(created)
    await store.close()
    versions.append(await store.set("c", 1))

    assert versions == sorted(set(versions))
    assert await store.get_versioned("a") == Versioned(value=2, version=created)


async def test_a_swap_needs_the_version_that_is_there(store: StateStore) -> None:
    assert await store.compare_and_swap("k", "no", version=1) is None
    first = await store.compare_and_swap("k", "first", version=None)
    assert first is not None
    assert await store.compare_and_swap("k", "no", version=None) is None
    second = await store.compare_and_swap("k", "second", version=first)
    assert second is not None
    assert second > first
    assert await store.compare_and_swap("k", "no", version=first) is None
    await store.delete("k")
    assert await store.compare_and_swap("k", "no", version=second) is None
    await store.set("k", "again")
    assert await store.compare_and_swap("k", "no", version=second) is None, "the key was deleted in between"

    assert await store.get("k") == "again"


async def test_of_many_swaps_one_wins(store: StateStore) -> None:
    for _ in range(5):
        version = await store.set("lease", None)

        won = await asyncio.gather(*(store.compare_and_swap("lease", name, version=version) for name in range(20)))

        (winner,) = [name for name, swapped in enumerate(won) if swapped is not None]
        found = await store.get_versioned("lease")
        assert found is not None
        assert (found.value, found.version) == (winner, won[winner])


async def test_concurrent_increments_lose_nothing(store: StateStore) -> None:
    async def increment() -> None:
        while True:
            found = await store.get_versioned("counter")
            value, version = (found.value, found.version) if found else (0, None)
            if await store.compare_and_swap("counter", value + 1, version=version) is not None:
                return

    await asyncio.gather(*(increment() for _ in range(30)))

    assert await store.get("counter") == 30


async def test_keys_are_listed_by_prefix_in_order(store: StateStore) -> None:
    keys = ["b/2", "b/10", "a", "b", "b/1", "b/", "B/1", "b0", "b/\U0001f600", "b/\uffff", "c"]
    for key in keys:
        await store.set(key, None)
    await store.set("b/gone", 1)
    await store.delete("b/gone")

    assert await listed(store, "b/") == ["b/", "b/1", "b/10", "b/2", "b/\uffff", "b/\U0001f600"]
    assert await listed(store, "") == sorted(keys)
    assert await listed(store, "b/1") == ["b/1", "b/10"]
    assert await listed(store, "nothing/") == []


@pytest.mark.parametrize("prefix", ["%", "_", "b%", "b_", "*", "[a-z]"])
async def test_a_prefix_is_no_pattern(store: StateStore, prefix: str) -> None:
    for key in ("bx", "b/x", f"{prefix}!"):
        await store.set(key, 1)

    assert await listed(store, prefix) == [f"{prefix}!"]


async def test_a_long_listing_holds_back_no_writer_and_tells_every_key_once(store: StateStore) -> None:
    keys = [f"k/{number:05d}" for number in range(2_500)]
    await asyncio.gather(*(store.set(key, 1) for key in keys))

    seen = []
    async for key in store.keys("k/"):
        seen.append(key)
        if len(seen) in (1, 500, 1_001, 2_400):
            await store.set(f"k/{len(seen):05d}-new", 1)
            await store.delete("k/02499")
            await store.set("other", len(seen))

    assert seen == sorted(set(seen))
    assert set(keys) - set(seen) <= {"k/02499"}
    assert await store.get("other") == 2_400


async def test_writes_and_reads_take_effect_in_the_order_they_were_asked_for(store: StateStore) -> None:
    writes = [store.set("k", number) for number in range(600)]

    versions = await asyncio.gather(*writes)

    assert list(versions) == sorted(versions)
    assert await store.get("k") == 599


async def test_a_cancelled_call_harms_nobody(store: StateStore) -> None:
    for round_ in range(20):
        tasks = [asyncio.create_task(store.set(f"k/{round_}/{number}", number)) for number in range(50)]
        for _ in range(round_ % 4):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        kept = [task for task in tasks if not task.cancelled()]
        assert len(kept) >= 25
        assert all(task.exception() is None for task in kept)
        assert [await store.get(f"k/{round_}/{number}") for number in range(1, 50, 2)] == list(range(1, 50, 2))


async def test_closing_twice_or_unused_is_allowed(store: StateStore) -> None:
    await store.close()
    assert await store.set("k", 1) > 0
    await store.close()
    await store.close()


async def test_calls_on_their_way_are_ended_before_the_store_is_closed(store: StateStore) -> None:
    writes = [asyncio.ensure_future(store.set(f"k{number}", number)) for number in range(1_200)]
    await asyncio.sleep(0)

    await store.close()
    more = asyncio.ensure_future(store.set("later", 1))
    await asyncio.gather(*writes, more)

    assert len({write.result() for write in writes} | {more.result()}) == 1_201


# time to live


async def test_a_key_whose_time_is_up_is_gone_for_everybody(store: StateStore) -> None:
    await store.set("stays", 1)
    await store.set("goes", 1, ttl=0.2)
    assert await store.get("goes") == 1
    await asyncio.sleep(0.25)

    assert await store.get("goes", "gone") == "gone"
    assert await store.get_versioned("goes") is None
    assert await listed(store, "") == ["stays"]
    assert await store.delete("goes") is False
    assert await store.compare_and_swap("goes", 2, version=None) is not None
    assert await store.get("goes") == 2


async def test_what_is_over_its_time_is_removed_where_nobody_watches(store: StateStore) -> None:
    begin = await store.set("stays", 0)
    await asyncio.gather(*(store.set(f"short/{number}", 1, ttl=0.01) for number in range(250)))
    await asyncio.sleep(0.05)
    for number in range(300):
        end = await store.set("stays", number)

    removed = 0
    async with aclosing(store.watch("", prefix=True, after=begin)) as changes:
        async for change in changes:
            removed += change.is_gone
            if change.version == end:
                break

    # before the last write, so no reader has done it
    assert removed == 250


async def test_setting_a_key_again_sets_its_time_again(store: StateStore) -> None:
    first = await store.set("lease", "a", ttl=0.2)
    held = await store.compare_and_swap("lease", "a", version=first, ttl=30)
    await store.set("short", 1, ttl=0.2)
    await store.set("short", 2)
    await asyncio.sleep(0.25)

    assert held is not None
    assert await store.get("lease") == "a"
    assert await store.get("short") == 2


async def test_a_lease_whose_holder_is_gone_is_taken_once(store: StateStore) -> None:
    await store.set("lease", "the dead", ttl=0.1)
    await asyncio.sleep(0.15)

    taken = await asyncio.gather(*(store.compare_and_swap("lease", n, version=None, ttl=30) for n in range(20)))

    assert len([version for version in taken if version is not None]) == 1


# watching


async def seen(watch: AsyncGenerator[Change], count: int) -> list[tuple[str, Any]]:
    """The next changes, as key and value; a key that is gone has no value."""
    return [(change.key, ... if change.is_gone else change.value) for change in await following(watch, count)]


async def following(watch: AsyncGenerator[Change], count: int) -> list[Change]:
    return [await anext(watch) for _ in range(count)]


async def test_a_watch_tells_what_is_there_and_then_every_change(store: StateStore) -> None:
    await store.set("k", 1)
    await store.set("other", 1)
    async with aclosing(store.watch("k")) as watch:
        assert await seen(watch, 1) == [("k", 1)]
        await store.set("k", 2)
        await store.set("other", 2)
        await store.set("k", None)
        await store.delete("k")
        await store.delete("k")
        await store.set("k", 3)
        assert await seen(watch, 4) == [("k", 2), ("k", None), ("k", ...), ("k", 3)]


async def test_a_watch_of_what_is_not_there_says_so(store: StateStore) -> None:
    await store.set("other", 1)
    async with aclosing(store.watch("k")) as watch:
        assert await seen(watch, 1) == [("k", ...)]
        await store.set("k", 1)
        assert await seen(watch, 1) == [("k", 1)]


async def test_a_watch_of_a_prefix_tells_of_all_its_keys(store: StateStore) -> None:
    for key in ("a/2", "a/1", "b/1", "a"):
        await store.set(key, key)
    async with aclosing(store.watch("a/", prefix=True)) as watch:
        assert await seen(watch, 2) == [("a/2", "a/2"), ("a/1", "a/1")]
        await store.delete("a/2")
        await store.set("b/1", 2)
        await store.set("a/3", 3)
        assert await seen(watch, 2) == [("a/2", ...), ("a/3", 3)]


async def test_a_watch_goes_on_where_it_was_left(store: StateStore) -> None:
    versions = [await store.set("k", number) for number in range(5)]
    await store.delete("k")
    async with aclosing(store.watch("k", after=versions[2])) as watch:
        assert await seen(watch, 3) == [("k", 3), ("k", 4), ("k", ...)]
        await store.set("k", 5)
        assert await seen(watch, 1) == [("k", 5)]


async def test_wherever_a_watch_is_left_it_goes_on_without_a_gap(store: StateStore) -> None:
    for number in range(30):
        await store.set(f"k/{number % 7}", number)
    async with aclosing(store.watch("k/", prefix=True)) as watch:
        begun = await following(watch, 7)
    for number in range(30, 60):
        await store.set(f"k/{number % 7}", number)
    for left_at in range(1, 8):
        last = {change.key: change.value for change in begun[:left_at]}
        async with aclosing(store.watch("k/", prefix=True, after=begun[left_at - 1].version)) as watch:
            async for change in watch:
                last[change.key] = change.value
                if change.value == 59:
                    break
        assert last == {f"k/{number % 7}": number for number in range(53, 60)}


async def test_a_slow_reader_slows_nobody_and_loses_nothing(store: StateStore) -> None:
    count = 2_500
    async with aclosing(store.watch("k/", prefix=True)) as slow, aclosing(store.watch("k/", prefix=True)) as quick:
        first = asyncio.ensure_future(anext(slow)), asyncio.ensure_future(seen(quick, count))
        await asyncio.sleep(0.1)
        for number in range(count):
            await store.set(f"k/{number % 3}", number)
        assert [value for _, value in await first[1]] == list(range(count))
        rest = await seen(slow, count - 1)
        assert [(await first[0]).value, *(value for _, value in rest)] == list(range(count))


async def test_who_watches_hears_of_a_time_that_is_up(store: StateStore) -> None:
    await store.set("k", 1, ttl=0.3)
    async with aclosing(store.watch("k")) as watch:
        assert await seen(watch, 1) == [("k", 1)]
        assert await seen(watch, 1) == [("k", ...)]
        await store.set("k", 2, ttl=0.1)
        await asyncio.sleep(0.15)
        await store.set("k", 3)
        assert await seen(watch, 3) == [("k", 2), ("k", ...), ("k", 3)]


async def test_a_reader_looks_now_and_then_for_what_is_over(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    remove = store._remove_expired  # type: ignore[attr-defined]

    async def counted() -> None:
        looks.append(time.monotonic())
        await remove()

    monkeypatch.setattr(store, "_remove_expired", counted)
    async with aclosing(store.watch("k")) as watch:
        await anext(watch)
        for number in range(50):
            change = asyncio.ensure_future(anext(watch))
            await asyncio.sleep(0.01)  # it waits
            await store.set("k", number)
            assert (await change).value == number
        await asyncio.sleep(1.2 * watching.PATIENCE)

    # not at each change, but also where nothing changes
    assert 1 <= len(looks) <= 10
    assert all(later - earlier > 0.9 * watching.PATIENCE for earlier, later in pairwise(looks))


async def test_versions_have_no_gaps(store: StateStore) -> None:
    first = await store.set("k", 0)
    await asyncio.gather(*(store.set(f"k/{number}", number) for number in range(200)))
    await store.delete("nothing")
    await store.delete("k")
    async with aclosing(store.watch("", prefix=True, after=first)) as watch:
        changes = await following(watch, 201)
    assert [change.version for change in changes] == list(range(first + 1, first + 202))


async def test_many_watch_and_each_sees_all(store: StateStore) -> None:
    watches = [store.watch("k/", prefix=True) for _ in range(20)]
    tasks = [asyncio.ensure_future(seen(watch, 300)) for watch in watches]
    await asyncio.sleep(0.1)
    await asyncio.gather(*(store.set(f"k/{number}", number) for number in range(300)))
    results = await asyncio.gather(*tasks)
    assert len(results[0]) == 300
    assert all(result == results[0] for result in results)
    for watch in watches:
        await watch.aclose()


async def test_a_history_that_is_gone_is_said(place: Place) -> None:
    short = place.opened(history=50)
    versions = [await short.set("k", number) for number in range(1_100)]
    while True:
        # the history is pruned now and then
        versions.append(await short.set("k", len(versions)))
        if versions[-1] % 1_000 == 0:
            break
    with pytest.raises(HistoryLost, match="watch without after=") as caught:
        await anext(short.watch("k", after=versions[0]))
    assert caught.value.after == versions[0]
    assert versions[0] + 1 < caught.value.kept_from <= versions[-1]
    async with aclosing(short.watch("k", after=caught.value.kept_from - 1)) as watch:
        assert (await anext(watch)).version == caught.value.kept_from
    async with aclosing(short.watch("k")) as watch:
        assert await seen(watch, 1) == [("k", len(versions) - 1)]
    await short.close()


async def test_a_store_that_is_behind_what_was_seen_of_it_says_so(store: StateStore) -> None:
    # it was restored from a backup, or is another one
    with pytest.raises(HistoryLost):
        await anext(store.watch("k", after=7))
    last = await store.set("k", 1)
    with pytest.raises(HistoryLost, match=f"is at version {last}, and change {last + 7} was seen") as caught:
        await anext(store.watch("k", after=last + 7))
    assert (caught.value.after, caught.value.kept_from) == (last + 7, last + 1)


async def test_a_reader_keeps_no_more_than_it_may(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "WINDOW_SIZE", 1_000)
    first = await store.set("k", "first")
    async with aclosing(store.watch("k", after=first)) as slow, aclosing(store.watch("k", after=first)) as quick:
        task = asyncio.ensure_future(following(quick, 30))
        slow_first = asyncio.ensure_future(anext(slow))
        await asyncio.sleep(0.1)
        for number in range(30):
            await store.set("k", f"{number}" * 100)
        seen_by_quick = await task
        (reader,) = store._readers.values()  # type: ignore[attr-defined]
        assert sum(change.size for change in reader._window) <= 1_000
        # who is behind what it keeps reads for himself
        assert [await slow_first, *await following(slow, 29)] == seen_by_quick
