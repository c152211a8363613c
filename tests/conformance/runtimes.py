"""The runtimes, each as a function that runs examples, as many at once as two cores bear."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

from beluga_airflow import Chain, FlowResult, run
from beluga_airflow.config import Settings
from beluga_airflow.errors import ModelRefused, ModelUnavailable
from beluga_airflow.execute import Resources, to_json
from beluga_airflow.execute.status import RunStatus, status_key
from beluga_airflow.graph import Identity
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.llm.client import ModelRequest
from beluga_airflow.operators.flow import ChainOperator, GraphOperator
from beluga_airflow.operators.temporal import GRACE
from beluga_airflow.state import StateStore
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.state.sqlite import SqliteStore
from beluga_airflow.temporal.client import Run, Target, connect, result_of, start
from beluga_airflow.temporal.messages import FLOW_WORKFLOW, FlowCall
from beluga_airflow.testing import OperatorRunner, ScriptedModel, TemporalServer
from beluga_airflow.testing.scripted_model import Answer, prompt_of
from tests.conformance.expected import KEY, Example
from tests.conformance.trace import Trace
from tests.temporal.conftest import OwnBackends, Side

__all__ = [
    "Observed",
    "Runs",
    "by_operator",
    "by_run",
    "inputs_of",
    "model",
    "on_temporal",
    "run_on_temporal",
    "told_in",
]

AT_ONCE = 12
"""More runs at once, and two cores are too slow for the flows that are short of time."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """How a run ended, and the trace of its steps. What a runtime does not tell is None.

    ``told`` is the status in the state store, as (status, error).
    """

    status: str
    data: Mapping[str, Any]
    error: str | None
    steps: Mapping[str, str] | None = None
    undone: Mapping[str, str] | None = None
    decided: Mapping[str, str]
    trace: Trace
    told: tuple[str, str | None] | None = None

    @classmethod
    def of(cls, result: FlowResult, folder: Path, told: tuple[str, str | None] | None) -> Observed:
        """What a ``FlowResult`` tells."""
        return cls(
            status=result.status,
            data=_without_trace(result.data),
            error=result.error,
            steps=result.steps,
            undone=result.undone,
            decided=_deciders(result.decisions),
            trace=Trace(folder),
            told=told,
        )

    @classmethod
    def of_task(cls, returned: Any, error: str | None, decisions: Any, folder: Path, **more: Any) -> Observed:
        """What a task tells: what it returned, or the message with which it failed."""
        told = {"decided": _deciders(decisions or {}), "trace": Trace(folder), **more}
        if error is None:
            return cls(status=returned["status"], data=_without_trace(returned["data"]), error=None, **told)
        said = re.fullmatch(r"flow (\w+): (.*)", error, re.DOTALL)
        status, why = said.groups() if said else ("failed", error)
        return cls(status=status, data={}, error=why, **told)


Runs = dict[str, Observed | BaseException]
"""How examples ended, by their names, or what kept them from it."""


def model() -> ScriptedModel:
    """A model that answers what the data says."""
    return ScriptedModel(_answer)


def _answer(request: ModelRequest) -> Answer:
    match prompt_of(request).data["says"]:
        case "overloaded":
            return ModelUnavailable("the endpoint is overloaded")
        case "refused":
            return ModelRefused("the endpoint refuses the key")
        case "second thoughts":
            asked = sum(message["role"] == "assistant" for message in request.messages)
            return "expedite" if asked else "nonsense"
        case said:
            answer: Answer = said
            return answer


def inputs_of(example: Example, folder: Path | str) -> dict[str, Any]:
    """The input of an example, with the folder for its trace."""
    return {**example.inputs, "trace": str(folder)}


async def by_run(examples: Sequence[Example], folder: Path) -> Runs:
    """By ``run()``."""

    async def one(example: Example) -> Observed:
        trace = folder / example.name
        store = MemoryStore()
        result = await run(example.flow, inputs_of(example, trace), key=KEY, model=model(), state=store)
        return Observed.of(result, trace, await told_in(store, example))

    return await _all(examples, one)


async def by_operator(examples: Sequence[Example], folder: Path) -> Runs:
    """By ``ChainOperator`` or ``GraphOperator``, whose hook gives the model."""

    async def client(hook: LLMHook) -> ScriptedModel:
        return model()

    # one store each: all runs of a flow have the same business key, and so one status
    stores = {
        example.name: {"conn_type": "beluga_state", "extra": {"url": f"sqlite:///{folder / example.name}.db"}}
        for example in examples
    }
    with (
        OperatorRunner(connections=stores) as runner,
        patch.object(LLMHook, "client", client),
    ):

        async def one(example: Example) -> Observed:
            observed = await asyncio.to_thread(_in_one_task, example, folder / example.name, runner)
            store = SqliteStore(folder / f"{example.name}.db")
            told = await told_in(store, example)
            await store.close()
            return replace(observed, told=told)

        return await _all(examples, one)


def _in_one_task(example: Example, trace: Path, runner: OperatorRunner) -> Observed:
    kind = ChainOperator if isinstance(example.flow, Chain) else GraphOperator
    # a template: a name would have to be a field of the input
    inputs, key = inputs_of(example, trace), f"{{{{ {KEY!r} }}}}"
    operator = kind(task_id="task", flow=example.path, inputs=inputs, key=key, retries=1, state_conn_id=example.name)
    ended = runner.run(operator, run_id=example.name)
    assert ended.state != "up_for_retry", f"only a step's Retry retries, but for lost workers: {ended.error}"
    error = None if ended.error is None else str(ended.error)
    undone = ended.xcoms["steps"]["undone"] if "steps" in ended.xcoms else None
    return Observed.of_task(ended.return_value, error, ended.xcoms.get("decisions"), trace, undone=undone)


async def on_temporal(examples: Sequence[Example], folder: Path, server: TemporalServer) -> Runs:
    """On a server, with a worker in this process."""
    async with temporal_side(server, f"conformance-{uuid4().hex}") as side:
        backends = side.backends
        assert isinstance(backends, OneEach)

        async def one(example: Example) -> Observed:
            trace = folder / example.name
            result, _ = await run_on_temporal(example, trace, side, workflow_id=f"{example.name}-{uuid4().hex}")
            return Observed.of(result, trace, await told_in(backends.stores[example.name], example))

        return await _all(examples, one)


@dataclass
class OneEach(OwnBackends):
    """A store for each connection's name."""

    stores: dict[str | None, MemoryStore] = field(default_factory=lambda: defaultdict(MemoryStore))

    async def resources(self, *, llm_conn_id: str | None, state_conn_id: str | None) -> Resources:
        shared = await super().resources(llm_conn_id=llm_conn_id, state_conn_id=state_conn_id)
        return replace(shared, state=self.stores[state_conn_id])


