"""The hook for language models: any endpoint that speaks the OpenAI API."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from airflow.sdk import BaseHook

from beluga_airflow.errors import BelugaError, InvalidSetting
from beluga_airflow.hooks.connections import bounded_number, find_connection, text

if TYPE_CHECKING:
    from beluga_airflow.config import Settings
    from beluga_airflow.llm.client import Endpoint, ModelClient

__all__ = ["LLMHook"]


class LLMHook(BaseHook):
    """Connects to a language model.

    Without the connection ``beluga_llm_default``: provider ``openai``, model ``gpt-4o``, 30 s, the key from the
    environment variable ``OPENAI_API_KEY``.

    Args:
        llm_conn_id: a connection of type ``beluga_llm``: the key as its password; provider, model, base_url and timeout
            (seconds) in its fields.
        settings: instead of the defaults.
    """

    conn_name_attr = "llm_conn_id"
    default_conn_name = "beluga_llm_default"
    conn_type = "beluga_llm"
    hook_name = "Beluga LLM"

    def __init__(self, llm_conn_id: str = default_conn_name, *, settings: Settings | None = None) -> None:
        from beluga_airflow.config import Settings

        super().__init__()
        self.llm_conn_id = llm_conn_id
        self._settings = settings or Settings()

    async def endpoint(self) -> Endpoint:
        """Where the connection leads.

        Raises:
            InvalidSetting: the connection is missing, or something in it cannot be used.
        """
        # what talks to a model, which no DAG file needs when it is parsed
        from beluga_airflow.llm.client import Endpoint
        from beluga_airflow.llm.presets import preset

        defaults = self._settings.llm
        connection = await find_connection(
            self.llm_conn_id, default=self.default_conn_name, conn_types=(self.conn_type,)
        )
        if connection is None:
            return Endpoint(
                provider=defaults.provider, model=defaults.model, timeout=defaults.timeout, conn_id=self.llm_conn_id
            )
        timeout = bounded_number(connection, "timeout", defaults.timeout)
        provider = text(connection, "provider") or defaults.provider
        model, base_url = text(connection, "model") or defaults.model, text(connection, "base_url")
        try:
            preset(provider)
            return Endpoint(
                provider=provider,
                model=model,
                base_url=base_url,
                api_key=connection.password or None,
                conn_id=self.llm_conn_id,
                timeout=timeout,
            )
        except InvalidSetting as error:
            raise InvalidSetting(f"connection {self.llm_conn_id!r}: {error}") from None

    async def client(self) -> ModelClient:
        """A client for the connection; the caller closes it.

        Raises:
            InvalidSetting: the connection cannot be used, or there is no key.
        """
        from beluga_airflow.llm.client import OpenAIClient

        return OpenAIClient(await self.endpoint())

    def test_connection(self) -> tuple[bool, str]:
        """Ask the model for one word: whether it answered, and in words what happened."""
        return asyncio.run(self._test())

    async def _test(self) -> tuple[bool, str]:
        from beluga_airflow.llm.client import ModelRequest, OpenAIClient

        try:
            endpoint = await self.endpoint()
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
