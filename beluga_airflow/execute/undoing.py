"""Undoing one finished step, as often as its ``Retry`` says: the one rule where a run keeps its own attempts."""

from __future__ import annotations

import logging

from beluga_airflow.execute.attempt import undo
from beluga_airflow.execute.merge import States
from beluga_airflow.graph import Flow, Identity
from beluga_airflow.graph.shape import StepShape
from beluga_airflow.resilience.retrying import judge, retrying

__all__ = ["undo_with_retries"]

log = logging.getLogger(__name__)


async def undo_with_retries(
    flow: Flow,
    step: StepShape,
    *,
    states: States,
    identity: Identity,
    interrupts: tuple[type[BaseException], ...] = (),
) -> str | None:
    """Undo a finished step.

    Args:
        flow: whose code runs.
        step: of its settled shape; it can be undone.
        states: the data of the run, with what the step returned.
        identity: of the run.
        interrupts: see ``Resources``.

    Returns:
        why it could not be undone; None: it was.
    """

    async def once(number: int) -> None:
        await undo(
            flow,
            step.name,
            states=states,
            identity=identity,
            timeout=step.timeout,
            number=number,
            interrupts=interrupts,
        )

    try:
        await retrying(once, step.retries)
    except Exception as error:
        message = judge(error, step.retries).message
        log.error("step %r of flow %r could not be undone: %s", step.name, flow.name, message)
        return message
    log.warning("step %r of flow %r was undone", step.name, flow.name)
    return None
