"""A decision, and its memory, are checked before anything runs: whatever they are made of."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from beluga_airflow import Chain, Decision, InvalidFlow, Memory

SOUND: dict[str, Any] = {"question": "?", "choices": ["yes", "no"], "reads": ["x"]}
FIELDS = [field.name for field in dataclasses.fields(Decision)]


class Verdict(BaseModel):
    level: int


class Array:
    """As numpy's: a comparison gives another, which is neither true nor false."""

    def __eq__(self, other: object) -> Any:
        return Array()

    __ne__ = __eq__

    def __bool__(self) -> bool:
        raise ValueError("the truth value of an array is ambiguous")


class Unfit:
    """Of no use at all."""

    __hash__ = None  # type: ignore[assignment]  # which is the point

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __bool__ = __eq__ = __iter__ = __len__ = __repr__  # type: ignore[assignment]  # none of them works


def refused(**changes: Any) -> str:
    decision = Decision(**SOUND | changes)
    with pytest.raises(InvalidFlow) as caught:
        Chain("f").add_step("a", decision).check()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"question": None}, "its question is None, it must be a text"),
        ({"question": b"?"}, "its question is b'?', it must be a text"),
        ({"question": " "}, "its question is empty"),
        ({"rules": 3}, "rules is 3, it must be a list of pairs of a predicate and an answer"),
        ({"rules": None}, "rules is None, it must be a list of pairs"),
        ({"rules": "no"}, "rules is 'no', it must be a list of pairs"),
        ({"rules": [3]}, "each of its rules must be a pair of a predicate and an answer"),
        ({"rules": [("yes", lambda data: True)]}, "each of its rules must be a pair of a predicate and an answer"),
        ({"max_reprompts": "1"}, "max_reprompts is '1', it must be a whole number, 0 or more"),
        ({"max_reprompts": -1}, "max_reprompts is -1, it must be a whole number, 0 or more"),
        ({"max_reprompts": True}, "max_reprompts is True, it must be a whole number"),
        ({"max_tokens": "x"}, "max_tokens is 'x', it must be a whole number, 1 or more"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5, it must be a whole number, 1 or more"),
        ({"choices": [["a"]]}, "a choice must be a text that is not empty"),
        ({"choices": {"a": "", 2: ""}}, "a choice must be a text that is not empty"),
        ({"choices": {"a": "", "b": 2}}, "what choices says about a choice must be a text"),
        ({"choices": 3}, "choices is a int, it must be a mapping or a list"),
        ({"choices": b"ab"}, "choices is a bytes, it must be a mapping or a list"),
        ({"choices": {"a", "b"}}, "choices is a set, it must be a mapping or a list"),
        ({"reads": [1]}, "reads names 1, it must name keys, which are texts"),
        ({"reads": [["x"]]}, "reads names ['x'], it must name keys"),
        ({"reads": 3}, "reads is 3, it must be a list of keys"),
        ({"reads": None}, "reads is None, it must be a list of keys"),
        ({"reads": b"x"}, "reads names 120, it must name keys"),
        ({"reads": iter("x")}, "it must be a list of keys"),
        ({"reads": ""}, "reads is the text '', it must be a list of keys"),
        ({"output_key": 3}, "output_key is 3, it must be a text"),
        ({"instructions": 3}, "instructions is 3, it must be a text"),
        ({"model": 3}, "model is 3, it must be a text"),
        ({"llm_conn_id": 3}, "llm_conn_id is 3, it must be a text"),
        ({"reason": "no"}, "reason is 'no', it must be True or False"),
        ({"on_uncertain": ["fail"]}, "on_uncertain is ['fail'], it must be 'fallback' or 'fail'"),
        ({"on_uncertain": Array()}, "it must be 'fallback' or 'fail'"),
        ({"fallback": Array()}, "of its rules or fallback, is none of its choices"),
        ({"fallback": ["yes"]}, "['yes'], of its rules or fallback, is none of its choices"),
        ({"choices": None, "output_type": [bool]}, "it must be bool, int, float or a pydantic model"),
        ({"choices": None, "output_type": Array()}, "it must be bool, int, float or a pydantic model"),
        ({"choices": None, "output_type": int, "fallback": "1"}, "'1', of its rules or fallback, is no int"),
        ({"memory": "customer"}, "memory is 'customer', it must be a Memory"),
        ({"memory": Memory(key="")}, "memory: key is '', it must name the field of the data"),
        ({"memory": Memory(key=None)}, "memory: key is None"),  # type: ignore[arg-type]
        ({"memory": Memory(key="x", max_tokens=0)}, "memory: max_tokens is 0, it must be a whole number, 1 or more"),
        ({"memory": Memory(key="x", max_tokens=1.5)}, "memory: max_tokens is 1.5"),  # type: ignore[arg-type]
        ({"memory": Memory(key="x", max_tokens=True)}, "memory: max_tokens is True"),
        ({"memory": Memory(key="x", name=" ")}, "memory: name is ' ', it must be a text that is not empty"),
        ({"memory": Memory(key="x", name=7)}, "memory: name is 7"),  # type: ignore[arg-type]
        ({"memory": Memory(key="x", ttl=0)}, "memory: ttl is 0, it must be seconds or a timedelta, above 0"),
        ({"memory": Memory(key="x", ttl=timedelta(0))}, "memory: ttl is datetime.timedelta(0)"),
        ({"memory": Memory(key="x", ttl=float("nan"))}, "memory: ttl is nan"),
        ({"memory": Memory(key="x", ttl="1 day")}, "memory: ttl is '1 day'"),  # type: ignore[arg-type]
    ],
)
def test_what_means_nothing_is_named(changes: dict[str, Any], says: str) -> None:
    message = refused(**changes)
    assert message.startswith("flow 'f' cannot run: step 'a': ")
    assert says in message


