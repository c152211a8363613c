from __future__ import annotations

import inspect
import pickle
import re
from typing import Any

import pytest

from beluga_airflow import errors
from beluga_airflow.errors import BelugaError, BreakerOpen, InvalidInput, MissingKey, ModelUnavailable

CLASSES: list[Any] = [
    found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__
]


def drawn() -> dict[str, str | None]:
    """The tree in the module's docstring: each class with the one it hangs from."""
    path: list[tuple[int, str]] = []
    found: dict[str, str | None] = {}
    for line in str(errors.__doc__).splitlines():
        match = re.match(r"^    (?P<branch>[│├└─ ]*)(?P<name>[A-Z][A-Za-z]+)\b", line)
        if match is None:
            continue
        depth = len(match["branch"])
        path = [(place, name) for place, name in path if place < depth]
        found[match["name"]] = path[-1][1] if path else None
        path.append((depth, match["name"]))
    return found


def test_every_error_is_public_and_every_public_name_is_an_error() -> None:
    assert {found.__name__ for found in CLASSES} == set(errors.__all__)
    assert list(errors.__all__) == sorted(errors.__all__)


def test_the_tree_is_drawn_as_it_is() -> None:
    tree = {found.__name__: found.__bases__[0].__name__ for found in CLASSES}

    assert drawn() == {**tree, "BelugaError": None}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_ours_and_says_what_it_means(kind: type[BelugaError]) -> None:
    assert issubclass(kind, BelugaError)
    assert isinstance(kind.retryable, bool)
    assert kind.__doc__
    assert kind.__doc__ != BelugaError.__doc__ or kind is BelugaError


def test_only_what_may_pass_by_itself_is_retryable() -> None:
    assert {kind.__name__ for kind in CLASSES if kind.retryable} == {
        "BreakerOpen",
        "LimitReached",
        "ModelUnavailable",
        "NotNow",
        "StateUnavailable",
        "StepTimeout",
        "TemporalUnavailable",
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_cross_processes_whole(kind: type[BelugaError]) -> None:
    error = kind("step 'a' failed")

    twin = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes

    assert type(twin) is kind
    assert (str(twin), twin.args) == (str(error), error.args) == ("step 'a' failed", ("step 'a' failed",))


def test_what_a_server_asked_for_crosses_processes_too() -> None:
    for kind in (ModelUnavailable, BreakerOpen):
        error = pickle.loads(pickle.dumps(kind("overloaded", retry_after=7.5)))  # noqa: S301  # our own bytes

        assert error.retry_after == 7.5
        assert kind("overloaded").retry_after is None


def test_a_missing_key_is_caught_as_either_and_reads_as_a_sentence() -> None:
    error = MissingKey("step 'a' reads 'b'")

    assert isinstance(error, KeyError)
    assert isinstance(error, InvalidInput)
    assert str(error) == "step 'a' reads 'b'"