@asynccontextmanager
async def temporal_side(server: TemporalServer, task_queue: str) -> AsyncIterator[Side]:
    """A worker in this process. It remembers no workflow: what cannot be replayed shows at once."""
    target = Target(address=server.address, task_queue=task_queue)
    side = Side(client=await connect(target), target=target, backends=OneEach(model=model()))
    async with side.worker(max_cached_workflows=0):
        yield side


async def run_on_temporal(
    example: Example, trace: Path | str, side: Side, *, workflow_id: str
) -> tuple[FlowResult, Run]:
    """As ``TemporalWorkflowOperator`` runs it."""
    flow = example.flow
    shape = Settings().settle(flow.check(), durable=True)
    assert shape.timeout is not None, "settled"
    call = FlowCall(
        path=example.path,
        shape=shape.to_json(),
        inputs=to_json(inputs_of(example, trace), "the input"),
        scope=Identity.of(flow.name, KEY).scope,
        llm_conn_id=LLMHook.default_conn_name,
        state_conn_id=example.name,
    )
    started = await start(
        side.client,
        side.target,
        FLOW_WORKFLOW,
        call,
        workflow_id=workflow_id,
        task_queue=side.target.task_queue,
        summary=example.name,
        timeout=shape.timeout + shape.longest_undoing + GRACE,
    )
    async with asyncio.timeout(60):
        return FlowResult.from_json(await result_of(side.client, side.target, started)), started


async def _all(examples: Sequence[Example], one: Callable[[Example], Awaitable[Observed]]) -> Runs:
    places = asyncio.Semaphore(AT_ONCE)

    async def in_turn(example: Example) -> Observed:
        async with places:
            return await one(example)

    ended = await asyncio.gather(*map(in_turn, examples), return_exceptions=True)
    return dict(zip((example.name for example in examples), ended, strict=True))


async def told_in(store: StateStore, example: Example) -> tuple[str, str | None] | None:
    """The terminal status of the one run of an example; None: there is none."""
    entry = RunStatus.from_json(
        await store.get(status_key(example.flow.name, Identity.of(example.flow.name, KEY).scope))
    )
    return None if entry is None or entry.ended is None else (entry.status, entry.error)


def _without_trace(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    return {key: _without_trace(value) for key, value in data.items() if key != "trace"}


def _deciders(decisions: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {step: record["decided_by"] for step, record in decisions.items()}
