"""What a sensor waits for, of one key: that it is there, equals a value, or satisfies a predicate."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from beluga_airflow.errors import BelugaError, InvalidSetting
from beluga_airflow.graph.decision import UNSET
from beluga_airflow.state.base import Change

__all__ = ["Condition"]

SAID = 300
"""Characters of what a user's code says that are told."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Holds for a key that is there, and, where one of these is given, whose value is so.

    Args:
        equals: the JSON value that it must have; None is null.
        predicate: import path, ``package.module:function``, of a function that takes the value and says whether it
            is so. It runs in a thread, with a copy of the value.
    """

    equals: Any = UNSET
    predicate: str | None = None

    def check(self) -> None:
        """See that it can mean something in this process.

        Raises:
            InvalidSetting: both are given, or the predicate is not there.
        """
        if self.predicate is None:
            return
        if self.equals is not UNSET:
            raise InvalidSetting("equals= and predicate= are both given; leave one out, or let the predicate compare")
        _load(self.predicate)

    def check_value(self) -> None:
        """See that a key can have the value, templates being rendered.

        Raises:
            InvalidSetting: it is not JSON.
        """
        if self.equals is UNSET:
            return
        try:
            kept = json.loads(json.dumps(self.equals, allow_nan=False))
        except (ValueError, TypeError, RecursionError):
            kept = UNSET
        if not _same(kept, self.equals):
            raise InvalidSetting(
                f"equals= is no JSON value but of type {type(self.equals).__name__}, or holds what is none (a date, "
                "say, or a key that is no text), which no state key ever has; write it as it is stored"
            )

    async def holds(self, change: Change) -> bool:
        """Whether it does, after this change.

        Raises:
            InvalidSetting: the predicate cannot be imported here.
            BelugaError: the predicate raised something.
        """
        if change.is_gone:
            return False
        if self.equals is not UNSET:
            return _same(change.value, self.equals)
        if self.predicate is None:
            return True
        function = await asyncio.to_thread(_load, self.predicate)
        # the value is shared with whoever else watches the store
        return await asyncio.to_thread(self._ask, function, copy.deepcopy(change.value), change.key)

    def _ask(self, function: Callable[[Any], Any], value: Any, key: str) -> bool:
        try:
            said = function(value)
            if not isinstance(said, Awaitable | Iterator | AsyncIterator):
                return bool(said)
        # a user's code may raise anything; a cancellation from a thread would be taken for that of the trigger
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise BelugaError(
                f"predicate {self.predicate!r} raised {_told(error)} for the value of state key {key!r}; mend it, or "
                "what is stored there"
            ) from error
        if inspect.iscoroutine(said):
            said.close()
        raise BelugaError(
            f"predicate {self.predicate!r} returned a {type(said).__name__}, which says neither yes nor no; let it "
            "return True or False"
        )

    def to_json(self) -> dict[str, Any]:
        """What makes it again: plain JSON, as Airflow has its own ways with tuples."""
        given = {} if self.equals is UNSET else {"equals": json.loads(json.dumps(self.equals))}
        return given if self.predicate is None else {**given, "predicate": self.predicate}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Condition:
        """One from what ``to_json`` returned."""
        return cls(**given)


def _load(path: str) -> Callable[[Any], Any]:
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise InvalidSetting(f"predicate {path!r} is no import path of a function; write it as 'package.module:name'")
    try:
        found: Callable[[Any], Any] | None = getattr(importlib.import_module(module_name), name, None)
    except (Exception, SystemExit) as error:  # a module's code may raise anything
        raise InvalidSetting(
            f"predicate {path!r} cannot be imported in this process: {_told(error)}; mend or install its "
            "package where DAGs are parsed, on the workers and where the triggerer runs (the dags folder is not "
            "enough)"
        ) from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        kind = "nothing of that name" if found is None else f"a {type(found).__name__}"
        kind = "an async function" if inspect.iscoroutinefunction(found) else kind
        raise InvalidSetting(f"predicate {path!r}: module {module_name!r} has {kind} where a plain function is wanted")
    return found


def _told(error: BaseException) -> str:
    """What was raised, in one line that any database and terminal takes."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a user's code may raise anything, here too
        text = "its text cannot be had"
    return f"{type(error).__name__}: {''.join(sign if sign.isprintable() else '?' for sign in text[:SAID])}"


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values, in which true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
