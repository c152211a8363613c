"""The work that every side does, and how a side is asked for it. Standard library only: each side has its own packages.

A side is a process that answers one line of JSON with one line of JSON until its stdin ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

__all__ = ["INPUTS", "Program", "Step", "serve", "steps_of"]

Data = dict[str, Any]
Program = Callable[[Data], Awaitable[Data]]
"""Does the work once: takes the input, gives the final data."""

INPUTS: Data = {
    "order_id": "order-123",
    "order_value": 250.0,
    "customer_tier": "gold",
    "product_id": "40117",
    "quantity": 2,
}

_ORDER: dict[str, tuple[tuple[str, ...], Data]] = {
    "validate": ((), {"valid": True}),
    "check_inventory": (("validate",), {"in_stock": True}),
    "check_credit": (("validate",), {"credit_ok": True}),
    "process_payment": (("check_inventory", "check_credit"), {"payment_id": "payment-123"}),
    "fulfill": (("process_payment",), {"fulfillment_id": "parcel-123"}),
    "notify": (("fulfill",), {"message_id": "message-123"}),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: it takes the data and returns a small mapping. ``before`` names the steps directly before it."""

    name: str
    before: tuple[str, ...]
    returns: Data
    function: Callable[[Data], Any]


def steps_of(shape: str | int, *, sync: bool, ran: list[str]) -> list[Step]:
    """The steps in topological order.

    Args:
        shape: ``"order"``, the graph of six steps, or the length of a chain whose steps all return the same key.
        sync: plain functions instead of coroutines.
        ran: every call of a step leaves the step's name here, which is all that a step does.
    """
    table = _ORDER if shape == "order" else _chain(int(shape))
    return [
        Step(name=name, before=before, returns=returns, function=_function(name, returns, sync, ran))
        for name, (before, returns) in table.items()
    ]


def _chain(length: int) -> dict[str, tuple[tuple[str, ...], Data]]:
    return {f"step_{n}": ((f"step_{n - 1}",) if n else (), {"seen": True}) for n in range(length)}


def _function(name: str, returns: Data, sync: bool, ran: list[str]) -> Callable[[Data], Any]:
    # without annotations: no side is asked to convert the data
    def plain(order):
        ran.append(name)
        return returns.copy()

    async def coroutine(order):
        ran.append(name)
        return returns.copy()

    return plain if sync else coroutine


def serve(program_of: Callable[[list[Step]], Program], package: str | None = None) -> None:
    """Be a side: say which version this is, then do what is asked for.

    A request has a ``shape``, ``sync``, and a number of ``runs``, which go one after the other in one event loop. The
    answer has the ``cost`` of a step in microseconds, how often each step ``ran``, and the final ``data``.

    Args:
        program_of: makes the side's program of steps; not part of what is timed.
        package: what is measured; None: nothing but Python.
    """
    _answer({"version": version(package) if package else None})
    programs: dict[tuple[Any, bool], tuple[Program, list[str]]] = {}
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            request = json.loads(line)
            work = request["shape"], request["sync"]
            if work not in programs:
                ran: list[str] = []
                programs[work] = program_of(steps_of(work[0], sync=work[1], ran=ran)), ran
            _answer(runner.run(_timed(*programs[work], request["runs"])))


def _answer(answer: Data) -> None:
    print(json.dumps(answer), flush=True)


async def _timed(program: Program, ran: list[str], runs: int) -> Data:
    ran.clear()
    gc.collect()  # what an earlier request left behind is not this one's cost
    start = time.perf_counter()
    for _ in range(runs):
        data = await program(INPUTS)
    seconds = time.perf_counter() - start
    return {"cost": round(seconds * 1e6 / len(ran), 3), "ran": Counter(ran), "data": data}
