"""Values between steps: everything is JSON, and annotations bring types back."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any
from weakref import ref

from beluga_airflow.errors import InvalidFlow, InvalidInput, InvalidOutput, MissingKey

__all__ = ["StepInputs", "copied", "rehydrated", "to_json"]

PLAIN = frozenset({str, int, float, bool, type(None)})
"""What needs no copying."""
SMALLEST, LARGEST = -(2**63), 2**64 - 1
"""Whole numbers that Airflow carries from task to task."""
DEPTH = 100
"""Levels of nesting that data may have."""


class StepInputs(dict[str, Any]):
    """The data that a step sees: a dict that names the step when a key is missing."""

    def __init__(self, data: Mapping[str, Any], step: str) -> None:
        super().__init__(data)
        self.step = step

    def __missing__(self, key: str) -> Any:
        raise missing(self.step, key, self)


def missing(step: str, key: str, data: Mapping[str, Any]) -> MissingKey:
    """The error for a key that a step reads and nobody provided."""
    there = ", ".join(sorted(data)[:20]) or "nothing"
    return MissingKey(
        f"step {step!r} reads {key!r}, which neither the input nor an earlier step provided; there is: {there}"
    )


def to_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of ``value`` as JSON: dataclasses and pydantic models become objects, dates and decimals texts.

    Args:
        value: what a user's function returned, or a flow's input.
        where: names the value in the error.
        depth: levels above this value.

    Raises:
        InvalidOutput: something in it is not JSON.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return value if value.isascii() else _whole(value, where)
    if kind is int:
        if SMALLEST <= value <= LARGEST:
            return value
        raise InvalidOutput(f"{where} is a whole number of more than 64 bits; return it as a text")
    if kind is float:
        if math.isfinite(value):
            return value
        raise InvalidOutput(f"{where} is {value}, which JSON cannot hold; return a finite number or None")
    if depth > DEPTH:
        raise InvalidOutput(f"{where} is nested deeper than {DEPTH} levels")
    if isinstance(value, Mapping):
        return _object(value, where, depth)
    if kind is list or kind is tuple:
        return [to_json(item, f"{where}[{place}]", depth + 1) for place, item in enumerate(value)]
    return _converted(value, where, depth)


def _object(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    result = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise InvalidOutput(f"{where} has the key {key!r}, a {type(key).__name__}; keys must be texts")
        if not key.isascii():
            _whole(key, f"a key of {where}")
        kind = type(item)
        if item is None or kind is bool or (kind is str and item.isascii()):
            result[key] = item  # most of what there is, with no need to say where it stands
        else:
            result[key] = to_json(item, f"{where}[{key!r}]", depth + 1)
    return result


def _whole(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidOutput(f"{where} has half a character in it (a lone surrogate), which is no text") from None
    return text


def _converted(value: Any, where: str, depth: int) -> Any:
    if isinstance(value, Enum):
        return to_json(value.value, where, depth + 1)
    # subclasses of texts and numbers: their own behaviour does not travel
    if isinstance(value, str):
        return to_json("".join(value), where, depth)
    if isinstance(value, int):
        return to_json(int(value), where, depth)
    if isinstance(value, float):
        return to_json(float(value), where, depth)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _object(fields, where, depth)
    if hasattr(value, "model_dump") and hasattr(type(value), "model_fields"):
        return to_json(_dumped(value, where), where, depth + 1)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal) and value.is_finite():
        return str(value)
    raise InvalidOutput(
        f"{where} is a {type(value).__name__}, which is not JSON; return dicts, lists, texts, numbers, dates, "
        "decimals, dataclasses or pydantic models"
    )


def _dumped(model: Any, where: str) -> Any:
    try:
        return model.model_dump(mode="json")
    except ValueError as error:
        raise InvalidOutput(f"{where} is a {type(model).__name__} that cannot become JSON: {error}") from error


def copied(value: Any) -> Any:
    """A deep copy of JSON."""
    if type(value) is dict:
        return {key: item if type(item) in PLAIN else copied(item) for key, item in value.items()}
    if type(value) is list:
        return [item if type(item) in PLAIN else copied(item) for item in value]
    return value


def rehydrated(function: Callable[..., Any], data: StepInputs) -> Any:
    """``data`` as the type that the function's first parameter is annotated with; a dict where it says nothing.

    Raises:
        InvalidInput: the data does not fit the annotation.
    """
    try:
        adapter = _adapters[ref(function)]
    except (KeyError, TypeError):
        adapter = _kept_adapter(function)
    if adapter is None:
        return data
    from pydantic import ValidationError

    try:
        value = adapter.validate_python(dict(data))
        return StepInputs(value, data.step) if type(value) is dict else value
    except ValidationError as error:
        # without the input: it may be anybody's text
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        text = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'the data'}: {fault['msg']}" for fault in faults[:10])
        raise InvalidInput(f"step {data.step!r} got data that its annotation refuses: {text}") from None


_adapters: dict[ref[Any], Any] = {}
"""By function, and gone with it, since a function may hold anything. A ``WeakKeyDictionary`` is slower to look into."""


def _kept_adapter(function: Callable[..., Any]) -> Any:
    try:
        key = ref(function, _adapters.pop)
        hash(key)
    except TypeError:  # an object with a __call__, a dataclass say: its class says what it takes
        key = ref(type(function), _adapters.pop)
    if key not in _adapters:
        _adapters[key] = _adapter(function)
    return _adapters[key]


def _adapter(function: Callable[..., Any]) -> Any:
    try:
        first = next(iter(inspect.signature(function).parameters.values()))
    except (ValueError, StopIteration):
        return None
    annotation = first.annotation
    if isinstance(annotation, str):
        annotation = _evaluated(annotation, function)
    origin = getattr(annotation, "__origin__", annotation)
    if annotation is inspect.Parameter.empty or annotation is Any or origin in (dict, Mapping):
        return None
    from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter

    try:
        adapter = TypeAdapter(annotation)
        adapter.rebuild()  # raises where a type inside it cannot be resolved
        return adapter
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidFlow(
            f"the annotation {annotation!r} of {_label(function)} is no type that JSON can become: {reason}; use a "
            "dict, a dataclass or a pydantic model"
        ) from error


def _evaluated(annotation: str, function: Callable[..., Any]) -> Any:
    inner = inspect.unwrap(getattr(function, "__func__", function))
    inner = getattr(inner, "func", inner)  # functools.partial
    if not hasattr(inner, "__globals__"):
        inner = type(inner).__call__
    scope = inner.__globals__ | dict(inspect.getclosurevars(inner).nonlocals)
    try:
        return eval(annotation, scope)  # noqa: S307  # the author's own annotation, as typing.get_type_hints does
    except Exception as error:
        raise InvalidFlow(
            f"the annotation {annotation!r} of {_label(inner)} cannot be resolved: {type(error).__name__}: {error}; "
            "import its type at module level, outside `if TYPE_CHECKING`"
        ) from error


def _label(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
