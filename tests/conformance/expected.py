"""What an example is: a flow, its input, and the end to which every runtime must bring it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from beluga_airflow.graph import Flow
from beluga_airflow.graph.locate import load_flow

__all__ = ["KEY", "ONE_AT_A_TIME", "RUNTIMES", "Example", "Expected", "example", "failed"]

RUNTIMES = ("run", "operator", "temporal", "task group")

KEY = "item-1"
"""The business key of every run, so that idempotency keys are the same on all runtimes."""
ONE_AT_A_TIME = {"task group": "dag.test() runs one task at a time"}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """How a run ends, and what its steps do.

    Args:
        status: of the flow.
        data: all of it; empty after a failure.
        error: the whole text.
        skipped: the steps that are skipped; no others are.
        order: pairs of steps of which the first ended before the second began.
        never: steps that must not begin.
        attempts: of the steps that begin more than once; all others begin once at most.
        undone: each step that was to be undone, with ``undone`` or why it could not be; no others are.
        decided: by whom the decisions were taken.
        peak: how many steps run at once, at most.
        waits: seconds that lie between the attempts of a step, at least.
    """

    status: str = "completed"
    data: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    skipped: Set[str] = frozenset()
    order: tuple[tuple[str, str], ...] = ()
    never: Set[str] = frozenset()
    attempts: Mapping[str, int] = field(default_factory=dict)
    undone: Mapping[str, str] = field(default_factory=dict)
    decided: Mapping[str, str] = field(default_factory=dict)
    peak: int | None = None
    waits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One flow and one input.

    Args:
        name: unique; the flow's where it has one example.
        path: the flow's import path.
        shows: the rules of which it is an example.
        expect: how it ends.
        inputs: the flow's input; the runtimes add ``trace``.
        cannot_show: the runtimes that it cannot be run on, each with the reason.
    """

    name: str
    path: str
    shows: tuple[str, ...]
    expect: Expected
    inputs: Mapping[str, Any] = field(default_factory=dict)
    cannot_show: Mapping[str, str] = field(default_factory=dict)

    @property
    def flow(self) -> Flow:
        """The flow itself."""
        return load_flow(self.path)


def example(
    flow: str,
    *shows: str,
    inputs: Mapping[str, Any] | None = None,
    as_: str | None = None,
    cannot_show: Mapping[str, str] | None = None,
    **expect: Any,
) -> Example:
    """An example of the flow ``module:name`` of this folder; ``expect`` is what ``Expected`` takes."""
    return Example(
        name=as_ or flow.rpartition(":")[2],
        path=f"tests.conformance.{flow}",
        shows=shows,
        inputs=inputs or {},
        cannot_show=cannot_show or {},
        expect=Expected(**expect),
    )


def failed(flow: str, error: str, *shows: str, **more: Any) -> Example:
    """An example of a flow that fails."""
    return example(flow, *shows, status="failed", error=error, **more)
