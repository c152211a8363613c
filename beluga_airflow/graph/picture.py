"""A flow as a picture: what its author drew, and a Mermaid flowchart of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from beluga_airflow.graph.shape import RESULT, Edge, GroupShape, Shape, StepShape

__all__ = ["Box", "drawn", "mermaid", "readable"]

LABEL_LENGTH = 120
"""Characters of a condition that are shown."""

# Mermaid's one escape is an entity, and it sees no markdown in that. A colon must be one as well: Mermaid takes away
# the last semicolon of "style ...: ...#...;", wherever that stands.
_UNSAFE = re.compile(r"[^\w ,=()'-]|\b_|_\b", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Box:
    """A node as its author sees it: a step, or a nested flow with all that is in it.

    Args:
        path: of the node.
        step: itself, or the step that ends the nested flow.
        group: the nested flow.
        inner: what is in it, in topological order.
        joins_any: whether one of the edges into it is enough.
    """

    path: str
    step: StepShape
    group: GroupShape | None = None
    inner: tuple[Box, ...] = ()
    joins_any: bool = False

    @property
    def name(self) -> str:
        """Its name in the flow that it is a node of."""
        return self.path.rpartition(".")[2]


def drawn(shape: Shape) -> tuple[tuple[Box, ...], tuple[Edge, ...]]:
    """The nodes of the flow in topological order, and all edges between nodes, those inside of nested flows too.

    The steps that end nested flows are left out: edges lead into and out of the nested flow itself.
    """
    edges, joining = dict[Edge, None](), set[str]()
    for edge in shape.edges:
        if shape.by_name[edge.target].kind != "flow":
            source = edge.source.removesuffix(f".{RESULT}")
            target = _as_seen_from(source, edge.target, shape)
            edges[Edge(source=source, target=target, when=edge.when)] = None
            if shape.by_name[edge.target].join == "any":
                joining.add(target)
    groups = {group.path: group for group in shape.groups}

    def boxes(steps: Iterable[StepShape], inside: str) -> Iterator[Box]:
        steps = [step for step in steps if step.name.startswith(inside)]
        for path in dict.fromkeys(inside + step.name.removeprefix(inside).partition(".")[0] for step in steps):
            if path in groups:
                inner = tuple(boxes(steps, f"{path}."))
                end = shape.by_name[f"{path}.{RESULT}"]
                yield Box(path=path, step=end, group=groups[path], inner=inner, joins_any=path in joining)
            elif shape.by_name[path].kind != "flow":
                yield Box(path=path, step=shape.by_name[path], joins_any=path in joining)

    return tuple(boxes(shape.steps, "")), tuple(edges)


def _as_seen_from(source: str, target: str, shape: Shape) -> str:
    """The step, or the outermost nested flow around it that ``source`` is not in."""
    outside = (group.path for group in shape.around[target] if not source.startswith(f"{group.path}."))
    return next(outside, target)


def mermaid(shape: Shape) -> str:
    """A Mermaid flowchart of a checked flow: decisions are hexagons, nested flows are boxes around their steps."""
    boxes, edges = drawn(shape)
    ids: dict[str, str] = {}
    lines = ["flowchart TD", *_nodes(boxes, ids, "    ")]
    for edge in edges:
        label = f'|"{_escaped(edge.when)}"|' if edge.when else ""
        lines.append(f"    {ids[edge.source]} -->{label} {ids[edge.target]}")
    return "\n".join(lines) + "\n"


def _nodes(boxes: Iterable[Box], ids: dict[str, str], indent: str) -> Iterator[str]:
    for box in boxes:
        # numbers, since a step's name may be a word of Mermaid's
        ids[box.path] = f"s{len(ids) + 1}"
        label = _label(box)
        if box.group is not None:
            yield f'{indent}subgraph {ids[box.path]}["{label}"]'
            yield from _nodes(box.inner, ids, f"{indent}    ")
            yield f"{indent}end"
        elif box.step.kind == "decision":
            yield f'{indent}{ids[box.path]}{{{{"{label}"}}}}'
        else:
            yield f'{indent}{ids[box.path]}["{label}"]'


def _label(box: Box) -> str:
    marks = ["join any"] * box.joins_any + ["undo"] * box.step.undo
    return "<br/>".join([_escaped(box.name), *([", ".join(marks)] if marks else [])])


def _escaped(text: str) -> str:
    return _UNSAFE.sub(lambda unsafe: f"#{ord(unsafe[0])};", readable(text))


def readable(condition: str) -> str:
    """The text of a condition on one line, of at most 120 characters, all of which can be shown."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in condition)
    return text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 3]}..."
