"""Conversations of flows on a real Temporal server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from beluga_airflow import FlowResult
from beluga_airflow.config import Settings
from beluga_airflow.errors import StateUnavailable
from beluga_airflow.graph import Identity
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.temporal.batch import Batch, Item
from beluga_airflow.temporal.messages import BATCH_WORKFLOW, FLOW_WORKFLOW, BatchCall, FlowCall
from beluga_airflow.testing import ScriptedModel
from tests.temporal.conftest import Side
from tests.temporal.memory_flows import talk

PATH = "tests.temporal.memory_flows:talk"


@dataclass
class Forgetful:
    """A store that is away when a turn is written, so often."""

    store: MemoryStore
    times: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def compare_and_swap(self, key: str, value: Any, **options: Any) -> int | None:
        if key.startswith("beluga/memory/") and self.times:
            self.times -= 1
            raise StateUnavailable("the state store cannot be reached")
        return await self.store.compare_and_swap(key, value, **options)


async def ran(side: Side, text: str, *, generation: int = 0) -> FlowResult:
    call = FlowCall(
        path=PATH,
        shape=Settings().settle(talk.check(), durable=True).to_json(),
        inputs={"customer": "c-1", "text": text},
        scope=Identity.of("talk", text).scope,
        generation=generation,
    )
    return await side.result(await side.start(FLOW_WORKFLOW, call))


async def kept(store: MemoryStore) -> list[str]:
    entry = await store.get("beluga/memory/talk/answer/c-1")
    return [turn["asked"]["data"]["text"] for turn in entry["turns"]]


async def test_flows_talk_and_what_is_tried_again_is_one_turn(side: Side) -> None:
    store, model = MemoryStore(), ScriptedModel(lambda request: "a")
    state: Any = Forgetful(store, 2)
    side.backends.store, side.backends.model = state, model
    async with side.worker():
        for text in ("one", "two"):
            assert (await ran(side, text)).status == "completed"
        assert (await ran(side, "one", generation=1)).status == "completed"
    assert [len(request.messages) for request in model.requests] == [2, 4, 2], "asked once each, and once when cleared"
    assert json.loads(model.requests[1].messages[1]["content"].splitlines()[1])["data"] == {"text": "one"}
    assert await kept(store) == ["one", "two"]


async def test_items_of_a_batch_share_a_conversation_and_lose_no_turn(side: Side) -> None:
    store = MemoryStore()
    side.backends.store, side.backends.model = store, ScriptedModel(lambda request: "a")
    batch = Batch(store, uuid4().hex)
    texts = [f"text {number}" for number in range(12)]

    async def items() -> AsyncIterator[Item]:
        for index, text in enumerate(texts):
            scope = f"{batch.name}/{index}"
            yield Item(index=index, key=text, scope=scope, data={"customer": "c-1", "text": text})

    total = await batch.put(items(), started=0.0)
    call = BatchCall(path=PATH, batch=batch.name, total=total, item_timeout=60.0, max_in_flight=12)
    async with side.worker():
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call))
    assert returned["statuses"] == {"completed": 12}
    assert sorted(await kept(store)) == sorted(texts)
