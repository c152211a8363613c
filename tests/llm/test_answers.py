"""What a decision may answer: the schema that is sent, and the check of what comes back."""

from __future__ import annotations

import datetime
import enum
import json
from decimal import Decimal as Exact
from typing import Any, Literal

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, field_validator

from beluga_airflow import Chain, Decision, InvalidFlow
from beluga_airflow.llm.answers import Misfit, fitted, parsed, schema_of
from beluga_airflow.llm.model_requests import ChatRequest
from beluga_airflow.testing import reply


class Level(enum.Enum):
    LOW = "low"
    HIGH = "high"


class Note(BaseModel):
    text: str = "none"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    owner: Verdict | None


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    default: int = 3
    type: str = Field(min_length=1, max_length=5)
    level: Level
    note: Note = Field(Note(), description="what to tell the customer")
    animal: Cat | Dog = Field(discriminator="kind")
    notes: list[Note] = Field([], max_length=2)
    until: datetime.date | None = None
    price: Exact
    page: HttpUrl | None = None


VERDICT = {
    "default": 1,
    "type": "a",
    "level": "low",
    "note": {"text": "t"},
    "animal": {"kind": "dog", "owner": None},
    "notes": [{"text": "n"}],
    "until": "2026-01-02",
    "price": "1.50",
    "page": None,
}


def decision(output: Any = None, **options: Any) -> Decision:
    given = {"choices": ["yes", "no"]} if output is None else {"output_type": output}
    return Decision("Is it?", reads=("x",), **{**given, **options})


def parse(asked: Decision, answer: Any, **rest: Any) -> tuple[Any, str | None]:
    return parsed(asked, reply(json.dumps({"answer": answer, **rest})))


def misfit(asked: Decision, content: str) -> str:
    with pytest.raises(Misfit) as caught:
        parsed(asked, reply(content))
    assert "SECRET" not in str(caught.value)
    return str(caught.value)


# what is asked for


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (decision(), {"type": "string", "enum": ["yes", "no"]}),
        (decision(choices={"no": "", "yes": ""}), {"type": "string", "enum": ["no", "yes"]}),
        (decision(bool), {"type": "boolean"}),
        (decision(int), {"type": "integer"}),
        (decision(float), {"type": "number"}),
    ],
)
def test_the_schema_of_a_plain_answer(asked: Decision, answer: dict[str, Any]) -> None:
    assert schema_of(asked) == {
        "type": "object",
        "properties": {"answer": answer, "reason": {"type": "string"}},
        "required": ["answer", "reason"],
        "additionalProperties": False,
    }


def test_no_reason_is_asked_for_when_none_is_wanted() -> None:
    assert list(schema_of(decision(bool, reason=False))["properties"]) == ["answer"]


