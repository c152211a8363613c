"""What a sensor waits for, of one key: that it is there, equals a value, or satisfies a predicate."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from beluga_airflow.errors import BelugaError, InvalidSetting
from beluga_airflow.graph.decision import UNSET
from beluga_airflow.state.base import Change

__all__ = ["Condition"]


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
            return bool(function(value))
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            raise BelugaError(
                f"predicate {self.predicate!r} raised {type(error).__name__}: {error} for the value of state key "
                f"{key!r}; mend it, or what is stored there"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """What makes it again."""
        given = {"equals": self.equals, "predicate": self.predicate}
        return {name: value for name, value in given.items() if value is not (UNSET if name == "equals" else None)}

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
            f"predicate {path!r} cannot be imported in this process: {type(error).__name__}: {error}; mend or install "
            "its package where DAGs are parsed, on the workers and where the triggerer runs (the dags folder is not "
            "enough)"
        ) from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        kind = "nothing of that name" if found is None else f"a {type(found).__name__}"
        kind = "an async function" if inspect.iscoroutinefunction(found) else kind
        raise InvalidSetting(f"predicate {path!r}: module {module_name!r} has {kind} where a plain function is wanted")
    return found


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values, in which true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
