from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any

import pytest

from beluga_airflow import Chain, Graph, Retry
from beluga_airflow.config import (
    ChainSettings,
    GraphSettings,
    LLMSettings,
    Settings,
    StateSettings,
    TemporalSettings,
    WorkflowSettings,
)
from beluga_airflow.config.settings import PROVIDERS
from beluga_airflow.errors import InvalidSetting
from beluga_airflow.graph import Flow
from beluga_airflow.llm.presets import PRESETS
from beluga_airflow.state import open_store


def flow_of(kind: type[Flow], **options: Any) -> Flow:
    if kind is Chain:
        return Chain("f", **options).add_step("a", len)
    return Graph("f", **options).add_node("a", len)


@pytest.mark.parametrize(
    ("kind", "durable", "timeout", "attempts"),
    [(Chain, False, 300, 4), (Graph, False, 600, 3), (Chain, True, 3_600, 4), (Graph, True, 3_600, 3)],
)
def test_what_holds_where_nobody_says_otherwise(kind: type[Flow], durable: bool, timeout: float, attempts: int) -> None:
    shape = Settings().settle(flow_of(kind).check(), durable=durable)

    assert (shape.timeout, shape.parallel, shape.max_workers) == (timeout, True, 10)
    (step,) = shape.steps
    assert step.timeout == 60
    assert step.retry == Retry(
        maximum_attempts=attempts, initial_interval=0.5, backoff_coefficient=2.0, maximum_interval=5
    )


@pytest.mark.parametrize("durable", [False, True])
def test_what_the_author_says_goes_before_every_setting(durable: bool) -> None:
    retry = Retry(maximum_attempts=7)
    graph = Graph("f", timeout=12, max_workers=2, parallel=True, retry=retry).add_node("a", len, timeout=3)
    settings = Settings(
        graph=GraphSettings(timeout=1, max_workers=9, parallel_execution=False, max_retries=0),
        workflow=WorkflowSettings(timeout=1),
        step_timeout=1,
    )

    shape = settings.settle(graph.check(), durable=durable)

    assert (shape.timeout, shape.max_workers, shape.parallel) == (12, 2, True)
    assert (shape.steps[0].timeout, shape.steps[0].retry) == (3, retry)


def test_settings_fill_what_is_left_open() -> None:
    settings = Settings(
        chain=ChainSettings(timeout=1, max_retries=0),
        graph=GraphSettings(timeout=2, max_retries=1, max_workers=3),
        workflow=WorkflowSettings(timeout=4),
        step_timeout=5,
    )

    chain, graph = (settings.settle(flow_of(kind).check()) for kind in (Chain, Graph))

    assert (chain.timeout, graph.timeout, graph.max_workers) == (1, 2, 3)
    assert [shape.steps[0].retry for shape in (chain, graph)] == [Retry(maximum_attempts=1), Retry(maximum_attempts=2)]
    assert {shape.steps[0].timeout for shape in (chain, graph)} == {5}
    assert settings.settle(flow_of(Chain).check(), durable=True).timeout == 4


@pytest.mark.parametrize("kind", [Chain, Graph])
def test_retries_on_temporal_are_as_elsewhere_unless_they_are_set(kind: type[Flow]) -> None:
    settings = Settings(chain=ChainSettings(max_retries=1), graph=GraphSettings(max_retries=1))
    on_temporal = replace(settings, workflow=WorkflowSettings(max_retries=5))
    never = replace(settings, workflow=WorkflowSettings(max_retries=0))
    inner = flow_of(kind)
    nested = Graph("outer").add_node("in", inner).add_node("own", len, retry=Retry(maximum_attempts=7))

    def attempts(settings: Settings, flow: Flow, durable: bool = True) -> set[int]:
        return {step.retries.maximum_attempts for step in settings.settle(flow.check(), durable=durable).steps}

    assert attempts(settings, inner) == {2}
    assert attempts(on_temporal, inner) == {6}
    assert attempts(never, inner) == {1}
    assert attempts(on_temporal, inner, durable=False) == {2}, "of a flow in one task, and of an item of a batch"
    assert attempts(on_temporal, flow_of(kind, retry=Retry(maximum_attempts=4))) == {4}, "the flow's own Retry"
    assert attempts(on_temporal, nested) == {6, 7}


@pytest.mark.parametrize(
    ("flow", "settings"),
    [
        (Graph("f", parallel=False, max_workers=8).add_node("a", len), Settings()),
        (Graph("f", max_workers=8).add_node("a", len), Settings(graph=GraphSettings(parallel_execution=False))),
    ],
)
def test_a_flow_that_is_not_parallel_has_one_worker(flow: Flow, settings: Settings) -> None:
    assert settings.settle(flow.check()).max_workers == 1


