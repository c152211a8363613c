"""What a run of a flow leaves for one that goes on behind its finished steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from beluga_airflow.graph.outcome import Outcome
from beluga_airflow.graph.shape import Shape

__all__ = ["EarlierRun"]


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """An earlier run of a flow.

    Args:
        fingerprint: of its shape.
        inputs: its input, JSON.
        scope: of its identity.
        outcomes: of its finished steps.
        undone: the steps that were to be undone afterwards: ``undone``, or why nobody knows whether they were.
    """

    fingerprint: str
    inputs: dict[str, Any]
    scope: str
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    undone: Mapping[str, str] = field(default_factory=dict)

    @property
    def doubtful(self) -> dict[str, str]:
        """The steps of which nobody knows whether they were undone, each with why."""
        return {step: how for step, how in self.undone.items() if how != "undone"}

    def kept(self, shape: Shape, again: str) -> dict[str, Outcome]:
        """The outcomes that stand when the flow is run again from a step.

        They are those of the steps that do not follow from one that runs again. These are the step itself; what was, or
        may have been, undone; what stopped the flow, and would stop this run before it began; what has a fault.

        Args:
            shape: of the flow, the same as this run's.
            again: the step, or a nested flow's node.
        """
        unsound = [
            step for step, outcome in self.outcomes.items() if outcome.stop is not None or outcome.fault is not None
        ]
        runs = shape.rerun_from(again).union(*map(shape.rerun_from, [*self.undone, *unsound]))
        return {step: outcome for step, outcome in self.outcomes.items() if step not in runs}

    def to_json(self) -> dict[str, Any]:
        """This as JSON."""
        outcomes = {step: outcome.to_json() for step, outcome in self.outcomes.items()}
        return {
            "fingerprint": self.fingerprint,
            "inputs": self.inputs,
            "scope": self.scope,
            "outcomes": outcomes,
            "undone": dict(self.undone),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What ``to_json`` wrote."""
        outcomes = {step: Outcome.from_json(outcome) for step, outcome in data["outcomes"].items()}
        return cls(**{**data, "outcomes": outcomes})
