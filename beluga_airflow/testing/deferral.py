"""Where a deferred task goes on, and the trigger that it waits for."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, cast

import msgspec
from airflow.sdk.execution_time import comms
from airflow.sdk.module_loading import import_string  # type: ignore[attr-defined]  # an export that mypy does not see
from airflow.sdk.serde import deserialize
from airflow.triggers.base import BaseTrigger, DiscrimatedTriggerEvent, TriggerEvent
from pydantic import BaseModel, TypeAdapter

__all__ = ["Deferral", "DeferralTimeoutError", "first_event", "through_json"]

_TRIGGER_EVENT: TypeAdapter[TriggerEvent] = TypeAdapter(DiscrimatedTriggerEvent)


class DeferralTimeoutError(TimeoutError):
    """The trigger sent no event within the deferral's timeout."""


@dataclass(frozen=True, kw_only=True)
class Deferral:
    """Where a deferred task goes on, and what it waits for.

    Attributes:
        trigger_class: import path of the trigger; None where the task awaits a person's input.
        kwargs: what the trigger is made from, as the triggerer gets them.
        method: the operator's method that resumes the task.
        next_kwargs: what that method gets besides the event.
        timeout: how long the task waits, or None.
    """

    trigger_class: str | None
    kwargs: dict[str, Any]
    method: str
    next_kwargs: dict[str, Any]
    timeout: timedelta | None

    @classmethod
    def asked_by(cls, message: BaseModel | None) -> Self | None:
        """The deferral that the task's last message asks for, if it does."""
        match message:
            case comms.DeferTask():
                return cls(
                    trigger_class=message.classpath,
                    kwargs=_stored(message.trigger_kwargs),
                    method=message.next_method,
                    next_kwargs=_stored(message.next_kwargs),
                    timeout=message.trigger_timeout,
                )
            case comms.AwaitInputTask():
                return cls(
                    trigger_class=None,
                    kwargs={},
                    method=message.next_method,
                    next_kwargs=_stored(message.next_kwargs),
                    timeout=message.timeout,
                )
        return None

    def trigger(self) -> BaseTrigger:
        """The trigger as the triggerer would make it.

        Raises:
            RuntimeError: the task waits for a person, not for a trigger.
            ImportError, TypeError: the trigger cannot be made from what its ``serialize()`` gave.
        """
        if self.trigger_class is None:
            raise RuntimeError("the task awaits a person's input and has no trigger: answer by resume()")
        trigger: BaseTrigger = import_string(self.trigger_class)(**self.kwargs)
        return trigger


async def first_event(trigger: BaseTrigger) -> TriggerEvent:
    """The first event of a trigger, as it arrives at the triggerer's parent process.

    Raises:
        RuntimeError: it ends without an event.
        Exception: whatever the trigger raises.
    """
    try:
        async with aclosing(cast("AsyncGenerator[TriggerEvent]", trigger.run())) as events:
            async for event in events:
                # Airflow's own encoding refuses what cannot leave the triggerer
                frame = comms._new_encoder().encode(event)
                return _TRIGGER_EVENT.validate_python(msgspec.msgpack.decode(frame))
    finally:
        with suppress(Exception):  # as the triggerer does
            await trigger.cleanup()
    raise RuntimeError(f"{trigger!r} ended without an event: Airflow fails the task")


def through_json(value: Any) -> Any:
    """`value` after a stay in the metadata database."""
    return json.loads(json.dumps(value))


def _stored(kwargs: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", deserialize(through_json(kwargs or {})))
