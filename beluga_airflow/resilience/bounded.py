"""Bounding how long something may take, and what may not be cut short."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["bounded", "uncancelled"]

T = TypeVar("T")


def bounded(timeout: float | None, expired: Callable[[], Exception]) -> _Bounded:
    """Give the body of a ``with`` in a coroutine ``timeout`` seconds, None: any; then raise what ``expired`` makes.

    A ``TimeoutError`` of the body's own passes through as it is.
    """
    return _Bounded(timeout, expired)


class _Bounded:
    """As ``asyncio.timeout``, which sets a timer of its own for each body: that costs more than most steps do."""

    __slots__ = ("_cancels", "_expired", "_is_late", "_task", "_timeout", "_watch")

    def __init__(self, timeout: float | None, expired: Callable[[], Exception]) -> None:
        self._timeout = timeout
        self._expired = expired
        self._is_late = False

    def __enter__(self) -> None:
        if self._timeout is None:
            return
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None, "an event loop runs coroutines in tasks"
        self._task = task
        self._cancels = task.cancelling()
        self._watch = _watch_of(loop)
        self._watch.add(self, self._timeout)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timeout is None:
            return
        self._watch.ends.pop(self, None)
        # somebody else may have cancelled the task at the same moment: then that holds; no error: the body swallowed it
        if self._is_late and self._task.uncancel() <= self._cancels and kind in (None, asyncio.CancelledError):
            raise self._expired() from None

    def end(self) -> None:
        """The time is up."""
        self._is_late = True
        self._task.cancel()


class _Watch:
    """One timer of an event loop for all bodies that are bounded in it: it rings when the first may be late."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.ends: dict[_Bounded, float] = {}
        self._rings_at = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def add(self, body: _Bounded, timeout: float) -> None:
        """Watch a body that begins now."""
        self.ends[body] = end = self.loop.time() + timeout
        if end < self._rings_at:
            self._set(end)

    def _set(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = when
        self._timer = self.loop.call_at(when, self._ring)

    def _ring(self) -> None:
        now = self.loop.time()
        for body in [body for body, end in self.ends.items() if end <= now]:
            del self.ends[body]
            body.end()
        self._timer, self._rings_at = None, math.inf
        if self.ends:
            self._set(min(self.ends.values()))


class _Running(threading.local):
    """The watch of the loop that runs in this thread: no map of all loops, which would outlive them."""

    watch: _Watch | None = None


_running = _Running()


def _watch_of(loop: asyncio.AbstractEventLoop) -> _Watch:
    watch = _running.watch
    if watch is None or watch.loop is not loop:
        watch = _running.watch = _Watch(loop)
    return watch


async def uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Do this to its end, whoever cancels meanwhile, and however often; a cancellation is raised then."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
