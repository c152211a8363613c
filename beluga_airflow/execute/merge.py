"""Merging what steps returned, the same whoever finished first."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from itertools import takewhile
from typing import Any

from beluga_airflow.errors import MergeConflict
from beluga_airflow.execute.values import copied, to_json
from beluga_airflow.graph import Flow

__all__ = ["States"]

Setters = Mapping[str, tuple[str, ...]]
"""For each key that steps set, those whose values stand side by side; almost always one."""


class States:
    """The data that each step of one run sees: the flow's input, with what the steps before it returned.

    A later step's value replaces that of the steps before it; values of steps side by side must be equal or have
    a reducer. Only who set which key is carried from step to step, so that a long flow costs no more a step.

    Args:
        flow: whose reducers are used, and those of the flows inside it for what is side by side in them.
        sources: the steps directly before each step, in topological order.
        inputs: the flow's input, JSON.
        outputs: what the finished steps returned, JSON; may grow, by steps that no asked-for step comes before.
            Steps without one (skipped, or not yet run) are passed over.
    """

    def __init__(
        self,
        flow: Flow,
        sources: Mapping[str, Sequence[str]],
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._flow = flow
        self._sources = sources
        self._inputs = inputs
        self._outputs = outputs
        self._before: dict[str, Setters] = {}
        self._after: dict[str, Setters] = {}
        self._ancestors: dict[str, frozenset[str]] = {}

    def before(self, step: str) -> dict[str, Any]:
        """A copy of the data that a step sees.

        Raises:
            MergeConflict: two steps side by side set a key to different values.
        """
        return self._data(self._setters_before(step), self._outputs)

    def after(self, step: str, output: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A copy of the data after a step that returned ``output``; None: a finished one.

        Raises:
            MergeConflict: two steps side by side set a key to different values.
        """
        if output is None:
            output = self._outputs[step]
        setters = _overlaid(self._setters_before(step), step, output)
        # a view: whether the output is among the others yet must not matter
        return self._data(setters, ChainMap({step: dict(output)}, self._outputs))  # type: ignore[arg-type]

    def added(self, path: str) -> dict[str, Any]:
        """What the steps of a nested flow returned, merged: a copy.

        Args:
            path: of the step that ends it, ``ship.result``.

        Raises:
            MergeConflict: two steps side by side set a key to different values.
        """
        inside = path[: path.rindex(".") + 1]
        setters = self._setters_before(path)
        own = {key: names for key, names in setters.items() if any(name.startswith(inside) for name in names)}
        return {key: self._united(key, names, self._outputs) for key, names in own.items()}

    def _data(self, setters: Setters, outputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        data: dict[str, Any] = copied(self._inputs)
        for key, names in setters.items():
            data[key] = copied(outputs[names[0]][key]) if len(names) == 1 else self._united(key, names, outputs)
        return data

    def _united(self, key: str, names: tuple[str, ...], outputs: Mapping[str, Mapping[str, Any]]) -> Any:
        values = [copied(outputs[name][key]) for name in names]
        path, flat = _around(names), self._flow.flat
        # a run may have begun with a nested flow that the code does not have any more
        reducer = flat.reducers.get(path, {}).get(key)
        if reducer is not None and len(values) > 1:
            return to_json(reduce(reducer, values), f"what the reducer of {key!r} returned")
        for name, value in zip(names, values, strict=True):
            if value != values[0]:
                flow = next((group.flow for group in flat.groups if group.path == path), self._flow.name)
                raise MergeConflict(
                    f"steps {names[0]!r} and {name!r} of flow {flow!r} run side by side and set {key!r} to "
                    f"different values; let one of them set another key, or give the flow reducers={{{key!r}: ...}}"
                )
        return values[0]

    def _setters_before(self, step: str) -> Setters:
        known = self._before.get(step)
        if known is None:
            if not all(map(self._before.__contains__, self._sources[step])):
                self._look_back_from(step)
            known = self._before[step] = self._joined([self._setters_after(name) for name in self._sources[step]])
        return known

    def _look_back_from(self, step: str) -> None:
        # no recursion: steps in a row may be skipped in any number
        waiting = [*self._sources[step]]
        while waiting:
            name = waiting[-1]
            missing = [source for source in self._sources[name] if source not in self._before]
            if missing and name not in self._before:
                waiting += missing
                continue
            if name not in self._before:
                self._before[name] = self._joined([self._setters_after(source) for source in self._sources[name]])
            waiting.pop()

    def _setters_after(self, step: str) -> Setters:
        if step not in self._after:
            self._after[step] = _overlaid(self._before[step], step, self._outputs.get(step, {}))
        return self._after[step]

    def _joined(self, branches: Sequence[Setters]) -> Setters:
        if len(branches) < 2:
            return branches[0] if branches else {}
        found: dict[str, set[str]] = {}
        for setters in branches:
            for key, names in setters.items():
                found.setdefault(key, set()).update(names)
        return {key: tuple(names) if len(names) == 1 else self._side_by_side(names) for key, names in found.items()}

    def _side_by_side(self, names: set[str]) -> tuple[str, ...]:
        """Those that no other comes after, in the order of the flow."""
        last = names.difference(*(self._steps_before(name) for name in names))
        return tuple(sorted(last, key=self._places.__getitem__))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {step: place for place, step in enumerate(self._sources)}

    def _steps_before(self, step: str) -> frozenset[str]:
        waiting, found = list(self._sources[step]), set[str]()
        if step not in self._ancestors:
            while waiting:
                name = waiting.pop()
                if name not in found:
                    found.add(name)
                    waiting += self._sources[name]
            self._ancestors[step] = frozenset(found)
        return self._ancestors[step]


def _around(steps: Sequence[str]) -> str:
    """The path of the innermost flow that has all these steps side by side."""
    flows = [step.split(".")[:-1] for step in steps]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*flows, strict=False))
    return ".".join(names[0] for names in same)


def _overlaid(setters: Setters, step: str, output: Mapping[str, Any]) -> Setters:
    return {**setters, **dict.fromkeys(output, (step,))} if output else setters
