"""``airflow beluga show``: a flow, drawn in the terminal."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from airflow.configuration import conf
from rich.console import Console
from rich.text import Text

from beluga_airflow.config import Settings
from beluga_airflow.errors import BelugaError
from beluga_airflow.graph import Shape
from beluga_airflow.graph.locate import load_flow
from beluga_airflow.graph.picture import Box, drawn, readable
from beluga_airflow.graph.shape import Edge
from beluga_airflow.hooks.settings import settings_in_force

__all__ = ["draw", "show"]

NODES = {"function": "●", "decision": "◆", "flow": "■"}
# by the sides from which lines come: 1 above, 2 below, 4 left, 8 right
JOINTS = " ╵╷│╴╯╮┤╶╰╭├─┴┬┼"
IN_ASCII = str.maketrans("●◆■→" + JOINTS[1:], "o?#>" + "|||-+++-+++-+++")
COLUMN = 32
"""Characters: what is longer does not push the columns after it to the right in other rows."""


def show(arguments: Namespace) -> None:
    """Draw the flow at an import path, or print it as Mermaid text. Exits 1 with the reason when it cannot."""
    # behind all that is installed, which a file that lies around must not hide
    sys.path += ["", conf.get("core", "dags_folder")]
    try:
        flow, settings = load_flow(arguments.flow), settings_in_force()
    except BelugaError as error:
        sys.exit(f"beluga show: {error}")
    if arguments.mermaid:
        print(flow.to_mermaid(), end="")
    else:
        draw(flow.check(), Console(), settings)


def draw(shape: Shape, console: Console, settings: Settings | None = None) -> None:
    """Draw a checked flow as wide as the console is, with the characters that it has.

    Args:
        shape: of the flow.
        console: to draw on.
        settings: in force for what the flow leaves open; None: the defaults.
    """
    for line in _Drawing(shape, console, settings or Settings()).lines():
        line.rstrip()
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


@dataclass(frozen=True, kw_only=True)
class _Track:
    """What is beside one node: in its row, where more is told of it, where its edges lead off, and under that."""

    node: str
    beside: str = ""
    out: str | None = None
    under: str = ""


@dataclass(frozen=True)
class _Row:
    """A text with the lines left of it; ``below`` goes before what of it does not fit into one row."""

    lines: str
    below: str
    text: Text


class _Drawing:
    def __init__(self, shape: Shape, console: Console, settings: Settings) -> None:
        self._shape = shape
        self._settings = settings
        self._settled = settings.settle(shape)
        self._console = console
        self._in_ascii = console.options.ascii_only
        self._boxes, self._edges = drawn(shape)

    def lines(self) -> Iterator[Text]:
        yield from self._head()
        yield Text()
        for row in self._rows(self._boxes, self._console.width):
            room = max(20, self._console.width - len(row.lines))
            for number, text in enumerate(row.text.wrap(self._console, room)):
                yield Text(self._shown(row.below if number else row.lines)).append_text(text)
        yield Text()
        yield Text("* the default, since the flow does not say", style="dim")

    def _head(self) -> Iterator[Text]:
        shape, settled = self._shape, self._settled
        count = sum(step.kind != "flow" for step in shape.steps)
        yield Text.assemble((shape.flow, "bold"), f": a {shape.kind} of {_counted(count, 'step')}")
        durable = self._settings.settle(shape, durable=True).timeout
        elsewhere = f"; on Temporal {durable:g} s*" if durable != settled.timeout else ""
        yield Text(f"timeout {settled.time:g} s{'' if shape.timeout else '*'}{elsewhere}")
        workers = " (parallel=False)" if shape.parallel is False else "" if shape.max_workers else "*"
        if shape.kind == "graph" or shape.groups:
            yield Text(f"max_workers {settled.max_workers}{workers}")
        retries = self._settings.workflow.max_retries
        if retries is not None and any(step.retry is None for step in shape.steps):
            yield Text(f"attempts of a step on Temporal {retries + 1}*")

    def _rows(self, boxes: Sequence[Box], room: int) -> Iterator[_Row]:
        """Of the flow or of one nested flow, in so many columns."""
        edges = {box.path: [edge for edge in self._edges if edge.source == box.path] for box in boxes}
        tracks = _tracks(boxes, edges)
        width = max(len(part) for track in tracks for part in (track.node, track.out or "")) + 2
        too_wide = width > room // 2
        if too_wide:
            tracks, width = [_Track(node=NODES[box.step.kind]) for box in boxes], 3
        told = [self._told(box) for box in boxes]
        columns = [max(len(cell) * (len(cell) <= COLUMN) for cell in cells) for cells in zip(*told, strict=True)]
        for box, track, cells in zip(boxes, tracks, told, strict=True):
            beside, under = track.beside.ljust(width), track.under.ljust(width)
            yield _Row(track.node.ljust(width), beside, _lined_up(cells, columns))
            for row in self._rows(box.inner, room - width) if box.inner else ():
                yield _Row(beside + row.lines, beside + row.below, row.text)
            leads = self._leads(edges[box.path], every=too_wide)
            for out, text in zip_longest([] if track.out is None else [track.out], leads):
                yield _Row((out or track.under).ljust(width), under, text or Text(" "))

    def _told(self, box: Box) -> list[Text]:
        """The cells of a node's row: name, kind, timeout, attempts, and what is special."""
        own, settled = box.step, self._settled.by_name[box.step.name]
        special = ["join any"] * box.joins_any + ["undo"] * own.undo
        if group := box.group:
            limit = [] if group.max_workers is None else [f"max_workers {group.max_workers}"]
            order = ["parallel=False"] if group.parallel is False else []
            special = [f"{group.kind} {group.flow}", *limit, *order, *special]
            timeout, attempts = Text(f"{group.timeout:g} s" if group.timeout else ""), Text()
        else:
            timeout = _or_default(f"{settled.time:g} s", own.timeout is None)
            attempts = _or_default(_counted(settled.retries.maximum_attempts, "attempt"), own.retry is None)
        return [Text(box.name, "bold"), Text(own.kind), timeout, attempts, Text(", ".join(special), "cyan")]

    def _leads(self, edges: Sequence[Edge], *, every: bool) -> Iterator[Text]:
        """Where a node's edges lead: those with a condition, or every one."""
        always = [_name(edge.target) for edge in edges if every and not edge.when]
        if always:
            yield Text(self._shown(f"→ {', '.join(always)}"), "dim")
        for edge in edges:
            if edge.when:
                begin = self._shown(f"→ {_name(edge.target)} if ")
                yield Text.assemble((begin, "dim"), (self._shown(readable(edge.when)), "yellow"))

    def _shown(self, text: str) -> str:
        if self._in_ascii:
            text = text.translate(IN_ASCII)
        return text.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)


