from __future__ import annotations

import copy
import functools
import gc
import json
import math
import operator
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, RootModel

from beluga_airflow import InvalidFlow, InvalidInput
from beluga_airflow.errors import InvalidOutput, MissingKey
from beluga_airflow.execute import values
from beluga_airflow.execute.values import DEPTH, StepInputs, copied, rehydrated, to_json

if TYPE_CHECKING:
    from collections import Counter as NotImportedHere

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


class Tier(Enum):
    GOLD = "gold"


class Level(IntEnum):
    HIGH = 3


class Word(StrEnum):
    YES = "yes"


class Text(str):
    def __str__(self) -> str:
        return "something else"


class Whole(int):
    pass


class Part(float):
    pass


class Pair(NamedTuple):
    left: int
    right: int


@dataclass(frozen=True)
class Line:
    code: str
    price: Decimal
    tier: Tier = Tier.GOLD


@dataclass(frozen=True)
class Invoice:
    number: str
    day: date
    made: datetime
    lines: list[Line] = field(default_factory=list)
    note: str | None = None


class Customer(BaseModel):
    number: int
    since: date
    limit: Decimal


class Numbers(RootModel[list[int]]):
    pass


class Opaque:
    pass


class Holder(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    held: Opaque


@given(json_values)
def test_json_stays_as_it_is_and_is_copied(value: Any) -> None:
    result = to_json(value, "it")

    assert result == value
    assert json.loads(json.dumps(result)) == result
    assert copied(value) == value
    if isinstance(value, list | dict) and value:
        assert result is not value
        assert copied(value) is not value


def test_copies_share_nothing() -> None:
    inner = {"list": [{"deep": [1]}]}

    for twin in (copied(inner), to_json(inner, "it")):
        twin["list"][0]["deep"].append(2)

    assert inner == {"list": [{"deep": [1]}]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        (Tier.GOLD, "gold"),
        (Level.HIGH, 3),
        (Word.YES, "yes"),
        (Text("own"), "own"),
        (Whole(7), 7),
        (Part(0.5), 0.5),
        (Decimal("1.20"), "1.20"),
        (date(2025, 1, 31), "2025-01-31"),
        (datetime(2025, 1, 31, 12, 30, tzinfo=UTC), "2025-01-31T12:30:00+00:00"),
        (Line("x", Decimal("0.10")), {"code": "x", "price": "0.10", "tier": "gold"}),
        (
            Customer(number=1, since=date(2025, 1, 2), limit=Decimal(5)),
            {"number": 1, "since": "2025-01-02", "limit": "5"},
        ),
        (Numbers([1, 2]), [1, 2]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (MappingProxyType({"a": (1,)}), {"a": [1]}),
        (StepInputs({"a": 1}, "step"), {"a": 1}),
    ],
    ids=repr,
)
def test_what_is_like_json_becomes_json(value: Any, expected: Any) -> None:
    result = to_json({"it": value}, "what step 'a' returned")["it"]

    assert result == expected
    assert type(result) is type(expected), "and nothing of its own class is left"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "what step 'a' returned['k'][1] is nan, which JSON cannot hold; return a finite number or None"),
        (-math.inf, "what step 'a' returned['k'][1] is -inf"),
        (Part("inf"), "what step 'a' returned['k'][1] is inf"),
        (Decimal("NaN"), "what step 'a' returned['k'][1] is a Decimal, which is not JSON"),
        ({1, 2}, "what step 'a' returned['k'][1] is a set, which is not JSON; return dicts, lists, texts"),
        (b"bytes", "is a bytes, which is not JSON"),
        (Pair(1, 2), "is a Pair, which is not JSON"),
        (UUID(int=0), "is a UUID, which is not JSON"),
        (Opaque(), "is a Opaque, which is not JSON"),
        (Invoice, "is a type, which is not JSON"),
        (object, "is a type, which is not JSON"),
        ((number for number in range(3)), "is a generator, which is not JSON"),
        ({7: "seven"}, "what step 'a' returned['k'][1] has the key 7, a int; keys must be texts"),
        ({None: 1}, "has the key None, a NoneType; keys must be texts"),
        (Holder(held=Opaque()), "is a Holder that cannot become JSON: Unable to serialize unknown type"),
        (Line("x", Decimal("Infinity")), "what step 'a' returned['k'][1]['price'] is a Decimal, which is not JSON"),
    ],
)
def test_what_is_not_json_is_refused_by_its_place(value: Any, message: str) -> None:
    with pytest.raises(InvalidOutput) as refused:
        to_json({"k": [0, value]}, "what step 'a' returned")

    assert message in str(refused.value)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_nesting_has_a_bound() -> None:
    assert to_json(nested(DEPTH), "it") == nested(DEPTH)
    endless: list[Any] = []
    endless.append(endless)
    for value in (nested(DEPTH + 2), nested(100_000), endless, {"a": endless}):
        with pytest.raises(InvalidOutput, match=f"is nested deeper than {DEPTH} levels"):
            to_json(value, "it")


