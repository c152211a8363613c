from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pytest_mock import MockerFixture

from beluga_airflow import Chain, Decision, InvalidInput, Retry, Stop
from beluga_airflow.config import Settings
from beluga_airflow.errors import StateUnavailable
from beluga_airflow.execute import Resources
from beluga_airflow.graph import Identity
from beluga_airflow.local import run_with
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.testing.scripted_model import ScriptedModel
from tests.running import FAST, ended, graph_of, nothing


@pytest.fixture
def spans(mocker: MockerFixture) -> InMemorySpanExporter:
    """What the real SDK exports; the process's own provider, which can be set only once, is left alone."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    mocker.patch.object(trace, "get_tracer_provider", return_value=provider)
    return exporter


def split(spans: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The span of the one flow that ran, and those of its steps as they began."""
    finished = sorted(spans.get_finished_spans(), key=lambda span: span.start_time or 0)
    (flow,) = [span for span in finished if span.name == "workflow.execute"]
    return flow, [span for span in finished if span.name == "workflow.step"]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_flow_is_a_span_and_each_of_its_steps_a_child(spans: InMemorySpanExporter) -> None:
    flow = graph_of("ac", "bc", nodes={"a": nothing, "b": nothing, "c": nothing})

    await ended(flow, key="order 7")

    whole, steps = split(spans)
    assert attributes(whole) == {
        "workflow.type": "graph",
        "workflow.name": "g",
        "workflow.steps": 3,
        "workflow.runtime": "task",
        "workflow.status": "completed",
    }
    assert whole.status.status_code is StatusCode.UNSET
    assert whole.parent is None
    assert whole.context is not None
    assert sorted(attributes(span)["workflow.step.name"] for span in steps) == ["a", "b", "c"]
    assert {span.parent and span.parent.span_id for span in steps} == {whole.context.span_id}
    assert {span.context and span.context.trace_id for span in steps} == {whole.context.trace_id}
    assert attributes(steps[-1]) == {
        "workflow.name": "g",
        "workflow.step.name": "c",
        "workflow.step.attempt": 1,
        "workflow.step.idempotency_key": "g/order 7/c",
    }
    assert {span.status.status_code for span in steps} == {StatusCode.UNSET}


async def test_a_skipped_step_has_no_span(spans: InMemorySpanExporter) -> None:
    flow = graph_of(nodes={"a": nothing, "b": nothing}).add_edge("a", "b", when={"never": 1})

    await ended(flow)

    whole, steps = split(spans)
    assert [attributes(span)["workflow.step.name"] for span in steps] == ["a"]
    assert attributes(whole)["workflow.steps"] == 2


async def test_an_error_is_recorded_on_the_step_and_on_the_flow(spans: InMemorySpanExporter) -> None:
    def refuses(data: dict[str, Any]) -> None:
        raise InvalidInput("order_id is empty")

    result = await ended(Chain("f").add_step("a", refuses))

    whole, (step,) = split(spans)
    assert attributes(whole)["workflow.status"] == result.status == "failed"
    assert attributes(whole)["workflow.type"] == "chain"
    for span, said in ((whole, result.error), (step, "InvalidInput: order_id is empty")):
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == said
        (event,) = span.events
        assert event.name == "exception"
    assert dict(step.events[0].attributes or {})["exception.message"] == "order_id is empty"
    assert dict(whole.events[0].attributes or {})["exception.message"] == result.error


