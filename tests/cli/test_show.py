"""`airflow beluga show`: what the terminal shows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from beluga_airflow import Chain, Decision, Graph, Retry
from beluga_airflow.cli.commands import get_commands
from beluga_airflow.cli.show import draw
from beluga_airflow.graph import Flow, Shape
from beluga_airflow.graph.shape import Edge, StepShape

ROOT = Path(__file__).resolve().parents[2]


def nothing(data: dict[str, Any]) -> None:
    return None


def shown(flow: Flow | Shape, *, width: int = 80, encoding: str = "utf-8", **options: Any) -> str:
    """What a terminal of this width gets to see."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="")
    draw(flow if isinstance(flow, Shape) else flow.check(), Console(file=file, width=width, **options))
    file.flush()
    return raw.getvalue().decode(encoding)


def drawing(flow: Flow | Shape, **options: Any) -> list[str]:
    """The rows between the head and the foot."""
    head, rows, foot = shown(flow, **options).split("\n\n", 1)[0], shown(flow, **options), "* the default"
    return rows.removeprefix(head).partition(f"\n\n{foot}")[0].strip("\n").split("\n")


def order_graph() -> Graph:
    graph = Graph("order-graph", max_workers=5)
    for name in ("validate", "check_inventory", "check_credit", "pay", "notify"):
        graph.add_node(name, nothing)
    graph.add_edge("validate", "check_inventory").add_edge("validate", "check_credit")
    graph.add_edge("check_inventory", "pay").add_edge("check_credit", "pay", when={"credit_ok": True})
    return graph.add_edge("pay", "notify")


def test_a_graph_is_drawn_with_its_branches_and_conditions() -> None:
    assert shown(order_graph()) == (
        "order-graph: a graph of 5 steps\n"
        "timeout 600 s*; on Temporal 3600 s*\n"
        "max_workers 5\n"
        "\n"
        "●    validate         function  60 s*  3 attempts*\n"
        "├─╮\n"
        "● │  check_inventory  function  60 s*  3 attempts*\n"
        "│ ●  check_credit     function  60 s*  3 attempts*\n"
        "├─╯  → pay if credit_ok=True\n"
        "●    pay              function  60 s*  3 attempts*\n"
        "●    notify           function  60 s*  3 attempts*\n"
        "\n"
        "* the default, since the flow does not say\n"
    )


def test_what_the_flow_says_is_told_from_the_defaults() -> None:
    chain = Chain("orders", timeout=90, retry=Retry(maximum_attempts=1)).add_step("a", nothing, timeout=2.5)
    chain.add_step("b", Decision("?", output_type=bool, reads=["x"]), retry=Retry(maximum_attempts=9))
    chain.add_step("c", nothing, compensate=nothing)

    assert shown(chain).splitlines() == [
        "orders: a chain of 3 steps",
        "timeout 90 s",
        "",
        "●  a  function  2.5 s  1 attempt",
        "◆  b  decision  60 s*  9 attempts",
        "●  c  function  60 s*  1 attempt   undo",
        "",
        "* the default, since the flow does not say",
    ]


@pytest.mark.parametrize(
    ("graph", "told"),
    [
        (Graph("g"), "max_workers 10*"),
        (Graph("g", max_workers=3), "max_workers 3"),
        (Graph("g", parallel=False, max_workers=3), "max_workers 1 (parallel=False)"),
    ],
)
def test_how_many_steps_run_at_once_is_told(graph: Graph, told: str) -> None:
    assert told in shown(graph.add_node("a", nothing)).splitlines()


def test_a_nested_flow_is_drawn_under_its_node() -> None:
    ship = Graph("shipping", max_workers=2).add_node("pack", nothing).add_node("label", nothing)
    ship.add_node("send", nothing, join="any").add_edge("pack", "send", when={"ok": 1}).add_edge("label", "send")
    graph = Graph("shop").add_node("start", nothing).add_node("ship", ship, join="any", timeout=20, compensate=nothing)
    graph.add_node("bill", nothing).add_node("done", nothing)
    graph.add_edge("start", "ship").add_edge("start", "bill").add_edge("ship", "done").add_edge("bill", "done")

    assert drawing(graph, width=100) == [
        "●    start  function  60 s*  3 attempts*",
        "├─╮",
        "■ │  ship   flow      20 s                graph shipping, max_workers 2, join any, undo",
        "│ │  ●    pack   function  60 s*  3 attempts*",
        "│ │  │    → send if ok=1",
        "│ │  │ ●  label  function  60 s*  3 attempts*",
        "│ │  ├─╯",
        "│ │  ●    send   function  60 s*  3 attempts*  join any",
        "│ ●  bill   function  60 s*  3 attempts*",
        "├─╯",
        "●    done   function  60 s*  3 attempts*",
    ]
    assert "shop: a graph of 6 steps\n" in shown(graph)


