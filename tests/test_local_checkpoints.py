from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow import Chain, Decision, Graph, Retry, Stop
from beluga_airflow.config import Settings
from beluga_airflow.errors import StateUnavailable
from beluga_airflow.execute import Resources
from beluga_airflow.graph import Flow, FlowResult, Identity
from beluga_airflow.local import run_with
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.state.sqlite import SqliteStore
from beluga_airflow.testing.scripted_model import ScriptedModel

DEADLINE = 20


@dataclass
class Kept:
    """A checkpoint that takes outcomes through JSON, as every real one does."""

    entries: dict[str, str] = field(default_factory=dict)
    refuses: str | None = None
    error: type[Exception] = StateUnavailable

    async def load(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        if self.refuses == "load":
            raise self.error("the store is away")
        return {name: json.loads(self.entries[name]) for name in names if name in self.entries}

    async def save(self, name: str, entry: dict[str, Any]) -> None:
        if self.refuses == name:
            raise self.error("the store is away")
        self.entries[name] = json.dumps(entry)


async def ended(
    flow: Flow, kept: Kept, inputs: Mapping[str, Any] | None = None, model: ScriptedModel | None = None
) -> FlowResult:
    async def client(conn_id: str | None) -> ScriptedModel:
        return model or ScriptedModel([])

    async with asyncio.timeout(DEADLINE):
        return await run_with(
            flow,
            inputs or {},
            identity=Identity.of("shop", 7),
            resources=Resources(state=MemoryStore(), model=client),
            settings=Settings(),
            checkpoint=kept,
        )


SCRIPT = """
import asyncio, json, sys, threading
from pathlib import Path
from beluga_airflow import Graph
from beluga_airflow.config import Settings
from beluga_airflow.execute import Resources
from beluga_airflow.graph import Identity, Outcome
from beluga_airflow.local import run_with
from beluga_airflow.state import open_store

folder, hangs = Path(sys.argv[1]), sys.argv[2] == "hang"
store = open_store(f"sqlite:///{folder}/state.db")


class Kept:
    async def load(self, names):
        return {key.removeprefix("kept/"): await store.get(key) async for key in store.keys("kept/")}

    async def save(self, name, entry):
        await store.set(f"kept/{name}", entry)


def step(name):
    def call(data, context):
        with (folder / "calls").open("a") as calls:
            calls.write(f"{name} {context.idempotency_key}\\n")
        if name == "c" and hangs:
            threading.Event().wait()
        return {name: sorted(data)}
    return call


graph = Graph("shop")
for name in "abcd":
    graph.add_node(name, step(name))
for source, target in ("ab", "ac", "bd", "cd"):
    graph.add_edge(source, target)

async def main():
    result = await run_with(
        graph, {"order": 7}, identity=Identity.of("shop", 7), resources=Resources(state=store, model=None),
        settings=Settings(), checkpoint=Kept(),
    )
    print(json.dumps(result.to_json()))

asyncio.run(main())
"""


async def killed_when(holds: Callable[[], Awaitable[bool]], *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SCRIPT, *arguments)
    try:
        async with asyncio.timeout(DEADLINE):
            while not await holds():
                assert process.returncode is None
                await asyncio.sleep(0.02)
    finally:
        process.kill()
        await process.wait()


async def test_a_killed_process_loses_no_finished_step(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    store = SqliteStore(tmp_path / "state.db")

    async def c_hangs_and_b_is_kept() -> bool:
        return calls.exists() and "c " in calls.read_text() and await store.get("kept/b") is not None

    await killed_when(c_hangs_and_b_is_kept, str(tmp_path), "hang")
    await store.close()
    second = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, str(tmp_path), "go", stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(DEADLINE):
            printed, _ = await second.communicate()
    finally:
        if second.returncode is None:
            second.kill()

    assert second.returncode == 0
    result = FlowResult.from_json(json.loads(printed))
    assert (result.status, set(result.steps.values())) == ("completed", {"completed"})
    assert result.data == {
        "order": 7,
        "a": ["order"],
        "b": ["a", "order"],
        "c": ["a", "order"],
        "d": ["a", "b", "c", "order"],
    }
    called = calls.read_text().splitlines()
    assert sorted(called[:3]) == ["a shop/7/a", "b shop/7/b", "c shop/7/c"]
    assert called[3:] == ["c shop/7/c", "d shop/7/d"], (
        "the lost step runs again under the same key, the finished do not"
    )


async def test_conditions_and_decisions_of_finished_steps_are_not_asked_again() -> None:
    asked: list[str] = []

    def is_fast(output: dict[str, Any]) -> bool:
        asked.append("condition")
        return bool(output["how"] == "expedite")

    flaky = iter([ValueError("lost"), None])

    def fails_once(data: dict[str, Any]) -> dict[str, Any]:
        if error := next(flaky):
            raise error
        return {"sent": data["how"]}

    flow = Graph("shop", retry=Retry(maximum_attempts=1))
    flow.add_node("how", Decision("How?", choices=["expedite", "standard"], reads=["tier"]))
    flow.add_node("send", fails_once).add_edge("how", "send", when=is_fast)
    kept, model = Kept(), ScriptedModel(["expedite"])

    lost = await ended(flow, kept, {"tier": "gold"}, model)
    again = await ended(flow, kept, {"tier": "gold"}, model)

    assert (lost.status, again.status) == ("failed", "completed")
    assert again.data == {"tier": "gold", "how": "expedite", "sent": "expedite"}
    assert again.decisions == lost.decisions
    assert again.decisions["how"]["decided_by"] == "model"
    assert (model.calls, asked) == (1, ["condition"])


async def test_a_run_that_had_ended_ends_the_same_without_a_step() -> None:
    calls: list[str] = []

    def stops(data: dict[str, Any]) -> Stop:
        calls.append("a")
        return Stop("out_of_stock", {"product": 7})

    flow, kept = Chain("f").add_step("a", stops).add_step("b", lambda data: calls.append("b")), Kept()

    first, again = await ended(flow, kept, {"order": 1}), await ended(flow, kept, {"order": 1})

    assert again == first
    assert again.data == {"order": 1, "product": 7}
    assert calls == ["a"]


async def test_a_failed_step_keeps_no_outcome() -> None:
    def fails(data: dict[str, Any]) -> None:
        raise ValueError("broken")

    kept = Kept()
    flow = Chain("f", retry=Retry(maximum_attempts=2, initial_interval=0))

    await ended(flow.add_step("a", lambda data: {"x": 1}).add_step("b", fails), kept)

    assert list(kept.entries) == ["a"]


@pytest.mark.parametrize("error", [StateUnavailable, TimeoutError])
@pytest.mark.parametrize("refuses", ["load", "a"])
async def test_a_checkpoint_that_is_away_is_an_error_and_no_failure_of_the_flow(
    refuses: str, error: type[Exception]
) -> None:
    calls: list[str] = []
    cleaned = asyncio.Event()

    async def beside(data: dict[str, Any]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    flow = Graph("g", retry=Retry(maximum_attempts=3, initial_interval=0))
    flow.add_node("a", lambda data: calls.append("a")).add_node("b", beside)

    with pytest.raises(error, match="the store is away"):
        await ended(flow, Kept(refuses=refuses, error=error))

    assert calls == ([] if refuses == "load" else ["a"]), "the step itself went well and is not tried again"
    assert cleaned.is_set() is (refuses == "a")
    assert asyncio.all_tasks() == {asyncio.current_task()}
