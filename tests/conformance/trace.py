"""Steps that leave a trace in a file, which can be read whatever process they ran in."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beluga_airflow import StepContext

__all__ = ["Event", "Trace", "fails", "gives", "meets", "never", "nothing", "step", "traced"]

PATIENCE = 20.0
"""Seconds that a step waits for another one before it fails."""


@dataclass(frozen=True)
class Event:
    """A step ``began``, ``ended`` or ``failed``; ``at`` is in seconds."""

    step: str
    what: str
    attempt: int
    key: str
    at: float


class Trace:
    """What the steps of one run did, in the order in which they did it.

    Args:
        folder: one for each run; it exists.
    """

    def __init__(self, folder: str | Path) -> None:
        self._file = Path(folder) / "trace.jsonl"

    def add(self, context: StepContext, what: str) -> None:
        event = (context.step, what, context.attempt, context.idempotency_key, time.time())
        # one write at the end of a file: lines of several processes never mix
        with self._file.open("ab", buffering=0) as file:
            file.write(json.dumps(event).encode() + b"\n")

    @property
    def events(self) -> list[Event]:
        """What has been done so far."""
        if not self._file.exists():
            return []
        return [Event(*json.loads(line)) for line in self._file.read_text().splitlines()]

    @property
    def attempts(self) -> dict[str, int]:
        """How often each step began."""
        return dict(Counter(event.step for event in self.events if event.what == "began"))

    @property
    def peak(self) -> int:
        """How many steps ran at once, at most."""
        running = peak = 0
        for event in self.events:
            running += {"began": 1, "came": 0}.get(event.what, -1)
            peak = max(peak, running)
        return peak

    def keys(self, step: str) -> set[str]:
        """The idempotency keys that a step has had."""
        return {event.key for event in self.events if event.step == step}

    def waits(self, step: str) -> list[float]:
        """Seconds between the attempts of a step."""
        ends = [event.at for event in self.events if event.step == step and event.what in ("ended", "failed")]
        begins = [event.at for event in self.events if event.step == step and event.what == "began"]
        return [begin - end for end, begin in zip(ends, begins[1:], strict=False)]

    def before(self, first: str, then: str) -> bool:
        """Whether the one step ended before the other began."""
        ends = [place for place, event in enumerate(self.events) if (event.step, event.what) == (first, "ended")]
        begins = [place for place, event in enumerate(self.events) if (event.step, event.what) == (then, "began")]
        return bool(ends) and bool(begins) and ends[0] < begins[0]

    async def wait_for(self, what: str, step: str, times: int = 1) -> None:
        """Wait until a step has come that far, so many times."""
        await self._until(lambda done: done.count((step, what)) >= times, f"{step!r} {what}")

    async def wait_for_end(self, step: str) -> None:
        """Wait until the runtime knows that an async step of the same event loop has ended, well or not."""
        await self._until(lambda done: (step, "ended") in done or (step, "failed") in done, f"{step!r} is over")
        # what that step's runtime does next is on its way: it comes before what this one does after a while
        await asyncio.sleep(0.3)

    async def meet(self, context: StepContext, of: int) -> None:
        """Wait until as many steps have come here; the next ones meet anew."""
        self.add(context, "came")
        place = [event.step for event in self.events if event.what == "came"].index(context.step)
        wanted = (place // of + 1) * of
        await self._until(lambda done: sum(what == "came" for _, what in done) >= wanted, f"{of} steps run at once")

    async def _until(self, holds: Callable[[list[tuple[str, str]]], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds([(event.step, event.what) for event in self.events]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {PATIENCE:g} s until {what}")
            await asyncio.sleep(0.01)


@contextmanager
def traced(data: Any, context: StepContext) -> Iterator[Trace]:
    """What is done inside leaves a trace in the folder that the data names."""
    trace = Trace(data["trace"] if isinstance(data, dict) else data.trace)
    trace.add(context, "began")
    try:
        yield trace
    except BaseException:
        trace.add(context, "failed")
        raise
    trace.add(context, "ended")


def step(function: Callable[..., Any]) -> Callable[[Any, StepContext], Any]:
    """A function as a step that leaves a trace; beside the data it may ask for ``context`` and ``trace``."""
    first, *more = inspect.signature(function).parameters.values()
    asked = {parameter.name for parameter in more}

    def given(context: StepContext, trace: Trace) -> dict[str, Any]:
        return {name: value for name, value in (("context", context), ("trace", trace)) if name in asked}

    @functools.wraps(function)
    def in_thread(data: Any, context: StepContext) -> Any:
        with traced(data, context) as trace:
            return function(data, **given(context, trace))

    @functools.wraps(function)
    async def on_loop(data: Any, context: StepContext) -> Any:
        with traced(data, context) as trace:
            return await function(data, **given(context, trace))

    made: Any = on_loop if inspect.iscoroutinefunction(function) else in_thread
    # the annotation of the data stays: it brings types back
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    made.__signature__ = inspect.Signature([first, context])
    return made  # type: ignore[no-any-return]


def gives(**output: Any) -> Any:
    """A step that returns this, the same object every time."""
    return step(lambda data: output)


def fails(error: type[BaseException], *arguments: Any) -> Any:
    """A step that raises this."""

    def function(data: dict[str, Any]) -> None:
        raise error(*arguments)

    return step(function)


def meets(of: int, then: Callable[[], Any] = lambda: None) -> Any:
    """A step that ends when ``of`` steps run at once."""

    async def function(data: dict[str, Any], context: StepContext, trace: Trace) -> Any:
        await trace.meet(context, of)
        return then()

    return step(function)


nothing = step(lambda data: None)


@step
async def never(data: dict[str, Any]) -> None:
    """A step that ends only by being cancelled."""
    await asyncio.Event().wait()
