"""How far an item has come: a lost worker's outcomes are found, those of a changed flow are not."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow import Chain, FlowResult, InvalidFlow, Retry
from beluga_airflow.config import Settings
from beluga_airflow.errors import StateError
from beluga_airflow.execute import Resources
from beluga_airflow.execute.checkpoints import KEPT
from beluga_airflow.graph import Identity
from beluga_airflow.local import run_with
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.state.sqlite import SqliteStore
from beluga_airflow.temporal import batch as module
from beluga_airflow.temporal.batch import Batch, Item


class Shop:
    """One item's flow, whose worker may be lost in any of its calls.

    Attributes:
        calls: what was called so far.
        lost_in: the call in which the worker is lost.
    """

    def __init__(self) -> None:
        self.batch = Batch(MemoryStore(), "batch")
        self.calls: list[str] = []
        self.lost_in: str | None = None

    def flow(self, *steps: str) -> Chain:
        """A flow of these steps; each can be undone, and one called "ship" fails."""
        chain = Chain("shop", retry=Retry(maximum_attempts=1))
        for name in steps:
            chain.add_step(name, self._called(name), compensate=self._called(f"undo {name}"))
        return chain

    async def attempt(self, flow: Chain) -> FlowResult | None:
        """An attempt of the item; None where its worker was lost."""
        task = asyncio.create_task(
            run_with(
                flow,
                {},
                identity=Identity(scope="shop/o-1"),
                resources=Resources(state=self.batch.store, model=None),  # type: ignore[arg-type]  # nothing is asked
                settings=Settings(),
                checkpoint=self.batch.checkpoint(0, flow.check().fingerprint),
                gives_up=lambda: False,
            )
        )
        self._task = task
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    def _called(self, name: str) -> Any:
        async def call(data: dict[str, Any]) -> None:
            self.calls.append(name)
            if name == self.lost_in:
                self.lost_in = None
                self._task.cancel()
                await asyncio.sleep(10)
            if name == "ship":
                raise ConnectionError("no truck")

        return call


async def test_an_item_goes_on_behind_its_finished_steps() -> None:
    shop = Shop()
    shop.lost_in = "pack"
    assert await shop.attempt(shop.flow("pay", "pack")) is None
    result = await shop.attempt(shop.flow("pay", "pack"))
    assert result is not None
    assert (result.status, shop.calls) == ("completed", ["pay", "pack", "pack"])


async def test_an_item_whose_flow_changed_begins_anew_also_when_it_is_changed_back() -> None:
    shop = Shop()
    shop.lost_in = "pack"
    await shop.attempt(shop.flow("reserve", "pay", "pack"))
    assert shop.calls == ["reserve", "pay", "pack"]
    shop.calls.clear()
    shop.lost_in = "log"
    await shop.attempt(shop.flow("reserve", "log", "pay", "pack"))
    assert shop.calls == ["reserve", "log"]
    shop.calls.clear()
    shop.lost_in = "pay"
    await shop.attempt(shop.flow("reserve", "pay", "pack"))
    result = await shop.attempt(shop.flow("reserve", "pay", "pack"))
    assert result is not None
    # what the first attempt kept of "pay" is nothing to the third and the fourth
    assert (result.status, shop.calls) == ("completed", ["reserve", "pay", "pay", "pack"])


async def test_an_item_whose_flow_changed_while_it_was_undone_never_goes_forward() -> None:
    shop = Shop()
    shop.lost_in = "undo reserve"
    await shop.attempt(shop.flow("reserve", "pay", "ship"))
    assert shop.calls == ["reserve", "pay", "ship", "undo pay", "undo reserve"]
    changed = shop.flow("reserve", "pay", "log")
    for _ in range(2):
        with pytest.raises(InvalidFlow, match=r"item was changed .* not undone: reserve; undo by hand .* clear"):
            await shop.attempt(changed)
    assert shop.calls == ["reserve", "pay", "ship", "undo pay", "undo reserve"]
    # and the code that it began with undoes what is left
    result = await shop.attempt(shop.flow("reserve", "pay", "ship"))
    assert result is not None
    assert (result.status, result.undone) == ("failed", {"pay": "undone", "reserve": "undone"})
    assert shop.calls[5:] == ["undo reserve"]


# what a batch leaves does not stay for ever

ITEM = Item(index=0, key="o-1", scope="shop/o-1", data={"order_id": "o-1"})


async def one_item() -> AsyncIterator[Item]:
    yield ITEM


def ends_of(file: Path) -> dict[str, float | None]:
    """When each key in a state file ends, as the seconds from now."""
    with closing(sqlite3.connect(file)) as db:
        return {key: ends and ends - time.time() for key, ends in db.execute("SELECT key, ends FROM entry")}


async def test_all_that_a_batch_stores_has_an_end_and_its_results_outlast_it(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    batch = Batch(store, "b")
    await batch.put(one_item(), started=time.time())
    await batch.checkpoint(0, "f").save("pay", {"output": 1})
    unfinished = ends_of(tmp_path / "state.db")
    await batch.end(ITEM, FlowResult(status="completed"))
    finished = ends_of(tmp_path / "state.db")
    await store.close()

    part = "beluga/batches/b"
    assert unfinished.keys() == {f"{part}/staged", *(f"{part}/{what}/000000000" for what in ("items", "steps"))}
    assert finished.keys() == {f"{part}/staged", *(f"{part}/{what}/000000000" for what in ("items", "results"))}
    staged = finished.pop(f"{part}/staged")
    assert staged == pytest.approx(KEPT, abs=60)
    assert all(ends and ends > staged + 3600 for ends in [*finished.values(), unfinished[f"{part}/steps/000000000"]])


async def test_what_is_written_again_lives_as_long_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGER", 0.5)
    store = SqliteStore(tmp_path / "state.db")
    checkpoint = Batch(store, "b").checkpoint(0, "f")
    await checkpoint.save("pay", {"output": 1})
    await asyncio.sleep(0.3)
    await checkpoint.save("pack", {"output": 2})
    await asyncio.sleep(0.3)
    kept = await Batch(store, "b").checkpoint(0, "f").load(["pay", "pack"])
    await asyncio.sleep(0.3)
    gone = await Batch(store, "b").checkpoint(0, "f").load(["pay", "pack"])
    await store.close()

    assert (kept, gone) == ({"pay": {"output": 1}, "pack": {"output": 2}}, {})


async def test_a_batch_that_is_not_kept_any_more_is_no_batch_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 0.05)
    batch = Batch(MemoryStore(), "b")
    await batch.put(one_item(), started=1.0)
    await batch.end(ITEM, FlowResult(status="completed"))
    assert await batch.started() == 1.0
    await asyncio.sleep(0.1)
    with pytest.raises(StateError, match=r"batch 'b' is not in the state store memory:// .* 30 days"):
        await batch.started()
