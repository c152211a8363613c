from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from temporalio.contrib.opentelemetry import create_tracer_provider

from beluga_airflow.temporal.client import Target, cancel, connect
from beluga_airflow.temporal.messages import FLOW_WORKFLOW
from beluga_airflow.temporal.worker import tracing_plugins
from beluga_airflow.testing import ScriptedModel, TemporalServer
from tests.temporal import sample_flows
from tests.temporal.conftest import Side

Spans = Callable[[str], list[ReadableSpan]]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """What this process tells, by the spans' name."""
    exporter = InMemorySpanExporter()
    provider = create_tracer_provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # the process has one provider for good, so that a test can only put it in place
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield lambda name: [span for span in exporter.get_finished_spans() if span.name == name]
    provider.shutdown()


@pytest.fixture
async def traced(spans: Spans, temporal_server: TemporalServer, token: str) -> Side:
    """A side whose client and worker carry traces, as the worker's process does."""
    target = Target(address=temporal_server.address, task_queue=token)
    return Side(client=await connect(target, plugins=tracing_plugins()), target=target)


def workflow(spans: Spans) -> ReadableSpan:
    """The one span of the one run."""
    (span,) = spans("workflow.execute")
    return span


@pytest.mark.parametrize("cached", [1_000, 0])
async def test_a_run_is_one_span_with_a_child_a_step(traced: Side, spans: Spans, token: str, cached: int) -> None:
    """Also when every turn of the workflow is a replay."""
    async with traced.worker(max_cached_workflows=cached):
        result, _ = await traced.run("branches", {"token": token})
    assert result.status == "completed"

    run = workflow(spans)
    assert dict(run.attributes or {}) == {
        "workflow.type": "graph",
        "workflow.name": "branches",
        "workflow.steps": 4,
        "workflow.runtime": "temporal",
        "workflow.status": "completed",
    }
    assert run.status.status_code is StatusCode.UNSET
    steps = spans("workflow.step")
    names = [str((step.attributes or {})["workflow.step.name"]) for step in steps]
    assert sorted(names) == ["end", "left", "right", "start"]
    assert all(_is_below(step, run, spans) for step in steps)
    assert (steps[0].attributes or {})["workflow.step.idempotency_key"] == "branches/item-1/start"
    first = min(steps, key=lambda step: step.start_time or 0)
    last = max(steps, key=lambda step: step.end_time or 0)
    assert run.start_time is not None
    assert run.end_time is not None
    assert run.start_time <= (first.start_time or 0)
    assert run.end_time >= (last.end_time or 0)


@pytest.mark.parametrize("cached", [1_000, 0])
async def test_an_error_is_told_once_with_each_attempt(traced: Side, spans: Spans, token: str, cached: int) -> None:
    async with traced.worker(max_cached_workflows=cached):
        result, _ = await traced.run("used_up", {"token": token})
    run = workflow(spans)
    assert (run.attributes or {})["workflow.status"] == result.status == "failed"
    assert run.status.status_code is StatusCode.ERROR
    assert run.status.description == result.error
    told = [(event.attributes or {})["exception.message"] for event in run.events if event.name == "exception"]
    assert told == ["step 'try' failed: RuntimeError: the printer is on fire"]
    attempts = sorted(spans("workflow.step"), key=lambda step: step.start_time or 0)
    assert [(step.attributes or {})["workflow.step.attempt"] for step in attempts] == [1, 2, 3]
    assert {step.status.status_code for step in attempts} == {StatusCode.ERROR}


async def test_the_status_of_a_stop_is_no_error(traced: Side, spans: Spans, token: str) -> None:
    async with traced.worker():
        await traced.run("stop", {"token": token})
    run = workflow(spans)
    assert (run.attributes or {})["workflow.status"] == "out_of_stock"
    assert run.status.status_code is StatusCode.UNSET


async def test_a_cancelled_run_says_so(traced: Side, spans: Spans, token: str, eventually: Callable[..., Any]) -> None:
    async with traced.worker():
        started = await traced.start(FLOW_WORKFLOW, traced.call("stuck", {"token": token}))
        await eventually(lambda: sample_flows.seen[token])
        await cancel(traced.client, traced.target, started)
        assert (await traced.result(started)).status == "cancelled"
    run = workflow(spans)
    assert (run.attributes or {})["workflow.status"] == "cancelled"
    assert run.status.status_code is StatusCode.ERROR


async def test_a_worker_that_goes_away_leaves_the_telling_to_the_next(
    traced: Side, spans: Spans, token: str, eventually: Callable[..., Any]
) -> None:
    async with traced.worker(graceful=timedelta(0)):
        started = await traced.start(FLOW_WORKFLOW, traced.call("held", {"token": token}))
        await eventually(lambda: sample_flows.seen[token])
    assert spans("workflow.execute") == []
    sample_flows.gates[token].set()
    async with traced.worker():
        assert (await traced.result(started)).status == "completed"
    assert (workflow(spans).attributes or {})["workflow.status"] == "completed"


async def test_no_data_of_an_order_reaches_a_span(traced: Side, spans: Spans, token: str) -> None:
    traced.backends.model = ScriptedModel(["expedite"])
    async with traced.worker():
        await traced.run("decision", {"token": token, "order_id": "SECRET-ORDER"})
    told = "".join(span.to_json() for name in ("workflow.execute", "workflow.step") for span in spans(name))
    assert "decide" in told
    assert "SECRET-ORDER" not in told


def _is_below(span: ReadableSpan, above: ReadableSpan, spans: Spans) -> bool:
    """Whether ``above`` is an ancestor; between them are the SDK's own spans."""
    assert span.context is not None
    assert above.context is not None
    known: dict[int, ReadableSpan] = {}
    for name in ("RunActivity:beluga.step", "StartActivity:beluga.step", "workflow.execute", "workflow.step"):
        known |= {other.context.span_id: other for other in spans(name) if other.context is not None}
    while span.parent is not None and span.parent.span_id in known:
        span = known[span.parent.span_id]
        if span.context == above.context:
            return True
    return False
