"""What flows are made of, as their authors give it, and a flow with the flows inside it laid flat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cached_property
from reprlib import Repr
from typing import Any, Protocol, runtime_checkable

from beluga_airflow.graph.callee import Callee
from beluga_airflow.graph.retry import Retry
from beluga_airflow.graph.shape import GroupShape, Join

__all__ = ["Definition", "Guard", "Link", "Reducer", "Step", "When", "fault_of_guard", "told"]

When = Mapping[str, Any] | Callable[[dict[str, Any]], bool]
Reducer = Callable[[Any, Any], Any]


@runtime_checkable
class Guard(Protocol):
    """What may keep a call back for a while: a circuit breaker or a rate limit, shared through a state store."""

    @property
    def name(self) -> str:
        """By which all processes share it."""
        ...

    @property
    def kind(self) -> str:
        """``breaker`` or ``limit``."""
        ...

    @property
    def guard(self) -> Callable[..., AbstractAsyncContextManager[Any]]:
        """Lets the body of an ``async with guard(store, ...)`` through, or raises ``NotNow``.

        ``store`` is the ``StateStore`` where it is kept if it has none of its own; the rest is by kind.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of a flow.

    Args:
        name: its name; of a flow laid flat, its path.
        node: what its author gave; None where a nested flow ends.
        timeout: seconds for one attempt.
        retry: how often it is tried.
        join: of its incoming edges.
        provides: the keys that it returns; None: nobody said which.
        compensate: what undoes it.
        breaker, limit: what each attempt has to go past.
    """

    name: str
    node: Any
    timeout: float | None = None
    retry: Retry | None = None
    join: Join = "all"
    provides: tuple[str, ...] | None = None
    compensate: Any = None
    breaker: Guard | None = None
    limit: Guard | None = None

    @cached_property
    def callee(self) -> Callee:
        """What is called for it."""
        return Callee.of(self.node)

    @cached_property
    def undoing(self) -> Callee:
        """What is called to undo it."""
        return Callee.of(self.compensate)


@dataclass(frozen=True, kw_only=True)
class Link:
    """One edge of a flow."""

    source: str
    target: str
    when: When | None = None

    def taken(self, output: dict[str, Any]) -> bool:
        """Whether this edge is taken after its source step returned ``output``."""
        if self.when is None:
            return True
        if callable(self.when):
            return bool(self.when(output))
        return all(key in output and output[key] == value for key, value in self.when.items())

    @property
    def text(self) -> str | None:
        """The condition, for a reader."""
        if self.when is None:
            return None
        if callable(self.when):
            return getattr(self.when, "__name__", "predicate")
        return ", ".join(f"{key}={value!r}" for key, value in self.when.items())


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A flow laid flat.

    Args:
        steps: all steps, those of nested flows by their paths, in the order of definition.
        links: all edges between them.
        groups: the nested flows.
        reducers: of the flow (its path is empty) and of each nested flow, by path and key.
    """

    steps: tuple[Step, ...]
    links: tuple[Link, ...]
    groups: tuple[GroupShape, ...]
    reducers: Mapping[str, Mapping[str, Reducer]]

    @cached_property
    def by_name(self) -> dict[str, Step]:
        """The steps by path."""
        return {step.name: step for step in self.steps}

    @cached_property
    def links_from(self) -> dict[str, list[Link]]:
        """The outgoing edges of each step."""
        found: dict[str, list[Link]] = {step.name: [] for step in self.steps}
        for link in self.links:
            found[link.source].append(link)
        return found


_short = Repr()
_short.maxstring = _short.maxother = 200


def fault_of_guard(value: Any, kind: str) -> str | None:
    """Why this is no guard of that kind, as a clause of a sentence; None: it is one, or there is none."""
    if value is None or (isinstance(value, Guard) and value.kind == kind):
        return None
    wanted = {"breaker": "a CircuitBreaker", "limit": "a RateLimit"}[kind]
    return f"{kind} is {told(value)}, it must be {wanted}"


def told(value: Any) -> str:
    """What an author gave, for a message: of bounded length, and whatever its own ``__repr__`` does."""
    return _short.repr(value)
