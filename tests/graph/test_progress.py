from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow.graph import Outcome, Shape
from beluga_airflow.graph.progress import Progress
from beluga_airflow.graph.shape import Edge, StepShape


def shape_of(*edges: str, nodes: str = "abcd", max_workers: int = 10) -> Shape:
    return Shape(
        flow="g",
        kind="graph",
        steps=tuple(StepShape(name=name) for name in nodes),
        edges=tuple(Edge(source=edge[0], target=edge[1]) for edge in edges),
        max_workers=max_workers,
        timeout=5.0,
    )


def outcome(taken: str = "", **more: Any) -> Outcome:
    return Outcome(output=more.pop("output", {}), taken=tuple(taken), **more)


DIAMOND = ("ab", "ac", "bd", "cd")


@st.composite
def flows(draw: st.DrawFn) -> tuple[Shape, dict[str, Outcome]]:
    size = draw(st.integers(1, 8))
    names = [f"s{number}" for number in range(size)]
    edges = [(names[i], names[j]) for i in range(size) for j in range(i + 1, size) if draw(st.booleans())]
    shape = Shape(
        flow="g",
        kind="graph",
        steps=tuple(StepShape(name=name, join=draw(st.sampled_from(["all", "any"]))) for name in names),
        edges=tuple(Edge(source=source, target=target) for source, target in edges),
        max_workers=draw(st.integers(1, 4)),
    )
    outcomes = {
        name: Outcome(
            output={name: 1},
            taken=tuple(target for source, target in edges if source == name and draw(st.integers(0, 4)) > 0),
            state={"at": name},
        )
        for name in names
    }
    return shape, outcomes


def played(
    shape: Shape, ends: Mapping[str, Outcome | str], data: st.DataObject, kept: Mapping[str, Outcome] | None = None
) -> tuple[Progress, list[str]]:
    """A run in which steps end in an order that hypothesis chooses, several at a time."""
    assert shape.max_workers is not None
    progress = Progress(shape, kept)
    started: list[str] = []
    while True:
        now = progress.start()
        started += now
        assert len(progress.running) <= shape.max_workers
        assert all(source not in progress.running for step in now for source in shape.sources[step])
        if not progress.running:
            return progress, started
        some = data.draw(st.sets(st.sampled_from(progress.running), min_size=1))
        progress.finish({step: ends[step] for step in some})


@given(flows(), st.data())
def test_every_step_starts_once_or_is_skipped_whoever_ends_first(
    flow: tuple[Shape, dict[str, Outcome]], data: st.DataObject
) -> None:
    shape, outcomes = flow
    runs: dict[str, bool] = {}
    for step in shape.steps:
        taken = [runs[s] and step.name in outcomes[s].taken for s in shape.sources[step.name]]
        runs[step.name] = not taken or (any(taken) if step.join == "any" else all(taken))

    progress, started = played(shape, outcomes, data)

    assert sorted(started) == sorted(name for name, ran in runs.items() if ran)
    result = progress.result({"at": "skipped"})
    assert result.status == "completed"
    assert result.steps == {name: "completed" if ran else "skipped" for name, ran in runs.items()}
    assert list(result.steps) == list(shape.order)


@given(flows(), st.data())
def test_the_result_does_not_depend_on_who_ends_first(
    flow: tuple[Shape, dict[str, Outcome]], data: st.DataObject
) -> None:
    shape, outcomes = flow

    one, _ = played(shape, outcomes, data)
    other, _ = played(replace(shape, max_workers=1), outcomes, data)

    assert one.result({}) == other.result({})


@given(flows(), st.data())
def test_a_lost_run_goes_on_behind_what_was_kept(flow: tuple[Shape, dict[str, Outcome]], data: st.DataObject) -> None:
    shape, outcomes = flow
    whole, started = played(shape, outcomes, data)
    # any moment of it: what had ended before a step had ended before the step
    kept_steps = [step for step in started if data.draw(st.booleans())]
    kept = {
        step: outcomes[step]
        for step in kept_steps
        if all(source in kept_steps or source not in started for source in shape.ancestors[step])
    }

    again, started_again = played(shape, outcomes, data, kept)

    assert sorted(started_again) == sorted(set(started) - set(kept))
    assert again.result({}) == whole.result({})


@given(flows(), st.data())
def test_after_a_failure_nothing_new_starts(flow: tuple[Shape, dict[str, Outcome]], data: st.DataObject) -> None:
    shape, outcomes = flow
    failing = data.draw(st.sampled_from(list(outcomes)))
    progress = Progress(shape)

    while progress.start() or progress.running:
        step = data.draw(st.sampled_from(progress.running))
        progress.finish({step: "Broken: it broke" if step == failing else outcomes[step]})
        if step == failing:
            beside = set(progress.running)
            assert progress.start() == []
            progress.finish({name: outcomes[name] for name in beside})
            assert progress.start() == []
            assert progress.result().status == "failed"
            assert progress.result().error == f"step {failing!r} failed: Broken: it broke"
            assert beside <= {name for name, end in progress.result().steps.items() if end == "completed"}
            assert progress.result().data == {}
            return


def test_one_worker_takes_steps_in_topological_order() -> None:
    progress = Progress(shape_of(*DIAMOND, max_workers=1))
    started = []
    while now := progress.start():
        started += now
        progress.finish({now[0]: outcome("bcd")})

    assert started == ["a", "b", "c", "d"]


