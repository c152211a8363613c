"""Records what test_flow_workflow.py replays: the histories of a few runs on today's code.

Run it from the repository's root when the workflow code was changed so that it is meant to take another course:
``python -m tests.temporal.record_histories``. Histories of released versions stay, under names of their own.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from beluga_airflow.temporal.batch import Batch, Item
from beluga_airflow.temporal.client import Target, connect, result_of
from beluga_airflow.temporal.messages import BATCH_WORKFLOW, BatchCall
from beluga_airflow.testing import TemporalServer
from tests.temporal.conftest import FLOWS, Side

FOLDER = Path(__file__).parent / "histories"
RUNS = {"branches": {}, "when": {"size": 1}, "stop": {}, "used_up": {}, "flow_timeout": {}, "skipped_end": {}}


async def main() -> None:
    with TemporalServer() as server:
        target = Target(address=server.address, task_queue="recorded")
        side = Side(client=await connect(target), target=target)
        async with side.worker():
            for name, inputs in RUNS.items():
                _, run = await side.run(name, {**inputs, "token": "recorded"})
                await _write(name, side.handle(run))
            batch = Batch(side.backends.store, "recorded")
            await batch.put(_items(), started=0.0)
            call = BatchCall(
                path=f"{FLOWS}:by_size",
                batch="recorded",
                total=5,
                item_timeout=60,
                max_in_flight=2,
                page=3,
            )
            run = await side.start(BATCH_WORKFLOW, call, "recorded")
            await result_of(side.client, side.target, run)
            await _write("batch_page", side.handle(run))
            await _write("batch_end", side.client.get_workflow_handle("recorded"))


async def _items() -> Any:
    for index in range(5):
        yield Item(index=index, key=str(index), scope=f"recorded/{index}", data={"token": "recorded", "size": index})


async def _write(name: str, handle: Any) -> None:
    history = json.loads((await handle.fetch_history()).to_json())
    (FOLDER / f"{name}.json").write_text(json.dumps(_without_place(history), separators=(",", ":")) + "\n")


def _without_place(value: Any) -> Any:
    """A history without what names the machine that it was recorded on."""
    if isinstance(value, dict):
        return {key: _without_place(item) for key, item in value.items() if key != "stackTrace"}
    if isinstance(value, str):
        return re.sub(r"\d+@\S+", "recorder", value)  # process and host
    return [_without_place(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    asyncio.run(main())
