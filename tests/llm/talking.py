"""A process that decides, turn after turn of one conversation, and may kill itself on its way.

``python -m tests.llm.talking STORE_URL MODEL_URL NAME FIRST LAST [killed]``: turns FIRST to LAST of the runs NAME/1,
NAME/2, ... It tells each answer. Where it is to be killed, that is behind its first write.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from beluga_airflow import Chain, Decision, Memory, run
from beluga_airflow.llm.client import Endpoint
from beluga_airflow.state import StateStore, open_store

TALK = Chain("talk").add_step(
    "answer",
    Decision(
        "Which queue?",
        choices=["expedite", "standard"],
        reads=["text"],
        memory=Memory(key="customer", max_tokens=100_000),
    ),
)


class Dying:
    """A store whose process is killed (SIGKILL) behind the first write of a record or of a turn."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        if name not in ("set", "compare_and_swap"):
            return call

        async def last(key: str, *args: Any, **kwargs: Any) -> Any:
            written = await call(key, *args, **kwargs)
            if key.startswith(("beluga/decisions/", "beluga/memory/")):
                os.kill(os.getpid(), signal.SIGKILL)
            return written

        return last


async def main(store_url: str, model_url: str, name: str, first: int, last: int, killed: str = "") -> None:
    store = open_store(store_url)
    state: Any = Dying(store) if killed else store
    endpoint = Endpoint(provider="simulated", base_url=model_url, timeout=30)
    for number in range(first, last + 1):
        inputs = {"customer": "c-1", "text": f"{name}/{number}"}
        result = await run(TALK, inputs, key=f"{name}/{number}", endpoint=endpoint, state=state)
        print(result.data["answer"], flush=True)
    await store.close()


if __name__ == "__main__":
    store_url, model_url, name, first, last, *killed = sys.argv[1:]
    asyncio.run(main(store_url, model_url, name, int(first), int(last), *killed))