def test_all_faults_are_told_at_once() -> None:
    message = refused(question=None, rules=3, max_tokens="x", memory=Memory(key="", max_tokens=0))
    assert message.startswith("flow 'f' cannot run: 5 faults: ")


def test_a_fault_is_of_bounded_length() -> None:
    long = "x" * 1_000_000
    assert len(refused(rules=long, model=[long], memory=Memory(key="x", max_tokens=long))) < 2_000  # type: ignore[arg-type]


class Numbers:
    @classmethod
    def model_json_schema(cls) -> int:
        return 3


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers() | st.text() | st.lists(st.text())),
    st.lists(st.tuples(st.text() | st.just(callable), st.text())),
    st.sets(st.text()),
    st.dictionaries(st.text() | st.integers(), st.none() | st.text()),
    st.builds(iter, st.lists(st.text())),
    st.sampled_from([Array(), Unfit(), [Array()], [Unfit()], (Unfit(), Array()), {"x": Unfit()}, object(), Ellipsis]),
    st.sampled_from([Array, Unfit, Numbers, Verdict, int, complex, len, lambda: 3, timedelta(1), Memory(key="x")]),
    st.builds(Memory, key=st.none() | st.text(), max_tokens=st.text(), ttl=st.timedeltas() | st.floats()),
)


@given(st.dictionaries(st.sampled_from(FIELDS), junk, max_size=4))
def test_any_junk_is_refused_and_nothing_else(changes: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidFlow):
        Chain("f", inputs=["x"]).add_step("a", Decision(**SOUND | changes)).check()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [Array(), Unfit(), [Unfit()], Unfit, Numbers])
def test_what_nobody_can_look_at_is_refused_too(field: str, value: Any) -> None:
    if field != "fallback" or not callable(value):
        assert "flow 'f' cannot run" in refused(
            **{"choices": None if field == "output_type" else ["a", "b"], field: value}
        )


@pytest.mark.parametrize(
    "memory",
    [
        Memory(key="customer"),
        Memory(key="customer", max_tokens=1, name="any/name \N{SNOWMAN}", ttl=0.1),
        Memory(key="customer", ttl=timedelta(days=30)),
    ],
)
def test_a_sound_memory_is_taken(memory: Memory) -> None:
    Chain("f", inputs=["x", "customer"]).add_step("a", Decision(**SOUND, memory=memory)).check()


def test_the_key_of_the_conversation_must_be_there_as_what_is_read_must() -> None:
    talk = Decision(**SOUND, memory=Memory(key="customer"))
    with pytest.raises(InvalidFlow) as caught:
        Chain("f", inputs=["x"]).add_step("a", talk).check()
    assert str(caught.value) == (
        "flow 'f' cannot run: step 'a' finds its conversation by 'customer', which neither the input nor an earlier "
        "step provides"
    )
    begin: Any = {"provides": ["customer"]}
    Chain("f", inputs=["x"]).add_step("b", lambda data: None, **begin).add_step("a", talk).check()
    Chain("f").add_step("a", talk).check()


def test_a_generator_of_keys_is_not_used_up() -> None:
    def keys() -> Iterator[str]:
        yield "x"

    assert "it must be a list of keys" in refused(reads=keys())
