"""Calling any function behind guards, and again where it fails."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from contextvars import copy_context
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.graph.callee import is_async
from beluga_airflow.graph.parts import Guard, fault_of_guard, told
from beluga_airflow.graph.retry import Retry

if TYPE_CHECKING:
    from beluga_airflow.resilience.limits import Booking
    from beluga_airflow.state import StateStore

__all__ = ["WAITING", "call", "called", "guarded", "in_thread"]

T = TypeVar("T")

WAITING = 0.5
"""Of a step's time, what may be spent on waiting for a limit: the rest is for its work, so as not to cut it short."""


async def call(
    function: Callable[..., Any],
    /,
    *args: Any,
    retry: Retry | None = None,
    breaker: Guard | None = None,
    limit: Guard | None = None,
    store: StateStore | None = None,
    **kwargs: Any,
) -> Any:
    """Call a function with these arguments, sync (in a thread of its own) or async.

    Each attempt asks the breaker, then the limit. What is left out does not take part.

    Args:
        function: any.
        args, kwargs: what it is called with.
        retry: how often, and which errors end it at once.
        breaker: a ``CircuitBreaker``.
        limit: a ``RateLimit``.
        store: where they are kept if they have no store of their own.

    Raises:
        Exception: that of the last attempt: the function's own, or what follows.
        NotNow: a guard let nothing through.
        InvalidSetting: one of these cannot be used, or a guard has no store.
    """
    if retry is not None and not isinstance(retry, Retry):
        raise InvalidSetting(f"retry is {told(retry)}, it must be a Retry")

    async def once(_: int) -> Any:
        async with guarded(breaker, limit, store, retry=retry):
            return await called(function, *args, **kwargs)

    if retry is None:
        return await once(1)
    from beluga_airflow.resilience.retrying import retrying

    return await retrying(once, retry)


@asynccontextmanager
async def guarded(
    breaker: Guard | None,
    limit: Guard | None,
    store: StateStore | None,
    *,
    retry: Retry | None = None,
    within: float | None = None,
    tokens: int = 1,
) -> AsyncIterator[Booking | None]:
    """Go past a breaker, then past a limit; gives what was booked there.

    Args:
        breaker, limit, store, retry: see ``call``.
        within: seconds that the limit may take; None: its own ``max_wait``.
        tokens: to book, for a limit that counts them.

    Raises:
        NotNow: one of them lets nothing through.
        InvalidSetting: one of them is no such guard, or has no store.
    """
    for guard, kind in ((breaker, "breaker"), (limit, "limit")):
        if fault := fault_of_guard(guard, kind):
            raise InvalidSetting(fault)
    if breaker is None:
        if limit is None:
            yield None
        else:
            async with limit.guard(store, tokens=tokens, within=within) as booking:
                yield booking
        return
    # the breaker must hear how the call ended, and no failure is what the limit keeps back
    async with breaker.guard(store, retry=retry), guarded(None, limit, store, within=within, tokens=tokens) as booking:
        yield booking


async def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns, sync or async; a sync one blocks nobody meanwhile."""
    if is_async(function):
        return await function(*args, **kwargs)
    returned = await in_thread(lambda: function(*args, **kwargs))
    return await returned if inspect.isawaitable(returned) else returned


async def in_thread(work: Callable[[], T]) -> T:
    """Do ``work`` where it blocks nobody. Left behind when it is cancelled.

    A thread of its own, and a daemon: a pool would wait for one that hangs before it let the process end.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except KeyboardInterrupt as error:  # its own; a real one reaches the main thread
            future.set_exception(SystemExit(repr(error)))
        except StopIteration as error:  # no future can carry it
            future.set_exception(RuntimeError(f"StopIteration: {error}"))
        except BaseException as error:
            future.set_exception(error)

    future.set_running_or_notify_cancel()
    Thread(target=copy_context().run, args=(run,), name="beluga-step", daemon=True).start()
    return await asyncio.wrap_future(future)
