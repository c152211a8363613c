"""What the model server answers: by rules, or where none matches by a default that fits the request's schema.

A rules file (YAML, or JSON by its suffix) is a list; the first rule that matches answers::

    - question: How should this order be handled?     # optional: a part of the text around the data
      when:                                           # optional: every key must hold
        customer_tier: gold
        order_value: {gte: 200, lt: 1000}
        country: {in: [France, Spain]}
      answer: expedite
      reason: a large order of a gold customer        # optional

A key that the data lacks never matches. ``gt``, ``gte``, ``lt`` and ``lte`` compare a number with a number or
with text that is one (a decimal travels as text), and text with text; the others compare JSON values exactly.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from referencing import Registry
from referencing.exceptions import Unresolvable

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.model_requests import Prompt, RefusedRequest, Schema

DEFAULT_REASON = "a default of the simulation: no rule matched"


def _bound(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number or text")
    return value


Bound = Annotated[Any, AfterValidator(_bound)]


def _same(value: object, expected: object) -> bool:
    # in JSON, true is not 1
    return isinstance(value, bool) == isinstance(expected, bool) and value == expected


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[object, Any], bool]:
    def holds(value: object, bound: object) -> bool:
        if isinstance(bound, str):
            return isinstance(value, str) and compare(value, bound)
        number = _as_number(value)
        return number is not None and compare(number, bound)

    return holds


_COMPARATORS: dict[str, Callable[[object, Any], bool]] = {
    "gt": _ordered(operator.gt),
    "gte": _ordered(operator.ge),
    "lt": _ordered(operator.lt),
    "lte": _ordered(operator.le),
    "eq": _same,
    "ne": lambda value, expected: not _same(value, expected),
    "in_": lambda value, several: any(_same(value, one) for one in several),
    "not_in": lambda value, several: not any(_same(value, one) for one in several),
}


class Comparison(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What one value of the data must be: every comparator that is given must hold."""

    gt: Bound = None
    gte: Bound = None
    lt: Bound = None
    lte: Bound = None
    eq: JsonValue = None
    ne: JsonValue = None
    in_: list[JsonValue] = Field(default=[], alias="in")
    not_in: list[JsonValue] = []

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give at least one of gt, gte, lt, lte, eq, ne, in, not_in")
        return self

    def holds(self, value: object) -> bool:
        """Whether `value` passes every comparator that was given."""
        return all(_COMPARATORS[name](value, getattr(self, name)) for name in self.model_fields_set)


def _as_comparison(value: object) -> object:
    return value if isinstance(value, Mapping | Comparison) else {"eq": value}


