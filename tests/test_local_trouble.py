from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from beluga_airflow import Chain, Graph, InvalidFlow, InvalidInput, Retry, StepContext, local, run
from beluga_airflow.errors import InvalidOutput, ModelRefused, ModelUnavailable, StateUnavailable
from tests.running import DEADLINE, FAST, ONCE, ended, graph_of, nothing

# retries


@dataclass
class Failing:
    """Raises its error a number of times, then returns."""

    error: BaseException
    times: int = 1_000
    calls: int = 0

    def execute(self, inputs: dict[str, Any], context: StepContext) -> dict[str, Any]:
        self.calls += 1
        assert context.attempt == self.calls
        if self.calls <= self.times:
            raise self.error
        return {**inputs, "calls": self.calls}


class ShopError(OSError):
    pass


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (ValueError("flaky"), 3),
        (KeyError("theirs"), 3),
        (ModelUnavailable("overloaded"), 3),
        (StateUnavailable("away"), 3),
        (StopIteration(), 3),
        (InvalidInput("order_id is empty"), 1),
        (InvalidOutput("not JSON"), 1),
        (InvalidFlow("no such thing"), 1),
        (ModelRefused("key refused"), 1),
        (SystemExit(3), 1),
    ],
    ids=repr,
)
async def test_only_what_another_attempt_may_help_is_tried_again(error: BaseException, calls: int) -> None:
    step = Failing(error)

    result = await ended(Chain("f", retry=FAST).add_step("a", step))

    assert (result.status, step.calls) == ("failed", calls)


@pytest.mark.parametrize("listed", [ShopError, "ShopError", OSError, "OSError"])
async def test_what_is_listed_as_not_retryable_is_not_tried_again(listed: Any) -> None:
    shop, other = Failing(ShopError("closed")), Failing(ValueError("flaky"), times=2)
    retry = Retry(maximum_attempts=3, initial_interval=0, non_retryable=(listed,))

    result = await ended(Graph("g", retry=retry).add_node("a", shop).add_node("b", other))

    assert (shop.calls, other.calls) == (1, 3)
    assert result.error == "step 'a' failed: ShopError: closed"


async def test_an_attempt_that_succeeds_ends_the_retries() -> None:
    step = Failing(ValueError("flaky"), times=2)

    result = await ended(Chain("f", retry=FAST).add_step("a", step))

    assert (result.status, result.data) == ("completed", {"calls": 3})


@pytest.mark.parametrize(("kind", "attempts"), [(Chain, 4), (Graph, 3)])
async def test_a_chain_tries_four_times_and_a_graph_three(kind: Any, attempts: int, mocker: Any) -> None:
    sleep = mocker.patch("asyncio.sleep")
    step = Failing(ValueError("flaky"))
    flow = kind("f")
    (flow.add_step if kind is Chain else flow.add_node)("a", step)

    result = await run(flow, {})

    assert (result.status, step.calls) == ("failed", attempts)
    assert [call.args[0] for call in sleep.await_args_list] == [0.5, 1.0, 2.0][: attempts - 1]


async def test_the_wait_that_a_server_asks_for_is_kept() -> None:
    step = Failing(ModelUnavailable("overloaded", retry_after=0.3), times=1)
    began = time.monotonic()

    result = await ended(Chain("f", retry=FAST).add_step("a", step))

    assert result.status == "completed"
    assert time.monotonic() - began >= 0.3


async def test_the_idempotency_key_is_the_same_for_every_attempt_and_for_every_run_of_a_business_key() -> None:
    keys: list[str] = []

    def charges(data: dict[str, Any], context: StepContext) -> None:
        keys.append(context.idempotency_key)
        if len(keys) % 2:
            raise ValueError("lost on the way back")

    flow = Chain("shop", retry=FAST).add_step("pay", charges)
    await ended(flow, key="order 7")
    await ended(flow, key="order 7")
    assert keys == ["shop/order 7/pay"] * 4

    await ended(flow)
    await ended(flow)
    assert keys[4] == keys[5] != keys[6] == keys[7]


