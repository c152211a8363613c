"""What the tests of one attempt share."""

from __future__ import annotations

from typing import Any

from beluga_airflow import Chain
from beluga_airflow.execute import Resources, States, attempt
from beluga_airflow.graph import Flow, Identity, Outcome
from beluga_airflow.graph.shape import Place
from beluga_airflow.state import StateStore
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.testing.scripted_model import ScriptedModel

DEADLINE = 20


async def once(
    flow: Flow,
    step: str = "a",
    inputs: dict[str, Any] | None = None,
    *,
    outputs: dict[str, dict[str, Any]] | None = None,
    place: Place | None = None,
    model: ScriptedModel | None = None,
    state: StateStore | None = None,
    timeout: float | None = DEADLINE,
    generation: int = 0,
    interrupts: tuple[type[BaseException], ...] = (),
    **options: Any,
) -> Outcome:
    async def client(conn_id: str | None) -> ScriptedModel:
        return model or ScriptedModel([])

    place = place or flow.check().place(step)
    return await attempt(
        flow,
        step,
        targets=place.targets,
        states=States(flow, place.sources, inputs or {}, outputs or {}),
        identity=Identity.of("shop", "order 7", generation=generation),
        resources=Resources(state=state or MemoryStore(), model=client, interrupts=interrupts),
        timeout=timeout,
        **options,
    )


async def output_of(node: Any, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return (await once(Chain("f").add_step("a", node), inputs=inputs)).output