def _tracks(boxes: Sequence[Box], edges: Mapping[str, Sequence[Edge]]) -> list[_Track]:
    """The lines along the nodes, as `git log --graph` has them: one for each node that something leads to later."""
    order = {box.path: place for place, box in enumerate(boxes)}
    lines: list[str | None] = []
    tracks = []
    for box in boxes:
        at = lines.index(box.path) if box.path in lines else _free(lines)
        lines[at] = box.path
        before = [*lines]
        lines[at] = None
        targets = sorted({edge.target for edge in edges[box.path]}, key=order.__getitem__)
        for target in targets:
            if target not in lines:
                lines[at if lines[at] is None else _free(lines)] = target
        ends = {at, *map(lines.index, targets)}
        out = _joined(before, lines, ends) if targets else _along(lines)
        leads_off = len(ends) > 1 or lines[at] is None
        tracks.append(
            _Track(
                node=_along(before, {at: NODES[box.step.kind]}),
                beside=_along(before if targets else lines),
                out=out if leads_off and box is not boxes[-1] else None,
                under=_along(lines),
            )
        )
    return tracks


def _free(lines: list[str | None]) -> int:
    if None not in lines:
        lines.append(None)
    return lines.index(None)


def _along(lines: Sequence[str | None], nodes: Mapping[int, str] | None = None) -> str:
    signs = ((nodes or {}).get(place, "│" if line else " ") for place, line in enumerate(lines))
    return " ".join(signs).rstrip()


def _joined(before: Sequence[str | None], after: Sequence[str | None], ends: set[int]) -> str:
    """The row in which lines part and meet at ``ends``, behind the lines that they cross."""
    first, last = min(ends), max(ends)
    row = ""
    for place, line in enumerate(after):
        above = place < len(before) and before[place] is not None
        if place in ends:
            row += JOINTS[above + 2 * (line is not None) + 4 * (place > first) + 8 * (place < last)]
        else:
            row += "│" if line else "─" if first < place < last else " "
        row += "─" if first <= place < last else " "
    return row.rstrip()


def _lined_up(cells: Sequence[Text], columns: Sequence[int]) -> Text:
    row = Text()
    for cell, width in zip(cells, columns, strict=True):
        row.append_text(cell).append(" " * (max(0, width - len(cell)) + 2))
    row.rstrip()
    return row


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _or_default(value: str, is_default: bool) -> Text:
    return Text(f"{value}*", "dim") if is_default else Text(value)
