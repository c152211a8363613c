"""A run that is lost, or cancelled, while it undoes: the next one goes on with that, and never forward."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from beluga_airflow import Chain, FlowResult, InvalidInput
from beluga_airflow.config import Settings
from beluga_airflow.execute import Resources
from beluga_airflow.graph import Identity
from beluga_airflow.local import run_with
from beluga_airflow.state.memory import MemoryStore
from tests.running import DEADLINE
from tests.undoing import IN_FLIGHT, NO_COURIER, Shop, hangs, waits_for_ever


@pytest.fixture
def shop() -> Shop:
    return Shop()


class LostError(Exception):
    """Stands for the end of the process."""


@dataclass
class Kept:
    """A checkpoint, with which the process is lost before or after one of its entries is kept."""

    entries: dict[str, str] = field(default_factory=dict)
    lost: tuple[str, str] = ("", "")

    async def load(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        return {name: json.loads(self.entries[name]) for name in names if name in self.entries}

    async def save(self, name: str, entry: dict[str, Any]) -> None:
        if self.lost == ("before", name):
            raise LostError
        self.entries[name] = json.dumps(entry)
        if self.lost == ("after", name):
            raise LostError


async def attempt(flow: Chain, kept: Kept, *, gives_up: bool = True) -> FlowResult:
    async with asyncio.timeout(DEADLINE):
        return await run_with(
            flow,
            {},
            identity=Identity.of("shop", 7),
            resources=Resources(state=MemoryStore(), model=None),  # type: ignore[arg-type]  # nothing is decided
            settings=Settings(),
            checkpoint=kept,
            gives_up=lambda: gives_up,
        )


# where the process is lost, and what is called after it
LOST = {
    ("after", "undo"): ["undo pay", "undo reserve"],
    ("before", "pay.undo"): ["undo pay", "undo reserve"],
    ("after", "pay.undo"): ["undo reserve"],
    ("before", "reserve.undo"): ["undo reserve"],
    ("after", "reserve.undo"): [],
}


@pytest.mark.parametrize("lost", LOST, ids=" ".join)
async def test_a_run_that_was_lost_while_undoing_goes_on_with_that_and_never_forward(
    shop: Shop, lost: tuple[str, str]
) -> None:
    ends = iter([RuntimeError("no courier"), None])

    def ship(data: dict[str, Any]) -> None:
        shop.calls.append("ship")
        if error := next(ends):  # it would succeed now
            raise error

    flow, kept = shop.order(ship), Kept(lost=lost)
    with pytest.raises(LostError):
        await attempt(flow, kept)
    assert shop.calls[:3] == ["reserve", "pay", "ship"]
    shop.calls.clear()
    kept.lost = ("", "")

    result = await attempt(flow, kept)

    assert shop.calls == LOST[lost]
    assert (result.status, result.error) == ("failed", NO_COURIER)
    assert (result.undone, list(result.undone)) == ({"pay": "undone", "reserve": "undone"}, ["pay", "reserve"])
    assert {context.idempotency_key for context in shop.contexts} == {"shop/7/pay.undo", "shop/7/reserve.undo"}
    assert await attempt(flow, kept) == result
    assert shop.calls == LOST[lost]


async def test_a_run_that_was_lost_before_it_kept_its_failure_finds_it_again(shop: Shop) -> None:
    flow, kept = shop.order(shop.fails("ship")), Kept(lost=("before", "undo"))
    with pytest.raises(LostError):
        await attempt(flow, kept)
    assert shop.calls == ["reserve", "pay", "ship"]
    kept.lost = ("", "")

    result = await attempt(flow, kept)

    assert shop.calls == ["reserve", "pay", "ship", "ship", "undo pay", "undo reserve"]
    assert result.undone == {"pay": "undone", "reserve": "undone"}


async def test_what_could_not_be_undone_is_remembered_by_the_next_run(shop: Shop) -> None:
    flow = shop.order(shop.fails("ship"), pay=shop.undoes("pay", InvalidInput("no such payment")))
    kept = Kept(lost=("after", "pay.undo"))
    with pytest.raises(LostError):
        await attempt(flow, kept)
    kept.lost = ("", "")

    result = await attempt(flow, kept)

    assert result.undone == {"pay": "InvalidInput: no such payment", "reserve": "undone"}
    assert result.error == f"{NO_COURIER}; step 'pay' could not be undone: InvalidInput: no such payment"
    assert shop.calls[3:] == ["undo pay", "undo reserve"]


async def test_a_run_out_of_time_that_was_lost_while_undoing_gets_no_new_time(shop: Shop) -> None:
    flow, kept = shop.order(hangs), Kept(lost=("after", "pay.undo"))
    flow.timeout = 0.1
    with pytest.raises(LostError):
        await attempt(flow, kept)
    kept.lost = ("", "")
    result = await attempt(flow, kept)
    assert (result.status, result.undone) == ("timed_out", {"ship": IN_FLIGHT, "pay": "undone", "reserve": "undone"})
    assert shop.calls == ["reserve", "pay", "undo pay", "undo reserve"]


async def cancelled_attempt(flow: Chain, kept: Kept, reached: asyncio.Event, *, gives_up: bool) -> None:
    task = asyncio.create_task(attempt(flow, kept, gives_up=gives_up))
    async with asyncio.timeout(DEADLINE):
        await reached.wait()
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


async def test_a_cancelled_run_whose_steps_were_undone_never_goes_forward_either(shop: Shop) -> None:
    """Or the next run would ship what was paid back."""
    reached = asyncio.Event()
    flow, kept = shop.order(waits_for_ever(reached)), Kept()
    await cancelled_attempt(flow, kept, reached, gives_up=True)
    assert shop.calls == ["reserve", "pay", "undo pay", "undo reserve"]

    result = await attempt(flow, kept)

    assert shop.calls == ["reserve", "pay", "undo pay", "undo reserve"]
    assert result.status == "cancelled"
    assert result.error == f"the run was cancelled; step 'ship' could not be undone: {IN_FLIGHT}"
    assert result.undone == {"ship": IN_FLIGHT, "pay": "undone", "reserve": "undone"}


async def test_a_cancelled_process_undoes_nothing_where_another_goes_on(shop: Shop) -> None:
    reached = asyncio.Event()
    kept = Kept()
    await cancelled_attempt(shop.order(waits_for_ever(reached)), kept, reached, gives_up=False)
    assert (shop.calls, list(kept.entries)) == (["reserve", "pay"], ["reserve", "pay"])

    result = await attempt(shop.order(shop.does("ship")), kept)

    assert (result.status, shop.calls) == ("completed", ["reserve", "pay", "ship"])


async def test_a_process_that_is_cancelled_while_it_undoes_leaves_the_rest_to_another(shop: Shop) -> None:
    reached = asyncio.Event()
    flow = shop.order(shop.fails("ship"), pay=waits_for_ever(reached))
    kept = Kept()
    await cancelled_attempt(flow, kept, reached, gives_up=False)
    assert (shop.calls, list(kept.entries)) == (["reserve", "pay", "ship"], ["reserve", "pay", "undo"])

    result = await attempt(shop.order(shop.does("ship")), kept)

    assert (result.status, result.undone) == ("failed", {"pay": "undone", "reserve": "undone"})
    assert shop.calls[3:] == ["undo pay", "undo reserve"]


@pytest.mark.parametrize("how", ["timed_out", "cancelled"])
async def test_a_step_that_ended_while_its_outcome_was_being_kept_is_undone(shop: Shop, how: str) -> None:
    saving = asyncio.Event()

    class Slow(Kept):
        async def save(self, name: str, entry: dict[str, Any]) -> None:
            if name == "pay" and not saving.is_set():
                saving.set()
                await asyncio.Event().wait()
            await super().save(name, entry)

    flow, kept = shop.order(shop.does("ship")), Slow()
    if how == "cancelled":
        await cancelled_attempt(flow, kept, saving, gives_up=True)
    else:
        flow.timeout = 0.2
        result = await attempt(flow, kept)
        assert (result.status, result.steps["pay"]) == ("timed_out", "completed")
    assert shop.calls == ["reserve", "pay", "undo pay", "undo reserve"]