async def test_a_missing_key_names_step_and_key_and_is_not_tried_again() -> None:
    calls: list[int] = []

    def reads(data: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        return {"id": data["order_id"]}

    result = await ended(Chain("f", retry=FAST).add_step("pay", reads), {"order": 7})

    assert result.error == (
        "step 'pay' failed: MissingKey: step 'pay' reads 'order_id', which neither the input nor an earlier step "
        "provided; there is: order"
    )
    assert len(calls) == 1


async def test_sys_exit_in_a_step_ends_the_flow_and_not_the_process() -> None:
    result = await ended(Chain("f", retry=FAST).add_step("a", lambda data: sys.exit("bye")))

    assert result.error == "step 'a' failed: StepExited: step 'a' called sys.exit('bye'); raise an error instead"


async def test_the_message_of_an_error_is_bounded() -> None:
    result = await ended(Chain("f").add_step("a", Failing(InvalidInput("x" * 1_000_000))))

    assert len(str(result.error)) < 2_200
    assert str(result.error).endswith("… (1000000 characters)")


# time


async def test_the_timeout_of_a_step_bounds_one_attempt() -> None:
    calls: list[int] = []

    async def slow_at_first(data: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 1:
            await asyncio.Event().wait()
        return {"calls": len(calls)}

    result = await ended(Chain("f", retry=FAST).add_step("a", slow_at_first, timeout=0.1))

    assert result.data == {"calls": 2}


async def test_a_step_that_is_always_too_slow_fails_the_flow() -> None:
    release = threading.Event()
    calls: list[int] = []

    def slow(data: dict[str, Any]) -> None:
        calls.append(1)
        release.wait(DEADLINE)

    try:
        result = await ended(Chain("f", retry=FAST).add_step("a", slow, timeout=0.05))
    finally:
        release.set()

    assert result.error == "step 'a' failed: StepTimeout: step 'a' took longer than its timeout of 0.05 s"
    assert len(calls) == 3


async def test_the_timeout_of_a_flow_bounds_its_waits_too_and_names_the_step() -> None:
    patient = Retry(maximum_attempts=9, initial_interval=60, maximum_interval=60)
    chain = Chain("f", timeout=0.1, retry=patient).add_step("a", nothing).add_step("b", Failing(ValueError("flaky")))

    result = await ended(chain.add_step("c", nothing))

    assert (result.status, result.ok, result.data) == ("timed_out", False, {})
    assert result.error == "flow 'f' used up its timeout of 0.1 s in step 'b'"
    assert result.steps == {"a": "completed"}


async def test_a_flow_whose_time_is_up_leaves_nothing_running() -> None:
    release, cleaned = threading.Event(), asyncio.Event()

    async def cleans_up(data: dict[str, Any]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    try:
        flow = graph_of(nodes={"a": cleans_up, "b": lambda data: release.wait(DEADLINE)}, timeout=0.1)
        result = await ended(flow)
    finally:
        release.set()

    assert result.error == "flow 'g' used up its timeout of 0.1 s in step 'a', 'b'"
    assert cleaned.is_set()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_step_that_hangs_does_not_keep_the_process_from_ending() -> None:
    code = (
        "import asyncio, threading\n"
        "from beluga_airflow import Graph, run\n"
        "graph = Graph('g', timeout=0.2).add_node('a', lambda data: threading.Event().wait())\n"
        "print(asyncio.run(run(graph, {})).status)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(DEADLINE):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()

    assert (printed, process.returncode) == (b"timed_out\n", 0)


async def test_a_timeout_of_a_steps_own_is_a_failure_and_no_timeout_of_the_flow() -> None:
    result = await ended(Chain("f", retry=ONCE).add_step("a", Failing(TimeoutError("the shop did not answer"))))

    assert (result.status, result.error) == ("failed", "step 'a' failed: TimeoutError: the shop did not answer")


async def test_a_cancelled_run_cancels_its_steps_and_leaves_nothing_running() -> None:
    started, cleaned = asyncio.Event(), asyncio.Event()
    release = threading.Event()

    async def cleans_up(data: dict[str, Any]) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    flow = graph_of(nodes={"a": cleans_up, "b": lambda data: release.wait(DEADLINE), "c": Failing(ValueError())})
    task = asyncio.create_task(ended(flow))
    await started.wait()
    task.cancel()
    try:
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        release.set()

    assert cleaned.is_set()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_step_that_is_cancelled_from_within_fails_and_does_not_cancel_the_run() -> None:
    async def awaits_what_is_cancelled(data: dict[str, Any]) -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        task.cancel()
        await task

    result = await ended(graph_of(nodes={"a": awaits_what_is_cancelled, "b": nothing}))

    assert result.status == "failed"
    assert result.steps == {"a": "failed", "b": "completed"}


async def test_a_step_fails_by_whatever_it_raises_and_is_not_tried_again() -> None:
    class HaltError(BaseException):
        pass

    tried = []

    async def halts(data: dict[str, Any]) -> None:
        tried.append("a")
        raise HaltError("all of it")

    result = await ended(graph_of("ab", nodes={"a": halts, "b": nothing}, retry=FAST))

    why = "step 'a' failed: StepExited: step 'a' raised HaltError: all of it; raise an Exception instead"
    assert (result.status, result.error, tried) == ("failed", why, ["a"])


async def test_an_error_that_cannot_say_what_it_is_fails_its_step() -> None:
    class SpeechlessError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def speechless(data: dict[str, Any]) -> None:
        raise SpeechlessError

    result = await ended(graph_of("ab", nodes={"a": speechless, "b": nothing}))

    assert (result.status, result.error) == (
        "failed",
        "step 'a' failed: SpeechlessError: (its text raised RuntimeError)",
    )


# steps that will not be cancelled


async def test_a_step_that_swallows_its_timeout_has_used_it_up() -> None:
    async def swallows(data: dict[str, Any]) -> dict[str, Any]:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return {"done": True}

    graph = Graph("g").add_node("a", swallows, timeout=0.05, retry=ONCE)

    result = await ended(graph)

    assert result.error == "step 'a' failed: StepTimeout: step 'a' took longer than its timeout of 0.05 s"


async def test_a_flow_that_runs_out_of_time_names_a_step_that_swallows_it() -> None:
    async def swallows(data: dict[str, Any]) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    result = await ended(Graph("g", timeout=0.05).add_node("a", swallows))

    assert result.error == "flow 'g' used up its timeout of 0.05 s in step 'a'"


async def test_a_step_that_cannot_be_cancelled_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "LEAVING", 0.1)
    end = asyncio.Event()
    undone: list[str] = []

    async def goes_on(data: dict[str, Any]) -> dict[str, Any]:
        while not end.is_set():
            with suppress(asyncio.CancelledError):
                await end.wait()
        return {"late": True}

    graph = Graph("g", timeout=0.05).add_node("a", goes_on, compensate=lambda data: undone.append("a"))
    result = await ended(graph.add_node("b", nothing).add_edge("a", "b"))
    end.set()
    await asyncio.sleep(0.05)

    assert result.status == "timed_out"
    assert str(result.error).startswith(
        "flow 'g' used up its timeout of 0.05 s in step 'a'; step 'a' could not be undone"
    )
    assert (result.steps, undone) == ({}, [])
    assert "flow 'g' leaves behind what goes on although it is cancelled: step 'a'" in caplog.text


async def test_no_attempt_begins_when_the_flow_is_over() -> None:
    attempts: list[int] = []

    async def makes_another_error_of_it(data: dict[str, Any], context: StepContext) -> None:
        attempts.append(context.attempt)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionError("lost") from None

    flow = Chain("f", timeout=0.05, retry=Retry(maximum_attempts=5, initial_interval=0))
    result = await ended(flow.add_step("a", makes_another_error_of_it))

    assert (result.status, attempts) == ("timed_out", [1])


async def test_a_step_that_cancels_its_own_task_fails() -> None:
    async def cancels_itself(data: dict[str, Any]) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.Event().wait()

    result = await ended(graph_of(nodes={"a": cancels_itself, "b": nothing}, retry=FAST))

    why = "step 'a' failed: StepExited: step 'a' cancelled its own task; raise an error instead"
    assert (result.status, result.error, result.steps["b"]) == ("failed", why, "completed")


async def test_what_a_step_does_to_its_task_is_nothing_to_the_next() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def leaves_traces(data: dict[str, Any]) -> None:
        variable.set("from a")
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, task.cancel)

    async def looks(data: dict[str, Any]) -> None:
        seen.append(variable.get())
        await asyncio.sleep(0.1)

    result = await ended(Chain("c", retry=ONCE).add_step("a", leaves_traces).add_step("b", looks))

    assert (result.status, seen) == ("completed", ["unset"])