def take(order: Any) -> Any:
    return order


def annotated(annotation: Any) -> Callable[..., Any]:
    def step(order: Any) -> Any:
        return order

    step.__annotations__["order"] = annotation
    return step


invoices = st.builds(
    Invoice,
    number=st.text(),
    day=st.dates(),
    made=st.datetimes(timezones=st.just(UTC)),
    lines=st.lists(
        st.builds(Line, code=st.text(), price=st.decimals(allow_nan=False, allow_infinity=False)), max_size=3
    ),
    note=st.none() | st.text(),
)


def takes_an_invoice(invoice: Invoice) -> None:
    return None


@given(invoices)
def test_the_annotation_brings_back_what_json_took(invoice: Invoice) -> None:
    data = json.loads(json.dumps(to_json(invoice, "it")))

    # beside what other steps have added
    assert rehydrated(takes_an_invoice, StepInputs({**data, "payment_id": "p-1"}, "step")) == invoice


def test_a_pydantic_model_is_brought_back() -> None:
    data = StepInputs({"number": 7, "since": "2025-01-02", "limit": "5.50"}, "step")

    assert rehydrated(annotated(Customer), data) == Customer(number=7, since=date(2025, 1, 2), limit=Decimal("5.50"))


class Taker:
    def execute(self, invoice: Invoice) -> Invoice:
        return invoice


@dataclass
class Unhashable:
    """Compares by value, so that it has no hash."""

    currencies: list[str]

    def __call__(self, customer: Customer) -> Customer:
        return customer


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (Taker().execute, Invoice),
        (functools.partial(takes_an_invoice), Invoice),
        (functools.lru_cache(takes_an_invoice), Invoice),
        (Unhashable(["EUR"]), Customer),
        (functools.partial(Unhashable(["EUR"])), Customer),
    ],
)
def test_annotations_are_found_in_whatever_is_called(function: Callable[..., Any], kind: type) -> None:
    data = {"number": "7", "since": "2025-01-02", "limit": 5, "day": "2025-01-02", "made": "2025-01-02T00:00:00Z"}

    assert isinstance(rehydrated(function, StepInputs(data, "step")), kind)


