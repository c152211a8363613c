"""A model behind guards, and a budget, that all workers share."""

from __future__ import annotations

from dataclasses import replace

from beluga_airflow.graph import Budget
from beluga_airflow.graph.parts import Guard
from beluga_airflow.graph.retry import Retry
from beluga_airflow.llm.budget import purse_of_connection, reserved
from beluga_airflow.llm.client import ModelClient, ModelReply, ModelRequest
from beluga_airflow.llm.estimate import estimated
from beluga_airflow.resilience.calling import guarded
from beluga_airflow.resilience.retrying import retrying
from beluga_airflow.state import StateStore

__all__ = ["GuardedModel"]

ONCE = Retry(maximum_attempts=1)


class GuardedModel:
    """A ``ModelClient`` that goes past a breaker and a limit each time it asks, and asks again where a retry says so.

    A model that answers has not failed, whatever it answers.

    Args:
        client: asks; it is closed with this one.
        breaker: a ``CircuitBreaker``, or None.
        limit: a ``RateLimit``, or None; tokens are booked as estimated, and settled as the reply says.
        budget: of a day, and whose it is: the connection's id; or None.
        retry: without it one attempt is made: a step has a retry of its own.
        store: where the budget is kept, and the guards if they have no store of their own.
        owns_store: whether the store is closed with this one.
    """

    def __init__(
        self,
        client: ModelClient,
        *,
        breaker: Guard | None = None,
        limit: Guard | None = None,
        budget: tuple[Budget, str] | None = None,
        retry: Retry | None = None,
        store: StateStore | None = None,
        owns_store: bool = False,
    ) -> None:
        self._client = client
        self._breaker, self._limit, self._retry = breaker, limit, retry
        self._budget = budget
        self._store, self._owns_store = store, owns_store

    async def answer(self, request: ModelRequest) -> ModelReply:
        """See ``ModelClient``.

        Raises:
            NotNow: a guard does not let it through now, or the budget is spent.
        """

        async def once(_: int) -> ModelReply:
            purses = [purse_of_connection(*self._budget, self._store)] if self._budget and self._store else []
            guards = guarded(
                *(self._breaker, self._limit, self._store),
                retry=self._retry,
                within=request.within,
                tokens=estimated(request).total,
            )
            async with reserved(purses, self._client, request) as reservation, guards as booking:
                left = request.timeout and max(0.001, request.timeout - (booking.waited if booking else 0.0))
                reply = await self._client.answer(replace(request, timeout=left))
                if booking is not None and reply.usage.total:
                    booking.settle(reply.usage.total)
                if reservation is not None:
                    reservation.settle(reply)
                return reply

        return await retrying(once, self._retry or ONCE)

    def asks(self, request: ModelRequest) -> tuple[str, str]:
        return self._client.asks(request)

    async def check(self) -> None:
        await self._client.check()

    @property
    def refused(self) -> bool:
        return self._client.refused

    async def close(self) -> None:
        await self._client.close()
        if self._owns_store and self._store is not None:
            await self._store.close()
