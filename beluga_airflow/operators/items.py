"""What goes into a batch and what comes out of it: reading items, and publishing results."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.operators.runs import parsed_text

__all__ = ["Manifest", "check_place", "items_of", "published"]

PATH_LENGTH = 200
"""Characters of an import path that are shown: what is longer is no path, but somebody's data."""


async def items_of(items: Any, arguments: Mapping[str, Any] | None) -> AsyncIterator[Any]:
    """The items, one at a time.

    Args:
        items: a list, its JSON text, or the import path ``"package.module:function"`` of a function, sync or async,
            that gives an iterable or an asynchronous one.
        arguments: keyword arguments for that function.

    Raises:
        InvalidSetting: there is no such function, or it gives no items.
        InvalidInput: the text is not JSON.
    """
    source = _source(items, arguments or {})
    if inspect.isawaitable(source):
        source = await source
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Mapping):
        for item in source:
            yield item
    else:
        raise InvalidSetting(f"items= gave a {type(source).__name__}, it must give an iterable of items")


def _source(items: Any, arguments: Mapping[str, Any]) -> Any:
    if not isinstance(items, str):
        return items
    if items.lstrip().startswith("["):
        return parsed_text(items, "items=")
    function = _function(items)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise InvalidSetting(f"items_args= does not fit items={items!r}: {error}") from None
    except ValueError:
        pass  # builtins have no signature to look at
    return function(**arguments)


def _function(path: str) -> Any:
    module_name, _, name = path.partition(":")
    shown = path if len(path) <= PATH_LENGTH else f"{path[:PATH_LENGTH]}..."
    try:
        function = getattr(importlib.import_module(module_name), name) if module_name and name else None
    except Exception as error:  # a module's code may raise anything
        raise InvalidSetting(f"items={shown!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise InvalidSetting(f"items={shown!r} is not the import path of a function; write 'package.module:function'")
    return function


@dataclass
class Manifest:
    """The sums over the results of a batch."""

    statuses: Counter[str] = field(default_factory=Counter)
    choices: Counter[str] = field(default_factory=Counter)
    decided_by: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    unpriced: bool = False
    simulated: bool = False

    def add(self, result: Mapping[str, Any]) -> None:
        """Count one result."""
        self.statuses[result["status"]] += 1
        for record in result["decisions"].values():
            answer = record["answer"]
            if isinstance(answer, str | bool):
                # numbers and objects are no choices: there could be as many of them as items
                self.choices[answer if isinstance(answer, str) else json.dumps(answer)] += 1
            self.decided_by[record["decided_by"]] += 1
            self.tokens.update(record["tokens"])
            self.simulated |= record["simulated"]
            if record["cost_usd"] is None:
                self.unpriced = True
            else:
                self.cost_usd += record["cost_usd"]

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON; ``cost_usd`` is None where the price of any call is unknown."""
        return {
            "total": self.statuses.total(),
            "statuses": dict(sorted(self.statuses.items())),
            "decisions": {
                "choices": dict(sorted(self.choices.items())),
                "decided_by": dict(sorted(self.decided_by.items())),
            },
            "tokens": {"input": self.tokens["input"], "output": self.tokens["output"]},
            "cost_usd": None if self.unpriced else round(self.cost_usd, 6),
            "simulated": self.simulated,
        }


def check_place(path: Path) -> None:
    """See that results can be written there, before anything is done to have some.

    Raises:
        InvalidSetting: they cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise _unwritable(path, error) from error


async def published(results: AsyncIterable[Mapping[str, Any]], path: Path) -> Manifest:
    """Write results as JSON Lines; the file appears whole or not at all.

    Raises:
        InvalidSetting: the file cannot be written.
    """
    manifest = Manifest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # nobody else uses this task's loop
        # a name of its own, so that two writers never share a half-written file
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                async for result in results:
                    manifest.add(result)
                    # ASCII: some readers take other characters for ends of lines, and half a one has no bytes
                    file.write(json.dumps(result) + "\n")
            Path(temporary).replace(path)  # noqa: ASYNC240  # as above
        except BaseException:
            Path(temporary).unlink(missing_ok=True)  # noqa: ASYNC240  # as above
            raise
    except OSError as error:
        raise _unwritable(path, error) from error
    return manifest


def _unwritable(path: Path, error: OSError) -> InvalidSetting:
    return InvalidSetting(f"the results cannot be written to {path}: {error}; set results_path= to another place")
