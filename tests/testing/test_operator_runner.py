"""The runner against small real operators; test_same_as_airflow.py compares some of them with Airflow itself."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
from airflow.sdk import DAG, BaseAsyncOperator, BaseHook, BaseOperator, BaseOperatorLink, Param, Variable
from airflow.sdk.exceptions import (
    AirflowFailException,
    AirflowNotFoundException,
    AirflowSkipException,
    TaskAwaitingInput,
    TaskDeferralError,
    TaskDeferralTimeout,
)
from airflow.sdk.execution_time.comms import DeadlockImminentError
from airflow.triggers.base import BaseTrigger, TaskFailedEvent, TaskSuccessEvent, TriggerEvent

from beluga_airflow.testing import OperatorRunner


class Call(BaseOperator):
    """Returns what a function of the context returns."""

    template_fields = ("text",)

    def __init__(self, *, function: Any = None, text: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function
        self.text = text

    def execute(self, context: Any) -> Any:
        return self.function(context) if self.function else self.text


class AsyncCall(BaseAsyncOperator):
    def __init__(self, *, function: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function

    async def aexecute(self, context: Any) -> Any:
        return await self.function(context)


class Reply(BaseTrigger):
    """Sends one event: a word that it was told, doubled; or the event that the word names."""

    def __init__(self, *, word: str) -> None:
        super().__init__()
        self.word = word
        self.cleaned = False

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{type(self).__module__}.{type(self).__qualname__}", {"word": self.word}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        await asyncio.sleep(0)
        match self.word:
            case "success":
                yield TaskSuccessEvent(xcoms={"return_value": "ended by the trigger"})
            case "failed":
                yield TaskFailedEvent(xcoms={"why": "never stored before a retry"})
            case "raise":
                raise ConnectionError("the other side is gone")
            case "silence":
                await asyncio.Event().wait()
            case "nothing":
                return
            case "connection":
                yield TriggerEvent((await BaseHook.aget_connection("other_side")).host)
            case "who":
                yield TriggerEvent(self.task_instance.task_id if self.task_instance else None)
            case word:
                yield TriggerEvent({"word": word * 2, "at": datetime(2026, 1, 2, tzinfo=UTC), "pair": (1, 2)})


class AskLink(BaseOperatorLink):
    name = "The question"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        return f"http://ask.example/{ti_key.run_id}/{operator.words[0]}"  # type: ignore[attr-defined]


class Ask(BaseOperator):
    """Defers once for each word, and returns the payloads."""

    template_fields = ("words",)
    operator_extra_links = (AskLink(),)

    def __init__(self, *, words: list[str], timeout: timedelta | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.words = words
        self.timeout = timeout

    def execute(self, context: Any, answers: list[Any] | None = None, event: Any = None) -> Any:
        answers = [*answers, event] if answers is not None else []
        context["ti"].xcom_push("asked", len(answers))
        if len(answers) < len(self.words):
            self.defer(
                trigger=Reply(word=self.words[len(answers)]),
                method_name="execute",
                kwargs={"answers": answers},
                timeout=self.timeout,
            )
        return answers


def fail(error: BaseException) -> Any:
    def function(context: Any) -> None:
        raise error

    return function


# what a worker gives an operator


def test_templates_see_the_run(operator_runner: OperatorRunner) -> None:
    text = "{{ params.name }} {{ dag_run.conf['name'] }} {{ run_id }} {{ ds }} {{ data_interval_end | ds }}"
    run = operator_runner.run(Call(task_id="greet", text=text), conf={"name": "Ada"}, run_id="r1")
    assert run.state == "success"
    assert run.return_value == "Ada Ada r1 2026-01-01 2026-01-02"
    assert run.operator.text == run.return_value
    assert run.rendered_fields == {"text": run.return_value}


def test_a_run_without_a_logical_date_has_no_interval(operator_runner: OperatorRunner) -> None:
    names = {"ds", "data_interval_start", "run_id"}
    operator = Call(task_id="t", function=lambda context: sorted(context.keys() & names))
    assert operator_runner.run(operator, logical_date=None).return_value == ["run_id"]


def test_a_failing_template_fails_the_task(operator_runner: OperatorRunner) -> None:
    run = operator_runner.run(Call(task_id="t", text="{{ nothing.here }}"))
    assert (run.state, type(run.error).__name__) == ("failed", "UndefinedError")


def test_params_are_validated_as_airflow_does(operator_runner: OperatorRunner) -> None:
    with DAG("orders", schedule=None, params={"value": Param(1, type="integer")}):
        operator = Call(task_id="t", text="{{ params.value }}")
    assert operator_runner.run(operator).return_value == "1"
    run = operator_runner.run(operator, conf={"value": "many"}, run_id="r2")
    assert (run.state, type(run.error).__name__) == ("failed", "ParamValidationError")


def test_xcoms_of_other_tasks_are_pulled(operator_runner: OperatorRunner) -> None:
    def pull(context: Any) -> list[Any]:
        pull = context["ti"].xcom_pull
        return [pull("up"), pull("up", key="decision"), pull("mapped"), pull("mapped", map_indexes=1), pull("absent")]

    xcoms: dict[Any, Any] = {
        "up": {"n": 1},
        ("up", "decision"): "yes",
        ("mapped", "return_value", 1): "b",
        ("mapped", "return_value", 0): "a",
    }
    run = operator_runner.run(Call(task_id="t", function=pull), xcoms=xcoms)
    assert run.return_value == [{"n": 1}, "yes", ["a", "b"], "b", None]


def test_an_xcom_arg_is_resolved(operator_runner: OperatorRunner) -> None:
    with DAG("orders", schedule=None):
        up = Call(task_id="up")
        operator = Call(task_id="t", text=up.output)
    assert operator_runner.run(operator, xcoms={"up": {"n": [1, 2]}}).return_value == {"n": [1, 2]}


def test_a_mapped_task_gets_its_item(operator_runner: OperatorRunner) -> None:
    with DAG("orders", schedule=None):
        mapped = Call.partial(task_id="t", retries=1).expand(text=["a", "b {{ ti.map_index }}"])
    assert operator_runner.run(mapped, map_index=1).return_value == "b 1"
    assert operator_runner.run(mapped, map_index=0).return_value == "a"


def test_a_task_is_mapped_over_what_another_returned(operator_runner: OperatorRunner) -> None:
    with DAG("orders", schedule=None):
        mapped = Call.partial(task_id="t").expand(text=Call(task_id="up").output)
    assert operator_runner.run(mapped, map_index=1, xcoms={"up": ["a", {"b": 2}]}).return_value == {"b": 2}


def test_xcoms_must_travel(operator_runner: OperatorRunner) -> None:
    for number, value in enumerate([object(), float("nan"), 2**70]):
        run = operator_runner.run(Call(task_id=f"t{number}", function=lambda _, value=value: value))
        assert run.state == "failed", value
        assert run.xcoms == {}


def test_connections_and_variables_reach_hooks(operator_runner: OperatorRunner) -> None:
    def look(context: Any) -> list[Any]:
        connection = BaseHook.get_connection("bank")
        return [connection.host, connection.port, connection.password, connection.extra_dejson, Variable.get("mode")]

    bank = {"conn_type": "http", "host": "bank.example", "port": 81, "password": "s3cret-word", "extra": {"a": 1}}
    operator_runner.variables["mode"] = "dry"
    run = operator_runner.run(
        Call(task_id="t", function=look), connections={"bank": bank, "uri": "http://u:p@h.example:82/s"}
    )
    assert run.return_value == ["bank.example", 81, "s3cret-word", {"a": 1}, "dry"]
    assert BaseHook.get_connection("uri").schema == "s"
    with pytest.raises(AirflowNotFoundException):
        BaseHook.get_connection("unknown")


def test_an_environment_variable_wins_over_a_connection(
    operator_runner: OperatorRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_BANK", '{"conn_type": "http", "host": "env.example"}')
    operator_runner.connections["bank"] = {"conn_type": "http", "host": "runner.example"}
    assert BaseHook.get_connection("bank").host == "env.example"


def test_async_operators_run_on_a_loop(operator_runner: OperatorRunner) -> None:
    async def work(context: Any) -> Any:
        context["task_state_store"].set("step", 1)
        connection = await BaseHook.aget_connection("bank")
        return [connection.host, await asyncio.to_thread(context["task_state_store"].get, "step")]

    run = operator_runner.run(
        AsyncCall(task_id="t", function=work), connections={"bank": {"conn_type": "http", "host": "h"}}
    )
    assert run.return_value == ["h", 1]


def test_a_sync_request_beside_an_async_one_is_a_deadlock(operator_runner: OperatorRunner) -> None:
    async def work(context: Any) -> None:
        request = asyncio.create_task(context["ti"].axcom_pull("up"))
        await asyncio.sleep(0)  # it is under way
        try:
            context["task_state_store"].get("step")
        finally:
            await request

    run = operator_runner.run(AsyncCall(task_id="t", function=work))
    assert isinstance(run.error, DeadlockImminentError)


def test_an_execution_timeout_ends_the_operator(operator_runner: OperatorRunner) -> None:
    operator = Call(task_id="t", function=lambda _: threading.Event().wait(), execution_timeout=timedelta(seconds=0.1))
    run = operator_runner.run(operator)
    assert (run.state, type(run.error).__name__) == ("failed", "AirflowTaskTimeout")


# how an attempt ends


@pytest.mark.parametrize(
    ("error", "retries", "state"),
    [
        (ValueError("no"), 0, "failed"),
        (ValueError("no"), 1, "up_for_retry"),
        (SystemExit(1), 1, "up_for_retry"),
        (AirflowFailException("never again"), 5, "failed"),
        (AirflowSkipException("not today"), 5, "skipped"),
    ],
)
def test_an_error_decides_the_state(
    operator_runner: OperatorRunner, error: BaseException, retries: int, state: str
) -> None:
    run = operator_runner.run(Call(task_id="t", function=fail(error), retries=retries))
    assert run.state == state
    assert run.error is (None if state == "skipped" else error)
    assert run.return_value is None


def test_a_retry_wipes_xcoms_and_keeps_the_task_state(operator_runner: OperatorRunner) -> None:
    seen = []

    def work(context: Any) -> str:
        ti, store = context["ti"], context["task_state_store"]
        seen.append((ti.try_number, ti.max_tries, ti.xcom_pull("t", key="half", map_indexes=-1), store.get("done", [])))
        store.set("done", [*store.get("done", []), ti.try_number])
        if ti.try_number < 3:
            ti.xcom_push("half", ti.try_number)
            raise ConnectionError("lost")
        return "whole"

    first = operator_runner.run(Call(task_id="t", function=work, retries=2))
    assert (first.state, first.xcoms, first.task_state) == ("up_for_retry", {"half": 1}, {"done": [1]})
    last = first.retry().retry()
    assert (last.state, last.xcoms) == ("success", {"return_value": "whole"})
    assert last.generation == 0
    assert seen == [(1, 2, None, []), (2, 2, None, [1]), (3, 2, None, [1, 2])]


def test_retries_are_used_up(operator_runner: OperatorRunner) -> None:
    run = operator_runner.run(Call(task_id="t", function=fail(ValueError()), retries=1)).retry()
    assert run.state == "failed"
    with pytest.raises(RuntimeError, match=r"attempt 2 is failed.*clear\(\)"):
        run.retry()


def test_an_attempt_is_lost_after_its_work_was_done(operator_runner: OperatorRunner) -> None:
    def work(context: Any) -> int:
        store = context["task_state_store"]
        store.set("paid", store.get("paid", 0) + 1)
        return context["ti"].try_number

    lost = operator_runner.run(Call(task_id="t", function=work, retries=1)).lose()
    assert (lost.state, lost.task_state, lost.return_value) == ("up_for_retry", {"paid": 1}, 1)
    again = lost.retry()
    assert (again.state, again.task_state, again.return_value) == ("success", {"paid": 2}, 2)
    assert again.lose().state == "failed"


def test_a_clear_raises_the_generation_and_retries_anew(operator_runner: OperatorRunner) -> None:
    def work(context: Any) -> int:
        store = context["task_state_store"]
        store.set("runs", store.get("runs", 0) + 1)
        if store.get("runs") == 2:
            raise ConnectionError("lost")
        return store.get("runs")

    operator = Call(task_id="t", function=work, retries=1)
    first = operator_runner.run(operator)
    assert (first.state, first.try_number, first.max_tries, first.generation) == ("success", 1, 1, 0)
    second = first.clear()
    assert (second.state, second.try_number, second.max_tries, second.generation) == ("up_for_retry", 2, 2, 1)
    third = second.retry()
    assert (third.state, third.try_number, third.generation, third.return_value) == ("success", 3, 1, 3)
    assert third.clear().generation == 3


def test_task_state_belongs_to_a_map_index(operator_runner: OperatorRunner) -> None:
    def work(context: Any) -> Any:
        store = context["task_state_store"]
        before = store.get("index")
        store.set("index", context["ti"].map_index)
        store.set("gone", 1)
        store.delete("gone")
        return before

    with DAG("orders", schedule=None):
        mapped = Call.partial(task_id="t").expand(function=[work, work])
    assert operator_runner.run(mapped, map_index=0).task_state == {"index": 0}
    run = operator_runner.run(mapped, map_index=1)
    assert (run.return_value, run.task_state) == (None, {"index": 1})


def test_callbacks_and_links_are_airflows(operator_runner: OperatorRunner) -> None:
    called = []
    operator = Ask(
        task_id="t",
        words=["{{ run_id }}"],
        on_success_callback=lambda context: called.append(context["ti"].task_id),
    )
    run = operator_runner.run(operator, run_id="r9")
    assert run.links == {"The question": "http://ask.example/r9/r9"}
    assert "_link_AskLink" not in run.xcoms
    assert called == []
    assert run.resume("x").state == "success"
    assert called == ["t"]


# deferral


async def test_a_task_defers_and_resumes_by_its_real_trigger(operator_runner: OperatorRunner) -> None:
    operator = Ask(task_id="t", words=["a", "{{ 'b' }}"], timeout=timedelta(minutes=1))
    run = await asyncio.to_thread(operator_runner.run, operator)
    assert (run.state, run.xcoms) == ("deferred", {"asked": 0})
    assert run.deferral is not None
    assert run.deferral.trigger_class == f"{__name__}.Reply"
    assert run.deferral.kwargs == {"word": "a"}
    assert (run.deferral.method, run.deferral.next_kwargs) == ("execute", {"answers": []})
    assert run.deferral.timeout == timedelta(minutes=1)
    event = await run.run_trigger()
    # a tuple arrives as a list, a datetime as itself: events are packed on their way out of the triggerer
    assert event.payload == {"word": "aa", "at": datetime(2026, 1, 2, tzinfo=UTC), "pair": [1, 2]}
    end = await run.run_to_end()
    assert end.state == "success"
    assert [answer["word"] for answer in end.return_value] == ["aa", "bb"]
    assert (end.try_number, end.deferral) == (1, None)


async def test_resuming_keeps_xcoms_and_next_kwargs(operator_runner: OperatorRunner) -> None:
    run = await asyncio.to_thread(operator_runner.run, Ask(task_id="t", words=["a", "b"]))
    second = await asyncio.to_thread(run.resume, {"ok": True})
    assert (second.state, second.xcoms) == ("deferred", {"asked": 1})
    end = await asyncio.to_thread(second.resume, "last")
    assert (end.state, end.return_value) == ("success", [{"ok": True}, "last"])


async def test_a_trigger_finds_connections_and_its_task(operator_runner: OperatorRunner) -> None:
    operator_runner.connections["other_side"] = {"conn_type": "http", "host": "h.example"}
    run = await asyncio.to_thread(operator_runner.run, Ask(task_id="t", words=["connection", "who"]))
    assert (await run.run_to_end()).return_value == ["h.example", "t"]


async def test_a_trigger_ends_its_task_without_a_worker(operator_runner: OperatorRunner) -> None:
    run = await asyncio.to_thread(operator_runner.run, Ask(task_id="t", words=["success"]))
    end = await run.run_to_end()
    assert (end.state, end.xcoms) == ("success", {"asked": 0, "return_value": "ended by the trigger"})


async def test_a_trigger_that_fails_its_task_lets_it_retry(operator_runner: OperatorRunner) -> None:
    run = await asyncio.to_thread(operator_runner.run, Ask(task_id="t", words=["failed"], retries=1))
    first = await run.run_to_end()
    assert (first.state, first.xcoms) == ("up_for_retry", {"asked": 0})
    last = await (await asyncio.to_thread(first.retry)).run_to_end()
    assert (last.state, last.xcoms) == ("failed", {"asked": 0, "why": "never stored before a retry"})


@pytest.mark.parametrize(
    ("word", "error"),
    [("raise", TaskDeferralError), ("nothing", TaskDeferralError), ("silence", TaskDeferralTimeout)],
)
async def test_a_trigger_without_an_event_fails_the_attempt(
    operator_runner: OperatorRunner, word: str, error: type[Exception]
) -> None:
    operator = Ask(task_id="t", words=[word], retries=1, timeout=timedelta(seconds=0.05))
    end = await (await asyncio.to_thread(operator_runner.run, operator)).run_to_end()
    assert (end.state, type(end.error)) == ("up_for_retry", error)


async def test_a_trigger_may_not_use_the_task_state(operator_runner: OperatorRunner) -> None:
    run = await asyncio.to_thread(operator_runner.run, StateAsk(task_id="t", words=["x"]))
    with pytest.raises(Exception, match="the triggerer of Airflow does not answer GetTaskStateStore"):
        await run.run_trigger()


class StateReply(Reply):
    async def run(self) -> AsyncIterator[TriggerEvent]:
        from airflow.sdk.execution_time import comms, task_runner

        assert self.task_instance is not None
        await task_runner.SUPERVISOR_COMMS.asend(comms.GetTaskStateStore(ti_id=self.task_instance.id, key="k"))
        yield TriggerEvent("never")


class StateAsk(Ask):
    def execute(self, context: Any, answers: Any = None, event: Any = None) -> Any:  # noqa: ARG002  # Airflow's
        self.defer(trigger=StateReply(word="x"), method_name="execute")


def test_a_person_is_awaited(operator_runner: OperatorRunner) -> None:
    run = operator_runner.run(Wait(task_id="t"))
    assert run.state == "awaiting_input"
    assert run.deferral is not None
    assert run.deferral.trigger_class is None
    with pytest.raises(RuntimeError, match="awaits a person"):
        run.deferral.trigger()
    assert run.resume({"chosen_options": ["yes"]}).return_value == ["yes"]


class Wait(BaseOperator):
    def execute(self, context: Any, event: Any = None) -> Any:  # noqa: ARG002  # Airflow's signature
        if event:
            return event["chosen_options"]
        raise TaskAwaitingInput(method_name="execute", kwargs={}, timeout=None)


# the process around it


def test_nothing_is_left_behind(operator_runner: OperatorRunner) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    operator_runner.run(Call(task_id="t", function=lambda _: os.environ["AIRFLOW_CTX_TASK_ID"]))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "AIRFLOW_CTX_TASK_ID" not in os.environ


async def test_several_operators_run_at_once(operator_runner: OperatorRunner) -> None:
    together = threading.Barrier(3)

    def work(context: Any) -> str:
        together.wait(timeout=30)
        context["task_state_store"].set("me", context["run_id"])
        return str(context["ti"].xcom_pull("up"))

    runs = await asyncio.gather(
        *(
            asyncio.to_thread(operator_runner.run, Call(task_id="t", function=work), run_id=f"r{n}", xcoms={"up": n})
            for n in range(3)
        )
    )
    assert [(run.return_value, run.task_state) for run in runs] == [(str(n), {"me": f"r{n}"}) for n in range(3)]


async def test_an_event_loop_is_not_blocked(operator_runner: OperatorRunner) -> None:
    with pytest.raises(RuntimeError, match=r"await asyncio\.to_thread"):
        operator_runner.run(Call(task_id="t"))


def test_a_task_of_a_run_begins_once(operator_runner: OperatorRunner) -> None:
    operator = Call(task_id="t")
    run = operator_runner.run(operator)
    with pytest.raises(ValueError, match=r"ran already: go on with retry\(\)"):
        operator_runner.run(operator)
    with pytest.raises(RuntimeError, match="is success, not deferred"):
        run.resume({})


def test_a_task_that_starts_in_the_triggerer_is_refused(operator_runner: OperatorRunner) -> None:
    with pytest.raises(ValueError, match="starts in the triggerer"):
        operator_runner.run(FromTrigger(task_id="t"))


class FromTrigger(Call):
    start_from_trigger: ClassVar[bool] = True


def test_a_runner_must_be_entered() -> None:
    with pytest.raises(RuntimeError, match="with OperatorRunner"):
        OperatorRunner().run(Call(task_id="t"))


def test_ctrl_c_is_for_the_tests(operator_runner: OperatorRunner) -> None:
    with pytest.raises(KeyboardInterrupt):
        operator_runner.run(Call(task_id="t", function=fail(KeyboardInterrupt()), retries=1))


def test_what_is_not_answered_says_so(operator_runner: OperatorRunner) -> None:
    run = operator_runner.run(Call(task_id="t", function=lambda context: context["ti"].get_dr_count(dag_id="d")))
    assert run.state == "failed"
    assert "does not answer GetDRCount" in str(run.error)