def test_the_schema_of_a_model_is_strict() -> None:
    schema = schema_of(decision(Verdict))
    Draft202012Validator.check_schema(schema)
    # as the OpenAI API does, the model server refuses what is not strict
    ChatRequest.read(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "?"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "decision", "strict": True, "schema": schema},
            },
        }
    )
    answer = schema["$defs"]["Verdict"]
    assert set(answer["required"]) == set(VERDICT)
    assert answer["properties"]["note"] == {
        "anyOf": [{"$ref": "#/$defs/Note"}],
        "description": "what to tell the customer",
    }
    assert answer["properties"]["animal"]["anyOf"] == [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
    assert answer["properties"]["default"] == {"type": "integer", "title": "Default"}
    refused = {"default", "oneOf", "discriminator", "minLength", "maxLength", "allOf", "uniqueItems", "prefixItems"}
    assert not refused & keywords(schema)
    assert "uri" not in json.dumps(schema), "a format that the API does not know"
    assert "(?" not in json.dumps(schema), "a pattern that looks ahead"
    # what can be answered by the schema is an answer
    assert Draft202012Validator(schema).is_valid({"answer": VERDICT, "reason": "r"})


def keywords(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    parts = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values(), schema.get("items")]
    return set(schema).union(*(keywords(part) for part in [*parts, *schema.get("anyOf", [])]))


@pytest.mark.parametrize(
    ("field", "place"),
    [
        (dict[str, int], "Open.field of"),
        (list[dict[str, Note]], r"Open.field\[\] of"),
        (tuple[int, str], "Open.field of"),
        (list, r"Open.field\[\] of"),
        (Any, "Open.field of"),
        (object, "Open.field of"),
        (dict[str, int] | None, "Open.field of"),
    ],
)
def test_a_model_that_no_strict_schema_can_hold_is_refused_when_checked(field: Any, place: str) -> None:
    model = type("Open", (BaseModel,), {"__annotations__": {"field": field}})
    chain = Chain("c").add_step("decide", decision(model))
    with pytest.raises(InvalidFlow, match=f"step 'decide': {place} its output_type leaves open what it holds"):
        chain.check()


def test_a_model_with_any_further_fields_is_refused() -> None:
    class Loose(BaseModel):
        model_config = ConfigDict(extra="allow")
        x: int

    class Around(BaseModel):
        loose: Loose

    assert decision(Verdict).faults() == []
    (fault,) = decision(Around).faults()
    assert fault.startswith("Loose of its output_type leaves open")


@pytest.mark.parametrize("kind", [dict, list[int], "bool", str, Exact, object(), int | None])
def test_another_output_type_is_refused(kind: Any) -> None:
    (fault,) = decision(kind).faults()
    assert fault.endswith("it must be bool, int, float or a pydantic model")


def test_a_model_without_a_schema_is_refused() -> None:
    class Odd(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        thing: Draft202012Validator

    (fault,) = decision(Odd).faults()
    assert fault.startswith("its output_type Odd has no JSON schema:")


@pytest.mark.parametrize(
    ("kind", "fallback"),
    [(bool, "yes"), (bool, 1), (int, True), (int, 1.5), (float, "1"), (float, False), (None, "maybe"), (None, None)],
)
def test_an_own_answer_outside_the_bounds_is_refused(kind: Any, fallback: Any) -> None:
    assert f"{fallback!r}, of its rules or fallback, is no" in " ".join(decision(kind, fallback=fallback).faults())
    rules = [(lambda _: True, fallback)]
    assert f"{fallback!r}, of its rules or fallback, is no" in " ".join(decision(kind, rules=rules).faults())


@pytest.mark.parametrize(
    ("kind", "fallback"), [(bool, False), (int, 0), (float, 1), (float, 0.5), (None, "yes"), (bool, lambda _: "?")]
)
def test_an_own_answer_inside_the_bounds_is_fine(kind: Any, fallback: Any) -> None:
    assert decision(kind, fallback=fallback).faults() == []


@pytest.mark.parametrize("rules", [["yes"], [("x", "yes")], [(len,)], [(len, "yes", 3)], [{"x": 1}]])
def test_a_rule_that_is_none_is_refused(rules: Any) -> None:
    assert decision(rules=rules).faults() == ["each of its rules must be a pair of a predicate and an answer"]


def test_choices_without_an_order_are_refused() -> None:
    assert decision(choices={"yes", "no"}).faults() == ["choices is a set, it must be a mapping or a list"]


# what comes back


@pytest.mark.parametrize(
    ("kind", "answer", "value"),
    [
        (None, "yes", "yes"),
        (bool, False, False),
        (int, 7, 7),
        (int, 7.0, 7),
        (int, -(2**63) + 1, -(2**63) + 1),
        (float, 7, 7.0),
        (float, -0.5, -0.5),
    ],
)
def test_an_answer_that_fits(kind: Any, answer: Any, value: Any) -> None:
    given, reason = parse(decision(kind), answer, reason="so")
    assert (given, type(given), reason) == (value, type(value), "so")


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (None, "maybe"),
        (None, "Yes"),
        (None, "yes "),
        (None, ["yes"]),
        (None, {"yes": 1}),
        (None, True),
        (None, None),
        (bool, "true"),
        (bool, 1),
        (bool, None),
        (int, 7.5),
        (int, "7"),
        (int, True),
        (int, None),
        (int, 2**63),
        (int, 1e300),
        (float, "1"),
        (float, True),
        (float, [1]),
    ],
)
def test_an_answer_that_does_not_fit(kind: Any, answer: Any) -> None:
    assert misfit(decision(kind), json.dumps({"answer": answer})).startswith("the answer is no")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "1" + "0" * 5000])
@pytest.mark.parametrize("kind", [int, float])
def test_a_number_that_is_none(kind: type, number: str) -> None:
    assert misfit(decision(kind), f'{{"answer": {number}}}').startswith("the answer is not")


@pytest.mark.parametrize(
    "content",
    ["", "SECRET", "null", "[]", "true", '"answer"', "{}", '{"Answer": "yes"}', '{"answer": "yes"', "[" * 100_000],
)
def test_content_that_is_no_answer(content: str) -> None:
    assert misfit(decision(), content).startswith("the answer is not")


VERDICT_TEXT = json.dumps({"answer": "yes", "reason": "so"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f"\n {VERDICT_TEXT} ", "so"),
        (f"```json\n{VERDICT_TEXT}\n```", "so"),
        (f"```{VERDICT_TEXT}```", "so"),
        (f"It is clear:\n\n```JSON\n{VERDICT_TEXT}\n```\nAs asked.", "so"),
        ('{"answer": "A: yes", "reason": "```{"}', "```{"),
        ("yes", None),
        (" yes\n", None),
        ("A: yes", None),
    ],
)
def test_the_forms_of_an_answer_in_words(content: str, reason: str | None) -> None:
    assert parsed(decision(), reply(content)) == ("yes", reason)


