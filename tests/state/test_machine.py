"""Any sequence of calls leaves a store as it leaves a plain dict, and its history tells that sequence."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from beluga_airflow.state import Change, StateStore
from tests.state.backends import Place

KEYS = st.sampled_from(["a", "a/1", "a/2", "b", "", "ü"])
VALUES = st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2)


class Machine(RuleBasedStateMachine):
    """The calls, on a store and on a dict."""

    place: Place

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.store: StateStore = self.place.opened()
        self.first = self.loop.run(self.store.set("zero", 0))
        self.model: dict[str, tuple[Any, int]] = {"zero": (0, self.first)}
        self.told: list[tuple[str, Any]] = []

    def teardown(self) -> None:
        self.loop.run(self.store.close())
        self.loop.close()

    @rule(key=KEYS, value=VALUES)
    def set(self, key: str, value: Any) -> None:
        self.model[key] = value, self.loop.run(self.store.set(key, value))
        self.told.append((key, value))

    @rule(key=KEYS, value=VALUES, off=st.sampled_from([0, 0, 1, -1, None]))
    def swap(self, key: str, value: Any, off: int | None) -> None:
        there = self.model.get(key)
        version = None if there is None or off is None else there[1] + off
        swapped = self.loop.run(self.store.compare_and_swap(key, value, version=version))
        fits = version == (there[1] if there else None)
        assert (swapped is not None) == fits
        if swapped is not None:
            self.model[key] = value, swapped
            self.told.append((key, value))

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        was_there = self.model.pop(key, None) is not None
        assert self.loop.run(self.store.delete(key)) == was_there
        if was_there:
            self.told.append((key, ...))

    @rule()
    def close(self) -> None:
        self.loop.run(self.store.close())

    @rule(prefix=KEYS)
    def listed(self, prefix: str) -> None:
        async def keys() -> list[str]:
            return [key async for key in self.store.keys(prefix)]

        assert self.loop.run(keys()) == sorted(key for key in self.model if key.startswith(prefix))

    @invariant()
    def holds_what_a_dict_holds(self) -> None:
        async def found(key: str) -> Any:
            versioned = await self.store.get_versioned(key)
            return None if versioned is None else (versioned.value, versioned.version)

        for key in ("a", "a/1", "b", "zero"):
            assert self.loop.run(found(key)) == self.model.get(key)

    @rule()
    def history_tells_it(self) -> None:
        async def changes() -> list[Change]:
            async with aclosing(self.store.watch("", prefix=True, after=self.first)) as watch:
                return [await anext(watch) for _ in self.told]

        told = self.loop.run(changes())
        assert [(change.key, ... if change.is_gone else change.value) for change in told] == self.told
        assert [change.version for change in told] == list(range(self.first + 1, self.first + 1 + len(self.told)))


def test_a_store_behaves_as_a_dict_with_a_history(place: Place) -> None:
    machine = type("Machine", (Machine,), {"place": place})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
