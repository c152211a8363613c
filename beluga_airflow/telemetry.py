"""Spans, through the OpenTelemetry API only: whoever runs the process decides whether and where they go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from beluga_airflow.graph import FlowResult, Shape

__all__ = ["FLOW_SPAN", "STEP_SPAN", "finish_flow_span", "flow_attributes", "flow_span", "step_span"]

FLOW_SPAN = "workflow.execute"
STEP_SPAN = "workflow.step"


def flow_attributes(shape: Shape, runtime: str) -> dict[str, str | int]:
    """What every ``workflow.execute`` span says of its flow."""
    return {
        "workflow.type": shape.kind,
        "workflow.name": shape.flow,
        "workflow.steps": len(shape.steps),
        "workflow.runtime": runtime,
    }


@contextmanager
def flow_span(shape: Shape, runtime: str) -> Iterator[Span]:
    """The span of one run of a flow; end it with ``finish_flow_span``."""
    tracer = trace.get_tracer("beluga_airflow")
    with tracer.start_as_current_span(FLOW_SPAN, attributes=flow_attributes(shape, runtime)) as span:
        yield span


def finish_flow_span(span: Span, result: FlowResult) -> None:
    """Put the flow's end on its span: the status, and an error with ERROR where it did not end well."""
    span.set_attribute("workflow.status", result.status)
    if not result.ok:
        span.add_event("exception", {"exception.message": result.error or result.status})
        span.set_status(Status(StatusCode.ERROR, result.error or result.status))


@contextmanager
def step_span(flow: str, step: str, *, attempt: int, key: str) -> Iterator[Span]:
    """The span of one attempt of one step; an exception that leaves it is recorded with ERROR."""
    tracer = trace.get_tracer("beluga_airflow")
    attributes: dict[str, str | int] = {
        "workflow.name": flow,
        "workflow.step.name": step,
        "workflow.step.attempt": attempt,
        "workflow.step.idempotency_key": key,
    }
    with tracer.start_as_current_span(STEP_SPAN, kind=SpanKind.INTERNAL, attributes=attributes) as span:
        yield span