def test_waiting_steps_are_taken_by_their_place_and_not_by_their_turn() -> None:
    # e becomes ready first, but b and c stand before it
    shape = shape_of("ab", "ac", nodes="abcde", max_workers=2)
    progress = Progress(shape)
    assert progress.start() == ["a", "d"]

    progress.finish({"a": outcome("bc")})

    assert progress.start() == ["b"]
    progress.finish({"d": outcome()})
    assert progress.start() == ["c"]


def test_a_stop_lets_running_steps_end_and_starts_nothing() -> None:
    progress = Progress(shape_of(*DIAMOND))
    progress.start()
    progress.finish({"a": outcome("bc")})
    assert progress.start() == ["b", "c"]

    progress.finish({"b": outcome(stop="out_of_stock", state={"product": 7})})

    assert (progress.start(), progress.running) == ([], ["c"])
    progress.finish({"c": outcome("d")})
    assert progress.start() == []
    result = progress.result()
    assert (result.status, result.data, result.ok) == ("out_of_stock", {"product": 7}, True)
    assert result.steps == {"a": "completed", "b": "completed", "c": "completed", "d": "skipped"}


def test_of_two_stops_the_first_in_order_counts() -> None:
    progress = Progress(shape_of(nodes="ab"))
    progress.start()

    progress.finish({"b": outcome(stop="second", state={"n": 2})})
    progress.finish({"a": outcome(stop="first", state={"n": 1})})

    assert (progress.result().status, progress.result().data) == ("first", {"n": 1})


def test_of_two_failures_the_first_in_order_is_told() -> None:
    progress = Progress(shape_of(nodes="ab"))
    progress.start()

    progress.finish({"b": "ValueError: late"})
    progress.finish({"a": "KeyError: early"})

    assert progress.result().error == "step 'a' failed: KeyError: early"
    assert progress.result().steps == {"a": "failed", "b": "failed"}


def test_a_failure_counts_more_than_a_stop() -> None:
    progress = Progress(shape_of(nodes="ab"))
    progress.start()

    progress.finish({"a": outcome(stop="enough", state={}), "b": "ValueError: broken"})

    assert progress.result().status == "failed"


def test_a_kept_stop_ends_the_flow_at_once() -> None:
    progress = Progress(shape_of(*DIAMOND), {"a": outcome(stop="cancellation", state={"order": 1})})

    assert progress.start() == []
    assert (progress.result().status, progress.result().data) == ("cancellation", {"order": 1})


def test_what_was_kept_of_other_steps_is_passed_over() -> None:
    progress = Progress(shape_of(nodes="a"), {"gone": outcome("a")})

    assert progress.start() == ["a"]
    progress.finish({"a": outcome(state={"x": 1})})
    assert progress.result().steps == {"a": "completed"}


def test_one_finish_point_gives_its_data_and_several_give_theirs_by_name() -> None:
    one, several = Progress(shape_of("ab", nodes="ab")), Progress(shape_of("ab", "ac", "ad"))
    for progress, ends in ((one, "b"), (several, "bcd")):
        progress.start()
        progress.finish({"a": outcome(ends.removesuffix("d"), state={})})
        progress.start()
        progress.finish({step: outcome(state={"from": step}) for step in ends.removesuffix("d")})

    assert one.result().data == {"from": "b"}
    assert several.result().data == {"b": {"from": "b"}, "c": {"from": "c"}}, "d was skipped"
    assert (one.skipped_end, several.skipped_end) == (None, None)


def test_a_skipped_finish_point_wants_the_data_before_it() -> None:
    progress = Progress(shape_of("ab", nodes="ab"))
    progress.start()
    progress.finish({"a": outcome("", output={"x": 1})})

    assert progress.start() == []
    assert progress.skipped_end == "b"
    assert progress.result({"x": 1}).data == {"x": 1}
    assert progress.result({"x": 1}).steps == {"a": "completed", "b": "skipped"}


@pytest.mark.parametrize("end", ["Broken: it broke", outcome(stop="enough", state={})])
def test_a_flow_that_ended_early_has_no_skipped_finish_point(end: Outcome | str) -> None:
    progress = Progress(shape_of("ab", nodes="ab"))
    progress.start()
    progress.finish({"a": end})

    assert progress.skipped_end is None


def test_a_timeout_names_the_steps_it_came_in() -> None:
    progress = Progress(shape_of("ab", "ac", nodes="abc"))

    assert progress.timed_out().error == "flow 'g' used up its timeout of 5 s between two steps"
    progress.start()
    assert progress.timed_out().error == "flow 'g' used up its timeout of 5 s in step 'a'"
    progress.finish({"a": outcome("bc")})
    progress.start()
    result = progress.timed_out()

    assert (result.status, result.ok, result.steps) == ("timed_out", False, {"a": "completed"})
    assert result.error == "flow 'g' used up its timeout of 5 s in step 'b', 'c'"


def test_a_step_gets_what_its_ancestors_returned_and_nothing_else() -> None:
    progress = Progress(shape_of("ab", "bd", "ac"))
    progress.start()
    progress.finish({"a": outcome("bc", output={"a": 1})})
    progress.start()
    progress.finish({"b": outcome("d", output={"b": 2}), "c": outcome(output={"c": 3})})

    assert progress.outputs_before("d") == {"a": {"a": 1}, "b": {"b": 2}}
    assert progress.outputs_before("a") == {}


def test_the_records_of_decisions_are_told_by_step() -> None:
    progress = Progress(shape_of("ab", nodes="ab"))
    progress.start()
    progress.finish({"a": outcome("b", decision={"answer": "yes"})})
    progress.start()
    progress.finish({"b": "Undecided: no answer"})

    assert progress.result().decisions == {"a": {"answer": "yes"}}
