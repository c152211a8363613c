"""An order that goes wrong, for the tests of undoing in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from beluga_airflow import Chain, StepContext
from tests.running import FAST, ONCE

Step = Callable[..., Any]


@dataclass
class Shop:
    """Steps, what undoes them, and what was called of these, in order."""

    calls: list[str] = field(default_factory=list)
    contexts: list[StepContext] = field(default_factory=list)

    def does(self, name: str) -> Step:
        async def step(data: dict[str, Any]) -> dict[str, Any]:
            self.calls.append(name)
            return {name: True}

        return step

    def undoes(self, name: str, *errors: Exception) -> Step:
        """Fails with one error after the other, then works."""
        left = list(errors)

        def undo(data: dict[str, Any], context: StepContext) -> None:
            self.calls.append(f"undo {name}")
            self.contexts.append(context)
            if left:
                raise left.pop(0)

        return undo

    def fails(self, name: str, error: BaseException | None = None) -> Step:
        def step(data: dict[str, Any]) -> None:
            self.calls.append(name)
            raise error or RuntimeError("no courier")

        return step

    def order(self, end: Step, **undos: Step) -> Chain:
        """Goods are reserved and paid for; then comes ``end``."""
        return (
            Chain("shop", retry=ONCE)
            .add_step("reserve", self.does("reserve"), compensate=undos.get("reserve", self.undoes("reserve")))
            .add_step("pay", self.does("pay"), compensate=undos.get("pay", self.undoes("pay")), retry=FAST)
            .add_step("ship", end, compensate=self.undoes("ship"))
        )


IN_FLIGHT = "it ran when the flow ended, and may have done its work: see whether it did"
NO_COURIER = "step 'ship' failed: RuntimeError: no courier"


async def hangs(data: dict[str, Any]) -> None:
    await asyncio.Event().wait()


def waits_for_ever(reached: asyncio.Event) -> Step:
    async def step(data: dict[str, Any]) -> None:
        reached.set()
        await asyncio.Event().wait()

    return step