class Slotted:
    """Can be referred to by no weak reference."""

    __slots__ = ()

    def __call__(self, customer: Customer) -> Customer:
        return customer


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda: lambda data: data, StepInputs),
        (lambda: functools.partial(takes_an_invoice), Invoice),
        (lambda: Taker().execute, Invoice),
        (lambda: Unhashable(["EUR"]), Customer),
        (Slotted, Customer),
        (lambda: operator.itemgetter("number"), StepInputs),
        (lambda: {}.get, StepInputs),
        (lambda: {}.__contains__, StepInputs),
    ],
    ids=["lambda", "partial", "method", "unhashable", "slotted", "itemgetter", "builtin", "wrapper"],
)
def test_a_type_is_made_ready_once_for_each_function(
    made: Callable[[], Callable[..., Any]], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []
    adapter = values._adapter
    monkeypatch.setattr(values, "_adapters", {})
    monkeypatch.setattr(values, "_adapter", lambda function: looked_at.append(1) or adapter(function))
    data = {"number": "7", "since": "2025-01-02", "limit": 5, "day": "2025-01-02", "made": "2025-01-02T00:00:00Z"}
    function = made()

    for _ in range(3):
        assert isinstance(rehydrated(function, StepInputs(data, "step")), kind)

    assert looked_at == [1]


class Held:
    """Something large that a step closes over."""


def closing_over(held: Held, kind: Any) -> Callable[..., Any]:
    def step(data: Any) -> Any:
        return held, data

    step.__annotations__["data"] = kind
    return step


@pytest.mark.parametrize("kind", [Any, Customer, "Customer"])
@pytest.mark.parametrize("wrap", [lambda step: step, functools.partial, lambda step: functools.lru_cache(step)])
def test_a_function_that_nobody_has_any_more_is_not_kept(kind: Any, wrap: Callable[..., Any]) -> None:
    held = Held()
    step = wrap(closing_over(held, kind))
    rehydrated(step, StepInputs({"number": 7, "since": "2025-01-02", "limit": "5"}, "step"))

    there = weakref.ref(held)
    known = len(values._adapters)
    del held, step
    gc.collect()

    assert there() is None
    assert len(values._adapters) < known


def test_an_annotation_may_be_known_to_its_function_only() -> None:
    @dataclass
    class Local:
        number: int

    def step(local: Local) -> Local:
        return Local(local.number + 1)

    assert rehydrated(step, StepInputs({"number": 1}, "step")) == Local(1)


@pytest.mark.parametrize(
    "function",
    [
        lambda data: data,
        annotated(Any),
        annotated(dict),
        annotated(dict[str, Any]),
        annotated(Mapping[str, Any]),
        annotated(MutableMapping[str, Any]),
        annotated(dict[str, Any] | None),
        annotated("dict[str, Any]"),
        annotated(object),
        len,
    ],
)
def test_a_dict_names_the_step_of_a_missing_key_whatever_the_annotation(function: Callable[..., Any]) -> None:
    value = rehydrated(function, StepInputs({"there": 1}, "pay"))

    assert value == {"there": 1}
    with pytest.raises(MissingKey, match="step 'pay' reads 'gone', which neither the input nor an earlier step"):
        value["gone"]


def test_data_that_the_annotation_refuses_is_not_shown() -> None:
    data = StepInputs({"number": "secret-7", "limit": "5"}, "pay")

    with pytest.raises(InvalidInput) as refused:
        rehydrated(annotated(Customer), data)

    assert str(refused.value).startswith("step 'pay' got data that its annotation refuses: ")
    assert "number: Input should be a valid integer" in str(refused.value)
    assert "since: Field required" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None


@dataclass
class Dangling:
    counter: NotImportedHere  # type: ignore[type-arg]


def takes_what_is_not_there(counter: NotImportedHere) -> None:  # type: ignore[type-arg]
    return None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (takes_what_is_not_there, "'NotImportedHere' of takes_what_is_not_there cannot be resolved: NameError"),
        (annotated("math.nothing"), "cannot be resolved: AttributeError"),
        (annotated("1 +"), "cannot be resolved: SyntaxError"),
        (annotated(Opaque), "is no type that JSON can become: Unable to generate pydantic-core schema"),
        (annotated(Dangling), "is no type that JSON can become: name 'NotImportedHere' is not defined"),
    ],
)
def test_an_annotation_that_means_nothing_is_a_fault_of_the_flow(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(InvalidFlow) as refused:
        rehydrated(function, StepInputs({"a": 1}, "pay"))

    assert message in str(refused.value)


def test_a_missing_key_says_what_there_is() -> None:
    data = StepInputs({"b": 1, "a": 2}, "pay")

    with pytest.raises(KeyError) as missing:
        data["order_id"]

    assert str(missing.value) == (
        "step 'pay' reads 'order_id', which neither the input nor an earlier step provided; there is: a, b"
    )
    assert isinstance(missing.value, InvalidInput)
    with pytest.raises(MissingKey, match="there is: nothing"):
        StepInputs({}, "pay")["a"]
    with pytest.raises(MissingKey) as many:
        StepInputs(dict.fromkeys((f"k{number}" for number in range(1_000)), 1), "pay")["a"]
    assert len(str(many.value)) < 300


def test_the_data_is_a_dict_in_every_other_way() -> None:
    data = StepInputs({"a": [1]}, "pay")

    assert data.get("b", 7) == 7
    assert json.loads(json.dumps(data)) == {"a": [1]}
    assert {**data} == data | {} == dict(data) == {"a": [1]}
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):  # noqa: S301
        assert twin == data
        assert twin["a"] is not data["a"]
        with pytest.raises(MissingKey, match="step 'pay' reads 'b'"):
            twin["b"]


@pytest.mark.parametrize("value", ["\ud800", "naïve \udfff", {"\udc00": 1}, [{"a": "x\ud800"}]])
def test_half_a_character_is_no_text(value: Any) -> None:
    with pytest.raises(InvalidOutput, match=r"it.* has half a character in it \(a lone surrogate\), which is no text"):
        to_json(value, "it")


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, [10**40]])
def test_a_whole_number_that_airflow_cannot_carry_is_refused(value: Any) -> None:
    with pytest.raises(InvalidOutput, match=r"it.* is a whole number of more than 64 bits; return it as a text"):
        to_json(value, "it")
