"""A model behind guards that all workers share."""

from __future__ import annotations

import json

from beluga_airflow.graph.parts import Guard
from beluga_airflow.graph.retry import Retry
from beluga_airflow.llm.client import ModelClient, ModelReply, ModelRequest
from beluga_airflow.resilience.calling import guarded
from beluga_airflow.resilience.retrying import retrying
from beluga_airflow.state import StateStore

__all__ = ["GuardedModel", "estimated_tokens"]

ONCE = Retry(maximum_attempts=1)
BYTES_A_TOKEN = 4


def estimated_tokens(request: ModelRequest) -> int:
    """What a request may cost, before anybody knows: a token for each four bytes of messages and schema, as UTF-8, and
    the most that the answer may have."""
    asked = json.dumps([*map(dict, request.messages), dict(request.schema)], ensure_ascii=False)
    return -(-len(asked.encode("utf-8", "replace")) // BYTES_A_TOKEN) + request.max_tokens


class GuardedModel:
    """A ``ModelClient`` that goes past a breaker and a limit each time it asks, and asks again where a retry says so.

    A model that answers has not failed, whatever it answers.

    Args:
        client: asks; it is closed with this one.
        breaker: a ``CircuitBreaker``, or None.
        limit: a ``RateLimit``, or None; tokens are booked as estimated, and settled as the reply says.
        retry: without it one attempt is made: a step has a retry of its own.
        store: where the guards are kept if they have no store of their own.
        owns_store: whether the store is closed with this one.
    """

    def __init__(
        self,
        client: ModelClient,
        *,
        breaker: Guard | None = None,
        limit: Guard | None = None,
        retry: Retry | None = None,
        store: StateStore | None = None,
        owns_store: bool = False,
    ) -> None:
        self._client = client
        self._breaker, self._limit, self._retry = breaker, limit, retry
        self._store, self._owns_store = store, owns_store

    async def answer(self, request: ModelRequest) -> ModelReply:
        """See ``ModelClient``.

        Raises:
            NotNow: a guard does not let it through now.
        """

        async def once(_: int) -> ModelReply:
            async with guarded(
                *(self._breaker, self._limit, self._store),
                retry=self._retry,
                within=request.within,
                tokens=estimated_tokens(request),
            ) as booking:
                reply = await self._client.answer(request)
                if booking is not None and (reply.usage.input or reply.usage.output):
                    booking.settle(reply.usage.input + reply.usage.output)
                return reply

        return await retrying(once, self._retry or ONCE)

    async def check(self) -> None:
        await self._client.check()

    @property
    def refused(self) -> bool:
        return self._client.refused

    async def close(self) -> None:
        await self._client.close()
        if self._owns_store and self._store is not None:
            await self._store.close()
