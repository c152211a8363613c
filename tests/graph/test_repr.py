"""What a person sees of an object in a log, a debugger or a failed assertion."""

from __future__ import annotations

from typing import Any

import pytest

from beluga_airflow import Chain, Decision, FlowResult, Graph, Retry, StepContext, Stop
from beluga_airflow.graph import Outcome

LONG = 4_000
LARGE: dict[str, Any] = {f"key{i}": {f"inner{j}": "x" * 500 for j in range(50)} for i in range(50)}


def nothing(data: dict[str, Any]) -> None:
    return None


def chain_of(size: int) -> Chain:
    chain = Chain("line")
    for number in range(size):
        chain.add_step(f"s{number}", nothing)
    return chain


def diamond() -> Graph:
    graph = Graph("shop").add_node("a", nothing).add_node("b", nothing).add_node("c", nothing)
    return graph.add_edge("a", "c").add_edge("b", "c", when={"ok": True})


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (chain_of(3), "Chain('line': s0 -> s1 -> s2)"),
        (Chain("line"), "Chain('line': no steps)"),
        (diamond(), "Graph('shop': a, b, c; a -> c, b -> c)"),
        (Graph("shop").add_node("a", nothing), "Graph('shop': a; no edges)"),
        (Chain("f").add_step(None, nothing), "Chain('f': None)"),  # type: ignore[arg-type]
        (diamond().check(), "Shape('shop', graph, 3 steps: a, b, c; a -> c, b -> c)"),
        (
            Chain("outer").add_step("ship", chain_of(2)).check(),
            "Shape('outer', chain, 3 steps: ship.s0, ship.s1, ship.result; "
            "ship.s0 -> ship.s1, ship.s0 -> ship.result, ship.s1 -> ship.result)",
        ),
        (
            Decision("How?", choices=["now", "later"], reads=("tier",), fallback=None),
            "Decision('How?', choices=['now', 'later'], reads=('tier',), fallback=None)",
        ),
        (Decision("Yes?", output_type=bool, reads=["x"]), "Decision('Yes?', output_type=<class 'bool'>, reads=['x'])"),
        (Decision(7), "Decision('7')"),  # type: ignore[arg-type]
        (Stop("out_of_stock"), "Stop(status='out_of_stock')"),
        (Stop("out_of_stock", {"product": 7}), "Stop(status='out_of_stock', data={'product': 7})"),
        (Outcome(output={}), "Outcome(output={})"),
        (Outcome(output={"x": 1}, taken=("b",)), "Outcome(output={'x': 1}, taken=('b',))"),
        (FlowResult(status="completed", data={"x": 1}), "FlowResult(status='completed', data={'x': 1})"),
        (
            FlowResult(status="failed", error="step 'b' failed: KeyError: 'x'", undone={"a": "undone"}),
            """FlowResult(status='failed', error="step 'b' failed: KeyError: 'x'", undone={'a': 'undone'})""",
        ),
    ],
    ids=str,
)
def test_what_is_small_is_told_whole(thing: object, text: str) -> None:
    assert repr(thing) == text


@pytest.mark.parametrize(
    ("thing", "beginning"),
    [
        (chain_of(500), "Chain('line': s0 -> s1 -> "),
        (chain_of(500).check(), "Shape('line', chain, 500 steps: s0, s1, "),
        (
            Decision("word " * 900, choices=[f"answer {n}" for n in range(999)], reads=["x"] * 999),
            "Decision('word word ",
        ),
        (Stop("halt", LARGE), "Stop(status='halt', data={'key0': {'inner0': 'xxxx"),
        (Outcome(output=LARGE, state=LARGE, taken=tuple("abcdefgh" * 99)), "Outcome(output={'key0': {'inner0': "),
        (
            FlowResult(status="failed", error="word " * 900, data=LARGE, steps=dict.fromkeys(LARGE, "skipped")),
            "FlowResult(status='failed', data={'key0': {'inner0': ",
        ),
        (
            StepContext(flow="f" * 100, step="s" * 100, idempotency_key="k" * 200, attempt=1, generation=0),
            f"StepContext(flow='{'f' * 100}', step=",
        ),
        (Retry(non_retryable=("KeyError",)), "Retry(maximum_attempts=3, "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_large_is_told_in_short(thing: object, beginning: str) -> None:
    assert repr(thing).startswith(beginning)
    assert len(repr(thing)) < LONG


def test_data_that_can_be_neither_true_nor_false_is_told() -> None:
    class Frame:
        def __bool__(self) -> bool:
            raise ValueError("neither")

        def __repr__(self) -> str:
            return "Frame(2 x 2)"

    assert repr(Stop("halt", Frame())) == "Stop(status='halt', data=Frame(2 x 2))"  # type: ignore[arg-type]
