"""The last two tasks of a group: the one that undoes, and the flow's end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow import Chain, Graph, Retry, StepContext, run
from beluga_airflow.testing import TaskRun
from tests.task_group import sample_flows as flows

no_bank: set[str] = set()
"""Cases in which money cannot be given back."""
no_truck: set[str] = set()
"""Cases in which nothing can be shipped."""
no_card: set[str] = set()
"""Cases in which nothing can be charged."""


def refund(data: dict[str, Any], context: StepContext) -> None:
    flows.told(f"refund {context.idempotency_key} {context.attempt}", data)
    if data["case"] in no_bank:
        raise ConnectionError("the bank is closed")


shop = (
    Chain("shop", retry=flows.ONCE)
    .add_step("reserve", flows.sets("reserve"), compensate=flows.undoes("reserve"))
    .add_step("charge", flows.sets("charge"), compensate=refund)
    .add_step("fulfil", flows.raises("fulfil", RuntimeError("the truck is gone")), retry=Retry(maximum_attempts=1))
)


def charge(data: dict[str, Any]) -> dict[str, Any]:
    flows.told("charge", data)
    if data["case"] in no_card:
        raise ConnectionError("no card")
    return {"charge": True}


def ship(data: dict[str, Any]) -> None:
    flows.told("ship", data)
    if data["case"] in no_truck:
        raise ConnectionError("no truck")


def side_by_side() -> Graph:
    """``charge`` and ``ship`` after ``start``: none of the two is before the other."""
    graph = Graph("shop", retry=flows.ONCE).add_node("start", flows.sets("start"))
    graph.add_node("charge", charge, compensate=refund).add_node("ship", ship)
    return graph.add_edge("start", "charge").add_edge("start", "ship")


def ended(tasks: Any, *cleared: str) -> TaskRun:
    """The end of a flow after a user cleared these of its steps, with all that is downstream."""
    for name in (*cleared, "undo"):
        del tasks.states[name]
    for name in (*cleared, "undo"):
        tasks.clear(name)
    tasks.states.pop("result", None)
    # it does not run where something before it failed
    assert "failed" not in tasks.states.values()
    run: TaskRun = tasks.clear("result") if "result" in tasks.runs else tasks.run("result")
    return run


def failed(tasks: Any) -> Any:
    """A group whose last step has failed."""
    tasks.run("reserve", "charge", "fulfil")
    assert tasks.states == {"reserve": "success", "charge": "success", "fulfil": "failed"}
    return tasks


def seen_by_undoing(case: str) -> list[str]:
    return [name for name in flows.seen[case] if name.startswith(("undo", "refund"))]


# undoing


def test_undoing_has_keys_of_its_own(tasks_of: Any) -> None:
    tasks = failed(tasks_of(shop, inputs={"case": "keys of undoing"}))
    undo = tasks.run("undo")
    assert (undo.state, undo.return_value) == ("success", {"undone": {"charge": "undone", "reserve": "undone"}})
    assert seen_by_undoing("keys of undoing") == [
        *("refund orders/test-run/g/-1/charge.undo 1", "undo reserve True reserve.undo")
    ]


async def test_a_step_that_is_done_is_undone_where_its_condition_fails(tasks_of: Any) -> None:
    graph = Graph("shop", retry=Retry(maximum_attempts=2))
    graph.add_node("charge", flows.sets("charge"), compensate=flows.undoes("charge"))
    graph.add_node("ship", flows.sets("ship")).add_edge("charge", "ship", when=lambda output: output["no such key"])
    case = "condition"

    def in_tasks() -> list[TaskRun]:
        tasks = tasks_of(graph, inputs={"case": case})
        tasks.run("charge", "undo")
        return [tasks.runs["charge"], tasks.runs["undo"]]

    (charge, undo), expected = await asyncio.to_thread(in_tasks), await run(graph, {"case": case})
    # done: another attempt would do it again
    assert (charge.state, str(charge.error)) == ("failed", f"flow failed: {expected.error}")
    assert (undo.state, undo.return_value) == ("success", {"undone": expected.undone})
    assert expected.undone == {"charge": "undone"}
    assert flows.seen[case] == ["charge", "undo charge True charge.undo"] * 2


async def test_what_could_not_be_undone_has_the_words_of_a_run(tasks_of: Any) -> None:
    case = "no bank"
    no_bank.add(case)

    def undone() -> TaskRun:
        undo: TaskRun = failed(tasks_of(shop, inputs={"case": case})).run("undo")
        return undo

    undo, expected = await asyncio.to_thread(undone), await run(shop, {"case": case})
    assert (undo.state, type(undo.error)) == ("failed", AirflowFailException)
    assert str(undo.error) == f"flow failed: {expected.error}"
    assert undo.return_value == {"undone": expected.undone}


def test_undoing_goes_on_where_a_worker_was_lost(tasks_of: Any) -> None:
    tasks = failed(tasks_of(shop, inputs={"case": "lost"}, dag_args={"retries": 1}))
    tasks.run("undo")
    tasks.lose("undo")
    again = tasks.retry("undo")
    assert (again.state, again.return_value) == ("success", {"undone": {"charge": "undone", "reserve": "undone"}})
    assert len(seen_by_undoing("lost")) == 2


def test_a_clear_of_undoing_tries_what_could_not_be_undone(tasks_of: Any) -> None:
    case = "bank opens"
    no_bank.add(case)
    tasks = failed(tasks_of(shop, inputs={"case": case}))
    assert tasks.run("undo").state == "failed"
    no_bank.discard(case)
    again = tasks.clear("undo")
    assert (again.state, again.return_value["undone"]["charge"]) == ("success", "undone")
    assert [name.split()[0] for name in seen_by_undoing(case)] == ["refund", "undo", "refund"]


def test_each_attempt_of_a_step_is_undone_once(tasks_of: Any) -> None:
    tasks = failed(tasks_of(shop, inputs={"case": "twice"}))
    tasks.run("undo")
    for step in ("reserve", "charge", "fulfil", "undo", "undo"):
        tasks.clear(step)
    assert [name.split()[0] for name in seen_by_undoing("twice")] == ["refund", "undo"] * 2


def test_a_step_whose_task_left_no_word_is_named(tasks_of: Any) -> None:
    case = "no word"
    no_bank.add(case)
    tasks = failed(tasks_of(shop, inputs={"case": case}))
    tasks.lose("fulfil")
    tasks.left("fulfil", None, "failure")
    error = str(tasks.run("undo").error)
    assert error.startswith("flow failed: step 'fulfil' failed: its task 'g.fulfil' ended without an outcome")
    assert error.endswith("; step 'charge' could not be undone: ConnectionError: the bank is closed")


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ({}, "no step failed: there is nothing to undo"),
        ({"reserve": "upstream_failed"}, "no step failed: there is nothing to undo"),
        ({"reserve": "failed"}, "no step that can be undone had finished: there is nothing to undo"),
    ],
)
def test_where_nothing_is_to_undo_the_task_is_skipped(
    tasks_of: Any, states: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tasks_of(shop)
    tasks.states.update(states)
    assert tasks.run("undo").state == "skipped"
    assert says in capsys.readouterr().out


# behind what was undone


def test_a_flow_does_not_go_on_behind_what_was_undone(tasks_of: Any) -> None:
    tasks = failed(tasks_of(shop, inputs={"case": "undone"}))
    tasks.run("undo")
    run = tasks.clear("fulfil")
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert "step 'reserve' was undone when the flow had failed" in str(run.error)
    assert "clear its task 'g.reserve' with all that is downstream" in str(run.error)
    assert flows.seen["undone"].count("fulfil") == 1
    # nor by hand
    tasks.states["fulfil"] = "success"
    assert tasks.run("result").state == "failed"


def test_a_flow_whose_undone_steps_are_cleared_goes_on(tasks_of: Any) -> None:
    tasks = failed(tasks_of(shop, inputs={"case": "cleared"}))
    tasks.run("undo")
    tasks.clear("reserve")
    tasks.clear("charge")
    assert "the truck is gone" in str(tasks.clear("fulfil").error)


@pytest.mark.parametrize("case", ["side", "side no bank"])
def test_a_flow_does_not_end_beside_what_was_undone(tasks_of: Any, case: str) -> None:
    """Also where the step that is cleared does not follow from it, and where undoing it failed: it may be undone."""
    no_truck.add(case)
    if case == "side no bank":
        no_bank.add(case)
    tasks = tasks_of(side_by_side(), inputs={"case": case})
    tasks.run("start", "charge", "ship", "undo")
    assert tasks.runs["undo"].xcoms["undone"] == {"charge": 1}
    no_truck.discard(case)
    no_bank.discard(case)
    for _ in range(2):  # whoever clears the same again gets the same
        run = ended(tasks, "ship")
        assert (tasks.states["ship"], tasks.states["undo"]) == ("success", "skipped")
        # Airflow wipes it when a task runs again
        assert tasks.runs["undo"].xcoms == {"undone": {"charge": 1}}
        assert (run.state, type(run.error)) == ("failed", AirflowFailException)
        assert "step 'charge' was undone when the flow had failed" in str(run.error)
        assert "clear its task 'g.charge' with all that is downstream" in str(run.error)
    run = ended(tasks, "charge")
    assert (run.state, run.return_value["status"]) == ("success", "completed")
    assert [name.split()[0] for name in flows.seen[case]].count("refund") == 1


# what is marked as success by hand


def test_what_is_marked_counts_as_the_attempt_that_began_last(tasks_of: Any) -> None:
    case = "marked"
    no_truck.add(case)
    no_card.add(case)
    tasks = tasks_of(side_by_side(), inputs={"case": case})

    def marked() -> None:
        """A user clears what failed and was undone, and marks as success what fails again."""
        tasks.states.pop("ship")
        tasks.clear("charge")
        assert tasks.states["charge"] == "failed"
        tasks.states["charge"] = "success"

    tasks.run("start", "ship", "charge")
    assert (tasks.states["ship"], tasks.states["charge"]) == ("failed", "skipped")
    marked()
    tasks.clear("ship")
    assert tasks.run("undo").xcoms["undone"] == {"charge": 2}
    # it begins anew, and is marked anew: so it is to be undone anew
    marked()
    tasks.clear("ship")
    again = tasks.clear("undo")
    assert (again.return_value, again.xcoms["undone"]) == ({"undone": {"charge": "undone"}}, {"charge": 3})
    assert [name.split()[0] for name in flows.seen[case] if name != "ship"] == ["start", *["charge", "refund"] * 2]
    # and the flow goes on behind a third one
    marked()
    tasks.states["ship"] = "failed"
    no_truck.discard(case)
    run = ended(tasks, "ship")
    assert (run.state, run.return_value["status"]) == ("success", "completed")


def test_what_is_marked_before_another_attempt_begins_is_undone_still(tasks_of: Any) -> None:
    case = "marked only"
    no_truck.add(case)
    tasks = tasks_of(side_by_side(), inputs={"case": case})
    tasks.run("start", "ship")
    tasks.states["charge"] = "success"  # it never began
    assert tasks.run("undo").xcoms["undone"] == {"charge": 0}
    no_truck.discard(case)
    assert "step 'charge' was undone" in str(ended(tasks, "ship").error)
    tasks.run("charge")
    assert ended(tasks).return_value["status"] == "completed"


def test_a_done_step_that_was_undone_and_is_marked_is_undone_still(tasks_of: Any) -> None:
    graph = Graph("shop", retry=flows.ONCE).add_node("charge", flows.sets("charge"), compensate=flows.undoes("charge"))
    graph.add_node("ship", flows.sets("ship")).add_edge("charge", "ship", when=lambda output: output["no such key"])
    tasks = tasks_of(graph, inputs={"case": "marked done"})
    tasks.run("charge", "undo")
    assert (tasks.states["charge"], tasks.runs["undo"].xcoms["undone"]) == ("failed", {"charge": 1})
    tasks.states["charge"] = "success"
    assert "step 'charge' was undone when the flow had failed" in str(tasks.run("ship").error)


# the end


def test_the_end_puts_together_what_there_is(tasks_of: Any) -> None:
    tasks = tasks_of(flows.several_ends, inputs={"case": "end"})
    run = tasks.run("a", "b", "c", "result")
    data = {"case": "end", "a": True}
    assert run.return_value == {
        "status": "completed",
        "data": {"b": {**data, "b": True}, "c": {**data, "c": True}},
    }


def test_a_flow_that_did_not_run_is_skipped(tasks_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = tasks_of(flows.linear)
    tasks.states.update(validate="skipped", charge="skipped")
    assert tasks.run("result").state == "skipped"
    assert "flow 'linear' did not run" in capsys.readouterr().out


def test_what_a_failure_had_skipped_must_be_cleared_too(tasks_of: Any) -> None:
    tasks = tasks_of(flows.several_ends)
    tasks.run("a", "b")
    tasks.states["c"] = "skipped"
    run = tasks.run("result")
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert str(run.error).startswith("flow 'several-ends' is not at its end: 'c' did not run")
    tasks.run("c")
    assert tasks.clear("result").state == "success"
