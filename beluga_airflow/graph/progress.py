"""Where one run of a flow stands: the bookkeeping that every runtime's loop shares. Deterministic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from beluga_airflow.graph.outcome import FlowResult, Outcome
from beluga_airflow.graph.shape import Shape

__all__ = ["Progress"]


class Progress:
    """Which steps are done, which may start, and how the flow ended.

    Args:
        shape: settled, so that ``max_workers`` is a number.
        kept: outcomes of an earlier, lost run; those of steps the shape does not have are passed over.
    """

    def __init__(self, shape: Shape, kept: Mapping[str, Outcome] | None = None) -> None:
        self.shape = shape
        self.outcomes = {step: outcome for step, outcome in (kept or {}).items() if step in shape.order}
        self.failures: dict[str, str] = {}
        self.running: list[str] = []
        self._done: dict[str, tuple[str, ...]] = {step: outcome.taken for step, outcome in self.outcomes.items()}
        self._waiting: list[str] = []
        self._follow(None)

    @property
    def ending(self) -> bool:
        """Whether a step failed for good or stopped the flow: what runs may finish, nothing new starts."""
        return bool(self.failures) or any(outcome.stop for outcome in self.outcomes.values())

    def start(self) -> list[str]:
        """The steps to start now, in topological order; they count as running from here on."""
        if self.ending:
            self._waiting = []
        assert self.shape.max_workers is not None, "a settled shape has max_workers"
        free = self.shape.max_workers - len(self.running)
        steps, self._waiting = self._waiting[:free], self._waiting[free:]
        self.running += steps
        return steps

    def finish(self, ended: Mapping[str, Outcome | str]) -> None:
        """Take note of steps that ended: each with its outcome, or with the message of its failure."""
        for step in self._in_order(ended):
            self.running.remove(step)
            outcome = ended[step]
            if isinstance(outcome, str):
                self.failures[step] = outcome
            else:
                self.outcomes[step] = outcome
                self._done[step] = outcome.taken
                self._follow(step)

    def outputs_before(self, step: str) -> dict[str, dict[str, Any]]:
        """What the finished steps before ``step`` returned."""
        return {name: self.outcomes[name].output for name in self.shape.ancestors[step] if name in self.outcomes}

    @property
    def skipped_end(self) -> str | None:
        """The flow's only finish point, when it was skipped: its data must then be merged by the runtime."""
        finish = self.shape.finish
        ended_there = self.ending or len(finish) != 1 or finish[0] in self.outcomes
        return None if ended_there else finish[0]

    def result(self, state: dict[str, Any] | None = None) -> FlowResult:
        """How the flow ended. ``state``: the data before ``skipped_end``, where that is a step."""
        for step in self._in_order(self.failures):
            return self._result("failed", error=f"step {step!r} failed: {self.failures[step]}")
        for step in self._in_order(self.outcomes):
            outcome = self.outcomes[step]
            if outcome.stop:
                return self._result(outcome.stop, data=outcome.state)
        if self.skipped_end is not None:
            return self._result("completed", data=state)
        ends = {step: self.outcomes[step].state or {} for step in self.shape.finish if step in self.outcomes}
        single = len(self.shape.finish) == 1
        return self._result("completed", data=next(iter(ends.values())) if single else dict(ends))

    def timed_out(self) -> FlowResult:
        """The result when the flow's time is used up."""
        steps = ", ".join(repr(step) for step in self._in_order(self.running))
        where = f"in step {steps}" if steps else "between two steps"
        return self._result(
            "timed_out", error=f"flow {self.shape.flow!r} used up its timeout of {self.shape.timeout:g} s {where}"
        )

    def _follow(self, after: str | None) -> None:
        ready, skipped = self.shape.ready(self._done, after)
        self._done.update((step, ()) for step in skipped)
        self._waiting = self._in_order([*self._waiting, *ready])

    def _in_order(self, steps: Iterable[str]) -> list[str]:
        return sorted(steps, key=self.shape.order.__getitem__)

    def _result(self, status: str, *, data: dict[str, Any] | None = None, error: str | None = None) -> FlowResult:
        ends = {step: "completed" if step in self.outcomes else "skipped" for step in self._in_order(self._done)}
        ends.update(dict.fromkeys(self._in_order(self.failures), "failed"))
        decisions = {
            step: self.outcomes[step].decision or {}
            for step in self._in_order(self.outcomes)
            if self.outcomes[step].decision
        }
        return FlowResult(status=status, data=data or {}, error=error, steps=ends, decisions=decisions)
