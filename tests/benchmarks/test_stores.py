"""The questions about shared state, and the sides they compare with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import breaker
import pytest
import stores
import watching
from bare import MODULES, Pair, pairs, psycopg_3, redis_py
from harness import Unequal, taking_turns, text
from watching import Watcher, verdict

from beluga_airflow.state import Change
from beluga_airflow.state.memory import MemoryStore

SMALL = {
    "stores": lambda: stores.measured(runs=dict.fromkeys(stores.RUNS, 2), rounds=2),
    "watching": lambda: watching.measured(changes=300, watchers=3),
    "breaker": lambda: breaker.measured(runs=2, rounds=2),
}


@pytest.fixture
async def found() -> AsyncIterator[list[Pair]]:
    async with pairs() as (found, _):
        yield found


async def test_each_has_its_turns_and_the_first_is_not_counted() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            calls.append(name)
            await asyncio.sleep(seconds)

        return run

    samples = await taking_turns({"beluga": work("b", 0.002), "bare": work("p", 0)}, runs=2, rounds=3)

    assert "".join(calls) == "ppbb" + "bbpp" + "ppbb" + "bbpp"
    assert {side: len(costs) for side, costs in samples.items()} == {"beluga": 3, "bare": 3}
    # microseconds of one run
    assert all(2_000 <= cost < 200_000 for cost in samples["beluga"])
    assert min(samples["bare"]) < 1_000


async def test_all_sides_of_a_backend_do_the_same(found: list[Pair]) -> None:
    assert {"memory", "SQLite"} <= {pair.name for pair in found}
    for pair in found:
        for side in (pair.ours, pair.bare):
            first = await side.set("k", {"n": 1})
            assert await side.set("other", 0) == first + 1
            assert await side.compare_and_swap("k", {"n": 2}, version=first) == first + 2
            assert await side.compare_and_swap("k", {"n": 3}, version=first) is None
            assert await side.get("k") == {"n": 2}
        await pair.plain.set("k", {"n": 2})
        assert await pair.plain.get("k") == {"n": 2}


async def test_all_sides_tell_of_the_same_changes(found: list[Pair]) -> None:
    async def told(side: Any, reader: Any) -> list[Any]:
        await side.set("k", 0)
        async with asyncio.timeout(20), aclosing(reader.watch("k")) as changes:
            seen = [await anext(changes)]
            for value in (1, 2):
                await side.set("other", value)
                await side.set("k", value)
                seen.append(await anext(changes))
        return [getattr(change, "value", change) for change in seen]

    for pair in found:
        assert await told(pair.ours, pair.reader) == [0, 1, 2]
        assert await told(pair.bare, pair.bare) == [0, 1, 2]


@pytest.mark.parametrize("question", SMALL)
def test_a_question_about_state_is_answered(question: str) -> None:
    answer = SMALL[question]()

    names = [each.work.partition(":")[0] for each in answer.comparisons]
    assert {"memory", "SQLite"} <= {*names}
    assert all(min(costs) > 0 for each in answer.comparisons for costs in each.samples.values())
    assert "SQLite" in answer.versions
    # each backend is measured, or it is said why not
    left_out = [note for note in answer.notes if note.startswith("Left out: ")]
    assert len({*names}) + len(left_out) == len(MODULES)
    assert answer.question in text(answer)


def test_gets_and_sets_have_targets_where_there_is_a_client() -> None:
    targets = {each.work: each.at_most for each in SMALL["stores"]().comparisons}

    assert [targets[f"SQLite: {work}"] for work in ("get", "set", "watch")] == [{"bare": 1.5}, {"bare": 1.5}, {}]
    assert targets["memory: get"] == {}


async def test_a_server_that_is_away_is_left_out_and_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setattr(redis_py, "URL", f"redis://:hush-4711@localhost:{unused_tcp_port}/0")
    monkeypatch.setattr(psycopg_3, "URL", f"postgresql://u:hush-4711@localhost:{unused_tcp_port}/d")

    async with pairs() as (found, away):
        pass

    assert [pair.name for pair in found] == ["memory", "SQLite"]
    assert [f"localhost:{unused_tcp_port}" in note for note in away] == [True, True]
    assert "hush" not in str(away)


class Wrong(MemoryStore):
    """A store that takes everything for something else."""

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> int:
        return await super().set(key, [value], ttl=ttl) + 1


@pytest.mark.parametrize("work", ["get", "compare-and-swap", "watch"])
async def test_a_side_that_does_other_work_has_no_cost(found: list[Pair], work: str) -> None:
    memory, wrong = found[0], Wrong()
    pair = Pair(name="wrong", ours=wrong, bare=memory.bare, plain=memory.plain, reader=wrong, url=None, versions={})
    with pytest.raises(Unequal, match="wrong: Wrong"):
        await stores.WORKS[work](pair, 1, 1)
    await wrong.close()


class Deaf(MemoryStore):
    """A store whose watch breaks off at its first change."""

    async def watch(self, key: str, *, prefix: bool = False, after: int | None = None) -> AsyncGenerator[Change]:
        async with aclosing(super().watch(key, prefix=prefix, after=after)) as changes:
            yield await anext(changes)
            await anext(changes)
        raise ConnectionError("cut off")


async def test_a_watch_that_breaks_off_is_not_waited_for(found: list[Pair]) -> None:
    memory, deaf = found[0], Deaf()
    pair = Pair(name="deaf", ours=deaf, bare=memory.bare, plain=memory.plain, reader=deaf, url=None, versions={})
    with pytest.raises(ConnectionError, match="cut off"):
        await asyncio.wait_for(stores.WORKS["watch"](pair, 1, 1), 10)
    await deaf.close()


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ([6, 7, 8], "of 6 changes due, 0 were lost and 0 came twice; all came in order. Target: none lost: met."),
        ([6, 8], "1 were lost and 0 came twice; all came in order. Target: none lost: missed."),
        ([6, 7, 7, 8], "0 were lost and 1 came twice; all came in order. Target: none lost: missed."),
        ([6, 8, 7], "0 were lost and 0 came twice; not all came in order. Target: none lost: missed."),
    ],
)
def test_what_was_lost_twice_or_late_is_said(versions: list[int], said: str) -> None:
    watchers = [Watcher(store=MemoryStore(), after=5, versions=seen) for seen in ([6, 7, 8], versions)]

    assert said in verdict("Redis", watchers, 3)


async def test_a_watcher_that_never_hears_the_end_is_not_waited_for(
    found: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PATIENCE", 0.2)
    deaf = Watcher(store=MemoryStore(), after=0)

    await watching._watch(found[0], [deaf], 10)

    assert "10 were lost" in verdict("memory", [deaf], 10)
