"""Spans and a counter, through the OpenTelemetry API only: whoever runs the process decides where they go."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, ProxyTracerProvider, Span, SpanKind, Status, StatusCode

from beluga_airflow.graph import FlowResult, Identity, Shape

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter

__all__ = [
    "FLOW_SPAN",
    "STEP_SPAN",
    "count_breaker_change",
    "finish_flow_span",
    "flow_attributes",
    "flow_span",
    "step_span",
]

FLOW_SPAN = "workflow.execute"
STEP_SPAN = "workflow.step"
NOBODY_LISTENS = nullcontext(INVALID_SPAN)
"""In place of a span where the process has no provider: what is made for nobody would cost as much as the step."""


def flow_attributes(shape: Shape, runtime: str) -> dict[str, str | int]:
    """What every ``workflow.execute`` span says of its flow."""
    return {
        "workflow.type": shape.kind,
        "workflow.name": shape.flow,
        "workflow.steps": len(shape.steps),
        "workflow.runtime": runtime,
    }


def flow_span(shape: Shape, runtime: str) -> AbstractContextManager[Span]:
    """The span of one run of a flow; end it with ``finish_flow_span``."""
    if isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        return NOBODY_LISTENS
    tracer = trace.get_tracer("beluga_airflow")
    return tracer.start_as_current_span(FLOW_SPAN, attributes=flow_attributes(shape, runtime))


def finish_flow_span(span: Span, result: FlowResult) -> None:
    """Put the flow's end on its span: the status, and an error with ERROR where it did not end well."""
    if not span.is_recording():
        return
    span.set_attribute("workflow.status", result.status)
    if not result.ok:
        span.add_event("exception", {"exception.message": result.error or result.status})
        span.set_status(Status(StatusCode.ERROR, result.error or result.status))


def step_span(flow: str, step: str, *, attempt: int, identity: Identity) -> AbstractContextManager[Span]:
    """The span of one attempt of one step; an exception that leaves it is recorded with ERROR."""
    tracer = trace.get_tracer("beluga_airflow")
    attributes: dict[str, str | int] = {
        "workflow.name": flow,
        "workflow.step.name": step,
        "workflow.step.attempt": attempt,
        "workflow.step.idempotency_key": identity.key(step),
    }
    return tracer.start_as_current_span(STEP_SPAN, kind=SpanKind.INTERNAL, attributes=attributes)


def count_breaker_change(name: str, state: str) -> None:
    """Count that a circuit breaker came to this state."""
    _breaker_changes().add(1, {"name": name, "state": state})


@cache
def _breaker_changes() -> Counter:
    # most processes never count anything
    from opentelemetry import metrics

    return metrics.get_meter("beluga_airflow").create_counter(
        "beluga.breaker.changes", unit="{change}", description="changes of the state of a circuit breaker"
    )
