"""The worker: a process that runs our workflows and activities until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from opentelemetry import trace
from temporalio.client import Client
from temporalio.contrib.opentelemetry import (
    OpenTelemetryPlugin,
    ReplaySafeTracerProvider,
    create_tracer_provider,
)
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from beluga_airflow.config import Settings
from beluga_airflow.errors import InvalidSetting
from beluga_airflow.temporal.activities import Activities, Backends
from beluga_airflow.temporal.batch_workflow import BatchWorkflow
from beluga_airflow.temporal.flow_workflow import FlowWorkflow

__all__ = ["serve", "set_up_tracing", "tracing_plugins", "worker_for", "workflow_runner"]

log = logging.getLogger(__name__)

GRACEFUL = timedelta(seconds=20)
"""How long running steps may go on after the worker was told to stop."""
PASSED_THROUGH = ("beluga_airflow", "opentelemetry")
"""Modules that workflows share with the process: importing them anew for every workflow costs seconds."""


def worker_for(
    client: Client,
    backends: Backends,
    *,
    task_queue: str,
    concurrency: int = 100,
    graceful: timedelta = GRACEFUL,
    max_cached_workflows: int = 1_000,
    settings: Callable[[], Settings] = Settings,
) -> Worker:
    """A worker, not yet running.

    Args:
        client: a connected client.
        backends: for what steps need.
        task_queue: whose work it takes.
        concurrency: how many steps and items may run in it at once.
        graceful: how long they may go on when it stops.
        max_cached_workflows: how many it keeps in memory, others are replayed; 0 replays at every turn.
        settings: asked when an item of a batch starts; the defaults when left out.

    Raises:
        InvalidSetting: ``concurrency`` is under 1.
    """
    if concurrency < 1:
        raise InvalidSetting(f"the worker's concurrency is {concurrency}, it must be 1 or more")
    activities = Activities(backends, settings)
    return Worker(
        client,
        task_queue=task_queue,
        workflows=[FlowWorkflow, BatchWorkflow],
        activities=activities.all(),
        workflow_runner=workflow_runner(),
        max_cached_workflows=max_cached_workflows,
        max_concurrent_activities=concurrency,
        graceful_shutdown_timeout=graceful,
        # a step hears of its cancellation by the answer to a heartbeat
        max_heartbeat_throttle_interval=timedelta(seconds=2),
        # a killed worker's workflows wait this long for it before another takes them
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=2),
    )


def workflow_runner() -> SandboxedWorkflowRunner:
    """What workflows run in: the SDK's sandbox, into which our own modules are let."""
    return SandboxedWorkflowRunner(restrictions=SandboxRestrictions.default.with_passthrough_modules(*PASSED_THROUGH))


def set_up_tracing() -> None:
    """Send this process's spans to where the standard ``OTEL_*`` variables say; do nothing where they say nothing.

    The provider is Temporal's, under which a replayed workflow tells of nothing twice.
    """
    named = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not named or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = create_tracer_provider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def tracing_plugins() -> list[Any]:
    """For ``connect``: carries traces through workflows, where this process records spans in a replay-safe way."""
    return [OpenTelemetryPlugin()] if isinstance(trace.get_tracer_provider(), ReplaySafeTracerProvider) else []


async def serve(worker: Worker, stop: asyncio.Event) -> None:
    """Run ``worker`` until ``stop`` is set; then let it finish what it has begun, within its grace."""
    async with worker:
        log.info("worker is ready on task queue %r", worker.task_queue)
        await stop.wait()
        log.info("worker stops: finishing what it has begun")
