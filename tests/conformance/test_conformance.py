"""Every example comes to the same end on every runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from beluga_airflow import errors
from beluga_airflow.execute.status import LONGEST
from beluga_airflow.graph import Flow, Identity
from beluga_airflow.graph.parts import Step
from beluga_airflow.graph.progress import IN_FLIGHT
from tests.conformance import flows, nested_flows, trouble_flows
from tests.conformance.examples import EXAMPLES
from tests.conformance.expected import KEY, RUNTIMES, Example
from tests.conformance.flows import RULES
from tests.conformance.runtimes import Observed, Runs

MODULES = (flows, nested_flows, trouble_flows)
ENDS_NO_FLOW = {
    errors.BelugaError: "the root of all",
    errors.ModelError: "the root of those about models",
    errors.InvalidSetting: "no flow begins with it",
    errors.FlowNotFound: "no flow begins with it; the tests of Temporal have a worker with other code",
    errors.StateError: "the store refuses: see the tests of checkpoints and decisions",
    errors.HistoryLost: "no flow watches a store: see the tests of stores",
    errors.StateUnavailable: "the store is gone: see the tests of checkpoints and decisions",
    errors.NotNow: "the root of those of guards",
    errors.BreakerOpen: "it tells the time: tests/resilience/test_steps.py has it on every runtime",
    errors.BudgetSpent: "it tells the time: tests/llm/test_budget.py has it",
    errors.LimitReached: "it tells the time: tests/resilience/test_steps.py has it on every runtime",
    errors.TemporalError: "the server refuses: see the tests of Temporal",
    errors.TemporalUnavailable: "the server is gone: see the tests of Temporal",
}
"""Errors of which there is no example, and why."""


@pytest.mark.parametrize(
    ("runtime", "example"),
    [
        pytest.param(runtime, example, id=f"{runtime}-{example.name}")
        for runtime in RUNTIMES
        for example in EXAMPLES
        if runtime not in example.cannot_show
    ],
)
def test_every_runtime_brings_it_to_the_same_end(runtime: str, example: Example, runs: Callable[[str], Runs]) -> None:
    observed = runs(runtime)[example.name]
    if isinstance(observed, BaseException):
        raise observed
    as_expected(example, observed)


def test_what_a_runtime_cannot_show_has_a_reason() -> None:
    for example in EXAMPLES:
        assert example.cannot_show.keys() < set(RUNTIMES), example.name
        assert all(reason.strip() for reason in example.cannot_show.values()), example.name


def test_names_are_unique() -> None:
    names = [example.name for example in EXAMPLES]
    assert len(set(names)) == len(names)


def test_every_rule_has_an_example() -> None:
    assert {rule for example in EXAMPLES for rule in example.shows} == set(RULES)


def test_every_flow_has_an_example() -> None:
    """A flow that nobody runs proves nothing; those inside others are run with them."""
    run = {id(example.flow) for example in EXAMPLES}
    inside = {id(step.node) for example in EXAMPLES for step in _all_steps(example.flow)}
    made = {name: flow for module in MODULES for name, flow in vars(module).items() if isinstance(flow, Flow)}
    assert [name for name, flow in made.items() if id(flow) not in run | inside] == []


def test_every_error_that_can_end_a_flow_has_an_example() -> None:
    told = " ".join(example.expect.error or "" for example in EXAMPLES)
    every = {getattr(errors, name) for name in errors.__all__}
    assert {error for error in every if f"{error.__name__}:" not in told} == ENDS_NO_FLOW.keys()


def test_every_status_has_an_example() -> None:
    """But `cancelled`: it takes somebody who cancels; see test_local_undoing.py and temporal/test_undoing.py."""
    statuses = {example.expect.status for example in EXAMPLES}
    assert statuses > {"completed", "failed", "timed_out", "out_of_stock"}


def _all_steps(flow: Flow) -> Iterator[Step]:
    for step in flow.definition[0]:
        yield step
        if isinstance(step.node, Flow):
            yield from _all_steps(step.node)


def as_expected(example: Example, observed: Observed) -> None:
    expect, trace = example.expect, observed.trace
    assert (observed.status, observed.error) == (expect.status, expect.error)
    assert observed.told == (expect.status, expect.error and expect.error[:LONGEST])
    assert observed.data == expect.data
    assert observed.decided == expect.decided
    if observed.steps is not None:
        assert {step for step, end in observed.steps.items() if end == "skipped"} == expect.skipped
    if observed.undone is not None:
        assert observed.undone == expect.undone
    attempts = trace.attempts
    assert attempts == {**dict.fromkeys(attempts, 1), **expect.attempts}
    assert not attempts.keys() & expect.never
    tried = {f"{step}.undo" for step, how in expect.undone.items() if how != IN_FLIGHT}
    assert {step for step in attempts if step.endswith(".undo")} == tried
    assert [pair for pair in expect.order if not trace.before(*pair)] == []
    assert expect.peak in (None, trace.peak)
    assert all(wait >= least for step, least in expect.waits.items() for wait in trace.waits(step))
    identity = Identity.of(example.flow.name, KEY)
    assert {step: trace.keys(step) for step in attempts} == {step: {identity.key(step)} for step in attempts}