def test_lines_part_under_what_is_told_of_a_node() -> None:
    graph = Graph("g").add_node("ship", Chain("in").add_step("a", nothing)).add_node("b", nothing)
    graph.add_node("c", nothing).add_node("end", nothing).add_node("alone", Chain("in").add_step("a", nothing))
    graph.add_edge("ship", "b").add_edge("ship", "c").add_edge("b", "end")

    assert [row.partition("  f")[0] for row in drawing(graph)] == [
        "■    ship ",
        "│    ●  a",
        "├─╮",
        "● │  b    ",
        "│ ●  c    ",
        "│",
        "●    end  ",
        "",
        "■    alone",
        "     ●  a",
    ]


def lines_of(*edges: str, nodes: str) -> list[str]:
    """The lines alone."""
    graph = Graph("g")
    for name in nodes:
        graph.add_node(name, nothing)
    for edge in edges:
        graph.add_edge(edge[0], edge[1])
    return [row.partition("  function")[0] for row in drawing(graph)]


def test_lines_that_are_crossed_go_on() -> None:
    assert lines_of("ac", "ad", "bd", "be", "cf", "df", "ef", "ag", "eg", "fg", nodes="abcdefg") == [
        "●        a",
        "├─┬─╮",
        "│ │ │ ●  b",
        "│ ├─│─┤",
        "● │ │ │  c",
        "│ ● │ │  d",
        "├─╯ │ │",
        "│   │ ●  e",
        "├───┼─╯",
        "●   │    f",
        "╰───┤",
        "    ●    g",
    ]


