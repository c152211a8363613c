from __future__ import annotations

import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import pydantic
import pytest

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.model_requests import Prompt, RefusedRequest
from beluga_airflow.llm.model_rules import DEFAULT_REASON, content_for
from beluga_airflow.llm.model_setup import load_setup

CHOICES = {"type": "string", "enum": ["expedite", "standard"]}


def decision(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"answer": answer, "reason": {"type": "string"}},
        "required": ["answer", "reason"],
        "additionalProperties": False,
    }


def text_for(rules: Any, prompt: Prompt, schema: dict[str, Any] | None) -> str:
    return content_for(load_setup(rules).rules, prompt, schema).text


def answer_to(data: dict[str, Any], *rules: dict[str, Any], question: str = "How?") -> Any:
    content = text_for(rules, Prompt(question=question, data=data), decision(CHOICES))
    return json.loads(content)["answer"]


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ("gold", "gold", True),
        ("gold", "silver", False),
        (True, True, True),
        (True, 1, False),
        (0, False, False),
        (None, None, True),
        ({"gt": 200}, 200.01, True),
        ({"gt": 200}, 200, False),
        ({"gte": 200}, 200, True),
        ({"lt": 200}, 199, True),
        ({"lte": 200}, 200, True),
        ({"lte": 200}, 201, False),
        ({"gte": 200, "lt": 300}, 250, True),
        ({"gte": 200, "lt": 300}, 300, False),
        ({"gt": 200}, "250.00", True),
        ({"gt": 200}, "many", False),
        ({"gt": 0}, True, False),
        ({"gt": 0}, None, False),
        ({"gt": 0}, [1], False),
        ({"gte": "2010-12-01"}, "2010-12-02", True),
        ({"gte": "2010-12-01"}, 20101202, False),
        ({"eq": [1, 2]}, [1, 2], True),
        ({"eq": {"a": 1}}, {"a": 1}, True),
        ({"ne": "gold"}, "silver", True),
        ({"ne": "gold"}, "gold", False),
        ({"in": ["gold", "silver"]}, "silver", True),
        ({"in": [1]}, True, False),
        ({"not_in": ["gold"]}, "silver", True),
        ({"not_in": ["gold"]}, "gold", False),
    ],
)
def test_a_condition_compares_json_values(condition: Any, value: Any, holds: bool) -> None:
    answer = answer_to({"key": value}, {"when": {"key": condition}, "answer": "standard"})
    assert answer == ("standard" if holds else "expedite")


@pytest.mark.parametrize("condition", [None, {"ne": 1}, {"not_in": [1]}, {"eq": None}])
def test_a_key_that_the_data_lacks_never_matches(condition: Any) -> None:
    assert answer_to({}, {"when": {"key": condition}, "answer": "standard"}) == "expedite"


def test_every_condition_must_hold_and_the_first_matching_rule_answers() -> None:
    rules = (
        {"when": {"tier": "gold", "value": {"gt": 100}}, "answer": "expedite", "reason": "both"},
        {"when": {"tier": "gold"}, "answer": "standard", "reason": "tier only"},
        {"answer": "expedite"},
    )
    schema = decision(CHOICES)

    def asked(**data: Any) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(text_for(rules, Prompt(question="", data=data), schema))
        return content

    assert asked(tier="gold", value=101) == {"answer": "expedite", "reason": "both"}
    assert asked(tier="gold", value=99) == {"answer": "standard", "reason": "tier only"}
    assert asked() == {"answer": "expedite", "reason": "rule 3 of the simulation"}


def test_a_question_is_looked_for_outside_the_data() -> None:
    rule = {"question": "refund", "answer": "standard"}
    assert answer_to({}, rule, question="May we refund this?") == "standard"
    assert answer_to({"note": "refund"}, rule) == "expedite"


