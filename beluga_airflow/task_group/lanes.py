"""Ordering edges: Airflow has no cap for a group, so a flow's cap becomes edges between its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from beluga_airflow.graph import Shape

__all__ = ["ordering_edges"]

Before = dict[str, set[str]]
"""All steps before each step, by the flow's edges and by those that were added."""


def ordering_edges(shape: Shape, *, pooled: bool) -> list[tuple[str, str]]:
    """The edges to add, as pairs of steps, so that no more steps can run at once than the flow allows.

    The steps are put into as many lanes as may run at once, one after the other in each. No edge is added where the
    flow's own are enough. All follow the topological order, so they never close a circle.

    Args:
        shape: settled.
        pooled: a pool is the cap: only flows with ``parallel=False`` are ordered.
    """
    before: Before = {step: set(names) for step, names in shape.ancestors.items()}
    steps = list(shape.order)
    added: list[tuple[str, str]] = []
    # the inner ones first: their edges may be enough for the outer ones
    for group in reversed(shape.groups):
        inside = [step for step in steps if group in shape.around[step]]
        added += _lanes(inside, _cap(group.parallel, group.max_workers, pooled), before)
    return added + _lanes(steps, _cap(shape.parallel, shape.max_workers, pooled), before)


def _cap(parallel: bool | None, max_workers: int | None, pooled: bool) -> int | None:
    return 1 if parallel is False else None if pooled else max_workers


def _lanes(steps: Sequence[str], cap: int | None, before: Before) -> list[tuple[str, str]]:
    if cap is None or len(steps) <= cap or _widest(steps, before) <= cap:
        return []
    added = []
    last: list[str] = []  # of each lane
    for step in steps:
        behind = [lane for lane, name in enumerate(last) if name in before[step]]
        if behind:
            # the nearest one: the others stay open to steps that nearer ones do not precede
            lane = max(behind, key=lambda lane: len(before[last[lane]]))
        elif len(last) < cap:
            last.append(step)
            continue
        else:
            # the one that is likely to be free first
            lane = min(range(cap), key=lambda lane: len(before[last[lane]]))
            added.append((last[lane], step))
            _put_behind(last[lane], step, before)
        last[lane] = step
    return added


def _put_behind(first: str, step: str, before: Before) -> None:
    new = before[first] | {first}
    for name, names in before.items():
        if name == step or step in names:
            names |= new


def _widest(steps: Sequence[str], before: Mapping[str, set[str]]) -> int:
    """How many of the steps can run at once: as many as the fewest lanes that need no edge (Dilworth)."""
    after = {step: [name for name in steps if step in before[name]] for step in steps}
    next_of: dict[str, str] = {}
    previous_of: dict[str, str] = {}
    return len(steps) - sum(_has_place(step, after, next_of, previous_of) for step in steps)


def _has_place(
    step: str, after: Mapping[str, Sequence[str]], next_of: dict[str, str], previous_of: dict[str, str]
) -> bool:
    """Find a step that can come next in the lane of ``step``, moving others to other lanes where that helps."""
    came_from: dict[str, str] = {}
    waiting = [step]
    for name in waiting:
        for candidate in after[name]:
            if candidate in came_from:
                continue
            came_from[candidate] = name
            if candidate in previous_of:
                waiting.append(previous_of[candidate])
                continue
            follower: str | None = candidate
            while follower is not None:
                leader = came_from[follower]
                moved = next_of.get(leader)
                next_of[leader], previous_of[follower] = follower, leader
                follower = moved
            return True
    return False