def test_settling_changes_nothing_else_and_leaves_nothing_open() -> None:
    graph = Graph("f").add_node("b", len, join="any").add_node("a", len).add_edge("a", "b", when={"ok": 1})
    shape = graph.check()

    settled = Settings().settle(shape)

    assert (settled.flow, settled.kind, settled.edges) == (shape.flow, shape.kind, shape.edges)
    assert [(step.name, step.join) for step in settled.steps] == [("a", "all"), ("b", "any")]
    assert graph.check() is shape
    assert shape.timeout is None, "the flow may run under other settings next time"
    assert Settings().settle(settled, durable=True) == settled
    assert None not in {settled.timeout, settled.max_workers, settled.parallel}


def test_the_defaults_of_connections_are_those_that_are_promised() -> None:
    settings = Settings()

    assert (settings.llm.provider, settings.llm.model, settings.llm.timeout) == ("openai", "gpt-4o", 30)
    temporal = settings.workflow.temporal
    assert (temporal.address, temporal.namespace, temporal.task_queue) == (
        "localhost:7233",
        "default",
        "beluga-workflows",
    )


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (ChainSettings, {"timeout": 0}, "ChainSettings(timeout=0): it must be seconds, above 0 and finite"),
        (ChainSettings, {"timeout": math.nan}, "ChainSettings(timeout=nan): it must be seconds, above 0 and finite"),
        (ChainSettings, {"timeout": "60"}, "ChainSettings(timeout='60'): it must be seconds"),
        (GraphSettings, {"timeout": True}, "GraphSettings(timeout=True): it must be seconds"),
        (WorkflowSettings, {"timeout": math.inf}, "WorkflowSettings(timeout=inf): it must be seconds"),
        (LLMSettings, {"timeout": -1}, "LLMSettings(timeout=-1): it must be seconds"),
        (Settings, {"step_timeout": timedelta(1)}, "Settings(step_timeout=datetime.timedelta(days=1)): it must be"),
        (GraphSettings, {"max_workers": True}, "GraphSettings(max_workers=True): it must be a whole number, 1 or more"),
        (GraphSettings, {"max_workers": 0}, "GraphSettings(max_workers=0): it must be a whole number, 1 or more"),
        (GraphSettings, {"max_retries": True}, "GraphSettings(max_retries=True): it must be a whole number, 0 or more"),
        (ChainSettings, {"max_retries": -1}, "ChainSettings(max_retries=-1): it must be a whole number, 0 or more"),
        (GraphSettings, {"parallel_execution": "no"}, "GraphSettings(parallel_execution='no'): it must be True or"),
        (
            WorkflowSettings,
            {"max_retries": -1},
            "WorkflowSettings(max_retries=-1): it must be a whole number, 0 or more",
        ),
        (ChainSettings, {"max_retries": None}, "ChainSettings(max_retries=None): it must be a whole number, 0 or more"),
        (TemporalSettings, {"address": "t"}, "TemporalSettings(address='t'): it must be host:port, such as localhost:"),
        (TemporalSettings, {"task_queue": " "}, "TemporalSettings(task_queue=' '): it must be a text of printable"),
        (LLMSettings, {"provider": "opnai"}, "LLMSettings(provider='opnai'): it must be one of openai, azure"),
        (LLMSettings, {"model": None}, "LLMSettings(model=None): it must be a text"),
        (
            StateSettings,
            {"url": "hush"},
            "StateSettings(url=...): it must be the URL of a state store, such as sqlite:",
        ),
    ],
)
def test_a_setting_that_cannot_hold_is_refused(kind: type, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        kind(**wrong)

    assert str(refused.value).startswith(message)


def test_settings_are_frozen_all_the_way_down() -> None:
    def parts(part: Any) -> list[Any]:
        return [
            part,
            *(
                more
                for field in fields(part)
                if is_dataclass(getattr(part, field.name))
                for more in parts(getattr(part, field.name))
            ),
        ]

    found = parts(Settings())

    assert len(found) == 7
    for part in found:
        with pytest.raises(FrozenInstanceError):
            setattr(part, fields(part)[0].name, None)
        with pytest.raises(TypeError, match="positional"):
            type(part)(1)


def test_known_providers_are_those_that_there_are_presets_for() -> None:
    assert set(PROVIDERS) == set(PRESETS)


@pytest.mark.parametrize(
    "url",
    [
        *("memory://", "sqlite:////tmp/x/state.db", "redis://localhost:6379/0", "rediss://:p%40w@h/1"),
        *("postgresql://u:pw@h/db", "postgres://h/db?sslmode=verify-full"),
    ],
)
def test_a_url_that_can_be_opened_is_taken(url: str) -> None:
    settings = StateSettings(url=url)
    assert open_store(url)
    assert repr(settings) == "StateSettings()", "it may hold a password"


@pytest.mark.parametrize("url", ["", "x", "sqlite://", "sqlite:///", "redis:", "mysql://h/db", "http://h", "redis:/h"])
def test_a_url_that_cannot_be_opened_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting):
        StateSettings(url=url)
    with pytest.raises(InvalidSetting):
        open_store(url)


def test_a_path_that_each_process_reads_otherwise_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"such as sqlite:////path/to/state\.db"):
        StateSettings(url="sqlite:///state.db")
