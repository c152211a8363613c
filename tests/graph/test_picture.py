"""Pictures of flows; what Mermaid would make of the text is told by a strict reader of the few forms that we write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Chain, Graph
from beluga_airflow.graph import Flow, Shape
from beluga_airflow.graph.picture import Box, drawn, mermaid, readable
from beluga_airflow.graph.shape import Edge, StepShape
from tests.graph.random_flows import asked, flows, nothing

# a quote would end a label, `#...;` is an entity, and a colon is dangerous even inside of one
LABEL = r"(?P<label>(?:[A-Za-z0-9 _,=()'-]|#\d+;|<br/>)+)"
NODE = re.compile(rf'(?P<indent> +)(?P<id>s\d+)(?:\["{LABEL}"\]|{{{{"{LABEL.replace("label", "hexagon")}"}}}})')
SUBGRAPH = re.compile(rf'(?P<indent> +)subgraph (?P<id>s\d+)\["{LABEL}"\]')
END = re.compile(r"(?P<indent> +)end")
EDGE = re.compile(rf'    (?P<source>s\d+) -->(?:\|"{LABEL}"\|)? (?P<target>s\d+)')


@dataclass
class Picture:
    """What is read out of a Mermaid text, in terms of labels."""

    nodes: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    edges: list[tuple[str, str, str | None]] = field(default_factory=list)


def unescaped(label: str) -> str:
    return re.sub(r"#(\d+);", lambda entity: chr(int(entity[1])), label.replace("<br/>", "\n"))


def read(text: str) -> Picture:
    picture, ids, inside = Picture(), dict[str, str](), list[str]()
    assert text.isascii()
    assert text.endswith("\n")
    first, *lines = text.splitlines()
    assert first == "flowchart TD"
    for line in lines:
        indent = "    " * (len(inside) + 1)
        if edge := EDGE.fullmatch(line):
            assert not inside, "edges are outside of all subgraphs"
            label = None if edge["label"] is None else unescaped(edge["label"])
            picture.edges.append((ids[edge["source"]], ids[edge["target"]], label))
            continue
        if end := END.fullmatch(line):
            inside.pop()
            assert end["indent"] == "    " * (len(inside) + 1)
            continue
        found = SUBGRAPH.fullmatch(line) or NODE.fullmatch(line)
        assert found, f"not a line of Mermaid that we write: {line!r}"
        assert found["indent"] == indent
        assert found["id"] not in ids
        hexagon = found.groupdict().get("hexagon")
        name, _, marks = unescaped(hexagon or found["label"]).partition("\n")
        path = ".".join([*inside, name])
        ids[found["id"]] = path
        picture.nodes[path] = marks
        picture.kinds[path] = "flow" if found.re is SUBGRAPH else "decision" if hexagon else "function"
        if found.re is SUBGRAPH:
            inside.append(name)
    assert not inside, "every subgraph ends"
    return picture


def shipping() -> Graph:
    flow = Graph("shipping").add_node("pack", nothing).add_node("label", nothing, compensate=nothing)
    return flow.add_node("end", nothing, join="any").add_edge("pack", "end", when={"ok": 1}).add_edge("label", "end")


def shop() -> Graph:
    flow = Graph("shop").add_node("start", nothing).add_node("decide", asked())
    flow.add_node("ship", shipping(), join="any", compensate=nothing).add_node("done", nothing)
    flow.add_edge("start", "decide").add_edge("start", "ship", when={"fast": True})
    return flow.add_edge("decide", "ship").add_edge("ship", "done", when={"weight": 2})


def test_a_chain_is_drawn_downwards() -> None:
    chain = Chain("orders").add_step("validate", nothing).add_step("decide", asked()).add_step("pay", nothing)

    assert chain.to_mermaid() == (
        'flowchart TD\n    s1["validate"]\n    s2{{"decide"}}\n    s3["pay"]\n    s1 --> s2\n    s2 --> s3\n'
    )


def test_a_nested_flow_is_drawn_around_its_steps_and_its_end_is_not() -> None:
    assert shop().to_mermaid() == (
        "flowchart TD\n"
        '    s1["start"]\n'
        '    s2{{"decide"}}\n'
        '    subgraph s3["ship<br/>join any, undo"]\n'
        '        s4["pack"]\n'
        '        s5["label<br/>undo"]\n'
        '        s6["end<br/>join any"]\n'
        "    end\n"
        '    s7["done"]\n'
        '    s4 -->|"ok=1"| s6\n'
        "    s5 --> s6\n"
        "    s1 --> s2\n"
        '    s1 -->|"fast=True"| s3\n'
        "    s2 --> s3\n"
        '    s3 -->|"weight=2"| s7\n'
    )


def test_the_picture_is_read_as_it_was_meant() -> None:
    picture = read(shop().to_mermaid())

    assert picture.nodes == {
        "start": "",
        "decide": "",
        "ship": "join any, undo",
        "ship.pack": "",
        "ship.label": "undo",
        "ship.end": "join any",
        "done": "",
    }
    assert {path for path, kind in picture.kinds.items() if kind != "function"} == {"decide", "ship"}
    assert ("ship", "done", "weight=2") in picture.edges


def conditioned(*conditions: str | None, names: tuple[str, ...] = ()) -> Shape:
    """Steps in a row, with conditions between them."""
    names = names or tuple(f"s{number}" for number in range(len(conditions) + 1))
    steps = tuple(StepShape(name=name) for name in names)
    pairs = zip(names, names[1:], conditions, strict=False)
    edges = tuple(Edge(source=source, target=target, when=when) for source, target, when in pairs)
    return Shape(flow="f", kind="graph", steps=steps, edges=edges)


HOSTILE = [
    *('"', "'", "|", "<", ">", "]", "}}", "))", "#", ";", "&", "%%", "`", "\\", "\n", "\r", "\t", "$$", "°", "ü", "😀"),
    *("\ud800", "\x1b[31m", "\u202e", "\u2028", "#quot;", "&quot;", "#35;", "\\n", "end", "subgraph", "-->", "---"),
    *("%%{init: {}}%%", "style a:", "style :#", "classDef x:#;", "click s1", "<br/>", "<script>", "fa:fa-car", "__a__"),
    *("*", "_", "1. one", "- one", "=", "@{", "a"),
]
conditions = st.lists(st.sampled_from(HOSTILE) | st.characters(), min_size=1, max_size=9).map("".join)


@given(st.lists(conditions, min_size=1, max_size=4))
def test_no_condition_breaks_out_of_its_label(texts: list[str]) -> None:
    picture = read(mermaid(conditioned(*texts)))

    assert [label for _, _, label in picture.edges] == [readable(text) for text in texts]
    assert len(picture.nodes) == len(texts) + 1


def test_conditions_as_authors_write_them() -> None:
    flow = Graph("f")
    for name in "abcd":
        flow.add_node(name, nothing)
    flow.add_edge("a", "b", when={"note": 'say "hi" | <b>', "ok": True}).add_edge("b", "c", when=lambda output: True)
    flow.add_edge("c", "d", when={})

    text = flow.to_mermaid()

    assert "    s1 -->|\"note='say #34;hi#34; #124; #60;b#62;', ok=True\"| s2\n" in text
    assert '    s2 -->|"#60;lambda#62;"| s3\n' in text
    assert "    s3 --> s4\n" in text, "an empty mapping holds always"
    assert [label for _, _, label in read(text).edges] == ["note='say \"hi\" | <b>', ok=True", "<lambda>", None]


WORDS = (
    "end",
    "graph",
    "subgraph",
    "flowchart",
    "style",
    "class",
    "classDef",
    "click",
    "default",
    "linkStyle",
    "o",
    "x",
)


@pytest.mark.parametrize("names", [WORDS, ("a-", "a--b", "a-b", "_", "__init__", "1", "a_b")])
def test_steps_may_be_called_what_they_like(names: tuple[str, ...]) -> None:
    shape = conditioned(*[None] * (len(names) - 1), names=names)

    picture = read(mermaid(shape))

    assert list(picture.nodes) == list(names)
    assert picture.edges == [(edge.source, edge.target, None) for edge in shape.edges]


def test_underscores_at_the_ends_of_words_are_no_markdown() -> None:
    assert 's1["#95;_init_#95;"]' in mermaid(conditioned(names=("__init__",)))
    assert 's1["check_stock"]' in mermaid(conditioned(names=("check_stock",)))


@given(st.text(st.characters(), max_size=300) | conditions)
def test_a_readable_condition_is_one_line_of_bounded_length(text: str) -> None:
    told = readable(text)

    assert told.isprintable()
    assert len(told) <= 120
    assert told == text or not text.isprintable() or (len(text) > 120 and told.endswith("..."))


def boxes_in(boxes: tuple[Box, ...]) -> Iterator[Box]:
    for box in boxes:
        yield box
        yield from boxes_in(box.inner)


def as_written(flow: Flow, inside: str = "") -> tuple[dict[str, Any], set[Edge]]:
    """Nodes and edges as the author gave them, with the paths they have in the whole."""
    steps, links = flow.definition
    nodes: dict[str, Any] = {f"{inside}{step.name}": step for step in steps}
    edges = {Edge(source=f"{inside}{one.source}", target=f"{inside}{one.target}", when=one.text) for one in links}
    for step in steps:
        if isinstance(step.node, Flow):
            inner, between = as_written(step.node, f"{inside}{step.name}.")
            nodes |= inner
            edges |= between
    return nodes, edges


@given(flows())
def test_what_is_drawn_is_what_the_author_wrote(flow: Flow) -> None:
    nodes, edges = as_written(flow)
    led_to = {edge.target for edge in edges}

    boxes, arrows = drawn(flow.check())

    found = {box.path: box for box in boxes_in(boxes)}
    assert found.keys() == nodes.keys()
    assert len(arrows) == len(edges)
    assert set(arrows) == edges
    for path, box in found.items():
        assert (box.group is not None) is isinstance(nodes[path].node, Flow)
        assert box.joins_any is (nodes[path].join == "any" and path in led_to)
        assert box.step.undo is (nodes[path].compensate is not None)
        assert box.name == nodes[path].name


@given(flows())
def test_nodes_are_drawn_after_those_that_lead_to_them(flow: Flow) -> None:
    boxes, arrows = drawn(flow.check())

    order = [box.path for box in boxes_in(boxes)]
    assert all(order.index(arrow.source) < order.index(arrow.target) for arrow in arrows)


@given(flows())
def test_the_mermaid_text_says_all_that_is_drawn(flow: Flow) -> None:
    boxes, arrows = drawn(flow.check())

    picture = read(flow.to_mermaid())

    assert picture.kinds == {box.path: box.step.kind for box in boxes_in(boxes)}
    assert picture.edges == [(arrow.source, arrow.target, arrow.when) for arrow in arrows]
    assert {path: "join any" in marks for path, marks in picture.nodes.items()} == {
        box.path: box.joins_any for box in boxes_in(boxes)
    }
    assert {path: "undo" in marks for path, marks in picture.nodes.items()} == {
        box.path: box.step.undo for box in boxes_in(boxes)
    }


@given(flows())
def test_one_flow_gives_one_text(flow: Flow) -> None:
    shape = flow.check()

    assert mermaid(shape) == mermaid(Shape.from_json(shape.to_json())) == flow.to_mermaid()