def test_steps_with_nothing_between_them_are_not_drawn_as_a_chain() -> None:
    assert lines_of("bc", nodes="abc") == ["●  a", "", "●  b", "●  c"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_utf_8_gets_plain_signs(encoding: str) -> None:
    graph = order_graph().add_node("judge", Decision("?", output_type=bool, reads=["x"]))
    graph.add_edge("notify", "judge", when={"größe": "→ ●"}).add_node("nested", Chain("in").add_step("a", nothing))

    rows = drawing(graph, encoding=encoding)

    assert [row for row in rows if "attempts" not in row] == [
        "+-+",
        "+-+  > pay if credit_ok=True",
        "|    > judge if gr\\xf6\\xdfe='> o'" if encoding == "ascii" else "|    > judge if größe='> o'",
        "",
        "#    nested           flow                          chain in",
    ]
    assert rows[0].startswith("o    validate ")
    assert any(row.startswith("?    judge ") for row in rows)


@pytest.mark.parametrize("text", ["\x1b[31mred", "two\nlines", "[bold]x[/bold]", ":smile:", "x" * 5000])
def test_a_condition_is_shown_and_not_obeyed(text: str) -> None:
    graph = Graph("g").add_node("a", nothing).add_node("b", nothing).add_edge("a", "b", when={text: 1})

    seen = shown(graph, force_terminal=True, no_color=True, color_system=None)

    assert "\x1b[31m" not in seen
    assert len(seen.splitlines()) < 12
    assert seen.count("[bold]") == text.count("[bold]")
    assert seen.count(":smile:") == text.count(":smile:")


def test_a_terminal_gets_colours_and_a_pipe_none() -> None:
    assert "\x1b[" in shown(order_graph(), force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b" not in shown(order_graph())


def test_what_is_too_wide_is_told_in_words() -> None:
    graph = Graph("g").add_node("root", nothing)
    for number in range(30):
        graph.add_node(f"n{number}", nothing).add_edge("root", f"n{number}", when={"n": 7} if number == 7 else None)

    rows = drawing(graph)

    assert rows[0] == "●  root  function  60 s*  3 attempts*"
    assert rows[1].startswith("   → n0, n1, n2, ")
    assert rows[3] == "   → n7 if n=7"
    assert "│" in "".join(drawing(graph, width=200))


def test_long_names_are_broken_and_not_cut() -> None:
    long = "x" * 100
    rows = drawing(Chain("c").add_step("a", nothing).add_step(long, nothing))

    assert rows[0] == "●  a  function  60 s*  4 attempts*", "one long name does not push the others away"
    assert "".join(row.strip("● ") for row in rows[1:]).startswith(long)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    size = draw(st.integers(1, 9))
    names = [f"n{number}" for number in range(size)]
    edges = [(names[i], names[j]) for i in range(size) for j in range(i + 1, size) if draw(st.booleans())]
    return Shape(
        flow="g",
        kind="graph",
        steps=tuple(StepShape(name=name) for name in names),
        edges=tuple(Edge(source=source, target=target) for source, target in edges),
    )


LEFTWARDS, RIGHTWARDS, DOWNWARDS = "─┬┴┼╮╯┤", "─┬┴┼╭╰├", "│├┤┬┼╭╮"
"""The signs from which a line goes on to the left, to the right and down."""


def followed(rows: list[str]) -> set[tuple[str, str]]:
    """The edges that an eye finds: it goes sideways in the row under a step, and down until it meets one."""
    where = {(row.index("●"), y): row.split("  function")[0].split()[-1] for y, row in enumerate(rows) if "●" in row}

    def sign(x: int, y: int) -> str:
        return rows[y][x] if 0 <= y < len(rows) and 0 <= x < len(rows[y]) else " "

    def lines_off(x: int, y: int) -> Iterator[int]:
        yield x
        for way, onwards, back in ((1, RIGHTWARDS, LEFTWARDS), (-1, LEFTWARDS, RIGHTWARDS)):
            place = x
            while sign(place, y) in (onwards if place == x else f"{onwards}│"):
                place += way
                if sign(place, y) not in "│─":
                    assert sign(place, y) in back, "no line ends in the middle of nothing"
                    yield place

    def led_to(x: int, y: int) -> Iterator[str]:
        while (x, y) not in where and sign(x, y) in DOWNWARDS:
            y += 1
        if (x, y) in where:
            yield where[x, y]

    return {(name, end) for (x, y), name in where.items() for off in lines_off(x, y + 1) for end in led_to(off, y + 1)}


@given(shapes())
def test_the_lines_lead_where_the_edges_do(shape: Shape) -> None:
    assert followed(drawing(shape)) == {(edge.source, edge.target) for edge in shape.edges}


def command(*arguments: str) -> Namespace:
    (group,) = get_commands()
    (show,) = (each for each in group.subcommands if each.name == "show")
    parser = ArgumentParser()
    for argument in show.args:
        argument.add_to_parser(parser)
    parser.set_defaults(func=show.func)
    return parser.parse_args(arguments)


@pytest.fixture
def shop_flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the current directory, which only the command makes importable."""
    name = "flows_in_the_current_directory"
    (tmp_path / f"{name}.py").write_text(
        "from beluga_airflow import Chain, Graph\n"
        "good = Chain('good').add_step('a', lambda data: None)\n"
        "bad = Graph('bad', max_workers=0).add_node('', len).add_node('b', 7)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield name
    sys.modules.pop(name, None)


def test_a_flow_of_the_current_directory_is_shown(shop_flows: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = command(f"{shop_flows}:good")

    given.func(given)

    assert "●  a  function  60 s*  4 attempts*\n" in capsys.readouterr().out


def test_a_flow_is_printed_as_mermaid_text(shop_flows: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = command(f"{shop_flows}:good", "--mermaid")

    given.func(given)

    assert capsys.readouterr().out == 'flowchart TD\n    s1["a"]\n'


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", ["module 'flows_in_the_current_directory' has nothing of that name where a Chain or Graph is wanted"]),
        ("bad", ["3 faults", "max_workers is 0", "the step name ''", "step 'b': 7 is neither a function"]),
    ],
)
@pytest.mark.parametrize("options", [(), ("--mermaid",)])
def test_what_cannot_be_shown_is_told(shop_flows: str, name: str, words: list[str], options: tuple[str, ...]) -> None:
    given = command(f"{shop_flows}:{name}", *options)

    with pytest.raises(SystemExit) as ended:
        given.func(given)

    assert str(ended.value.code).startswith("beluga show: flow ")
    assert all(word in str(ended.value.code) for word in words)


def airflow(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`airflow beluga show` in a process of its own, with no module of this project's dags on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AIRFLOW_HOME": str(folder), "PYTHONIOENCODING": "utf-8"}
    environment["AIRFLOW__CORE__DAGS_FOLDER"] = str(ROOT / "dags")
    return subprocess.run(
        [Path(sys.executable).with_name("airflow"), "beluga", "show", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_flow_of_the_dags_folder_is_shown_to_a_pipe(tmp_path: Path) -> None:
    done = airflow(tmp_path, "orders.flows:order_graph")

    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "order-graph: a graph of 6 steps"), done.stderr
    assert "├─╯  → process_payment if credit_ok=True\n" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_process_ends_with_the_reason_alone(tmp_path: Path) -> None:
    done = airflow(tmp_path, "orders.flows")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "beluga show: 'orders.flows' is not the import path of a flow; write it as 'package.module:name'\n"
    )
