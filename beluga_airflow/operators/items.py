"""What goes into a batch and what comes out of it: reading items, and publishing results."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beluga_airflow.errors import InvalidInput, InvalidSetting

__all__ = ["Manifest", "items_of", "published"]


async def items_of(items: Any, arguments: Mapping[str, Any] | None) -> AsyncIterator[Any]:
    """The items, one at a time.

    Args:
        items: a list, or the import path ``"package.module:function"`` of a function that gives an iterable or an
            asynchronous one.
        arguments: keyword arguments for that function.

    Raises:
        InvalidSetting: there is no such function, or it gives no items.
    """
    source = _function(items)(**(arguments or {})) if isinstance(items, str) else items
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Mapping):
        for item in source:
            yield item
    else:
        raise InvalidSetting(f"items= gave a {type(source).__name__}, it must give an iterable of items")


def _function(path: str) -> Any:
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name) if name else None
    except (ImportError, AttributeError) as error:
        raise InvalidSetting(f"items={path!r} cannot be imported: {error}") from error
    if not callable(function):
        raise InvalidSetting(f"items={path!r} is not the import path of a function; write 'package.module:function'")
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
            self.choices[str(record["answer"])] += 1
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


async def published(results: AsyncIterable[Mapping[str, Any]], path: Path) -> Manifest:
    """Write results as JSON Lines; the file appears whole or not at all.

    Raises:
        InvalidInput: the file cannot be written.
    """
    manifest = Manifest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # nobody else uses this task's loop
        # a name of its own, so that two writers never share a half-written file
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                async for result in results:
                    manifest.add(result)
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
            Path(temporary).replace(path)  # noqa: ASYNC240  # as above
        except BaseException:
            Path(temporary).unlink(missing_ok=True)  # noqa: ASYNC240  # as above
            raise
    except OSError as error:
        raise InvalidInput(
            f"the results cannot be written to {path}: {error}; set results_path= to another place"
        ) from error
    return manifest