@pytest.mark.parametrize(
    "content",
    [
        f"It is clear: {VERDICT_TEXT}",
        f"{VERDICT_TEXT} As asked.",
        f"{VERDICT_TEXT}\n{VERDICT_TEXT}",
        f"```\n{VERDICT_TEXT}\n{VERDICT_TEXT}\n```",
        f"```\n{VERDICT_TEXT}\n```\n```\n{VERDICT_TEXT}\n```",
        f"```\nno\n```\n```\n{VERDICT_TEXT}\n```",
        f'{{"answer": "no"}} ```{VERDICT_TEXT}```',
        f'```{VERDICT_TEXT}``` or {{"answer": "no"}}',
        f"```{VERDICT_TEXT}",
        f"[{VERDICT_TEXT}]",
        "```yes```",
        '{"answer": "yes", "answer": "no"}',
        '{"answer": "yes", "reason": {"x": 1, "x": 2}}',
        '"yes"',
        "yes.",
        "Yes",
        "A",
        "B: yes",
        "A: no",
        "A:yes",
        "yes no",
        "answer: yes",
        "true",
    ],
)
def test_nothing_else_is_an_answer_in_words(content: str) -> None:
    assert misfit(decision(), content).startswith("the answer is n")


def test_bool_may_be_bare() -> None:
    assert parsed(decision(bool), reply(" true\n")) == (True, None)
    assert parsed(decision(bool), reply("false")) == (False, None)
    for content in ("True", "1", '"true"', "yes", "null"):
        assert misfit(decision(bool), content).startswith("the answer is not")
    assert misfit(decision(int), "7").startswith("the answer is not an object")


def test_much_that_is_nearly_a_block_is_no_trouble() -> None:
    for content in (
        "```" * 50_000,
        "```{" + "} " * 50_000,
        "```{" + "}``" * 30_000,
        "x" * 200_000,
        " " * 200_000 + "{",
    ):
        assert misfit(decision(), content).startswith("the answer is n")


def test_what_the_client_found_wrong_is_said() -> None:
    with pytest.raises(Misfit, match=r"^the model refused to answer$"):
        parsed(decision(), reply("", trouble="the model refused to answer"))


def test_more_than_asked_is_passed_over() -> None:
    assert parse(decision(reason=False), "no", reason="so", extra=1) == ("no", None)
    assert parse(decision(), "no") == ("no", None)


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("a\nb\x00c\x1b[31md\N{RIGHT-TO-LEFT OVERRIDE}e\ud800f", "a b c [31md e f"),
        ("naïve — ok", "naïve — ok"),
        ("x" * 10_000, "x" * 500),
        ({"why": "so"}, '{"why": "so"}'),
        (5, "5"),
        ("", None),
        (None, None),
    ],
)
def test_a_reason_is_one_harmless_line(reason: Any, kept: str | None) -> None:
    assert parse(decision(), "yes", reason=reason) == ("yes", kept)
    assert kept is None or kept.encode()


def test_a_model_is_read_from_json_and_returned_as_json() -> None:
    value, _ = parse(decision(Verdict), VERDICT)
    assert value == VERDICT
    json.dumps(value, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"level": "SECRET"}, "level: Input should be 'low' or 'high'"),
        ({"SECRET": 1}, "as a whole: Extra inputs are not permitted"),
        ({"animal": {"kind": "SECRET"}}, "animal: its tag is none of those expected"),
        ({"type": "SECRET"}, "type: String should have at most 5 characters"),
        ({"price": "SECRET"}, "price: "),
        ({"default": "1"}, "default: Input should be a valid integer"),
        ({"notes": [{"text": "SECRET"}, {}, {}]}, "notes: List should have at most 2 items"),
    ],
)
def test_a_model_that_does_not_fit_says_where_and_quotes_nothing(change: dict[str, Any], says: str) -> None:
    told = misfit(decision(Verdict), json.dumps({"answer": VERDICT | change}))
    assert told.startswith("the answer is no Verdict: ")
    assert says in told


def test_what_is_said_of_a_misfit_is_bounded() -> None:
    class Wordy(BaseModel):
        x: int

        @field_validator("x")
        @classmethod
        def refuse(cls, value: int) -> int:
            raise ValueError(str(value) * 10_000)

    assert len(misfit(decision(Wordy), '{"answer": {"x": 1}}')) == 500


def test_numbers_in_a_model_that_json_cannot_hold() -> None:
    class Ratio(BaseModel):
        ratio: float

    assert misfit(decision(Ratio), '{"answer": {"ratio": 1e999}}').startswith("the answer is no Ratio")
    assert parse(decision(Ratio), {"ratio": 0.5})[0] == {"ratio": 0.5}


def test_half_a_character_in_a_model_does_not_fit() -> None:
    assert misfit(decision(Note), '{"answer": {"text": "\\ud800"}}').startswith("the answer is no Note")


def test_the_authors_own_answer_may_be_an_object() -> None:
    class Named(BaseModel):
        number: Exact = Field(alias="no")

    asked = decision(Named)
    assert fitted(asked, Named(no=Exact("1.50"))) == {"number": "1.50"}
    assert fitted(asked, {"no": Exact("1.50")}) == {"number": "1.50"}
    with pytest.raises(Misfit, match="the answer is no Named"):
        fitted(asked, {"no": object()})
