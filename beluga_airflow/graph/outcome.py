"""What steps see and leave behind: their context, ``Stop``, the outcome of a step, the result of a flow."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from textwrap import shorten
from typing import Any
from urllib.parse import quote

__all__ = ["FlowResult", "Identity", "Outcome", "StepContext", "Stop"]

KEY_LENGTH = 200
"""Characters an idempotency key may have: payment services accept 255 and more."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxstring = 2, 5, 50


def _short(record: Any) -> str:
    """A dataclass with those of its fields that say something, and no more of large data than can be read."""
    told = []
    for part in fields(record):
        value = getattr(record, part.name)
        text = repr(shorten(value, 300, placeholder=" ...")) if isinstance(value, str) else _SHORT.repr(value)
        is_required = part.default is MISSING and part.default_factory is MISSING
        if is_required or text not in ("None", "{}", "()"):
            told.append(f"{part.name}={text}")
    return f"{type(record).__name__}({', '.join(told)})"


@dataclass(frozen=True)
class Stop:
    """Returned by a step: the flow ends here, early and successfully.

    Args:
        status: the flow's status, for example ``"out_of_stock"``; not one of the four that flows have
            themselves (completed, failed, timed_out, cancelled).
        data: added to the data of the result.
    """

    status: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return _short(self)


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step learns about its run, when it has a parameter named ``context``.

    Args:
        flow: name of the flow.
        step: path of the step in the flow.
        idempotency_key: the same for every attempt, retry, replay and clear of this step of this run (with a
            business key: of this item, whoever runs it). Give it to whoever takes money.
        attempt: 1 for the first attempt.
        generation: 0, and one more for each time a user cleared the task, and for a run again from one step.
    """

    flow: str
    step: str
    idempotency_key: str
    attempt: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which run of a flow this is: the part of its keys that no attempt changes.

    Args:
        scope: names the run (dag, run, task, map index) or, where there is a business key, the flow and that key.
        generation: raised by each clear of the task; in records and checkpoints, never in idempotency keys.
        run: names the run where a business key does not: whose generation it is.
        task: dag, run and task (or task group) that pay for it; empty outside of Airflow.
    """

    scope: str
    generation: int = 0
    run: str = ""
    task: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, *parts: object, generation: int = 0, run: str = "", task: tuple[str, ...] = ()) -> Identity:
        """An identity from the parts of its name, quoted so that no two lists of parts read the same."""
        # any text is a name, lone surrogates out of somebody's JSON too
        names = (quote(str(part), safe=":+@ ", errors="surrogatepass") for part in parts)
        return cls(scope="/".join(names), generation=generation, run=run, task=task)

    def key(self, step: str) -> str:
        """The idempotency key of a step: readable, and at most 200 characters."""
        key = f"{self.scope}/{step}"
        if len(key) <= KEY_LENGTH:
            return key
        digest = hashlib.sha256(key.encode()).hexdigest()
        return f"{key[: KEY_LENGTH - len(digest) - 1]}~{digest}"

    def record(self, step: str) -> str:
        """The name of what is kept about a step for this generation.

        Runs with the same business key share what they decided first; what a clear asks for anew is its run's own.
        """
        return f"{self.key(step)}@{self.generation}" + (f" of {self.run}" if self.run and self.generation else "")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished step left behind, all JSON.

    Args:
        output: what it returned.
        taken: the steps to which its outgoing edges are taken.
        stop: the status of the ``Stop`` it returned.
        state: the merged data after it; only where the flow ends with it.
        decision: the record, where the step is a decision.
        fault: why the flow fails behind it, though the step itself is done.
    """

    output: dict[str, Any]
    taken: tuple[str, ...] = ()
    stop: str | None = None
    state: dict[str, Any] | None = None
    decision: dict[str, Any] | None = None
    fault: str | None = None

    def __repr__(self) -> str:
        return _short(self)

    def to_json(self) -> dict[str, Any]:
        """This outcome as JSON."""
        data = {key: value for key, value in asdict(self).items() if value is not None}
        return data | {"taken": list(self.taken)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The outcome that ``to_json`` wrote."""
        return cls(**{**data, "taken": tuple(data.get("taken", ()))})


@dataclass(frozen=True, kw_only=True)
class FlowResult:
    """How a flow ended; the same on every runtime.

    Args:
        status: ``completed``, ``failed``, ``timed_out``, ``cancelled``, or the status of the ``Stop``.
        data: one finish point: the merged data; several: ``{step: data}``; a stop: the data at the step that
            stopped, with the stop's own; empty after a failure.
        error: step and reason, where the flow failed or timed out.
        steps: how each step ended: ``completed``, ``skipped`` or ``failed``; steps that never started are absent.
        decisions: the record of each decision, by step.
        undone: after a failure, each step that can be undone and had finished: ``undone``, or why it could not be.
    """

    status: str
    data: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    steps: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)
    undone: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the flow ended as its author meant it to: completed, or by a ``Stop``."""
        return self.status not in ("failed", "timed_out", "cancelled")

    def __repr__(self) -> str:
        return _short(self)

    def to_json(self) -> dict[str, Any]:
        """This result as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FlowResult:
        """The result that ``to_json`` wrote."""
        return cls(**data)