async def test_every_attempt_is_a_span_and_only_the_failed_ones_are_errors(spans: InMemorySpanExporter) -> None:
    calls: list[int] = []

    def flaky(data: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise ValueError("flaky")

    await ended(Chain("f", retry=FAST).add_step("a", flaky))

    whole, steps = split(spans)
    assert [attributes(span)["workflow.step.attempt"] for span in steps] == [1, 2, 3]
    codes = [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert [span.status.status_code for span in steps] == codes
    assert len({attributes(span)["workflow.step.idempotency_key"] for span in steps}) == 1
    assert (attributes(whole)["workflow.status"], whole.status.status_code) == ("completed", StatusCode.UNSET)


async def test_a_stop_is_no_error(spans: InMemorySpanExporter) -> None:
    await ended(Chain("f").add_step("a", lambda data: Stop("out_of_stock")).add_step("b", nothing))

    whole, (step,) = split(spans)
    assert attributes(whole)["workflow.status"] == "out_of_stock"
    assert {whole.status.status_code, step.status.status_code} == {StatusCode.UNSET}


async def test_a_flow_whose_time_is_up_says_so(spans: InMemorySpanExporter) -> None:
    async def forever(data: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    await ended(Chain("f", timeout=0.05).add_step("a", forever))

    whole, _ = split(spans)
    assert attributes(whole)["workflow.status"] == "timed_out"
    assert whole.status.status_code is StatusCode.ERROR
    assert "used up its timeout of 0.05 s in step 'a'" in str(whole.status.description)


async def test_a_cancelled_flow_says_so_and_all_its_spans_end(spans: InMemorySpanExporter) -> None:
    started = asyncio.Event()

    async def forever(data: dict[str, Any]) -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(ended(Chain("f").add_step("a", forever)))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    whole, (step,) = split(spans)
    assert (attributes(whole)["workflow.status"], whole.status.status_code) == ("cancelled", StatusCode.ERROR)
    assert step.end_time is not None


async def test_sys_exit_in_a_step_is_an_error_of_the_step(spans: InMemorySpanExporter) -> None:
    await ended(Chain("f").add_step("a", lambda data: sys.exit(3)))

    _, (step,) = split(spans)
    assert step.status.status_code is StatusCode.ERROR
    assert str(step.status.description).startswith("StepExited: ")


async def test_spans_of_the_users_own_hang_below_the_step_and_the_flow_below_the_callers(
    spans: InMemorySpanExporter,
) -> None:
    def sync_step(data: dict[str, Any]) -> None:
        with trace.get_tracer("shop").start_as_current_span("in a thread"):
            pass

    async def async_step(data: dict[str, Any]) -> None:
        with trace.get_tracer("shop").start_as_current_span("in the loop"):
            pass

    with trace.get_tracer("shop").start_as_current_span("worker.task") as above:
        await ended(graph_of(nodes={"a": sync_step, "b": async_step}))

    whole, steps = split(spans)
    by_step = {attributes(span)["workflow.step.name"]: span.context and span.context.span_id for span in steps}
    own = {span.name: span.parent and span.parent.span_id for span in spans.get_finished_spans()}
    assert own["in a thread"] == by_step["a"]
    assert own["in the loop"] == by_step["b"]
    assert whole.parent is not None
    assert whole.parent.span_id == above.get_span_context().span_id


async def test_neither_data_nor_questions_are_in_spans(spans: InMemorySpanExporter) -> None:
    flow = Chain("f").add_step("how", Decision("Which question?", choices=["yes", "no"], reads=["note"]))

    await ended(flow, {"note": "private words", "card": "4111"}, model=ScriptedModel(["yes"]))

    for span in spans.get_finished_spans():
        text = span.to_json()
        assert not any(words in text for words in ("private", "4111", "question", "yes"))


async def test_a_run_that_is_lost_to_its_checkpoint_is_an_error(spans: InMemorySpanExporter) -> None:
    class Away:
        async def load(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:  # noqa: ARG002  # it never answers
            raise StateUnavailable("the store is away")

        async def save(self, name: str, entry: dict[str, Any]) -> None:
            raise AssertionError(name, entry)

    with pytest.raises(StateUnavailable):
        await run_with(
            Chain("f", retry=Retry()).add_step("a", nothing),
            {},
            identity=Identity.of("f"),
            resources=Resources(state=MemoryStore(), model=None),  # type: ignore[arg-type]  # nobody asks it
            settings=Settings(),
            checkpoint=Away(),
        )

    whole, steps = split(spans)
    assert (whole.status.status_code, steps) == (StatusCode.ERROR, [])
    assert whole.status.description == "StateUnavailable: the store is away"