def test_a_file_of_rules_is_read_as_yaml_or_json(tmp_path: Path) -> None:
    as_yaml = tmp_path / "rules.yaml"
    as_yaml.write_text("- when: {tier: gold, value: {gte: 200}}\n  answer: expedite\n- answer: standard\n")
    as_json = tmp_path / "rules.json"
    as_json.write_text(
        json.dumps([{"when": {"tier": "gold", "value": {"gte": 200}}, "answer": "expedite"}, {"answer": "standard"}])
    )
    assert load_setup(as_yaml).rules == load_setup(str(as_json)).rules
    assert len(load_setup(as_yaml).rules) == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- answer: a\n- wen: {}\n  answer: b\n", ["rule 2, wen:"]),
        ("- when: {}\n", ["rule 1, answer: Field required"]),
        (
            "- answer: a\n  when: {value: {gt: true}}\n",
            ["rule 1, when.value.gt:", "must be a number or text"],
        ),
        ("- answer: a\n  when: {value: {gt: null}}\n", ["rule 1, when.value.gt:"]),
        ("- answer: a\n  when: {value: {greater: 1}}\n", ["rule 1, when.value.greater:"]),
        ("- answer: a\n  when: {value: {}}\n", ["rule 1, when.value:", "at least one of gt"]),
        ("- answer: a\n  when: {value: {in: gold}}\n", ["rule 1, when.value.in:"]),
        ("- answer: a\n  when: {value: 2010-12-01}\n", ["rule 1, when.value.eq"]),
        ("- answer: .nan\n", ["rule 1, answer"]),
        ("- wrong: 1\n  answer: a\n- answer: b\n- 7\n", ["rule 1, wrong:", "rule 3, as a whole:"]),
        ("answer: a\n", ["answer: unknown; there can be: endpoint, models, troubles, rules (line 1)"]),
        ("", ["rules must be a list, not NoneType"]),
        ("- answer: [\n", ["cannot be read"]),
        ("- answer: !!python/object/apply:os.getcwd []\n", ["cannot be read"]),
    ],
)
def test_a_bad_file_is_refused_with_file_rule_and_field(tmp_path: Path, text: str, named: list[str]) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(InvalidSetting) as refused:
        load_setup(path)
    for part in ["rules.yaml", *named]:
        assert part in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"nowhere\.yaml"):
        load_setup(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (CHOICES, "expedite"),
        ({"type": "boolean"}, False),
        ({"type": "integer"}, 0),
        ({"type": "number"}, 0),
        ({"type": "integer", "minimum": 3}, 3),
        ({"type": "integer", "maximum": -2}, -2),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, 0.5),
        ({"type": "integer", "exclusiveMinimum": 4}, 5),
        ({"type": "string"}, ""),
        ({"type": "string", "minLength": 2}, "xx"),
        ({"type": ["string", "null"]}, ""),
        ({"type": "null"}, None),
        ({"const": 7}, 7),
        ({"type": "array", "items": {"type": "boolean"}}, []),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [False, False]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 0),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
                "required": ["a"],
            },
            {"a": 0},
        ),
    ],
)
def test_the_default_is_the_least_value_of_the_schema(schema: dict[str, Any], answer: Any) -> None:
    content = json.loads(text_for((), Prompt(question="", data={}), decision(schema)))
    assert content == {"answer": answer, "reason": DEFAULT_REASON}
    assert list(content) == ["answer", "reason"]


class Line(pydantic.BaseModel):
    amount: float = pydantic.Field(gt=0)
    ordered: datetime.date
    reference: uuid.UUID


class Verdict(pydantic.BaseModel):
    line: Line
    lines: list[Line] = pydantic.Field(min_length=1)
    seen: datetime.datetime | None


def test_the_default_for_a_pydantic_model_is_one() -> None:
    schema = Verdict.model_json_schema()
    definitions = schema.pop("$defs")
    content = text_for((), Prompt(question="", data={}), decision(schema) | {"$defs": definitions})
    verdict = Verdict.model_validate(json.loads(content)["answer"])
    assert verdict.lines == [verdict.line]


def test_a_schema_without_an_answer_takes_the_rules_answer_whole() -> None:
    schema = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
    prompt = Prompt(question="", data={})
    assert json.loads(text_for([{"answer": {"total": 3}}], prompt, schema)) == {"total": 3}
    assert json.loads(text_for((), prompt, schema)) == {"total": 0}


def test_without_a_schema_the_answer_is_text() -> None:
    prompt = Prompt(question="", data={})
    assert text_for([{"answer": "hello"}], prompt, None) == "hello"
    assert text_for([{"answer": [1]}], prompt, None) == "[1]"
    assert text_for((), prompt, None) == DEFAULT_REASON


@pytest.mark.parametrize("answer", ["expdite", 1, None, {"answer": "expedite"}])
def test_a_rule_that_the_schema_does_not_allow_is_refused(answer: Any) -> None:
    with pytest.raises(RefusedRequest, match=r"rule 1 of the simulation .*mend the rule.*\$\.answer"):
        answer_to({}, {"answer": answer})


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "string", "pattern": "^[0-9]{5}$"}, "write a rule"),
        ({"$ref": "#/$defs/missing"}, "leads to nothing"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "leads to nothing"),
        ({"$ref": "#/$defs/tree"}, "recursive"),
        ({"type": "string", "pattern": "("}, "cannot be used"),
    ],
)
def test_a_schema_without_a_default_asks_for_a_rule(schema: dict[str, Any], named: str) -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}, "required": ["left"]}
    with pytest.raises(RefusedRequest, match=named):
        content_for((), Prompt(question="", data={}), decision(schema) | {"$defs": {"tree": tree}})


def test_a_schema_elsewhere_is_not_fetched() -> None:
    rules = load_setup([{"answer": 1}]).rules
    with pytest.raises(RefusedRequest, match="cannot be used"):
        content_for(rules, Prompt(question="", data={}), decision({"$ref": "http://127.0.0.1:9/schema"}))
