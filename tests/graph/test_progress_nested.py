"""Where a run stands that has flows inside of its flow."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow import Chain, Graph
from beluga_airflow.config import Settings
from beluga_airflow.graph import Flow, Outcome, Shape
from beluga_airflow.graph.progress import Progress
from tests.graph.random_flows import flows, outcomes
from tests.graph.test_progress import outcome


def graph_of(*edges: str, nodes: str, **options: Any) -> Graph:
    graph = Graph("inner", **options)
    for name in nodes:
        graph.add_node(name, len)
    for edge in edges:
        graph.add_edge(edge[0], edge[1])
    return graph


def settled(flow: Flow) -> Shape:
    return Settings().settle(flow.check())


def end(progress: Progress, *steps: str, **more: Any) -> list[str]:
    """End these steps with all their edges taken; what starts then."""
    progress.finish({step: Outcome(output={}, taken=progress.shape.targets[step], **more) for step in steps})
    return progress.start()


@given(flows(), st.data())
def test_nested_flows_have_no_more_steps_running_than_they_allow(flow: Flow, data: st.DataObject) -> None:
    shape = settled(flow)
    assert shape.max_workers is not None
    left = data.draw(outcomes(shape))
    progress = Progress(shape)
    most: dict[str, int] = {}
    while progress.start() or progress.running:
        for group in shape.groups:
            inside = [step for step in progress.running if group in shape.around[step]]
            most[group.path] = max(most.get(group.path, 0), len(inside))
        assert len(progress.running) <= shape.max_workers
        some = data.draw(st.sets(st.sampled_from(progress.running), min_size=1))
        progress.finish({step: left[step] for step in some})

    assert progress.result({}).steps.keys() == shape.order.keys(), "nothing waits for ever"
    assert all(most.get(group.path, 0) <= group.max_workers for group in shape.groups if group.max_workers)


@given(flows(), st.data())
def test_no_worker_is_idle_while_a_step_could_run(flow: Flow, data: st.DataObject) -> None:
    shape = settled(flow)
    assert shape.max_workers is not None
    left = data.draw(outcomes(shape))
    progress = Progress(shape)
    done: dict[str, tuple[str, ...]] = {}
    while progress.start() or progress.running:
        ready, skipped = shape.ready(done)
        done |= dict.fromkeys(skipped, ())
        for step in ready:
            full = len(progress.running) >= shape.max_workers or any(
                sum(group in shape.around[other] for other in progress.running) >= group.max_workers
                for group in shape.around[step]
                if group.max_workers
            )
            assert step in progress.running or full
        step = data.draw(st.sampled_from(progress.running))
        progress.finish({step: left[step]})
        done[step] = left[step].taken


def test_a_nested_flow_leaves_the_other_workers_to_the_rest() -> None:
    outer = Graph("outer", max_workers=3).add_node("ship", graph_of(nodes="abcd", max_workers=1))
    for name in "wxyz":
        outer.add_node(name, len)
    progress = Progress(settled(outer))

    assert progress.start() == ["ship.a", "w", "x"]
    assert end(progress, "w") == ["y"], "ship.b stands before it, but there is no room in ship"
    assert end(progress, "ship.a") == ["ship.b"]
    assert end(progress, "x", "y") == ["z"]


def test_caps_hold_through_all_depths() -> None:
    middle = Graph("middle", max_workers=2).add_node("one", graph_of(nodes="ab", max_workers=1))
    middle.add_node("two", graph_of(nodes="ab"))
    progress = Progress(settled(Graph("outer").add_node("in", middle).add_node("beside", len)))

    assert progress.start() == ["in.one.a", "in.two.a", "beside"]
    assert end(progress, "in.two.a") == ["in.two.b"]
    assert end(progress, "in.one.a") == ["in.one.b"]


def test_a_nested_flow_that_is_not_parallel_runs_in_topological_order() -> None:
    progress = Progress(settled(Graph("outer").add_node("in", graph_of("ac", nodes="abc", parallel=False))))
    started = progress.start()
    while progress.running:
        started += end(progress, *progress.running)

    assert started == ["in.a", "in.b", "in.c", "in.result"]


def test_several_finish_points_are_named_by_their_nodes() -> None:
    outer = Graph("outer").add_node("a", len).add_node("ship", graph_of(nodes="x")).add_node("bill", len)
    progress = Progress(settled(outer.add_edge("a", "ship").add_edge("a", "bill")))
    progress.start()
    end(progress, "a")
    end(progress, "ship.x")
    end(progress, "bill", state={"from": "bill"})
    end(progress, "ship.result", state={"from": "ship"})

    result = progress.result()

    assert result.data == {"ship": {"from": "ship"}, "bill": {"from": "bill"}}
    assert result.steps == dict.fromkeys(["a", "ship.x", "ship.result", "bill"], "completed")


def test_a_nested_flow_that_ends_the_flow_gives_its_data() -> None:
    progress = Progress(settled(Chain("outer").add_step("ship", graph_of(nodes="x"))))
    progress.start()
    end(progress, "ship.x")
    end(progress, "ship.result", state={"x": 1})

    assert progress.result().data == {"x": 1}


def test_a_stop_in_a_nested_flow_ends_the_whole() -> None:
    progress = Progress(settled(Chain("outer").add_step("ship", graph_of("xy", nodes="xy")).add_step("end", len)))
    progress.start()

    progress.finish({"ship.x": outcome(stop="out_of_stock", state={"product": 7})})

    assert progress.start() == []
    assert (progress.result().status, progress.result().data) == ("out_of_stock", {"product": 7})


def timed() -> Progress:
    """``start`` -> ``ship`` (2 s) with ``pack`` (1 s) in it and ``y`` behind that -> ``end``."""
    ship = Graph("shipping", timeout=2).add_node("pack", graph_of("ab", nodes="ab", timeout=1)).add_node("y", len)
    outer = Graph("outer", timeout=9).add_node("start", len).add_node("ship", ship.add_edge("pack", "y"))
    return Progress(settled(outer.add_node("end", len).add_edge("start", "ship").add_edge("ship", "end")))


def test_a_nested_flow_begins_with_its_first_step() -> None:
    progress = timed()
    ship, pack = progress.shape.groups

    progress.start()
    assert progress.begun() == []
    end(progress, "start")
    assert progress.begun() == [ship, pack]
    assert progress.begun() == [], "each is told once"
    end(progress, "ship.pack.a")
    assert progress.begun() == []


def test_nested_flows_without_a_timeout_are_not_told() -> None:
    outer = Graph("outer").add_node("one", graph_of(nodes="a")).add_node("two", graph_of(nodes="a"), timeout=3)
    progress = Progress(settled(outer))
    progress.start()

    assert [group.path for group in progress.begun()] == ["two"]


def test_a_lost_run_begins_its_nested_flows_again() -> None:
    shape = timed().shape
    kept = {"start": Outcome(output={}, taken=("ship.pack.a",))}
    kept["ship.pack.a"] = Outcome(output={}, taken=("ship.pack.b", "ship.pack.result"))
    progress = Progress(shape, kept)

    assert progress.start() == ["ship.pack.b"]
    assert [group.path for group in progress.begun()] == ["ship", "ship.pack"]


def test_a_nested_flow_is_closed_by_its_end() -> None:
    progress = timed()
    ship, pack = progress.shape.groups
    progress.start()
    for step in ("start", "ship.pack.a", "ship.pack.b"):
        assert not progress.closed(pack)
        end(progress, step)
    assert not progress.closed(pack), "its end has not run yet"

    end(progress, "ship.pack.result")

    assert (progress.closed(pack), progress.closed(ship)) == (True, False)


def test_a_skipped_nested_flow_is_closed() -> None:
    progress = timed()
    progress.start()

    progress.finish({"start": outcome("")})

    assert all(progress.closed(group) for group in progress.shape.groups)
    assert (progress.start(), progress.begun()) == ([], [])


def test_the_timeout_of_a_nested_flow_names_it_and_its_steps() -> None:
    outer = Graph("outer").add_node("ship", graph_of(nodes="ab", timeout=1.5)).add_node("beside", len)
    progress = Progress(settled(outer))
    (ship,) = progress.shape.groups
    progress.start()
    end(progress, "ship.a")

    result = progress.timed_out(ship)

    assert (result.status, result.ok, result.data) == ("timed_out", False, {})
    assert result.error == "flow 'inner' used up its timeout of 1.5 s in step 'ship.b'"
    assert result.steps == {"ship.a": "completed"}
    assert progress.timed_out().error == "flow 'outer' used up its timeout of 600 s in step 'ship.b', 'beside'"


def test_the_timeout_of_a_nested_flow_may_come_between_two_steps() -> None:
    progress = timed()
    ship, pack = progress.shape.groups
    progress.start()

    assert progress.timed_out(ship).error == "flow 'shipping' used up its timeout of 2 s between two steps"
    end(progress, "start")
    assert progress.timed_out(ship).error == "flow 'shipping' used up its timeout of 2 s in step 'ship.pack.a'"
    assert progress.timed_out(pack).error == "flow 'inner' used up its timeout of 1 s in step 'ship.pack.a'"
