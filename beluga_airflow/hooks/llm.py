"""The hook for language models: any endpoint that speaks the OpenAI API."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook, Connection

from beluga_airflow.errors import BelugaError, InvalidSetting
from beluga_airflow.graph import Budget
from beluga_airflow.graph.parts import Guard, fault_of_guard, told
from beluga_airflow.graph.retry import Retry
from beluga_airflow.hooks.connections import bounded_number, find_connection, text, whole_number
from beluga_airflow.hooks.settings import settings_in_force
from beluga_airflow.hooks.state import StateHook

if TYPE_CHECKING:
    from beluga_airflow.config import Settings
    from beluga_airflow.llm.client import Endpoint, ModelClient
    from beluga_airflow.state import StateStore

__all__ = ["LLMHook"]


class LLMHook(BaseHook):
    """Connects to a language model.

    What the connection does not say, or all where there is no ``beluga_llm_default``, is as the configuration file
    says, or provider ``openai``, model ``gpt-4o``, 30 s. Without a connection the key is from the provider's usual
    environment variable, ``OPENAI_API_KEY``.

    Args:
        llm_conn_id: a connection of type ``beluga_llm``: the key as its password; provider, model, base_url and timeout
            (seconds) in its fields; structured_output (auto, schema or text) and logprobs (auto, on or off), see
            ``Endpoint``; and what makes a breaker and a limit that all who use it share:
            failure_threshold and recovery_timeout (seconds); requests_per_minute, tokens_per_minute and
            concurrent_calls and max_wait (seconds); and what all of them may spend: tokens_per_day and
            dollars_per_day.
        breaker: a ``CircuitBreaker`` in place of the connection's.
        limit: a ``RateLimit`` in place of the connection's.
        retry: asks again; none where a step asks, which has a retry of its own.
        state: where what is spent is kept, and breaker and limit if they have no store of their own; without it, in the
            store of ``beluga_state_default``.
        settings: instead of those in force when it connects.
    """

    conn_name_attr = "llm_conn_id"
    default_conn_name = "beluga_llm_default"
    conn_type = "beluga_llm"
    hook_name = "Beluga LLM"

    def __init__(
        self,
        llm_conn_id: str = default_conn_name,
        *,
        breaker: Guard | None = None,
        limit: Guard | None = None,
        retry: Retry | None = None,
        state: StateStore | None = None,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self.llm_conn_id = llm_conn_id
        self._breaker, self._limit, self._retry = breaker, limit, retry
        self._state = state
        self._settings = settings
        faults = [fault_of_guard(breaker, "breaker"), fault_of_guard(limit, "limit")]
        faults += [None if retry is None or isinstance(retry, Retry) else f"retry is {told(retry)}, it must be a Retry"]
        if any(faults):
            raise InvalidSetting(f"LLMHook({llm_conn_id!r}): {'; '.join(filter(None, faults))}")

    async def endpoint(self) -> Endpoint:
        """Where the connection leads.

        Raises:
            InvalidSetting: the connection is missing, or something in it cannot be used.
        """
        return self._endpoint(await self.connection())

    def _endpoint(self, connection: Connection | None) -> Endpoint:
        # what talks to a model, which no DAG file needs when it is parsed
        from beluga_airflow.llm.client import Endpoint
        from beluga_airflow.llm.presets import preset

        chosen = {**vars((self._settings or settings_in_force()).llm)}
        if connection is None:
            return Endpoint(**chosen, conn_id=self.llm_conn_id)
        chosen |= self.told(connection)
        try:
            preset(chosen["provider"])
            return Endpoint(
                **chosen,
                base_url=text(connection, "base_url"),
                api_key=connection.password or None,
                **_words(connection),
                conn_id=self.llm_conn_id,
            )
        except InvalidSetting as error:
            raise InvalidSetting(f"connection {self.llm_conn_id!r}: {error}") from None

    async def connection(self) -> Connection | None:
        """The connection; None where it is the default one and nobody made it.

        Raises:
            InvalidSetting: a connection that was asked for by name does not exist, or cannot be used.
        """
        return await find_connection(self.llm_conn_id, default=self.default_conn_name, conn_types=(self.conn_type,))

    @staticmethod
    def told(connection: Connection) -> dict[str, Any]:
        """What a connection says in place of settings, by their names.

        Raises:
            InvalidSetting: something in it cannot be used.
        """
        told: dict[str, Any] = {name: text(connection, name) for name in ("provider", "model")}
        told["timeout"] = bounded_number(connection, "timeout")
        return {name: value for name, value in told.items() if value is not None}

    async def client(self) -> ModelClient:
        """A client for the connection; the caller closes it.

        Raises:
            InvalidSetting: the connection cannot be used, or there is no key.
        """
        from beluga_airflow.llm.client import OpenAIClient

        connection = await self.connection()
        client = OpenAIClient(self._endpoint(connection))
        breaker, limit = self._guards(connection)
        budget = self._budget(connection)
        if breaker is None and limit is None and budget is None and self._retry is None:
            return client
        from beluga_airflow.llm.guarded import GuardedModel

        owns_store = self._state is None and (breaker, limit, budget) != (None, None, None)
        return GuardedModel(
            client,
            breaker=breaker,
            limit=limit,
            budget=None if budget is None else (budget, self.llm_conn_id),
            retry=self._retry,
            store=await StateHook(settings=self._settings).store() if owns_store else self._state,
            owns_store=owns_store,
        )

    def _guards(self, connection: Connection | None) -> tuple[Guard | None, Guard | None]:
        """Breaker and limit: those that were given, else what the connection says."""
        if connection is None:
            return self._breaker, self._limit
        from beluga_airflow.resilience.breaker import CircuitBreaker
        from beluga_airflow.resilience.limits import RateLimit

        # a connection id may hold what no name of a guard does
        name = re.sub(r"[^A-Za-z0-9_.:-]", "_", f"llm:{self.llm_conn_id}")[:200]
        of_breaker = {
            "failure_threshold": whole_number(connection, "failure_threshold"),
            "recovery_timeout": bounded_number(connection, "recovery_timeout"),
        }
        of_limit = {
            "requests_per_minute": whole_number(connection, "requests_per_minute"),
            "tokens_per_minute": whole_number(connection, "tokens_per_minute"),
            "concurrent": whole_number(connection, "concurrent_calls"),
        }
        given: dict[str, Any] = {field: value for field, value in of_breaker.items() if value is not None}
        breaker = CircuitBreaker(name, **given) if given else None
        bounds: dict[str, Any] = {field: value for field, value in of_limit.items() if value is not None}
        max_wait = bounded_number(connection, "max_wait")
        if bounds and max_wait is not None:
            bounds["max_wait"] = max_wait
        limit = RateLimit(name, **bounds) if bounds else None
        return self._breaker or breaker, self._limit or limit

    @staticmethod
    def _budget(connection: Connection | None) -> Budget | None:
        """What the connection says that all who use it may spend in a day."""
        if connection is None:
            return None
        tokens, dollars = whole_number(connection, "tokens_per_day"), bounded_number(connection, "dollars_per_day")
        return None if tokens is None and dollars is None else Budget(tokens=tokens, dollars=dollars, per="day")

    def test_connection(self) -> tuple[bool, str]:
        """Ask the model for one word: whether it answered, and in words what happened."""
        return asyncio.run(self._test())

    async def _test(self) -> tuple[bool, str]:
        from beluga_airflow.llm.client import ModelRequest, OpenAIClient

        try:
            connection = await self.connection()
            endpoint = self._endpoint(connection)
            # what cannot be used there shows too
            self._guards(connection)
            self._budget(connection)
            client = OpenAIClient(endpoint)
            try:
                reply = await client.answer(
                    ModelRequest(
                        messages=({"role": "user", "content": 'Answer {"answer": true}.'},),
                        schema={
                            "type": "object",
                            "properties": {"answer": {"type": "boolean"}},
                            "required": ["answer"],
                            "additionalProperties": False,
                        },
                        max_tokens=50,
                    )
                )
            finally:
                await client.close()
        except BelugaError as error:
            return False, str(error)
        simulated = " (a SIMULATION)" if reply.simulated else ""
        return True, f"model {reply.model!r} of {endpoint.address}{simulated} answered in {reply.seconds:.1f} s"


def _words(connection: Connection) -> dict[str, Any]:
    given = {name: text(connection, name) for name in ("structured_output", "logprobs")}
    return {name: word for name, word in given.items() if word is not None}