class Rule(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """One rule: which prompts it answers, and how.

    Args:
        when: data key to the value it must have, or to comparators (an object is compared by ``eq``).
        question: text that the prompt contains outside its data.
        answer: the decision's ``answer``; the whole content where the schema has no such property.
        reason: the decision's ``reason``.
    """

    when: dict[str, Annotated[Comparison, BeforeValidator(_as_comparison)]] = {}
    question: str = ""
    answer: JsonValue
    reason: str | None = None

    def matches(self, prompt: Prompt) -> bool:
        """Whether this rule answers `prompt`."""
        return self.question in prompt.question and all(
            key in prompt.data and comparison.holds(prompt.data[key]) for key, comparison in self.when.items()
        )


def load_rules(source: str | Path | Iterable[Rule | Mapping[str, Any]]) -> tuple[Rule, ...]:
    """The rules in a file, or in Python objects.

    Raises:
        InvalidSetting: the file cannot be read, or a rule is wrong; names the file, the rule and the field.
    """
    if not isinstance(source, str | Path):
        return _checked(list(source), where="the given rules")
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidSetting(f"{path}: the rules of the model server cannot be read: {error}") from error
    return _checked(raw, where=str(path))


def _checked(raw: object, *, where: str) -> tuple[Rule, ...]:
    if not isinstance(raw, list):
        raise InvalidSetting(f"{where}: rules must be a list, not {type(raw).__name__}; begin each with '- '")
    rules, faults = [], []
    for number, item in enumerate(raw, 1):
        try:
            rules.append(Rule.model_validate(item))
        except ValidationError as error:
            faults += [f"{where}, rule {number}, {fault}" for fault in describe(error)]
    if faults:
        raise InvalidSetting("\n".join(faults))
    return tuple(rules)


def describe(error: ValidationError) -> list[str]:
    """One ``field.path: what is wrong`` for each fault, without the values."""
    return [
        f"{'.'.join(map(str, fault['loc'])) or 'as a whole'}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_input=False)
    ]


def content_for(rules: Iterable[Rule], prompt: Prompt, schema: Schema | None) -> str:
    """The content of the model's message: JSON text that fits `schema`, plain text where there is none.

    Raises:
        RefusedRequest: the matching rule's answer, or the default, does not fit the schema.
    """
    number, rule = next(((n, rule) for n, rule in enumerate(rules, 1) if rule.matches(prompt)), (0, None))
    reason = DEFAULT_REASON if rule is None else rule.reason or f"rule {number} of the simulation"
    if schema is None:
        answer = reason if rule is None else rule.answer
        return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    if rule is None:
        given: dict[str, JsonValue] = {"reason": reason}
        misfit = "the simulation has no default for this schema; write a rule that answers it"
    else:
        given = {"answer": rule.answer, "reason": reason}
        misfit = (
            f"rule {number} of the simulation gives an answer that the request's schema does not allow; "
            "mend the rule, or give it a `question` so that it answers no other question"
        )
    if "answer" in schema.get("properties", {}):
        content = _minimal(schema, given=given)
    else:
        content = rule.answer if rule else _minimal(schema, given={})
    if fault := _fault(content, schema):
        raise _cannot_answer(f"{misfit} ({fault})")
    return json.dumps(content, ensure_ascii=False)


def _cannot_answer(message: str) -> RefusedRequest:
    return RefusedRequest(message, code="simulation_cannot_answer", param="response_format")


def _fault(content: object, schema: Schema) -> str | None:
    try:
        # a registry of its own, since without one a $ref would be fetched from the network
        error = next(Draft202012Validator(schema, registry=Registry()).iter_errors(content), None)
        return f"at {error.json_path}: {error.message[:300]}" if error else None
    except (Unresolvable, RecursionError, re.error) as unusable:
        return f"the schema cannot be used: {unusable}"


_FORMATS = {
    "date": "2000-01-01",
    "date-time": "2000-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "P0D",
    "email": "nobody@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def _minimal(schema: Schema, *, given: Mapping[str, Any]) -> Any:
    """The least value that the schema describes, with the properties `given`, in the schema's order."""

    def of(part: Any, open_refs: tuple[str, ...] = (), given: Mapping[str, Any] = {}) -> Any:
        if not isinstance(part, dict):
            return None
        if ref := part.get("$ref"):
            if ref in open_refs:
                raise _cannot_answer(f"there is no default for the recursive {ref}; write a rule for it")
            return of(_pointed(schema, ref) | _without(part, "$ref"), (*open_refs, ref), given)
        for several in ("anyOf", "oneOf", "allOf"):
            if several in part and isinstance(part[several][0], dict):
                return of(_without(part, several) | part[several][0], open_refs, given)
        if "const" in part:
            return part["const"]
        if part.get("enum"):
            return part["enum"][0]
        kind = part.get("type", "object" if "properties" in part else "null")
        match kind[0] if isinstance(kind, list) else kind:
            case "object":
                return {
                    name: given[name] if name in given else of(child, open_refs)
                    for name, child in part.get("properties", {}).items()
                    if name in given or name in part.get("required", [])
                }
            case "array":
                return [of(part.get("items"), open_refs) for _ in range(min(part.get("minItems", 0), 100))]
            case "string":
                return _FORMATS.get(part.get("format", ""), "x" * min(part.get("minLength", 0), 10_000))
            case "integer" | "number":
                return _number_within(part)
            case "boolean":
                return False
        return None

    return of(schema, given=given)


def _without(part: Schema, key: str) -> Schema:
    return {name: value for name, value in part.items() if name != key}


def _pointed(schema: Schema, ref: str) -> Schema:
    target: Any = schema if ref.startswith("#") else None
    for name in ref.split("/")[1:]:
        target = target.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise _cannot_answer(f"{ref} leads to nothing inside the request's schema")
    return target


def _number_within(part: Schema) -> int | float:
    low: Any = part.get("minimum", part.get("exclusiveMinimum", 0))
    high: Any = part.get("maximum", part.get("exclusiveMaximum", 0))
    candidates = (0, low, high, low + 1, high - 1, (low + high) / 2, part.get("multipleOf", 0))
    return next((number for number in candidates if Draft202012Validator(part).is_valid(number)), 0)
