"""A flow as a node of a flow: its steps are laid into the outer flow, under path names.

The steps of a nested flow ``ship`` are called ``ship.pack``, ``ship.label``, ...; edges into it lead to its entry
points. One step of ours, ``ship.result``, comes after its finish points and stands for it in the edges out of it, so
that no runtime needs to know of nesting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from beluga_airflow.graph.flow import Flow
from beluga_airflow.graph.parts import Definition, Link, Reducer, Step
from beluga_airflow.graph.shape import RESULT, GroupShape

__all__ = ["laid_flat"]


def laid_flat(flow: Flow) -> Definition:
    """The definition of a flow, with the (checked) flows inside it laid into it."""
    steps: list[Step] = []
    links: list[Link] = []
    groups: list[GroupShape] = []
    reducers: dict[str, Mapping[str, Reducer]] = {"": flow.reducers}
    inner = {step.name: step.node for step in flow.definition[0] if isinstance(step.node, Flow)}
    for step in flow.definition[0]:
        if step.name not in inner:
            steps.append(step)
            continue
        nested = inner[step.name]
        steps += _steps_of(step, nested)
        links += _links_of(step.name, nested)
        groups += _groups_of(step, nested)
        for path, by_key in nested.flat.reducers.items():
            reducers[f"{step.name}.{path}".rstrip(".")] = by_key
    for link in flow.definition[1]:
        source = f"{link.source}.{RESULT}" if link.source in inner else link.source
        node = inner.get(link.target)
        targets = [link.target] if node is None else [f"{link.target}.{entry}" for entry in _entries(node)]
        links += (replace(link, source=source, target=target) for target in targets)
    return Definition(steps=tuple(steps), links=tuple(links), groups=tuple(groups), reducers=reducers)


def _steps_of(outer: Step, node: Flow) -> Iterable[Step]:
    entries = _entries(node)
    retry = outer.retry or node.retry
    for step in node.flat.steps:
        yield replace(
            step,
            name=f"{outer.name}.{step.name}",
            retry=step.retry or retry,
            join=outer.join if step.name in entries else step.join,
        )
    # "any": it runs whenever the nested flow did, whichever of its finish points were skipped
    yield Step(
        name=f"{outer.name}.{RESULT}",
        node=None,
        join="any",
        retry=outer.retry,
        provides=outer.provides,
        compensate=outer.compensate,
    )


def _links_of(path: str, node: Flow) -> Iterable[Link]:
    for link in node.flat.links:
        yield replace(link, source=f"{path}.{link.source}", target=f"{path}.{link.target}")
    ends = [step.name for step in node.flat.steps if not node.flat.links_from[step.name]]
    for name in dict.fromkeys((*_entries(node), *ends)):
        yield Link(source=f"{path}.{name}", target=f"{path}.{RESULT}")


def _groups_of(outer: Step, node: Flow) -> Iterable[GroupShape]:
    yield GroupShape(
        path=outer.name,
        flow=node.name,
        kind=node.kind,
        parallel=node.parallel,
        max_workers=node.max_workers,
        timeout=outer.timeout or node.timeout,
    )
    for group in node.flat.groups:
        yield replace(group, path=f"{outer.name}.{group.path}")


def _entries(node: Flow) -> list[str]:
    targets = {link.target for link in node.flat.links}
    return [step.name for step in node.flat.steps if step.name not in targets]
