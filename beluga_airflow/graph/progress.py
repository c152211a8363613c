"""Where one run of a flow stands: the bookkeeping that every runtime's loop shares. Deterministic."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from beluga_airflow.graph.outcome import FlowResult, Outcome
from beluga_airflow.graph.shape import RESULT, GroupShape, Shape

__all__ = ["IN_FLIGHT", "Progress"]

IN_FLIGHT = "it ran when the flow ended, and may have done its work: see whether it did"
"""Why a step that was cut off could not be undone."""


class Progress:
    """Which steps are done, which may start, how the flow ended, and what was undone then.

    Args:
        shape: settled, so that ``max_workers`` is a number.
        kept: outcomes of an earlier, lost run; those of steps the shape does not have are passed over.
    """

    def __init__(self, shape: Shape, kept: Mapping[str, Outcome] | None = None) -> None:
        self.shape = shape
        self.outcomes = {step: outcome for step, outcome in (kept or {}).items() if step in shape.order}
        self.outputs = {step: outcome.output for step, outcome in self.outcomes.items()}
        self.failures = {step: outcome.fault for step, outcome in self.outcomes.items() if outcome.fault}
        self.running: list[str] = []
        self.undone: dict[str, str | None] = {}
        self._stopped = any(outcome.stop for outcome in self.outcomes.values())
        self._done: dict[str, tuple[str, ...]] = {
            step: outcome.taken for step, outcome in self.outcomes.items() if not outcome.fault
        }
        self._waiting: list[str] = []
        self._begun: list[GroupShape] = []
        assert shape.max_workers is not None, "a settled shape has max_workers"
        self._free = shape.max_workers
        self._free_in = {group.path: group.max_workers for group in shape.groups if group.max_workers is not None}
        if self.outcomes:
            self._follow(None)
        else:
            self._waiting = [*shape.entries]

    @property
    def ending(self) -> bool:
        """Whether a step failed for good or stopped the flow: what runs may finish, nothing new starts."""
        return self._stopped or bool(self.failures)

    def start(self) -> list[str]:
        """The steps to start now, in topological order; they count as running from here on."""
        waiting, self._waiting = self._waiting, []
        if self.ending:
            # the end of a nested flow whose steps are done is nothing new: without it the flow could not be undone
            waiting = [step for step in waiting if self.shape.by_name[step].kind == "flow"]
        if not waiting:
            return []
        if len(waiting) <= self._free and not self._free_in:
            started = waiting
            self._free -= len(started)
        else:
            started = [step for step in waiting if self._has_taken_room(step)]
            self._waiting = [step for step in waiting if step not in started]
        self.running += started
        return started

    def begun(self) -> list[GroupShape]:
        """The nested flows with a timeout whose first step has started since this was last asked."""
        running = [group for step in self.running for group in self.shape.around[step] if group.timeout is not None]
        new = [group for group in dict.fromkeys(running) if group not in self._begun]
        self._begun += new
        return new

    def finish(self, ended: Mapping[str, Outcome | str]) -> None:
        """Take note of steps that ended: each with its outcome, or with the message of its failure."""
        for step in self._in_order(ended):
            self.end(step, ended[step])

    def end(self, step: str, outcome: Outcome | str) -> None:
        """Take note of one step that ended: with its outcome, or with the message of its failure."""
        self.running.remove(step)
        self._free += 1
        if self._free_in:
            self._give_room(step)
        if isinstance(outcome, str):
            self.failures[step] = outcome
            return
        self.outcomes[step] = outcome
        self.outputs[step] = outcome.output
        if outcome.fault is not None:
            self.failures[step] = outcome.fault  # what follows is not skipped: nobody can say
            return
        if outcome.stop is not None:
            self._stopped = True
        self._done[step] = outcome.taken
        self._follow(step)

    @property
    def ends(self) -> dict[str, str]:
        """How each step ended that did: ``completed``, ``skipped`` or ``failed``."""
        ends = {step: "completed" if step in self.outcomes else "skipped" for step in self._in_order(self._done)}
        return ends | dict.fromkeys(self._in_order(self.failures), "failed")

    def outputs_before(self, step: str) -> dict[str, dict[str, Any]]:
        """What the finished steps before ``step`` returned."""
        return {name: self.outputs[name] for name in self.shape.ancestors[step] if name in self.outputs}

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
        for step in self._in_order(self.outcomes) if self._stopped else ():
            outcome = self.outcomes[step]
            if outcome.stop:
                return self._result(outcome.stop, data=outcome.state)
        if self.skipped_end is not None:
            return self._result("completed", data=state)
        ends = {step: self.outcomes[step].state or {} for step in self.shape.finish if step in self.outcomes}
        if len(self.shape.finish) == 1:
            return self._result("completed", data=next(iter(ends.values())))
        # a nested flow is known by its node's name
        return self._result("completed", data={step.removesuffix(f".{RESULT}"): data for step, data in ends.items()})

    def timed_out(self, group: GroupShape | None = None, running: Collection[str] | None = None) -> FlowResult:
        """The result when the flow's time is used up, or that of a nested one.

        Args:
            group: the nested flow.
            running: the steps that ran then, where they have ended since.
        """
        within = self._in_order(self.running if running is None else running)
        late = [step for step in within if group is None or group in self.shape.around[step]]
        flow, timeout = (self.shape.flow, self.shape.timeout) if group is None else (group.flow, group.timeout)
        where = f"in step {', '.join(map(repr, late))}" if late else "between two steps"
        return self._result("timed_out", error=f"flow {flow!r} used up its timeout of {timeout:g} s {where}")

    def closed(self, group: GroupShape) -> bool:
        """Whether a nested flow has ended."""
        return f"{group.path}.{RESULT}" in self._done

    def cut_off(self, steps: Collection[str]) -> None:
        """Take note of steps that ran when the flow ended: of those that can be undone nobody knows what they did."""
        for step in self._in_order(steps):
            if self.shape.by_name[step].undo and step not in self.outcomes:
                self.undone[step] = IN_FLIGHT

    @property
    def to_undo(self) -> list[str]:
        """The finished steps that can be undone and are not yet, the last one first."""
        finished = [step for step in self._in_order(self.outcomes) if self.shape.by_name[step].undo]
        return [step for step in reversed(finished) if step not in self.undone]

    def after_undoing(self, result: FlowResult) -> FlowResult:
        """``result`` with what was undone after it, and what could not be."""
        undone = {step: "undone" if error is None else error for step, error in self.undone.items()}
        left = [f"step {step!r} could not be undone: {error}" for step, error in self.undone.items() if error]
        return replace(result, undone=undone, error="; ".join([*filter(None, [result.error]), *left]) or None)

    def _has_taken_room(self, step: str) -> bool:
        capped = self._caps_of(step)
        if self._free < 1 or any(self._free_in[path] < 1 for path in capped):
            return False
        self._free -= 1
        for path in capped:
            self._free_in[path] -= 1
        return True

    def _give_room(self, step: str) -> None:
        for path in self._caps_of(step):
            self._free_in[path] += 1

    def _caps_of(self, step: str) -> Iterable[str]:
        if not self._free_in:
            return ()
        return [group.path for group in self.shape.around[step] if group.path in self._free_in]

    def _follow(self, after: str | None) -> None:
        ready, skipped = self.shape.ready(self._done, after)
        for step in skipped:
            self._done[step] = ()
        if self._waiting:
            self._waiting = [*self._in_order([*self._waiting, *ready])]
        else:
            self._waiting = ready

    def _in_order(self, steps: Collection[str]) -> Collection[str]:
        return steps if len(steps) < 2 else sorted(steps, key=self.shape.order.__getitem__)

    def _result(self, status: str, *, data: dict[str, Any] | None = None, error: str | None = None) -> FlowResult:
        decided = [(step, self.outcomes[step].decision) for step in self._in_order(self.outcomes)]
        decisions = {step: record for step, record in decided if record}
        return FlowResult(status=status, data=data or {}, error=error, steps=self.ends, decisions=decisions)
