"""A bound on time, and whose TimeoutError it is."""

from __future__ import annotations

import asyncio

import pytest

from beluga_airflow.resilience.bounded import bounded


class TooLateError(Exception):
    pass


async def test_what_takes_too_long_raises_what_was_asked_for() -> None:
    with pytest.raises(TooLateError) as caught:
        async with bounded(0.01, lambda: TooLateError("late")):
            await asyncio.Event().wait()
    assert caught.value.__suppress_context__


async def test_a_timeout_of_the_bodys_own_passes_through() -> None:
    with pytest.raises(TimeoutError, match="its own"):
        async with bounded(60, TooLateError):
            raise TimeoutError("its own")


async def test_without_a_bound_nothing_is_raised() -> None:
    async with bounded(None, TooLateError):
        await asyncio.sleep(0)
        reached = True
    assert reached
