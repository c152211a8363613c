"""What is called for a node of a flow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

__all__ = ["Callee", "function_of", "is_async", "is_generator", "signature_of", "wants_context"]


@dataclass(frozen=True, kw_only=True)
class Callee:
    """The function of a node.

    Args:
        function: to call with the data.
        takes_context: whether it asks for the ``StepContext``.
        is_async: whether it returns an awaitable at once, so that it needs no thread.
    """

    function: Callable[..., Any]
    takes_context: bool
    is_async: bool

    @classmethod
    def of(cls, node: Any) -> Callee:
        """The callee of a node of a checked flow."""
        function = function_of(node)
        assert function is not None, "a checked flow has functions only"
        return cls(function=function, takes_context=wants_context(function), is_async=is_async(function))


def function_of(node: Any) -> Callable[..., Any] | None:
    """What to call for a node: its ``execute`` where it has one, else itself; None when it cannot be called."""
    function = getattr(node, "execute", node)
    return function if callable(function) else None


def wants_context(function: Callable[..., Any]) -> bool:
    """Whether the function asks for the ``StepContext`` by a parameter named ``context``."""
    signature = signature_of(function)
    return signature is not None and "context" in [*signature.parameters][1:]


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """The function's signature; None where it does not tell, as many builtins do not."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    return _is(inspect.iscoroutinefunction, function)


def is_generator(function: Callable[..., Any]) -> bool:
    """Whether calling it runs nothing, and gives what has to be iterated."""
    return _is(inspect.isgeneratorfunction, function) or _is(inspect.isasyncgenfunction, function)


def _is(kind: Callable[[Any], bool], function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    return kind(function) or kind(type(function).__call__)
