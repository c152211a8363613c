"""A process that decides within a budget, and may be killed.

``python -m tests.llm.spending STORE MODEL NAME COUNT TOKENS [OPTION]``: COUNT decisions of the runs NAME/0, NAME/1, ...
at once, with TOKENS for all processes of the day. It tells each one's tokens and who decided. The option ``lease``
holds what a call reserved, with a lease of so many seconds; ``answered`` and ``recorded`` kill the process right after
the model has answered, or after the record is written.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from beluga_airflow import Budget, Chain, Decision, run
from beluga_airflow.llm import purse
from beluga_airflow.llm.client import Endpoint, ModelReply, ModelRequest, OpenAIClient
from beluga_airflow.state import StateStore, open_store

NAME = "all"


def spending(tokens: int) -> Chain:
    return Chain("spending").add_step(
        "answer",
        Decision(
            "Which queue?",
            choices=["expedite", "standard"],
            reads=["text"],
            max_tokens=50,
            budget=Budget(tokens=tokens, per="day", name=NAME),
            fallback="standard",
        ),
    )


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """A store whose process is killed (SIGKILL) behind the write of a record."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def set(self, key: str, *args: Any, **kwargs: Any) -> int:
        written = await self._store.set(key, *args, **kwargs)
        if key.startswith("beluga/decisions/"):
            end()
        return written


class Answered(OpenAIClient):
    """A client whose process is killed when the answer is there."""

    async def answer(self, request: ModelRequest) -> ModelReply:
        await super().answer(request)
        end()
        raise AssertionError


async def main(
    store_url: str, model_url: str, name: str, count: int, tokens: int, how: str = "", much: str = ""
) -> None:
    store: Any = open_store(store_url)
    endpoint = Endpoint(provider="simulated", base_url=model_url, timeout=30)
    model = Answered(endpoint) if how == "answered" else OpenAIClient(endpoint)
    if how == "lease":
        purse.LEASE = float(much)
    state = Dying(store) if how == "recorded" else store

    async def one(number: int) -> None:
        result = await run(spending(tokens), {"text": "?"}, key=f"{name}/{number}", model=model, state=state)
        record = result.decisions["answer"]
        print(sum(record["tokens"].values()), record["decided_by"], flush=True)

    await asyncio.gather(*(one(number) for number in range(count)))
    await model.close()
    await store.close()


if __name__ == "__main__":
    store_url, model_url, name, count, tokens, *more = sys.argv[1:]
    asyncio.run(main(store_url, model_url, name, int(count), int(tokens), *more))
