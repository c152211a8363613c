"""A bound on time, and whose TimeoutError it is."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow.resilience.bounded import bounded


class TooLateError(Exception):
    pass


async def late(timeout: float) -> float:
    """When a body that would never end is ended: seconds since its start."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(TooLateError), bounded(timeout, TooLateError):
        await asyncio.Event().wait()
    return loop.time() - start


async def test_what_takes_too_long_raises_what_was_asked_for() -> None:
    with pytest.raises(TooLateError) as caught, bounded(0.01, lambda: TooLateError("late")):
        await asyncio.Event().wait()
    assert caught.value.__suppress_context__


async def test_a_timeout_of_the_bodys_own_passes_through() -> None:
    with pytest.raises(TimeoutError, match="its own"), bounded(60, TooLateError):
        raise TimeoutError("its own")


async def test_without_a_bound_nothing_is_raised() -> None:
    with bounded(None, TooLateError):
        await asyncio.sleep(0)
        reached = True
    assert reached


@given(st.lists(st.integers(1, 8), min_size=1, max_size=8))
def test_each_of_many_has_its_own_end(ticks: list[int]) -> None:
    async def all_of_them() -> list[float]:
        return await asyncio.gather(*(late(tick / 100) for tick in ticks))

    for tick, end in zip(ticks, asyncio.run(all_of_them()), strict=True):
        assert tick / 100 <= end < tick / 100 + 1


async def test_a_shorter_one_that_begins_later_ends_first() -> None:
    async def first() -> str:
        await late(0.2)
        return "long"

    long = asyncio.create_task(first())
    await asyncio.sleep(0)
    await late(0.01)
    assert not long.done()
    assert await long == "long"


async def test_one_inside_another_ends_alone() -> None:
    with bounded(60, lambda: ValueError("the outer one")):
        await late(0.01)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0, "what was cancelled for its sake is settled"
        reached = True
    assert reached


async def test_the_outer_one_ends_the_inner() -> None:
    with pytest.raises(TooLateError), bounded(0.01, TooLateError), bounded(60, lambda: ValueError("the inner one")):
        await asyncio.Event().wait()


async def test_a_cancellation_by_somebody_else_stays_one() -> None:
    async def body() -> None:
        with bounded(60, TooLateError):
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_at_the_same_moment_holds() -> None:
    async def body() -> None:
        with bounded(0.01, TooLateError):
            try:
                await asyncio.Event().wait()
            finally:
                asyncio.current_task().cancel()  # type: ignore[union-attr]  # it runs in one
                await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(body())


async def test_an_error_of_the_body_is_not_hidden_by_the_end() -> None:
    async def body() -> None:
        with bounded(0.01, TooLateError):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("the body") from None

    with pytest.raises(ValueError, match="the body"):
        await body()


async def test_a_body_that_ends_in_time_is_forgotten() -> None:
    task = asyncio.current_task()
    assert task is not None
    with bounded(0.02, TooLateError):
        pass
    await asyncio.sleep(0.05)
    assert task.cancelling() == 0


def test_a_loop_that_is_closed_is_not_kept() -> None:
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def body() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        with bounded(60, TooLateError):
            pass

    for _ in range(3):
        asyncio.run(body())
    gc.collect()
    assert [loop() is None for loop in loops[:2]] == [True, True]
